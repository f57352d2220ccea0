"""What each stage takes: rates (rates.py) times how much there is to do, a `Cost` a stage, with the reasons beside it.
Here those of index and export; before them come those of samples.py.

Engines, list lengths, numbers of join tasks and bytes a node are those of graphbuild.knn.engine. Times of a GPU are
computed, never measured: operations / published peak + bytes / published bandwidth, thus a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from graphbuild.export.cells import CELL, LEADERS, LISTED, RUN_SAMPLES, RUNS
from graphbuild.graph.certify import first_look
from graphbuild.graph.recall.recall import BLOCK_ROWS
from graphbuild.graph.sketch import BYTES as SKETCH_BYTES
from graphbuild.graph.tasks import PART_NODES, PARTS
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.samples import download_costs, embed_costs, pack_costs
from graphbuild.knn import device as gpu
from graphbuild.knn.engine import bytes_a_node, nodes_at_once
from graphbuild.knn.faiss_index import TASK_NODES as FAISS_TASK_NODES
from graphbuild.knn.leaders import (
    FLAT_GROUPS,
    GROUP_GROUPS,
    GROUP_LEADERS,
    MOST_GROUPS,
    NODES_PER_LEADER,
    ORDERED,
    PROBED_GROUPS,
    blocks_of,
    compared_at_once,
    leader_count,
    ranges_of_leaders,
)
from graphbuild.knn.partition import LONGEST, fan_of
from graphbuild.knn.sample import SAMPLE

CERTIFY_FLOPS = 0.6  # of 2 N d FLOP a node, whose time the certificate takes: most pairs are ruled out before
# The interval of recall is about INTERVAL deviations of nodes' recalls over sqrt(n) wide; their variance is this share
# of recall (1 - recall): 0.12 on 50,000 captions at recall 0.965, 0.27 on 300,000 mixed vectors at 0.973.
# REACHED: what a graph misses, of what it was allowed to.
INTERVAL, NODE_VARIANCE, REACHED = 7.0, 0.2, 0.7
# The more nodes, the nearer each other's neighbours, of which codes put the wrong ones first: a list of candidates has
# k + k/8 up to so many nodes, and then grows with this power of N (k = 15: 19, 23 and 45 at 0.3, 3 and 30 million mixed
# vectors; k = 32: 36 and 60 at 3 and 12.4 million, benchmarks/results/ladder_epyc.jsonl).
LISTS_GROW_FROM, LISTS_GROWTH = 2e6, 0.3
# Refinement reads neighbours' lists at random: where all take more than LISTS_NEAR bytes, up to 1 + LISTS_FAR times as
# long for each entry (0.9, 6.0 and 10.8 GB: 1.0, 1.0 and 1.3 times, benchmarks/results/ladder_epyc.jsonl).
LISTS_NEAR, LISTS_FAR = 1e9, 0.3
# Likewise the leaders of codes: 18, 74 and 180 MB of them took 1.0, 1.2 and 1.4 times as long.
LEADERS_NEAR, LEADERS_FAR = 4e7, 0.5
LEAF_SCAN = 2e-9  # seconds a number: a task looks through all nodes' leaves for its own
PAIR_BYTES = 19  # moved a pair on a GPU: int32 product out and in, float32 out and in, a byte of comparison out and in
# twice more for compaction (graphbuild.knn.device): 4 + 4 + 4 + 4 + 1 + 1 + 1
FAISS_PAIRS_FAR = 64  # vectors that an inverted-list search at the usual settings compares, in units of sqrt(N)


def index_costs(case: Case) -> dict[str, Cost]:
    """From embeddings to a certified graph."""
    job, rates, shards, shard_nodes = case.job, case.rates, case.job.shards, case.shard_nodes
    vectors, kept, partition = 2.0 * job.nodes * job.d, 6.0 * job.k * job.first_new, case.engine.name == "partition"
    leaders = leader_count(job.nodes)
    drawn = 1.0 * leaders * job.d  # bytes
    # Partition reads all vectors, by ranges: SAMPLE nodes are searched among them, and the leaders copied, one node in
    # 64 (a random read each). Then, on all cores of a node, leaders are ordered by recursive bisection: 8 products of
    # [L, d] with a vector a level, bound by memory: 4 times a matrix product's time; beyond ORDERED one pass a level, a
    # tenth of the time to copy and code them.
    ranges = min(math.ceil(job.nodes / PART_NODES), PARTS, shards)
    tasks = ranges if partition and ranges > 1 else 0
    levels = max(math.log2(max(2 * min(leaders, ORDERED) / GROUP_LEADERS, 1)), 1)
    copying = leaders * rates.code_node * case.width
    ordering = 64.0 * leaders * job.d * levels * rates.flop / case.machine.cores
    ordering += copying * (1 + max(math.log2(leaders / ORDERED), 0.0) / 10)
    reading = copying + 2.0 * SAMPLE * job.nodes * job.d * rates.flop if partition else 0.0
    prepare = Cost(
        tasks + 1,
        reading / tasks if tasks else ordering + reading / case.machine.cores,
        (vectors if partition else drawn) + 2 * drawn,
        3 * drawn,
        14.0 * job.d * min(leaders, ORDERED) + 16.0 * leaders,
        vectors / max(tasks, 1),
        least_seconds=ordering,
    )
    # A node's leaders are found by L / 128 + 12 x 128 products, all L where they are few; where they are many, L / 128
    # of these by groups of groups.
    groups = leaders / GROUP_LEADERS
    compared = leaders if groups <= FLAT_GROUPS else groups + PROBED_GROUPS * GROUP_LEADERS
    while groups > MOST_GROUPS:
        groups /= GROUP_GROUPS
        compared += groups + PROBED_GROUPS * GROUP_GROUPS - groups * GROUP_GROUPS
    at_once = max(compared_at_once(job.nodes), shard_nodes)
    coders = math.ceil(shards / math.ceil(at_once / shard_nodes))
    coding = job.nodes / coders * (rates.code_node + compared * rates.pair) * case.width
    coding *= 1 + LEADERS_FAR * max(1 - LEADERS_NEAR / drawn, 0.0)
    matrix = 8.0 * job.d * (job.d + 1)  # of a task's moments; one of them has its eigenvectors taken
    join, length, lists = _join(case)
    entries = 1.0 * job.nodes * length  # of candidate lists, one a node, united from `lists` a node
    merging = entries / shards * lists * rates.merge_entry
    # Candidates are scored again by the stored vectors, read at random. Partition, which looks at neighbours' lists
    # too, has those of near nodes behind each other, in blocks: a vector is read at random once, to be put there.
    table, scoring, blocks = vectors, shard_nodes * length * rates.candidate * case.far(vectors), shards
    coded, ordered, refined = job.nodes * (24.0 + job.d), 0.0, 0.0
    if partition:  # whose stage codes leaves what stage order makes codes of, sorted
        coded = job.nodes * (2.0 * job.d + 4 * (fan_of(case.index.recall, job.nodes) + 3))
        coding += job.nodes / coders * rates.sort_node * case.width
        table, scoring, blocks = 8.0 * job.k * job.nodes, 0.0, len(blocks_of(job.nodes, job.first_new)) - 1
        ordered, refined = job.nodes * (3.0 * job.d + 50), job.nodes * length * rates.refine_entry * case.width
        refined *= 1 + LISTS_FAR * max(1 - LISTS_NEAR / (8 * entries), 0.0)
    scoring = (scoring + shard_nodes * rates.search_node) * case.width
    found = job.nodes * (6.0 * job.k + 8 + min(SKETCH_BYTES, job.d))
    held = shard_nodes * (24.0 * length + 10.0 * job.d)
    # Sampled nodes against all by float32 products, in looks, each of a task that draws and one a range of nodes; and
    # every list is looked over once.
    looks, searched = looks_of(case)
    checking = searched * (vectors * rates.flop * CERTIFY_FLOPS + job.k * rates.certified_edge)
    checking = (checking + job.nodes * job.k * rates.checked_entry) / (looks * ranges)
    tasks = len(ranges_of_leaders(job.nodes)) - 1
    held_codes = 5.0 * job.d * shard_nodes + (5.0 * job.d + 500.0) * at_once
    held_order = 5.0 * job.d * job.nodes / tasks
    order = Cost(tasks + 1, job.nodes * rates.order_node * case.width / tasks, coded, ordered, held_order)
    near = (3.0 * job.d + 16.0 * length) * job.nodes / blocks
    refine = Cost(blocks, refined / blocks, ordered + 8 * entries, table, near, near)
    return {
        "base": Cost(shards, 0.0, kept, kept),
        "prepare": prepare,
        "codes": Cost(coders, coding, vectors, coded + coders * matrix, held_codes, drawn),
        "moments": Cost(1, coders * matrix / 1e9 + 2e-9 * job.d**3, coders * matrix, 2 * matrix),
        "order": order if partition else Cost(0),
        "join": join,
        "merge": Cost(blocks, merging * shards / blocks, 8 * entries * lists, 8 * entries, 16 * entries / blocks),
        "refine": refine if partition else Cost(0),
        "search": Cost(shards, scoring, table + 8.0 * entries, found, held, table),
        "certify": Cost(
            looks * ranges,
            checking,
            looks * vectors + 6.0 * job.k * job.nodes,
            held=searched / looks * BLOCK_ROWS * 5.0 + 20.0 * shard_nodes * job.k,
            mapped=vectors / ranges,
        ),
    }


def looks_of(case: Case) -> tuple[int, float]:
    """How often the certificate looks at recall, and how many nodes it has searched by then."""
    index, nodes = case.index, case.job.nodes
    sample = min(index.recall_sample, nodes)
    missing = 0.0 if case.engine.name == "exact" else (1 - index.recall) * REACHED
    wanted = min(NODE_VARIANCE * missing * (1 - missing) * (INTERVAL / max(index.recall_width, 1e-6)) ** 2, sample)
    searched = float(max(wanted, first := first_look(sample, nodes)))
    return 1 + math.ceil(math.log2(searched / first)), searched


def _join(case: Case) -> tuple[Cost, float, float]:
    """The join tasks of the engine that would be chosen, the length of a candidate list, and lists a node, one a task
    that it is in."""
    job, machine, rates, index, engine = case.job, case.machine, case.rates, case.index, case.engine
    nodes, new = job.nodes, job.nodes - job.first_new
    at_once = nodes_at_once(engine, index, nodes, job.d)
    tasks = len(engine.joins(nodes, at_once, job.first_new))
    held_nodes, lists = engine.spread(nodes, len(engine.joins(nodes, at_once)))
    held_nodes = min(held_nodes, nodes)
    length = engine.length(job.k, nodes)
    if engine.name == "partition":
        length = max(min(length * max(nodes / LISTS_GROW_FROM, 1.0) ** LISTS_GROWTH, LONGEST * job.k), length)
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
        cost = replace(cost, core_seconds=seconds, read=read, mapped=mapped)
    else:
        compared = min(FAISS_PAIRS_FAR * math.sqrt(nodes), nodes) * FAISS_TASK_NODES
        whole = 4.0 * nodes * job.d
        seconds = compared * 2 * job.d * rates.flop
        cost = replace(cost, core_seconds=seconds, read=whole * tasks, held=cost.held + whole, mapped=whole)
    return cost, length, lists


def export_costs(case: Case) -> dict[str, Cost]:
    """From a graph to sidecars, or to tars written once more: every member read, written and hashed."""
    job, config, rates, shards = case.job, case.recipe.export, case.rates, case.job.shards
    carried = {"int8": job.d + 4, "float16": 2 * job.d, "sketch:64": 64, "none": 0}[config.embeddings]
    row = carried + 6.0 * job.k + 40 + job.characters * 0.8  # of a sidecar: 6 bytes a neighbour; key, caption, places
    rows, edges, tars = job.samples * row, 1.0 * job.nodes * job.k, job.tar_bytes + job.samples * row
    copying, hashing = job.samples * (rates.tar_sample + row * rates.export_byte), tars * rates.hash_byte
    sidecar_held, lists = case.shard_rows * (4 * row + 16.0 * job.d), job.nodes * (2.0 * job.d + 6.0 * job.k)
    # Clustered: every byte is moved twice, in runs of old tars into scratch, and from there into new tars.
    run = max(min(job.samples / RUNS, RUN_SAMPLES), case.shard_rows)
    runs, tasks = math.ceil(job.samples / run), math.ceil(job.samples / config.shard_size)
    scattering, clustering = (copying + hashing) / runs, (rows * rates.export_byte + 2 * hashing) / tasks
    # Of each sample the list, for its place in the order; beyond one cell its vector is compared with all leaders.
    cells, listed = max(math.ceil(job.samples / CELL), 1), job.samples * (16 + 4.0 * min(job.k, LISTED))
    led = 2.0 * job.samples * job.d * cells * LEADERS * rates.flop if cells > 1 else 0.0
    led_bytes = 2.0 * job.samples * job.d if cells > 1 else 0.0

    return {
        "export": Cost(shards, rows / shards * rates.export_byte, rows, rows, sidecar_held, lists),
        "inline": Cost(shards, (copying + hashing) / shards, job.tar_bytes, tars, 4 * case.shard_rows * (row + 500)),
        "columns": Cost(shards, rows / shards * rates.export_byte, rows, rows, sidecar_held, lists),
        "cells": Cost(runs, led / runs, listed + led_bytes, listed, 3 * listed / runs, listed),
        "arrange": Cost(cells, 2 * edges / cells * rates.merge_entry, listed, 16.0 * job.samples, 2.5 * listed / cells),
        "scatter": Cost(runs, scattering, tars, tars, 2 * run * (row + 500) + sidecar_held, lists),
        "cluster": Cost(tasks, clustering, tars, tars, 4 * job.samples / tasks * (row + 500)),
    }


FORMULAS: dict[str, Callable[[Case], dict[str, Cost]]] = {
    "download": download_costs,
    "pack": pack_costs,
    "embed": embed_costs,
    "index": index_costs,
    "export": export_costs,
}
"""By verb."""
