"""Formulas of the stages from embeddings to a certified graph; the joins themselves: engines.py."""

from __future__ import annotations

import math

from graphbuild.graph.certify import SLICE_NODES
from graphbuild.graph.sketch import BYTES as SKETCH_BYTES
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.engines import chosen_engine, join_of
from graphbuild.knn.leaders import FLAT_GROUPS, GROUP_LEADERS, PROBED_GROUPS, leader_count
from graphbuild.knn.sample import SAMPLE

CERTIFY_FLOPS = 1.1  # seconds of a FLOP of the certificate's products, which also compares, in units of such a FLOP's


def base(case: Case) -> Cost:
    kept = 6.0 * case.job.k * case.job.first_new
    return Cost(case.job.shards, 0.0, kept, kept)


def prepare(case: Case) -> Cost:
    """One task on all cores of a node. One node in 64 is drawn (a random read each) and ordered by recursive bisection
    (8 products of [L, d] with a vector a level); partition also searches SAMPLE nodes among all (2 SAMPLE N d FLOP)."""
    job, rates = case.job, case.rates
    leaders = leader_count(job.nodes)
    levels = max(math.log2(max(2 * leaders / GROUP_LEADERS, 1)), 1)
    flop = 16.0 * leaders * job.d * levels * 4  # such products are bound by memory: 4 times a matrix product's time
    read = 2.0 * leaders * job.d
    if chosen_engine(case.recipe, job, case.machine)[0].name == "partition":
        flop += 2.0 * SAMPLE * job.nodes * job.d
        read = 2.0 * job.nodes * job.d
    seconds = flop * rates.flop / case.machine.cores + leaders * rates.code_node * case.width
    held, mapped = 14.0 * leaders * job.d, 2.0 * job.nodes * job.d
    return Cost(1, seconds, read, 1.0 * leaders * job.d, held, mapped)


def codes(case: Case) -> Cost:
    """int8 codes and moments of a shard's nodes, and their nearest leaders: L / 128 + 12 x 128 products a node (all L
    where they are few)."""
    job, rates = case.job, case.rates
    leaders = leader_count(job.nodes)
    groups = leaders / GROUP_LEADERS
    compared = leaders if groups <= FLAT_GROUPS else groups + PROBED_GROUPS * GROUP_LEADERS
    seconds = case.shard_nodes * (rates.code_node + compared * rates.pair) * case.width
    read, written = 2.0 * job.d * job.nodes, job.nodes * (job.d + 24.0)
    return Cost(job.shards, seconds, read, written, case.shard_nodes * job.d * 5.0, 1.0 * leaders * job.d)


def moments(case: Case) -> Cost:
    """One task adds up [d + 1, d] float64 of each shard, and takes the eigenvectors of one such matrix."""
    job = case.job
    matrix = 8.0 * job.d * (job.d + 1)
    return Cost(1, job.shards * matrix / 1e9 + 2e-9 * job.d**3, job.shards * matrix, 2 * matrix)


def join(case: Case) -> Cost:
    return join_of(case).cost


def merge(case: Case) -> Cost:
    """Every list of a node, read and united entry by entry."""
    job, found = case.job, join_of(case)
    entries = 1.0 * job.nodes * found.length
    seconds = entries / job.shards * found.lists * case.rates.merge_entry
    return Cost(job.shards, seconds, 8 * entries * found.lists, 8 * entries, 16 * entries / job.shards)


def search(case: Case) -> Cost:
    """Candidates scored again by the stored vectors, read at random; partition first looks at neighbours' lists."""
    job, rates, found = case.job, case.rates, join_of(case)
    entries = case.shard_nodes * found.length
    table = 2.0 * job.nodes * job.d
    seconds = entries * rates.candidate * case.far(table)
    if found.engine == "partition":
        lists = job.nodes * (job.d + 8.0 * found.length)
        seconds = entries * rates.refine_entry * case.far(lists)
        table += lists
    seconds = (seconds + case.shard_nodes * rates.search_node) * case.width
    read, written = table + 8.0 * job.nodes * found.length, job.nodes * (6.0 * job.k + 8 + min(SKETCH_BYTES, job.d))
    held = case.shard_nodes * (24.0 * found.length + 10.0 * job.d)
    return Cost(job.shards, seconds, read, written, held, table)


def certify(case: Case) -> Cost:
    """S sampled nodes against all N by float32 products, SLICE_NODES a task; and every list is looked over once."""
    job = case.job
    sample = min(case.recipe.index.recall_sample, job.nodes)
    tasks = math.ceil(sample / SLICE_NODES)
    vectors = 2.0 * job.nodes * job.d
    seconds = sample / tasks * (vectors * case.rates.flop * CERTIFY_FLOPS + job.k * case.rates.certified_edge)
    return Cost(tasks, seconds, tasks * vectors + 6.0 * job.k * job.nodes, 0.0, mapped=vectors)
