"""Edges: a sparse graph over nodes in compressed rows (CSR), its filters, and the forms in which other tools take it.

Filters return new Edges; nothing is searched again. Memory: 8 bytes a node and 8 an edge, and as much for a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphbuild.errors import ConfigError
from graphbuild.knn.lists import key_of, node_of, score_of
from graphbuild.machine.compiled import compiled, inlined

if TYPE_CHECKING:
    import networkx
    import scipy.sparse
    import torch

NETWORKX_EDGES = 2_000_000


@dataclass(frozen=True)
class Edges:
    """Directed edges of M nodes: node i's are neighbors[offsets[i]:offsets[i + 1]], by descending similarity.

    offsets int64 [M + 1]; neighbors uint32 [E], node ids; similarities float32 [E], cosines. len(edges) is E.
    """

    offsets: NDArray[np.int64]
    neighbors: NDArray[np.uint32]
    similarities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.neighbors)

    @property
    def nodes(self) -> int:
        return len(self.offsets) - 1

    def threshold(self, least: float) -> Edges:
        """The edges whose similarity is at least `least`."""
        return self._kept(self.similarities >= least)

    def mutual(self) -> Edges:
        """The edges whose reverse is an edge too: i lists j and j lists i."""
        return self._kept(_has_reverse(self.offsets, self.neighbors))

    def symmetrized(self) -> Edges:
        """All edges and their reverses, each once: i and j are joined when either lists the other."""
        one_sided = ~_has_reverse(self.offsets, self.neighbors)
        counts = np.diff(self.offsets) + np.bincount(self.neighbors[one_sided], minlength=self.nodes)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        keys = _with_reverses(self.offsets, self.neighbors, self.similarities, one_sided, offsets)
        return Edges(offsets, *_unpacked(keys))

    def _kept(self, kept: NDArray[np.bool_]) -> Edges:
        before = np.concatenate([[0], np.cumsum(kept)])
        return Edges(before[self.offsets], self.neighbors[kept], self.similarities[kept])

    def sources(self) -> NDArray[np.int64]:
        """The node that each edge leaves, int64 [E]."""
        return np.repeat(np.arange(self.nodes), np.diff(self.offsets))

    def to_scipy(self) -> scipy.sparse.csr_array:
        """[M, M] with similarities as values, columns ascending in each row."""
        import scipy.sparse

        matrix = scipy.sparse.csr_array(
            (self.similarities, self.neighbors.astype(np.int64), self.offsets), shape=(self.nodes, self.nodes)
        )
        return matrix.sorted_indices()

    def to_torch(self) -> torch.Tensor:
        """A sparse CSR tensor [M, M], float32."""
        import torch

        matrix = self.to_scipy()
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data),
            size=(self.nodes, self.nodes),
        )

    def to_edge_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """PyTorch Geometric's edge_index int64 [2, E] (from, to) and edge_weight float32 [E]."""
        import torch

        pairs = np.stack([self.sources(), self.neighbors.astype(np.int64)])
        return torch.from_numpy(pairs), torch.from_numpy(self.similarities.copy())

    def to_networkx(self) -> networkx.DiGraph:
        """A directed graph with the edge attribute `similarity`; ConfigError beyond NETWORKX_EDGES edges."""
        import networkx

        if len(self) > NETWORKX_EDGES:
            raise ConfigError(
                f"{len(self):,} edges are too many for networkx, at some 300 bytes each",
                "filter first, as by threshold(), or take to_scipy()",
            )
        graph: Any = networkx.DiGraph()
        graph.add_nodes_from(range(self.nodes))
        triples = zip(self.sources().tolist(), self.neighbors.tolist(), self.similarities.tolist(), strict=True)
        graph.add_weighted_edges_from(triples, weight="similarity")
        return graph


@compiled()
def _has_reverse(offsets: Any, neighbors: Any) -> Any:
    found = np.zeros(len(neighbors), np.bool_)
    for i in range(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            j = neighbors[e]
            reverse = False
            for f in range(offsets[j], offsets[j + 1]):
                reverse |= neighbors[f] == i
            found[e] = reverse
    return found


@compiled()
def _with_reverses(offsets: Any, neighbors: Any, similarities: Any, one_sided: Any, into: Any) -> Any:
    """Keys of all edges and of the reverses of the one-sided ones, each row in descending order."""
    keys = np.empty(into[-1], np.int64)
    filled = into[:-1].copy()
    for i in range(len(offsets) - 1):
        for e in range(offsets[i], offsets[i + 1]):
            j = neighbors[e]
            keys[filled[i]] = key_of(similarities[e], j)
            filled[i] += 1
            if one_sided[e]:
                keys[filled[j]] = key_of(similarities[e], i)
                filled[j] += 1
    for i in range(len(offsets) - 1):
        row = keys[into[i] : into[i + 1]]
        row[:] = np.sort(row)[::-1]
    return keys


@compiled()
def _unpacked(keys: Any) -> Any:
    neighbors = np.empty(len(keys), np.uint32)
    similarities = np.empty(len(keys), np.float32)
    for e in range(len(keys)):
        neighbors[e] = node_of(keys[e])
        similarities[e] = score_of(keys[e])
    return neighbors, similarities


@compiled()
def overlay(nodes: Any, neighbors: Any, similarities: Any, values: Any, known: Any) -> None:
    """Write what is stored into a batch's block: values float32 [B, B] and known bool [B, B], in place.

    nodes int64 [B]; neighbors [B, k], integers of any kind, and similarities float32 [B, k] of each. Row i gets node
    i's edges, those of others to it that it does not list, and 1 where column j has the same node.
    """
    count = len(nodes)
    slots = 2
    while slots < 2 * count:
        slots *= 2
    first = np.full(slots, -1, np.int32)  # a hash table: the last place of a node in the batch
    same = np.full(count, -1, np.int32)  # the place before with the same node
    for i in range(count):
        slot = _slot(nodes, first, nodes[i])
        same[i] = first[slot]
        first[slot] = i
    for i in range(count):
        place = first[_slot(nodes, first, nodes[i])]
        while place >= 0:
            values[i, place] = 1
            known[i, place] = True
            place = same[place]
        for q in range(neighbors.shape[1]):
            place = first[_slot(nodes, first, neighbors[i, q])]
            while place >= 0:
                values[i, place] = similarities[i, q]
                known[i, place] = True
                place = same[place]
    for i in range(count):
        for j in range(count):
            if known[i, j] and not known[j, i]:
                values[j, i] = values[i, j]
                known[j, i] = True


@inlined
def _slot(nodes: Any, first: Any, node: Any) -> Any:
    mask = len(first) - 1
    slot = ((node * 0x9E3779B1) >> 7) & mask
    while first[slot] >= 0 and nodes[first[slot]] != node:
        slot = (slot + 1) & mask
    return slot
