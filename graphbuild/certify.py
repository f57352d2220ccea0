"""Stage certify: measures the finished graph's recall against an independent float64 search, and refuses a bad graph.

Written with numpy alone, on purpose: it shares no code with the engines it judges. recall@k is the share of a node's k
listed neighbours whose true similarity reaches that of its true k-th neighbour (less TOLERANCE, so ties are no misses).
Cost: one pass over all embeddings, 2 S N d flop for S sampled nodes; memory: a block and S x (k + BLOCK_ROWS) scores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphbuild.errors import QualityError, StageError
from graphbuild.index import VECTORS, node_count, nodes_entry
from graphbuild.recipe import Recipe
from graphbuild.sharded import Array, ShardedArray, node_array
from graphbuild.stage import Stage, Task
from graphbuild.store import Json, Store, Writer

TOLERANCE = 1e-6
BLOCK_ROWS = 4_096


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    index = recipe.index
    settings = {"sample": index.recall_sample, "seed": index.seed, "min_recall": index.min_recall}
    built = {"graph": manifest["graph"]["fingerprint"], "embeddings": manifest["embeddings"]["fingerprint"]}
    return [Task(stage="certify", name="all", settings=settings, built=built)]


def run(task: Task, store: Store, writer: Writer) -> Json:
    certificate = certificate_of(store, task.settings["sample"], task.settings["seed"])
    if certificate["recall"] < task.settings["min_recall"]:
        raise QualityError(
            f"recall@{certificate['k']} is {certificate['recall']:.6f}, "
            f"under the floor of {task.settings['min_recall']} ({certificate})",
            "the graph is kept in graph/ for inspection; lower --min-recall only if that recall is good enough for you",
        )
    return {"certificate": certificate}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    return {"recall": done[0]["facts"]["certificate"]}


STAGE = Stage(name="certify", title="recall", plan=plan, run=run, finish=finish)


def certificate_of(store: Store, sample: int, seed: int) -> Json:
    """Recall and similarity deficit of `sample` random nodes (all of them when there are fewer), as JSON numbers."""
    manifest = store.manifest()
    nodes = node_count(manifest)
    ids = np.sort(np.random.default_rng(seed).choice(nodes, size=min(sample, nodes), replace=False))
    listed = node_array(store, manifest, "graph/{}.neighbors.npy").take(ids).astype(np.int64)
    vectors = node_array(store, manifest, VECTORS)
    k = listed.shape[1]
    check_lists(ids, listed, nodes)
    queries = _unit(vectors.take(ids))
    true = true_similarities(vectors, queries, ids, k)
    found = np.stack([_unit(vectors.take(row)) @ query for row, query in zip(listed, queries, strict=True)])
    per_node = (found >= true[:, -1:] - TOLERANCE).mean(axis=1)
    low, high = wilson_interval(float(per_node.mean()), len(ids))
    return {
        "k": k,
        "sampled_nodes": len(ids),
        "recall": round(float(per_node.mean()), 9),
        "recall_95_low": round(low, 6),
        "recall_95_high": round(high, 6),
        "worst_node_recall": round(float(per_node.min()), 6),
        "mean_similarity_deficit": round(float((true - np.sort(found, axis=1)[:, ::-1]).mean()), 9),
        "tolerance": TOLERANCE,
        "reference": "float64 brute force",
    }


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


def true_similarities(vectors: ShardedArray, queries: Array, ids: Array, k: int) -> Array:
    """The k largest float64 cosines [n, k], descending, of queries [n, d] (nodes `ids`) to all other nodes."""
    best: Array = np.full((len(ids), k), -np.inf)
    for first, block in vectors.blocks(BLOCK_ROWS):
        scores = queries @ _unit(block).T
        inside = np.flatnonzero((ids >= first) & (ids < first + len(block)))
        scores[inside, ids[inside] - first] = -np.inf
        best = np.concatenate([best, scores], axis=1)
        best = np.partition(best, best.shape[1] - k, axis=1)[:, -k:]
    return np.sort(best, axis=1)[:, ::-1]


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a mean of n values in [0, 1] (Wilson 1927; conservative: 0/1 values vary most)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _unit(raw: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    exact = raw.astype(np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=1, keepdims=True))
