"""The nodes nearest to any vector, found with the graph itself as the index.

Up to EXACT_NODES nodes one pass over all embeddings, exact. Beyond, best-first search (as in HNSW's lowest layer;
Malkov and Yashunin, arXiv 1603.09320): from ENTRIES evenly spaced nodes along the stored lists, until the POOL best
known nodes have all been looked at. That reads the lists and vectors of some thousand nodes, however many there are,
and may miss some of the true ones (tests/graph/test_by_vector.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphbuild.graph.sample_graph import Float32, Ids, SampleGraph
from graphbuild.store.sharded import Array

EXACT_NODES = 500_000
ENTRIES = 8_192
POOL = 192
LOOKED_AT = 16  # nodes whose lists are read at a time
BLOCK = 65_536


class VectorSearch:
    """Searches one graph; the entries' embeddings (6 d bytes each) are read at the first approximate search."""

    def __init__(self, graph: SampleGraph, exact_nodes: int = EXACT_NODES) -> None:
        self.graph = graph
        self.exact = len(graph) <= exact_nodes
        self._entries: tuple[Ids, Float32] | None = None

    def nearest(self, vector: Array, count: int) -> tuple[Ids, Float32]:
        """Ids int64 and similarities float32, [<= count] each, descending, ties by smaller id, of a vector [d]; of
        nodes that a sample has."""
        query = vector.astype(np.float32) / np.linalg.norm(vector)
        ids, scores = self._all(query, count) if self.exact else self._walk(query, max(count, POOL))
        return ids[:count], np.clip(scores[:count], -1, 1)

    def _all(self, query: Array, count: int) -> tuple[Ids, Float32]:
        ids, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for begin in range(0, len(self.graph), BLOCK):
            part = np.arange(begin, min(begin + BLOCK, len(self.graph)))
            part = part[~self.graph.gone[part]]
            ids, scores = _best(np.append(ids, part), np.append(scores, self.graph.embeddings(part) @ query), count)
        return ids, scores

    def _walk(self, query: Array, pool: int) -> tuple[Ids, Float32]:
        if self._entries is None:
            entries = np.linspace(0, len(self.graph) - 1, min(ENTRIES, len(self.graph))).astype(np.int64)
            self._entries = entries, self.graph.embeddings(entries)
        entries, vectors = self._entries
        there = ~self.graph.gone[entries]
        entries, vectors = entries[there], vectors[there]
        ids, scores = _best(entries, vectors @ query, pool)
        looked_at: Any = np.empty(0, np.int64)
        while True:
            ahead = ids[~np.isin(ids, looked_at)][:LOOKED_AT]
            if not len(ahead):
                return ids, scores
            looked_at = np.append(looked_at, ahead)
            near = np.setdiff1d(self.graph.neighbors(ahead)[0], ids)
            ids, scores = _best(np.append(ids, near), np.append(scores, self.graph.embeddings(near) @ query), pool)


def _best(ids: Ids, scores: Float32, count: int) -> tuple[Ids, Float32]:
    """The `count` of highest score, descending, ties by smaller id."""
    if len(ids) > 4 * count:  # all ties of the last one stay
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        ids, scores = ids[scores >= least], scores[scores >= least]
    order = np.lexsort((ids, -scores))[:count]
    return ids[order], scores[order]
