"""The cost model: what each stage of a job takes on a machine. One formula a stage, its reasons beside it:
embed_costs.py, index_costs.py, export_costs.py.

Times of cores come from this machine's calibration (`calibration.Rates`), each multiplied by how much there is to do; a
stage ends when its slowest slot does, so its time is rounds x a task's, and no less than its bytes over the network.
Times of a GPU are computed, never measured: operations / published peak + bytes / published bandwidth, and are thus a
lower bound. Memory is what a worker held in the calibration, and what the job's sizes add to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from graphbuild.plan import embed_costs, export_costs, index_costs
from graphbuild.plan.calibration import CALIBRATED, MOST_WORKERS, Rates
from graphbuild.plan.case import Case, Cost
from graphbuild.plan.encoder_facts import MINILM
from graphbuild.plan.machine import Machine
from graphbuild.recipe import Embed, Index, Recipe

KEPT_BYTES = 200e6  # of earlier stages' small arrays, that a worker does not give back; large ones it does
FORMULAS: dict[str, Callable[[Case], Cost]] = {
    "urls": embed_costs.urls,
    "download": embed_costs.download,
    "scan": embed_costs.scan,
    "number": embed_costs.number,
    "assign": embed_costs.assign,
    "encode": embed_costs.encode,
    "fidelity": embed_costs.fidelity,
    "vectors": embed_costs.vectors,
    "base": index_costs.base,
    "prepare": index_costs.prepare,
    "codes": index_costs.codes,
    "moments": index_costs.moments,
    "join": index_costs.join,
    "merge": index_costs.merge,
    "search": index_costs.search,
    "certify": index_costs.certify,
    "export": export_costs.export,
    "inline": export_costs.copy("inline", "tars", lambda case: case.job.shards),
    "arrange": export_costs.arrange,
    "scatter": export_costs.scatter,
    "cluster": export_costs.copy("cluster", "tars", export_costs.new_tars),
}


def costs(case: Case, stages: list[str]) -> list[Cost]:
    """What the named stages (`graphbuild.stage.ORDER`) take, in their order."""
    with_encoder = "encode" in stages
    before = calibrated(case, with_encoder=with_encoder)
    found: list[Cost] = []
    base = kept = mapped = 0.0
    for name in stages:
        cost = FORMULAS[name](case)
        known = before.get(name, before["search"])
        cost = _timed(replace(cost, loading=_loading(case.rates, name, stages)), case)
        more = max(cost.held - known.held, 0.0)
        if cost.tasks:
            base = max(base, _base_memory(case.rates, name, with_encoder=with_encoder))
            mapped = max(mapped, cost.mapped - known.mapped)
        ram = base + max(more, kept)
        if cost.tasks > 1:
            kept = max(kept, min(more, KEPT_BYTES))
        workers = max(min(case.machine.slots() // case.machine.nodes, cost.tasks), 1)
        found.append(replace(cost, ram=ram, resident=ram + mapped / workers))
    return found


def calibrated(case: Case, *, with_encoder: bool) -> dict[str, Cost]:
    """What the same formulas say of the calibration's own job: the memory measured there held that much already."""
    rates = case.rates
    one = Machine("calibration", 1, rates.cores, 16e9, 1e9)
    nodes = CALIBRATED.samples if with_encoder else CALIBRATED.nodes
    shards = CALIBRATED.tars if with_encoder else 4 * min(rates.cores, MOST_WORKERS)
    job = replace(
        case.job,
        source="tars" if with_encoder else "vectors",
        rows=nodes,
        samples=nodes,
        nodes=nodes,
        shards=shards,
        encoder=MINILM,
        k=CALIBRATED.k,
        tokens=14.0,
        characters=55.0,
        tar_bytes=CALIBRATED.samples * CALIBRATED.tar_sample_bytes,
        list_bytes=2.0 * CALIBRATED.nodes * CALIBRATED.d,
        first_new=0,
    )
    index = Index(k=CALIBRATED.k, engine="exact", recall_sample=CALIBRATED.recall_sample, device="cpu")
    own = Case(job, Recipe(embed=Embed(device="cpu"), index=index), one, rates)
    names = [name for name in FORMULAS if name not in ("urls", "download", "inline", "arrange", "scatter", "cluster")]
    return {name: FORMULAS[name](own) for name in names}


def _base_memory(rates: Rates, name: str, *, with_encoder: bool) -> float:
    """The largest worker of that stage in the calibration; of stages that it has not, one as light or as heavy."""
    known = rates.memory
    if name in ("urls", "download"):
        return known["with_encoder.scan"] + (rates.image_memory if name == "download" else 0.0)
    if not with_encoder and name in known:
        return known[name]
    return known.get(f"with_encoder.{name}", known["with_encoder.export" if with_encoder else "export"])


def _loading(rates: Rates, name: str, stages: list[str]) -> float:
    """What workers load before their first task of a kind."""
    loading = rates.start if name == stages[0] else 0.0
    if name == "encode":
        loading += rates.load_encoder
    if name in ("prepare", "codes"):
        loading += rates.load_index - (rates.import_torch if "encode" in stages else 0.0)
    if name == "export" and "codes" not in stages:
        loading += rates.import_torch
    return max(loading, 0.0)


def _timed(cost: Cost, case: Case) -> Cost:
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
    return replace(
        cost,
        tasks=tasks,
        seconds=max(seconds, least) + rates.stage + cost.loading,
        read=cost.read * share,
        written=cost.written * share,
    )
