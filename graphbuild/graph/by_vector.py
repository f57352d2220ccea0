"""The nodes nearest to any vector.

Up to EXACT_NODES nodes one pass over all embeddings, exact. Beyond, one over all sketches (graph/sketch.py), 64 bytes a
node; then the embeddings of those whose sketches are best are compared, POOL for each node that is asked for. That may
miss some of the true nearest (tests/graph/test_by_vector.py). Time: 17 ns of one core a node (EPYC, AVX2), with the
sketches in memory.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import carray

from graphbuild.graph.sample_graph import Float32, Ids, SampleGraph
from graphbuild.graph.sketch import DIMENSIONS, split
from graphbuild.knn.intrinsics import pointer, prefetch
from graphbuild.machine.compiled import compiled, inlined
from graphbuild.store.layout import BASIS, SKETCH, VECTORS
from graphbuild.store.sharded import Array, node_array
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store

EXACT_NODES = 500_000
POOL = 16  # nodes compared by their embeddings for each that is asked for
BLOCK = 65_536
AHEAD = 24  # sketches that are fetched before they are needed
WIDE, NARROW = split(DIMENSIONS)


class VectorSearch:
    """Searches one graph; exactly also where its store has no sketches."""

    def __init__(self, graph: SampleGraph, exact_nodes: int = EXACT_NODES) -> None:
        self.graph, self._store = graph, Store(graph.url)
        self.exact = len(graph) <= exact_nodes or not self._store.exists(BASIS)
        if not self.exact:
            shards = shards_of(self._store, self._store.manifest())
            self._sketches = node_array(self._store, shards, SKETCH)
            self._vectors = node_array(self._store, shards, VECTORS, few=True)

    def nearest(self, vector: Array, count: int) -> tuple[Ids, Float32]:
        """Ids int64 and similarities float32, [<= count] each, descending, ties by smaller id, of a vector [d]; of
        nodes that a sample has."""
        query = vector.astype(np.float32) / np.linalg.norm(vector)
        if self.exact:
            ids, scores = self._all(query, count)
        else:
            ids = self._by_sketches(query, POOL * max(count, POOL))
            vectors = self._vectors.take(ids).astype(np.float32)
            ids, scores = _best(ids, vectors @ query / np.linalg.norm(vectors, axis=1), count)
        return ids, np.clip(scores, -1, 1)

    def _all(self, query: Array, count: int) -> tuple[Ids, Float32]:
        ids, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for begin in range(0, len(self.graph), BLOCK):
            part = np.arange(begin, min(begin + BLOCK, len(self.graph)))
            part = part[~self.graph.gone[part]]
            ids, scores = _best(np.append(ids, part), np.append(scores, self.graph.embeddings(part) @ query), count)
        return ids, scores

    def _by_sketches(self, query: Array, pool: int) -> Ids:
        """The nodes whose sketches have the largest products with a unit vector [d], int64 [<= pool], in any order."""
        basis = self._store.array(BASIS)
        worth = basis @ query / np.square(basis).sum(axis=1)  # of a code of 1 in each coordinate
        weights = np.rint(worth * (32_767 / max(np.abs(worth).max(), 1e-30))).astype(np.int16)
        wide, _ = split(len(basis))
        addresses, starts, _, width = self._sketches.table()
        threads = min(os.cpu_count() or 1, len(addresses))
        cuts = np.linspace(0, len(addresses), threads + 1).astype(int).tolist()

        def scan(begin: int, end: int) -> tuple[Array, Array]:
            ids, scores = np.full(pool, -1), np.full(pool, np.iinfo(np.int32).min, np.int32)
            shards = addresses[begin:end], starts[begin : end + 1], width
            _offer_all(*shards, self.graph.gone, wide, weights, ids, scores)
            return ids, scores

        with ThreadPoolExecutor(threads) as readers:
            found = list(readers.map(scan, cuts, cuts[1:]))
        ids, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        ids = ids[np.argsort(-scores.astype(np.int64), kind="stable")[:pool]]
        return np.asarray(ids[ids >= 0])


def _best(ids: Ids, scores: Float32, count: int) -> tuple[Ids, Float32]:
    """The `count` of highest score, descending, ties by smaller id."""
    if len(ids) > 4 * count:  # all ties of the last one stay
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        ids, scores = ids[scores >= least], scores[scores >= least]
    order = np.lexsort((ids, -scores))[:count]
    return ids[order], scores[order]


@compiled()
def _offer_all(
    addresses: Any, starts: Any, width: Any, gone: Any, wide: Any, weights: Any, ids: Any, scores: Any
) -> None:
    """Keeps in `ids` and `scores`, a heap with the least first, the nodes of largest product. Sketches, uint8 [n, w],
    lie at each address, those of nodes from `starts` on. weights: int16 [b]."""
    half = width - wide
    usual = wide == WIDE and half == NARROW // 2
    for shard in range(len(addresses)):
        sketches = carray(pointer(addresses[shard]), (starts[shard + 1] - starts[shard], width), np.uint8)
        for i in range(len(sketches)):
            prefetch(addresses[shard] + (i + AHEAD) * width)
            if usual:
                score = _product(sketches, i, WIDE, NARROW // 2, weights)
            else:
                score = _product(sketches, i, wide, half, weights)
            if score <= scores[0] or gone[starts[shard] + i]:
                continue
            at, below = 0, 1
            while below < len(scores):
                if below + 1 < len(scores) and scores[below + 1] < scores[below]:
                    below += 1
                if scores[below] >= score:
                    break
                scores[at], ids[at] = scores[below], ids[below]
                at, below = below, 2 * below + 1
            scores[at], ids[at] = score, starts[shard] + i


@inlined
def _product(sketches: Any, i: Any, wide: Any, half: Any, weights: Any) -> Any:
    """Sketch i's codes times their weights, int32, more by 8 times those of the narrow ones. Sizes that are constants
    take a tenth of the time; so do numbers that never have 64 bits."""
    total = np.int32(0)
    for j in range(wide):
        total = np.int32(total + np.int32(np.int32(np.int8(sketches[i, j])) * np.int32(weights[j])))
    for j in range(half):
        code = np.int32(sketches[i, wide + j] & np.uint8(15))
        total = np.int32(total + np.int32(code * np.int32(weights[wide + j])))
    for j in range(half):
        code = np.int32(sketches[i, wide + j] >> np.uint8(4))
        total = np.int32(total + np.int32(code * np.int32(weights[wide + half + j])))
    return total
