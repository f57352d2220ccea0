"""What the search for neighbours takes: the engine that a build would choose on a machine, its join tasks, their cost.

Engines, list lengths, numbers of tasks and bytes a node are those of graphbuild.knn.engine; only time is modelled here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.job import Job
from graphbuild.job.plan.machine import Machine
from graphbuild.knn import device as gpu
from graphbuild.knn.engine import Engine, bytes_a_node, choose, nodes_at_once
from graphbuild.knn.faiss_index import TASK_NODES as FAISS_TASK_NODES
from graphbuild.knn.leaders import NODES_PER_LEADER
from graphbuild.knn.partition import FANS, MISSING_AFTER_REFINEMENT
from graphbuild.recipe import Index, Recipe

# The fan of partition: on 251,610 captions a share exp(-0.78 - 0.231 fan) of the true neighbours share no leaf, of
# which refinement leaves MISSING_AFTER_REFINEMENT (fans 7 and 14 for recall 0.95 and 0.99, benchmarks/results/
# knn.jsonl). It grows with N: cost grew with exponent 1.2 from 250,000 to 3,000,000 nodes, and goes with fan^2.
MISSED_AT_0, MISSED_BY_FAN, FAN_NODES, FAN_GROWTH = 0.78, 0.231, 250_000, 0.1
LEAF_SCAN = 2e-9  # seconds a number: a task looks through all nodes' leaves for its own
PAIR_BYTES = 19  # moved a pair on a GPU: int32 product out and in, float32 out and in, a byte of comparison out and in
# twice more for compaction (graphbuild.knn.device): 4 + 4 + 4 + 4 + 1 + 1 + 1
FAISS_PAIRS_FAR = 64  # vectors that an inverted-list search at the usual settings compares, in units of sqrt(N)
MANY_NODES = 50_000_000  # for which the pairs of exact's groups are counted, not listed


@dataclass(frozen=True)
class Join:
    engine: str
    length: int  # of a list
    lists: float  # of a node, one a task that it is in
    cost: Cost


def index_on(recipe: Recipe, machine: Machine) -> Index:
    """The recipe's section, its device settled as on that machine."""
    device = "cuda" if machine.card else "cpu"
    return recipe.index if recipe.index.device != "auto" else recipe.index.model_copy(update={"device": device})


def chosen_engine(recipe: Recipe, job: Job, machine: Machine) -> tuple[Engine, str]:
    """The engine, and why."""
    return choose(index_on(recipe, machine), job.nodes, job.d)


def join_of(case: Case) -> Join:
    """The join tasks of the engine that would be chosen."""
    job, machine, rates = case.job, case.machine, case.rates
    index = index_on(case.recipe, machine)
    engine, _ = choose(index, job.nodes, job.d)
    nodes, new = job.nodes, job.nodes - job.first_new
    at_once = nodes_at_once(engine, index, nodes, job.d)
    groups = math.ceil(nodes / min(math.ceil(nodes / 8), at_once // 2))
    counted = engine.name == "exact" and nodes >= MANY_NODES
    plain = groups * (groups + 1) // 2 if counted else len(engine.joins(nodes, at_once))
    tasks = len(engine.joins(nodes, at_once, job.first_new)) if job.first_new else plain
    held_nodes, lists = engine.spread(nodes, plain)
    held_nodes = min(held_nodes, nodes)
    length = engine.length(job.k, nodes)
    share = 1 - (job.first_new / nodes) ** 2  # of the pairs, that have a new node
    read, written = held_nodes * tasks * (job.d + 12.0), 8.0 * nodes * lists * (length + 1)
    held = held_nodes * bytes_a_node(engine, job.k, nodes, job.d)
    cost = Cost(tasks, 0.0, read, written, held, 1.0 * nodes * job.d)
    if engine.name == "exact" and machine.card is not None and index.device == "cuda":
        card = machine.card
        both = share * nodes**2 / tasks  # a GPU compares each pair from both sides
        seconds = both * (2.0 * job.d / card.int8 + PAIR_BYTES / card.bytes_second)
        vram = held_nodes * (job.d + 8.0) + 3 * 4.0 * gpu.ROWS * gpu.COLUMNS + 0.5e9
        cost = replace(cost, on_gpu=True, gpu_seconds=seconds, vram=vram)
    elif engine.name == "exact":
        pairs = share * nodes**2 / 2 / tasks
        filled = nodes * lists / tasks * length
        cost = replace(cost, core_seconds=pairs * rates.pair * case.width + filled * rates.list_entry)
    elif engine.name == "partition":
        fan = fan_of(index.recall, nodes)
        rows = nodes * fan / tasks * (new / nodes if job.first_new else 1.0)
        pairs = rows * NODES_PER_LEADER * fan / 2
        seconds = pairs * rates.pair * case.width + rows * length * rates.leaf_entry + nodes * fan * LEAF_SCAN
        read, mapped = cost.read + tasks * 4.0 * nodes * fan, nodes * (job.d + 4.0 * fan)
        cost = replace(cost, core_seconds=seconds, read=read, held=cost.held + 48.0 * rows, mapped=mapped)
    else:
        compared = min(FAISS_PAIRS_FAR * math.sqrt(nodes), nodes) * FAISS_TASK_NODES
        whole = 4.0 * nodes * job.d
        seconds = compared * 2 * job.d * rates.flop
        cost = replace(cost, core_seconds=seconds, read=whole * tasks, held=cost.held + whole, mapped=whole)
    return Join(engine.name, length, lists, cost)


def fan_of(recall: float, nodes: int) -> float:
    """Leaves that a node must join for that recall, about: see the constants above."""
    fan = (-math.log((1 - recall) / MISSING_AFTER_REFINEMENT) - MISSED_AT_0) / MISSED_BY_FAN
    return float(min(max(fan, FANS[0]) * max(nodes / FAN_NODES, 1.0) ** FAN_GROWTH, FANS[-1]))
