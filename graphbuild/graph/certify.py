"""Stage certify: measures the finished graph's recall against brute force, checks its structure, refuses a bad graph.

Written with numpy alone, on purpose: it shares no code with the engines it judges. recall@k is the share of a node's k
listed neighbours whose true similarity reaches that of its true k-th neighbour (less TOLERANCE, so ties are no misses).
A task takes a slice of the sampled nodes through all embeddings (float32: 2 S N d operations in all; what can decide is
computed again in float64) and validates every row of its share of the graph's shards. Memory, however bad the graph:
SLICE_NODES x BLOCK_ROWS float32 scores, TILE_ROWS x BLOCK_ROWS float64 ones, and a block of vectors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphbuild.errors import QualityError, StageError
from graphbuild.graph.tasks import nodes_entry
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.runner.state import require
from graphbuild.store.layout import NEIGHBORS, SIMILARITIES, VECTORS, shard_name
from graphbuild.store.sharded import Array, ShardedArray, node_array
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

TOLERANCE = 2.0**-23  # similarities that a graph rounds to one float32 number are ties
BLOCK_ROWS, TILE_ROWS = 4_096, 128
SLICE_NODES = 1_250
EXACT_FLOOR = 0.999
SLACK = 0.01  # between the recall that an approximate engine is set for and the floor


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    index = recipe.index
    sample = min(index.recall_sample, node_count(manifest))
    built = {
        "graph": manifest["graph"]["fingerprint"],
        "embeddings": manifest["embeddings"]["fingerprint"],
        "min_recall": floor_of(recipe, manifest),
    }
    slices = math.ceil(sample / SLICE_NODES)
    return [
        Task(
            stage="certify",
            name=shard_name(number),
            settings={"sample": index.recall_sample, "seed": index.seed},
            built={**built, "slice": [number, slices]},
        )
        for number in range(slices)
    ]


def floor_of(recipe: Recipe, manifest: Json) -> float:
    if recipe.index.min_recall is not None:
        return recipe.index.min_recall
    return EXACT_FLOOR if manifest["graph"]["engine"] == "exact" else round(recipe.index.recall - SLACK, 6)


def run(task: Task, store: Store, writer: Writer) -> Json:
    number, slices = task.built["slice"]
    manifest = store.manifest()
    shards = shards_of(store, manifest).with_nodes
    for shard in (shards[place] for place in range(number, len(shards), slices)):
        ids = np.arange(shard.first_node, shard.first_node + shard.nodes)
        listed = np.array(store.array(NEIGHBORS.format(shard.name))).astype(np.int64)
        check_lists(ids, listed, node_count(manifest))
        check_similarities(ids, np.array(store.array(SIMILARITIES.format(shard.name))))
    ids = sampled(task.settings["sample"], task.settings["seed"], node_count(manifest))[number::slices]
    recalls, deficits = measure(store, manifest, ids)
    return facts_of(recalls, deficits)


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    manifest = store.manifest()
    floor = floor_of(recipe, manifest)
    certificate = certificate_of(manifest["graph"]["k"], [record["facts"] for record in done])
    if certificate["recall"] < floor:
        raise under_floor(certificate, floor, store)
    return {"recall": certificate}


def under_floor(certificate: Json, floor: float, store: Store) -> QualityError:
    low, high, worst = (certificate[name] for name in ("recall_95_low", "recall_95_high", "worst_node_recall"))
    if store.manifest()["graph"]["engine"] == "exact":  # then files changed, or the machine computes wrongly
        better = f"see what is damaged by `graphbuild verify {store.url}`, and build it anew by `index --force`"
    else:
        better = f"build a better one with `graphbuild index {store.url} --engine exact --force`, or a higher --recall"
    return QualityError(
        f"{store.url}: recall@{certificate['k']} is {certificate['recall']:.6f} (95%: {low:.4f} to {high:.4f}; worst "
        f"node {worst:.4f}), under the floor of {floor}",
        f"the graph is kept in graph/ for inspection; {better}; or lower --min-recall, only if that recall is good "
        "enough for you",
    )


def require_graph(store: Store) -> None:
    """ConfigError when the index is not finished; QualityError when only its recall is under the floor."""
    manifest = store.manifest()
    if "certify" not in manifest["stages"]:
        refuse_under_floor(store, manifest)
    require(store, "certify", "index")


def refuse_under_floor(store: Store, manifest: Json) -> None:
    """QualityError when a graph without a certificate was measured whole, and its recall is under the floor."""
    done = list(records(store, "certify").values())
    if "search" in manifest["stages"] and done and done[0]["built"]["slice"][1] == len(done):
        certificate = certificate_of(manifest["graph"]["k"], [record["facts"] for record in done])
        floor = done[0]["built"]["min_recall"]
        same = all(record["built"]["graph"] == manifest["graph"]["fingerprint"] for record in done)
        if same and certificate["recall"] < floor:
            raise under_floor(certificate, floor, store)


STAGE = Stage(name="certify", title="recall", plan=plan, run=run, finish=finish, entries=("recall",))


def certify_afresh(store: Store, sample: int, seed: int) -> Json:
    """The certificate of another draw of at most SLICE_NODES nodes."""
    manifest = store.manifest()
    ids = sampled(min(sample, SLICE_NODES), seed, node_count(manifest))
    return certificate_of(manifest["graph"]["k"], [facts_of(*measure(store, manifest, ids))])


def facts_of(recalls: Array, deficits: Array) -> Json:
    """What a slice adds to the certificate, from its nodes' recalls and mean deficits [n]."""
    total, worst = float(recalls.sum()), float(recalls.min())
    deficit = round(float(deficits.sum()), 12)  # the order of sums, which differs with threads, shows only below
    return {"nodes": len(recalls), "recall": total, "worst": worst, "deficit": deficit}


