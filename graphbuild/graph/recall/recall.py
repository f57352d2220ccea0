"""Recall of neighbour lists against brute force, of nodes' or queries' vectors, under any metric.

Written with numpy alone, on purpose: it shares no code with the engines it judges. recall@k is the share of a node's k
listed neighbours whose true score reaches that of its true k-th neighbour (less a tolerance, so ties are no misses).
Time: 2 S N d float32 operations for S nodes, or down to a twelfth of them (recall/narrowing.py); what can decide is
computed again in float64, pair by pair, so that no order of sums and no cut of the work shows. Memory, however bad the
graph: S x BLOCK_ROWS float32 scores, TILE_ROWS x BLOCK_ROWS float64 ones, and a block of vectors, for each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from graphbuild.errors import InputError
from graphbuild.graph.recall.interval import interval
from graphbuild.graph.recall.metric import TOLERANCE, Array, Metric, Rows
from graphbuild.graph.recall.narrowing import Narrowing, may_exceed

Json = dict[str, Any]
COSINE = Metric()
BLOCK_ROWS, TILE_ROWS = 4_096, 64


def sampled(sample: int, seed: int, nodes: int) -> Array:
    """Distinct nodes, in the order in which chance drew them."""
    return np.random.default_rng(seed).choice(nodes, size=min(sample, nodes), replace=False)


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
    found = metric.pairs(vectors, queries, listed)

    def search(part: Rows) -> Array:
        return unlisted(part.blocks(BLOCK_ROWS), queries, ids, listed, found.min(axis=1, keepdims=True), metric)

    parts = vectors.parts()
    with ThreadPoolExecutor(len(parts)) as threads:
        others = list(threads.map(search, parts))
    return judged(found, others, metric.tolerance(queries), distances=metric.name == "l2")


def judged(
    found: Array, others: Sequence[Array], tolerance: Array | float = TOLERANCE, *, distances: bool = False
) -> tuple[Array, Array]:
    """Recall and mean deficit [n] of lists whose nodes have the scores found [n, k], where others, arrays [n, m], hold
    the best of those that exceed the least of a row, of all nodes not listed. distances: the deficit is one of L2."""
    k = found.shape[1]
    true = np.sort(np.concatenate([found, *others], axis=1), axis=1)[:, : -k - 1 : -1]
    found = np.sort(found, axis=1)[:, ::-1]
    there = np.isfinite(found)
    recalls = ((found >= true[:, -1:] - tolerance) & there).mean(axis=1)
    if distances:
        true, found = (-np.sqrt(np.maximum(-scores, 0)) for scores in (true, found))
    missed = np.subtract(true, found, out=np.zeros(found.shape), where=there)
    return recalls, missed.sum(axis=1) / np.maximum(there.sum(axis=1), 1)


@np.errstate(over="ignore", invalid="ignore")  # told with the row
def unlisted(
    blocks: Iterator[tuple[int, Array]],
    queries: Array,
    ids: Array,
    listed: Array,
    least: Array,
    metric: Metric = COSINE,
) -> Array:
    """The best scores of nodes that the lists do not name, float64 [n, k], ascending; -inf where fewer exceed `least`.

    blocks: (id of the first row, rows) of the nodes to look at. queries: prepared, [n, d], of nodes `ids`; listed
    [n, k]; least [n, 1]. A float32 score, wrong by no more than the metric's margin, tells which nodes may exceed it.
    """
    order = np.argsort(-least[:, 0], kind="stable")  # rows for which all vectors are looked at come last, in few tiles
    queries, ids, listed, least = (values[order] for values in (queries, ids, listed, least))
    best, known = np.full(listed.shape, -np.inf), np.concatenate([ids[:, None], listed], axis=1)
    rough = queries.astype(np.float32)
    narrowing = Narrowing(rough, metric)
    for first, block in blocks if len(ids) else ():
        others = metric.prepare(block, np.float32)
        narrowing.look_at(others)
        tile = metric.scores(rough[-1:] if narrowing.helps else rough, others)  # one product is faster than many
        finite = np.isfinite(tile[-1])
        if not finite.all():
            raise not_finite(first + int(np.argmin(finite)))
        margin = metric.margin(rough, others)
        own, place = np.nonzero((known >= first) & (known < first + len(block)))
        place = known[own, place] - first
        for begin in range(0, len(ids), TILE_ROWS):
            rows = slice(begin, begin + TILE_ROWS)
            floor = np.maximum(least[rows], best[rows, :1])
            some = np.arange(len(block))
            if len(tile) == len(ids):
                near = may_exceed(tile[rows], floor - margin[rows])
            else:
                columns = narrowing.columns(rows, floor, margin[rows])
                near = may_exceed(metric.scores(rough[rows], others[columns]), floor - margin[rows])
                some = some[columns]
            mine = slice(*np.searchsorted(own, [begin, begin + TILE_ROWS]).tolist())
            at = np.searchsorted(some, place[mine])
            there = np.append(some, -1)[at] == place[mine]
            near[own[mine][there] - begin, at[there]] = False
            columns = np.flatnonzero(near.any(axis=0))
            if not len(columns):
                continue
            exact = metric.prepare(block[some[columns]])
            query, column = np.nonzero(near[:, columns])
            scores = np.full((len(near), len(columns)), -np.inf)
            scores[query, column] = metric.of_pairs(queries[rows], query, exact, column)
            scores[scores <= least[rows]] = -np.inf
            best[rows] = np.sort(np.concatenate([best[rows], scores], axis=1), axis=1)[:, -listed.shape[1] :]
    return best[np.argsort(order)]


def not_finite(row: int) -> InputError:
    return InputError(
        f"the vector of row {row} has NaN, infinity, or numbers beyond float32", "leave it out, and make the graph anew"
    )


def certificate_of(k: int, nodes: int, recalls: Array, deficits: Array) -> Json:
    """Recall with its 95% interval and the mean similarity deficit, of sampled nodes [n], in the order of their draw,
    out of so many."""
    low, high = interval(recalls, nodes)
    return {
        "k": k,
        "sampled_nodes": len(recalls),
        "recall": round(float(recalls.mean()), 9),
        "recall_95_low": round(low, 6),
        "recall_95_high": round(high, 6),
        "worst_node_recall": round(float(recalls.min()), 6),
        "mean_similarity_deficit": round(float(deficits.mean()), 9),
        "tolerance": TOLERANCE,
        "reference": "float64 brute force",
    }
