"""Recall of neighbour lists against brute force, of nodes' or queries' vectors, under any metric.

Written with numpy alone, on purpose: it shares no code with the engines it judges. recall@k is the share of a node's k
listed neighbours whose true score reaches that of its true k-th neighbour (less a tolerance, so ties are no misses).
Time: 2 S N d float32 operations for S nodes; what can decide is computed again in float64. Memory, however bad the
graph: S x BLOCK_ROWS float32 scores, TILE_ROWS x BLOCK_ROWS float64 ones, and a block of vectors, for each part.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from graphbuild.errors import InputError
from graphbuild.graph.recall.metric import TOLERANCE, Array, Metric, Rows

Json = dict[str, Any]
COSINE = Metric()
BLOCK_ROWS, TILE_ROWS = 4_096, 128
LEAST = float(np.finfo(np.float32).min)


def sampled(sample: int, seed: int, nodes: int) -> Array:
    return np.sort(np.random.default_rng(seed).choice(nodes, size=min(sample, nodes), replace=False))


def measure(
    vectors: Rows,
    ids: Array,
    listed: Array,
    metric: Metric = COSINE,
    raw: Array | None = None,
) -> tuple[Array, Array]:
    """Recall and mean deficit [n] of the lists int64 [n, k] of nodes `ids`, or of vectors raw [n, d].

    A place below 0 is missed. The deficit is by how much true neighbours have the larger similarity, or of L2 the
    smaller distance.
    """
    queries = metric.prepare(vectors.take(ids) if raw is None else raw)
    found = np.sort(metric.pairs(vectors, queries, listed), axis=1)[:, ::-1]
    true = true_similarities(vectors, queries, ids, found, metric)
    there = np.isfinite(found)
    recalls = ((found >= true[:, -1:] - metric.tolerance(queries)) & there).mean(axis=1)
    if metric.name == "l2":
        true, found = (-np.sqrt(np.maximum(-scores, 0)) for scores in (true, found))
    missed = np.subtract(true, found, out=np.zeros(found.shape), where=there)
    return recalls, missed.sum(axis=1) / np.maximum(there.sum(axis=1), 1)


def true_similarities(vectors: Rows, queries: Array, ids: Array, found: Array, metric: Metric = COSINE) -> Array:
    """The k largest scores, float64 [n, k], descending, of prepared queries [n, d] (nodes `ids`) to all other nodes.

    found [n, k], descending: those of the lists under judgement; only what reaches the last of them is looked at.
    """
    parts = vectors.parts()
    with ThreadPoolExecutor(len(parts)) as threads:
        best = np.concatenate(list(threads.map(lambda part: _search(part, queries, ids, found, metric), parts)), axis=1)
    true = np.sort(best, axis=1)[:, : -found.shape[1] - 1 : -1]
    return np.asarray(np.maximum(true, found))  # the list itself is among the nodes: rounding must not say otherwise


def _search(part: Rows, queries: Array, ids: Array, found: Array, metric: Metric) -> Array:
    """As `true_similarities`, of the nodes that a part's blocks hold; -inf where it has none that can decide.

    A float32 score, wrong by no more than the metric's margin, tells which nodes may reach the last of `found`.
    """
    k = found.shape[1]
    rough, true = queries.astype(np.float32), np.full(found.shape, -np.inf)
    for first, block in part.blocks(BLOCK_ROWS):
        with np.errstate(over="ignore", invalid="ignore"):  # told below, with the row
            others = metric.prepare(block, np.float32)
            tile, margin = metric.scores(rough, others), metric.margin(rough, others)
        if not np.isfinite(tile[0]).all():
            raise not_finite(first + int(np.argmin(np.isfinite(tile[0]))))
        inside = np.flatnonzero((ids >= first) & (ids < first + len(block)))
        tile[inside, ids[inside] - first] = -np.inf
        for begin in range(0, len(ids), TILE_ROWS):
            rows = slice(begin, begin + TILE_ROWS)
            floor = np.maximum(found[rows, -1:], true[rows, -1:]) - margin[rows]
            near = tile[rows] >= np.maximum(floor, LEAST).astype(np.float32)  # never the node itself
            columns = np.flatnonzero(near.any(axis=0))
            if len(columns):
                exact = metric.scores(queries[rows], metric.prepare(block[columns]))
                scores = np.where(near[:, columns], exact, -np.inf)
                true[rows] = np.sort(np.concatenate([true[rows], scores], axis=1), axis=1)[:, : -k - 1 : -1]
    return true


def not_finite(row: int) -> InputError:
    return InputError(
        f"the vector of row {row} has NaN, infinity, or numbers beyond float32", "leave it out, and make the graph anew"
    )


def facts_of(recalls: Array, deficits: Array) -> Json:
    """What a slice adds to the certificate, from its nodes' recalls and mean deficits [n]."""
    total, worst = float(recalls.sum()), float(recalls.min())
    deficit = round(float(deficits.sum()), 12)  # the order of sums, which differs with threads, shows only below
    return {"nodes": len(recalls), "recall": total, "worst": worst, "deficit": deficit}


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


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a mean of n values in [0, 1] (Wilson 1927; conservative: 0/1 values vary most)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
