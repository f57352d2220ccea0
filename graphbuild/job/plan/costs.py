"""The cost model: what each stage of a job takes on a machine, from its formula (formulas.py).

Where the store has finished tasks of a stage, the formula only tells how much more or less the other tasks have to do
than those, and their seconds are what they took. A stage ends when its slowest slot does, so its time is rounds x a
task's, and no less than its bytes over the network. Memory is what a worker has imported, and what the job's sizes add
to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.formulas import FORMULAS
from graphbuild.job.plan.rates import WORKER_BYTES
from graphbuild.job.steps import STEPS, Step, folders
from graphbuild.knn.leaders import SORTED_PARTS
from graphbuild.runner.small import BYTES, FEW, SAMPLES

KEPT_BYTES = 200e6  # of earlier stages' small arrays, that a worker does not give back; large ones it does
IMPORTS = {
    "download": "img2dataset",
    **dict.fromkeys(("encode", "fidelity"), "torch transformers"),
    **dict.fromkeys(("prepare", "codes", "moments", "order", "join", "merge", "refine", "search"), "torch numba"),
    **dict.fromkeys(("export", "inline", "columns", "scatter"), "torch"),
}
"""What a worker imports for a stage, and then has for all after it; of `WORKER_BYTES`."""


def costs(case: Case, steps: Sequence[Step]) -> list[Cost]:
    """What the steps take, in their order; a step that has no formula is left out."""
    by_verb = {verb: FORMULAS[verb](case) for verb in {step.verb for step in steps}}
    steps = [step for step in steps if step.name in by_verb[step.verb]]
    found: list[Cost] = []
    imported: set[str] = {"python"}
    kept = mapped = 0.0
    job, begun = case.job, False
    small = case.machine.own and case.machine.workers is None and max(job.rows, job.samples, job.nodes) <= SAMPLES
    for step in steps:
        cost = replace(by_verb[step.verb][step.name], name=step.name, title=step.stage.title)
        same_device = case.machine.own or not step.stage.on_device  # else those seconds may be a GPU's, or not
        if step.name in case.job.finished and same_device:
            cost = _as_finished(cost, case, step)
        new = set(IMPORTS.get(step.name, "").split()) - imported
        loading = sum(getattr(case.rates, f"load_{part}", 0.0) for part in new)
        read = job.list_bytes + job.tar_bytes if step.reads_outside else 0.0
        few = cost.tasks == 1 or job.rows <= FEW * SAMPLES
        here = small and read <= BYTES and (few or step.name != "download")
        cost = _timed(cost, case, loading + (0.0 if here or begun else case.rates.start))
        if cost.tasks:
            begun |= not here
            imported |= new
            mapped = max(mapped, cost.mapped)
        weights = 1.5 * case.job.encoder.bytes if "transformers" in imported else 0.0
        ram = sum(WORKER_BYTES[part] for part in imported) + weights + max(cost.held, kept)
        if cost.tasks > 1:
            kept = max(kept, min(cost.held, KEPT_BYTES))
        workers = max(min(case.machine.slots() // case.machine.nodes, cost.tasks), 1)
        found.append(replace(cost, ram=ram, resident=ram + mapped / workers))
    return found


def room(found: Sequence[Cost]) -> float:
    """Bytes that the files of these stages take at most: scratch goes when the last stage that reads it is done."""
    until = {step.name: max(folders(step).values(), key=STEPS.index).name for step in STEPS if folders(step)}
    here = most = 0.0
    left = {cost.name: cost.written for cost in found}
    if left.get("order"):  # makes of what codes has written anew what others read, and frees it part by part
        until["codes"] = "order"
    for cost in found:
        here += cost.written
        if cost.name == "order" and cost.written:
            here -= left["codes"] * (1 - 1 / SORTED_PARTS)
            left["codes"] /= SORTED_PARTS
        most = max(most, here)
        here -= sum(size for name, size in left.items() if until.get(name) == cost.name)
    return most


def _as_finished(cost: Cost, case: Case, step: Step) -> Cost:
    """With the seconds of finished tasks, times the formula's ratio of a task now to one of those. (Of a stage whose
    records do not outlive its verb, `scratch`, those are of this very job.)"""
    job, done, ratio = case.job, case.job.finished[step.name], 1.0
    if not step.stage.scratch:
        nodes = max(done.counts.get("nodes", done.counts.get("embeddings", job.first_new or job.nodes)), 1)
        samples = done.counts.get("samples", done.counts.get("images", job.samples))
        edges = done.counts.get("edges", job.k * nodes)
        share = samples / max(job.samples, 1)
        before = replace(
            job,
            samples=samples,
            nodes=nodes,
            shards=done.tasks,
            k=max(edges // nodes, 1),
            first_new=0,
            rows=round(job.rows * share),
            tar_bytes=job.tar_bytes * share,
        )
        then = FORMULAS[step.verb](replace(case, job=before))[step.name]
        ratio = (cost.core_seconds + cost.gpu_seconds) / ((then.core_seconds + then.gpu_seconds) or 1.0)
    return replace(
        cost, core_seconds=done.seconds * ratio / (step.stage.sharing if cost.on_gpu else 1), gpu_seconds=0.0
    )


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
