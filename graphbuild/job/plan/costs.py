"""The cost model: what each stage of a job takes on a machine. One formula a stage, its reasons beside it:
embed_costs.py, index_costs.py, export_costs.py.

Times of cores are rates (rates.py) times how much there is to do; where the store has finished tasks of a stage, the
formula only tells how much more or less the other tasks have to do than those, and their seconds are what they took. A
stage ends when its slowest slot does, so its time is rounds x a task's, and no less than its bytes over the network.
Times of a GPU are computed, never measured: operations / published peak + bytes / published bandwidth, and are thus a
lower bound. Memory is what a worker has imported, and what the job's sizes add to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from graphbuild.job.plan import embed_costs, export_costs, index_costs
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.rates import WORKER_BYTES
from graphbuild.runner.stage import Stage

KEPT_BYTES = 200e6  # of earlier stages' small arrays, that a worker does not give back; large ones it does
FORMULAS: dict[str, Callable[[Case], Cost]] = {
    name: getattr(module, name)
    for module, names in (
        (embed_costs, "urls download scan number assign encode fidelity vectors"),
        (index_costs, "base prepare codes moments join merge search certify"),
        (export_costs, "export inline arrange scatter cluster"),
    )
    for name in names.split()
}
IMPORTS = {
    "download": "img2dataset",
    **dict.fromkeys(("encode", "fidelity"), "torch transformers"),
    **dict.fromkeys(("prepare", "codes", "moments", "join", "merge", "search"), "torch numba"),
    **dict.fromkeys(("export", "inline", "cluster"), "torch"),
}
"""What a worker imports for a stage, and then has for all after it; of `WORKER_BYTES`."""


def costs(case: Case, stages: Sequence[Stage]) -> list[Cost]:
    """What the stages take, in their order."""
    found: list[Cost] = []
    imported: set[str] = {"python"}
    kept = mapped = 0.0
    for stage in stages:
        cost = replace(FORMULAS[stage.name](case), name=stage.name, title=stage.title)
        if stage.name in case.job.finished and (case.machine.own or not stage.on_device):  # seconds of a GPU, or not
            cost = _as_finished(cost, case, stage)
        new = set(IMPORTS.get(stage.name, "").split()) - imported
        loading = sum(getattr(case.rates, f"load_{part}", 0.0) for part in new)
        cost = _timed(cost, case, loading + (case.rates.start if stage is stages[0] else 0.0))
        if cost.tasks:
            imported |= new
            mapped = max(mapped, cost.mapped)
        weights = 1.5 * case.job.encoder.bytes if "transformers" in imported else 0.0
        ram = sum(WORKER_BYTES[part] for part in imported) + weights + max(cost.held, kept)
        if cost.tasks > 1:
            kept = max(kept, min(cost.held, KEPT_BYTES))
        workers = max(min(case.machine.slots() // case.machine.nodes, cost.tasks), 1)
        found.append(replace(cost, ram=ram, resident=ram + mapped / workers))
    return found


def _as_finished(cost: Cost, case: Case, stage: Stage) -> Cost:
    """With the seconds of finished tasks, times the formula's ratio of a task now to one of those. (Of a stage whose
    records do not outlive its verb, `scratch`, those are of this very job.)"""
    job, done, ratio = case.job, case.job.finished[stage.name], 1.0
    if not stage.scratch:
        nodes = max(done.counts.get("nodes", done.counts.get("embeddings", job.first_new or job.nodes)), 1)
        samples = done.counts.get("samples", done.counts.get("images", job.samples))
        edges = done.counts.get("edges", job.k * nodes)
        before = replace(job, samples=samples, nodes=nodes, shards=done.tasks, k=max(edges // nodes, 1), first_new=0)
        share = samples / max(job.samples, 1)
        before = replace(before, rows=round(job.rows * share), tar_bytes=job.tar_bytes * share)
        then = FORMULAS[stage.name](replace(case, job=before))
        ratio = (cost.core_seconds + cost.gpu_seconds) / ((then.core_seconds + then.gpu_seconds) or 1.0)
    return replace(cost, core_seconds=done.seconds * ratio / (stage.sharing if cost.on_gpu else 1), gpu_seconds=0.0)


def _timed(cost: Cost, case: Case, loading: float) -> Cost:
    """With its wall time, and what is done already left out.

    Wall = rounds of tasks x seconds a task + the runner's own a task + its own a stage + loading; no less than the
    bytes over all nodes' links, where the store is shared, or over the disk's rate, where it is not.
    """
    rates, machine = case.rates, case.machine
    share = 1 - case.job.done.get(cost.name, 0.0)
    tasks = math.ceil(cost.tasks * share - 1e-9)
    if tasks <= 0:
        return replace(cost, tasks=0, read=0.0, written=0.0)
    rounds = math.ceil(tasks / machine.slots(on_device=cost.on_gpu))
    seconds = rounds * (cost.core_seconds + cost.gpu_seconds) + tasks * rates.task
    rate = machine.network * min(machine.nodes, tasks) if machine.shared else rates.disk_bytes_second
    moved = (cost.read if machine.shared else 0.0) + cost.written
    least = max(cost.least_seconds, moved / rate) * share
    seconds = max(seconds, least) + rates.stage + loading
    return replace(cost, tasks=tasks, seconds=seconds, read=cost.read * share, written=cost.written * share)
