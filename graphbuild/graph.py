"""SampleGraph: a finished store's similarity graph as a library object.

Opening memory-maps the shard files and copies nothing. Ids are node ids; `block` gives a batch its B x B similarities.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from graphbuild.errors import ConfigError
from graphbuild.index import VECTORS
from graphbuild.sharded import ShardedArray, node_array
from graphbuild.store import Json, Store

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


class SampleGraph:
    """The directed k-nearest-neighbour graph over a store's nodes (distinct captions), with their embeddings.

    len(graph) is the number of nodes M; k the neighbours of each; certificate the measured recall.
    """

    def __init__(
        self,
        manifest: Json,
        embeddings: ShardedArray,
        neighbors: ShardedArray,
        similarities: ShardedArray,
        background: ShardedArray,
    ) -> None:
        self._embeddings, self._neighbors, self._similarities, self._background = (
            embeddings,
            neighbors,
            similarities,
            background,
        )
        self.k: int = neighbors.width
        self.d: int = embeddings.width
        self.encoder: str = manifest["embeddings"]["encoder"]
        self.certificate: Json = manifest["recall"]

    @classmethod
    def open(cls, url: str) -> SampleGraph:
        """Open the graph of a store, a folder or any fsspec URL; ConfigError when it has no certified graph."""
        store = Store(url)
        manifest = store.manifest()
        if "certify" not in manifest["stages"]:
            raise ConfigError(f"{store.url} has no finished graph", f"run `graphbuild index {store.url}` first")
        files = ("graph/{}.neighbors.npy", "graph/{}.similarities.npy", "graph/{}.background.npy")
        return cls(manifest, *(node_array(store, manifest, pattern) for pattern in (VECTORS, *files)))

    def __len__(self) -> int:
        return len(self._neighbors)

    def neighbors(self, nodes: Any) -> tuple[Ids, Float32]:
        """Neighbour ids int64 [..., k] and similarities float32 [..., k], descending, of any nodes [...]."""
        ids = np.asarray(nodes, dtype=np.int64)
        return self._neighbors.take(ids).astype(np.int64), self._similarities.take(ids).astype(np.float32)

    def embeddings(self, nodes: Any) -> Float32:
        """Unit-norm embeddings float32 [..., d] of any nodes [...]."""
        vectors = self._embeddings.take(np.asarray(nodes, dtype=np.int64)).astype(np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))

    def background(self, nodes: Any) -> Float32:
        """Mean and standard deviation [..., 2] of a node's similarity to the nodes that are not its neighbours."""
        return np.asarray(self._background.take(np.asarray(nodes, dtype=np.int64)), dtype=np.float32)

    def block(
        self, nodes: Any, *, source: Literal["embeddings", "edges"] = "embeddings", tau_s: float = 0.1
    ) -> tuple[Float32, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Similarities float32 [B, B] of a batch's nodes [B], and which of them are exact, bool [B, B].

        source="embeddings" takes all from the embeddings (all exact). source="edges" reads only the stored lists: row i
        has node i's edges, float16-exact, and for absent edges, which are *not* similarity 0, its background
        mean + deviation^2 / (2 tau_s): the value whose exponential at temperature tau_s is the mean exponential of
        normally distributed similarities. Equal nodes have similarity 1. Cost: 2 B^2 d flop, or B k log B.
        """
        ids = np.asarray(nodes, dtype=np.int64)
        if source == "embeddings":
            vectors = self.embeddings(ids)
            return np.clip(vectors @ vectors.T, -1, 1), np.ones((len(ids), len(ids)), bool)
        mean, deviation = self.background(ids).T
        values = np.repeat((mean + deviation**2 / (2 * tau_s))[:, None], len(ids), axis=1).clip(-1, 1)
        neighbor_ids, similarities = self.neighbors(ids)
        distinct, inverse = np.unique(ids, return_inverse=True)
        place = np.searchsorted(distinct, neighbor_ids).clip(max=len(distinct) - 1)
        row, slot = np.nonzero(distinct[place] == neighbor_ids)
        by_distinct = np.full((len(ids), len(distinct)), np.nan, np.float32)
        by_distinct[row, place[row, slot]] = similarities[row, slot]
        by_distinct[np.arange(len(ids)), inverse] = 1
        edges = by_distinct[:, inverse]
        known = ~np.isnan(edges)
        values[known] = edges[known]
        return values.astype(np.float32), known
