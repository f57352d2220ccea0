"""Formulas of the stages from embeddings to a certified graph; the joins themselves: engines.py."""

from __future__ import annotations

import math

from graphbuild.certify import SLICE_NODES
from graphbuild.knn.leaders import FLAT_GROUPS, GROUP_LEADERS, PROBED_GROUPS, leader_count
from graphbuild.plan.calibration import CALIBRATED
from graphbuild.plan.case import Case, Cost
from graphbuild.plan.engines import chosen_engine, join_of


def base(case: Case) -> Cost:
    job = case.job
    return Cost("base", "old lists", job.shards, 0.0, 6.0 * job.k * job.first_new, 6.0 * job.k * job.first_new)


def prepare(case: Case) -> Cost:
    """One task on all cores of a node. One node in 64 is drawn (a random read each) and ordered by recursive bisection
    (8 products of [L, d] with a vector a level); partition also searches 400 nodes among all (2 x 400 N d FLOP)."""
    job, rates = case.job, case.rates
    leaders = leader_count(job.nodes)
    levels = max(math.log2(max(leaders / 64, 1)), 1)
    flop = 16.0 * leaders * job.d * levels * 4  # such products are bound by memory: 4 times a matrix product's time
    engine = chosen_engine(case.recipe, job, case.machine)
    if engine.name == "partition":
        flop += 2.0 * 400 * job.nodes * job.d
    seconds = flop * rates.prepare_flop / case.machine.cores + leaders * rates.leader * case.width
    return Cost(
        "prepare",
        "prepare",
        1,
        seconds,
        2.0 * job.nodes * job.d if engine.name == "partition" else 2.0 * leaders * job.d,
        1.0 * leaders * job.d,
        held=14.0 * leaders * job.d,
        mapped=2.0 * job.nodes * job.d,
    )


def codes(case: Case) -> Cost:
    """int8 codes and moments of a shard's nodes, and their nearest leaders: L / 128 + 12 x 128 products a node (all L
    where they are few)."""
    job, rates = case.job, case.rates
    leaders = leader_count(job.nodes)
    more = max(leader_products(job.nodes) - leader_products(CALIBRATED.nodes), 0)
    seconds = case.shard_nodes * (rates.code_node + more * rates.pair) * case.width
    return Cost(
        "codes",
        "codes",
        job.shards,
        seconds,
        2.0 * job.nodes * job.d,
        job.nodes * (job.d + 24.0),
        held=case.shard_nodes * job.d * 5.0,
        mapped=1.0 * leaders * job.d,
    )


def leader_products(nodes: int) -> float:
    """Leaders that a node is compared with (graphbuild.knn.leaders)."""
    leaders = leader_count(nodes)
    groups = leaders / GROUP_LEADERS
    return leaders if groups <= FLAT_GROUPS else groups + PROBED_GROUPS * GROUP_LEADERS


def moments(case: Case) -> Cost:
    """One task adds up [d + 1, d] float64 of each shard, and takes the eigenvectors of one such matrix."""
    job = case.job
    matrix = 8.0 * job.d * (job.d + 1)
    return Cost("moments", "moments", 1, job.shards * matrix / 1e9 + 2e-9 * job.d**3, job.shards * matrix, 2 * matrix)


def join(case: Case) -> Cost:
    return join_of(case).cost


def merge(case: Case) -> Cost:
    """Every list of a node, read and united entry by entry."""
    job = case.job
    found = join_of(case)
    entries = case.shard_nodes * found.length * found.lists
    return Cost(
        "merge",
        "merge",
        job.shards,
        entries * case.rates.merge_entry,
        8.0 * job.nodes * found.length * found.lists,
        8.0 * job.nodes * found.length,
        held=16.0 * case.shard_nodes * found.length,
    )


def search(case: Case) -> Cost:
    """Candidates scored again by the stored vectors, read at random; partition first looks at neighbours' lists."""
    job, rates = case.job, case.rates
    found = join_of(case)
    table = 2.0 * job.nodes * job.d
    seconds = case.shard_nodes * found.length * rates.candidate * case.width * case.far(table)
    if found.engine == "partition":
        lists = job.nodes * (job.d + 8.0 * found.length)
        seconds = case.shard_nodes * rates.refine_node * case.width * found.length / CALIBRATED.leaf_length
        seconds *= case.far(lists)
        table += lists
    graph = job.nodes * (6.0 * job.k + 8 + min(64, job.d))
    return Cost(
        "search",
        "search",
        job.shards,
        seconds,
        table + 8.0 * job.nodes * found.length,
        graph,
        held=case.shard_nodes * (24.0 * found.length + 10.0 * job.d),
        mapped=table,
    )


def certify(case: Case) -> Cost:
    """S sampled nodes against all N by float32 products, SLICE_NODES a task; and every list is looked over once."""
    job = case.job
    sample = min(case.recipe.index.recall_sample, job.nodes)
    tasks = math.ceil(sample / SLICE_NODES)
    seconds = (sample / tasks) * job.nodes * job.d * case.rates.certify_mac
    read = tasks * 2.0 * job.nodes * job.d + 6.0 * job.k * job.nodes
    return Cost("certify", "recall", tasks, seconds, read, 0.0, mapped=2.0 * job.nodes * job.d)