def sampled(sample: int, seed: int, nodes: int) -> Array:
    return np.sort(np.random.default_rng(seed).choice(nodes, size=min(sample, nodes), replace=False))


def certificate_of(k: int, facts: list[Json]) -> Json:
    """Recall with its 95% interval and the mean similarity deficit, from the facts of all slices."""
    nodes = sum(fact["nodes"] for fact in facts)
    recall = sum(fact["recall"] for fact in facts) / nodes
    low, high = wilson_interval(recall, nodes)
    return {
        "k": k,
        "sampled_nodes": nodes,
        "recall": round(recall, 9),
        "recall_95_low": round(low, 6),
        "recall_95_high": round(high, 6),
        "worst_node_recall": round(min(fact["worst"] for fact in facts), 6),
        "mean_similarity_deficit": round(sum(fact["deficit"] for fact in facts) / nodes, 9),
        "tolerance": TOLERANCE,
        "reference": "float64 brute force",
    }


def measure(store: Store, manifest: Json, ids: Array) -> tuple[Array, Array]:
    """Recall and mean similarity deficit [n] of nodes `ids` [n]."""
    shards = shards_of(store, manifest)
    listed = node_array(store, shards, NEIGHBORS).take(ids).astype(np.int64)
    check_lists(ids, listed, node_count(manifest))
    vectors = node_array(store, shards, VECTORS)
    queries = _unit(vectors.take(ids))
    rows = zip(listed, queries, strict=True)
    found = np.sort(np.stack([_unit(vectors.take(row)) @ query for row, query in rows]), axis=1)[:, ::-1]
    true = true_similarities(vectors, queries, ids, found)
    recalls: Array = (found >= true[:, -1:] - TOLERANCE).mean(axis=1)
    return recalls, (true - found).mean(axis=1)


def check_lists(ids: Array, listed: Array, nodes: int) -> None:
    """StageError when a neighbour list [n, k] of nodes `ids` names the node itself, one twice, or one out of range."""
    ordered = np.sort(listed, axis=1)
    faults = {
        "names the node itself": (listed == ids[:, None]).any(axis=1),
        "names a node twice": (ordered[:, 1:] == ordered[:, :-1]).any(axis=1),
        "names a node that does not exist": (listed >= nodes).any(axis=1) | (listed < 0).any(axis=1),
    }
    for what, rows in faults.items():
        if rows.any():
            raise StageError(
                f"the neighbour list of node {ids[np.argmax(rows)]} {what} ({rows.sum()} lists do)",
                "rebuild with `graphbuild index --force`",
            )


def check_similarities(ids: Array, similarities: Array) -> None:
    """StageError when a list's similarities [n, k] are not finite, descending cosines."""
    values = similarities.astype(np.float32)
    ordered = (values[:, 1:] <= values[:, :-1]).all(axis=1) & (np.abs(values) <= 1.001).all(axis=1)
    if not ordered.all():
        raise StageError(
            f"the similarities of node {ids[np.argmin(ordered)]} are not descending cosines ({(~ordered).sum()} lists)",
            "rebuild with `graphbuild index --force`",
        )


def true_similarities(vectors: ShardedArray, queries: Array, ids: Array, found: Array) -> Array:
    """The k largest cosines, float64 [n, k], descending, of queries float64 [n, d] (nodes `ids`) to all other nodes.

    found [n, k], descending: those of the lists under judgement; only what reaches the last of them is looked at. A
    float32 product, wrong by at most (d + 8) 2^-24 for unit vectors and by as much for their norms (Higham 2002,
    section 3.1), tells which nodes that may be.
    """
    k, margin = found.shape[1], (vectors.width + 8) * 2.0**-23
    rough, true = queries.astype(np.float32), np.full(found.shape, -np.inf)
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = rough @ _unit(block, np.float32).T
        inside = np.flatnonzero((ids >= first) & (ids < first + len(block)))
        tile[inside, ids[inside] - first] = -np.inf
        for begin in range(0, len(ids), TILE_ROWS):
            rows = slice(begin, begin + TILE_ROWS)
            floor = np.maximum(found[rows, -1:], true[rows, -1:]) - margin
            near = tile[rows] >= floor.astype(np.float32)
            columns = np.flatnonzero(near.any(axis=0))
            if len(columns):
                scores = np.where(near[:, columns], queries[rows] @ _unit(block[columns]).T, -np.inf)
                true[rows] = np.sort(np.concatenate([true[rows], scores], axis=1), axis=1)[:, : -k - 1 : -1]
    return np.asarray(np.maximum(true, found))  # the list itself is among the nodes: rounding must not say otherwise


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a mean of n values in [0, 1] (Wilson 1927; conservative: 0/1 values vary most)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _unit(raw: Array, dtype: type[np.floating[Any]] = np.float64) -> Array:
    exact = raw.astype(dtype)
    return np.asarray(exact / np.linalg.norm(exact, axis=1, keepdims=True))
