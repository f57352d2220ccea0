"""SampleGraph: a finished store's similarity graph as a library object.

Opening memory-maps the shard files and copies nothing. Ids are node ids; `block` gives a batch its B x B similarities.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import pyarrow.compute as pc

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.certify import refuse_under_floor
from graphbuild.graph.tasks import gone_nodes
from graphbuild.nodes.samples import MORE
from graphbuild.store.layout import BACKGROUND, BASIS, NEIGHBORS, SAMPLES, SIMILARITIES, SKETCH, VECTORS
from graphbuild.store.sharded import ShardedArray, node_array
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store

if TYPE_CHECKING:
    import networkx
    import scipy.sparse
    import torch

    from graphbuild.graph.edges import Edges

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
Source = Literal["embeddings", "sketch", "edges"]


class SampleGraph:
    """The directed k-nearest-neighbour graph over a store's nodes (distinct captions), with their embeddings.

    len(graph) is the number of nodes M; k the neighbours of each; d the width of an embedding; certificate the measured
    recall; fingerprint says from what the graph was built, and changes with it. Pickled it is its URL, and opened again
    there.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(url)
        self._manifest: Json = self._store.manifest()
        if "certify" not in self._manifest["stages"]:
            refuse_under_floor(self._store, self._manifest)
            raise ConfigError(f"{self._store.url} has no finished graph", f"run `graphbuild index {url}` first")
        self.url = self._store.url
        self.k: int = self._manifest["graph"]["k"]
        self.d: int = self._manifest["embeddings"]["d"]
        self.encoder: str = self._manifest["embeddings"]["encoder"]
        self.certificate: Json = self._manifest["recall"]
        self.fingerprint: str = self._manifest["graph"]["fingerprint"]
        self._shards = shards_of(self._store, self._manifest)
        self._neighbors = self._array(NEIGHBORS)
        self._similarities = self._array(SIMILARITIES)

    @classmethod
    def open(cls, url: str) -> SampleGraph:
        """Open the graph of a store, a folder or any fsspec URL; ConfigError when it has no certified graph."""
        return cls(url)

    def __reduce__(self) -> Any:
        return SampleGraph, (self.url,)

    def __len__(self) -> int:
        return len(self._neighbors)

    def _array(self, pattern: str) -> ShardedArray:
        return node_array(self._store, self._shards, pattern)

    @cached_property
    def gone(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [M]: nodes that no sample has any more, for its tar is gone; no other node's list names one."""
        if not self._manifest.get("gone"):
            return np.zeros(len(self), bool)
        return gone_nodes(self._store, self._shards.with_nodes.names)

    @cached_property
    def _embeddings(self) -> ShardedArray:
        return self._array(VECTORS)

    @cached_property
    def _background(self) -> ShardedArray:
        return self._array(BACKGROUND)

    @cached_property
    def _sketches(self) -> ShardedArray:
        if not self._store.exists(BASIS):
            raise ConfigError(f"{self.url} was built without sketches", f"run `graphbuild index {self.url} --force`")
        return self._array(SKETCH)

    # -- nodes

    def neighbors(self, nodes: Any) -> tuple[Ids, Float32]:
        """Neighbour ids int64 [..., k] and similarities float32 [..., k], descending, of any nodes [...].

        InputError, here and below: nodes that are not integers, as a mask is not, or out of range.
        """
        ids = _as_ids(nodes)
        return self._neighbors.take(ids).astype(np.int64), self._similarities.take(ids).astype(np.float32)

    def embeddings(self, nodes: Any) -> Float32:
        """Unit-norm embeddings float32 [..., d] of any nodes [...]."""
        vectors = self._embeddings.take(_as_ids(nodes)).astype(np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))

    def sketches(self, nodes: Any) -> Float32:
        """Sketches float32 [..., b] of any nodes [...]: vectors whose products approximate similarities.

        64 bytes a node (docs/reference/format.md): 0.8 GB for 12.4 million nodes, where embeddings take 9.5 GB.
        """
        from graphbuild.graph.sketch import unpack

        return unpack(self._sketches.take(_as_ids(nodes)), self._sketch_steps)

    @cached_property
    def _sketch_steps(self) -> Float32:
        from graphbuild.graph.sketch import steps

        return steps(self._store.array(BASIS))

    def background(self, nodes: Any) -> Float32:
        """Mean and standard deviation [..., 2] of a node's similarity to the nodes that are not its neighbours."""
        return np.asarray(self._background.take(_as_ids(nodes)), dtype=np.float32)

    @cached_property
    def in_degrees(self) -> Ids:
        """How many lists name each node, int64 [M], but for those of nodes that are `gone`. One pass over the lists; 8
        bytes a node."""
        counts = np.zeros(len(self), np.int64)
        for first, ids, _ in self.edge_blocks():
            ids = ids[~self.gone[first : first + len(ids)]]
            np.add.at(counts, ids.reshape(-1), 1)  # a bincount would go over all nodes for every shard
        return counts

    @cached_property
    def nearest_similarities(self) -> Float32:
        """The similarity of each node to its nearest neighbour, float32 [M]."""
        return np.concatenate([values[:, 0].astype(np.float32) for _, _, values in self.edge_blocks()])

    # -- samples

    @cached_property
    def _nodes_of_rows(self) -> tuple[Ids, Ids, Ids]:
        """The node of each sample [N]; and of further captions of samples the rows and nodes."""
        firsts, rows, nodes = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for first, name in zip(self._shards.column("first_row"), self._shards.names, strict=True):
            table = self._store.table(SAMPLES.format(name), ["node", f"{MORE}.list.element.node"])
            firsts.append(pl.Series(table["node"]).fill_null(-1).to_numpy())
            if MORE in table.column_names:
                more = table[MORE].combine_chunks()
                rows.append(first + np.asarray(pc.list_parent_indices(more)))
                nodes.append(np.asarray(pc.struct_field(more.flatten(), "node")))
        return np.concatenate(firsts), np.concatenate(rows), np.concatenate(nodes)

    @cached_property
    def _rows_by_node(self) -> tuple[Ids, Ids]:
        firsts, rows, nodes = self._nodes_of_rows
        row, node = np.concatenate([np.arange(len(firsts)), rows]), np.concatenate([firsts, nodes])
        order = np.lexsort((row, node))
        return row[order], np.searchsorted(node[order], np.arange(len(self) + 1))

    def sample_nodes(self) -> Ids:
        """The node of each sample (of its first caption, if it has several), int64 [N] by row; -1 where it has no
        usable caption. Read once: 8 bytes a sample."""
        return self._nodes_of_rows[0]

    @property
    def is_plural(self) -> bool:
        """Whether any sample has several captions. Read as `sample_nodes`."""
        return len(self._nodes_of_rows[1]) > 0

    def samples_of(self, node: int) -> Ids:
        """The rows of the samples that have a node's text as a caption, int64, ascending. The first call sorts all
        captions: 24 bytes each."""
        if not 0 <= node < len(self):
            raise InputError(f"node id {node} is not in 0..{len(self) - 1}", "use ids of this store's nodes")
        rows, starts = self._rows_by_node
        return np.unique(rows[starts[node] : starts[node + 1]])

    # -- a batch

    def block(
        self, nodes: Any, *, source: Source = "embeddings", tau_s: float = 0.1
    ) -> tuple[Float32, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Similarities float32 [B, B] of a batch's nodes [B], and which of them are exact, bool [B, B].

        source="embeddings" takes all from the embeddings (all exact; 2 B^2 d flop). The others take what either node
        lists of the other, float16-exact, and what is absent there, which is *not* similarity 0, from "sketch":
        products of 64-byte sketches (256 B^2 flop); or "edges": the node's background mean + deviation^2 / (2 tau_s),
        the value whose exponential at temperature tau_s is the mean exponential of normally distributed similarities.
        Equal nodes have similarity 1. How near the targets come: docs/explanation/targets.md.
        """
        ids = _as_ids(nodes)
        if source == "embeddings":
            vectors = self.embeddings(ids)
            return _cosines(vectors), np.ones((len(ids), len(ids)), bool)
        if source == "sketch":
            vectors = self.sketches(ids)
            values = _cosines(vectors)
        elif source == "edges":
            mean, deviation = self.background(ids).T
            values = np.empty((len(ids), len(ids)), np.float32)
            values[:] = np.minimum(mean + deviation**2 / (2 * tau_s), 1)[:, None]
        else:
            raise ConfigError(f"source = {source!r}", 'pass "embeddings", "sketch" or "edges"')
        from graphbuild.graph.edges import overlay

        known = np.zeros(values.shape, bool)
        overlay(ids, self._neighbors.take(ids), self._similarities.take(ids).astype(np.float32), values, known)
        return values, known

    # -- the whole graph

    def edge_blocks(self) -> Iterator[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """(first node, neighbors uint32 [n, k], similarities float16 [n, k]) a shard, in order, mapped, not copied."""
        largest = len(self)
        for (first, neighbors), (_, similarities) in zip(
            self._neighbors.blocks(largest), self._similarities.blocks(largest), strict=True
        ):
            yield first, neighbors, similarities

    def to_knn(self) -> tuple[Ids, Float32]:
        """Indices int64 and cosine distances float32, both [M, k + 1]: each node itself, at 0, then its list.

        As umap, scikit-learn and others take known neighbours: docs/how-to/elsewhere.md. Memory: 12 bytes an entry.
        """
        indices = np.empty((len(self), self.k + 1), np.int64)
        distances = np.zeros((len(self), self.k + 1), np.float32)
        indices[:, 0] = np.arange(len(self))
        for first, neighbors, similarities in self.edge_blocks():
            nodes = slice(first, first + len(neighbors))
            indices[nodes, 1:] = neighbors
            np.maximum(1 - similarities.astype(np.float32), 0, out=distances[nodes, 1:])  # rounded, 1 may be exceeded
        return indices, distances

    def edges(self, least: float = -1) -> Edges:
        """The edges of similarity `least` or more, copied into memory: 8 bytes each."""
        from graphbuild.graph.edges import Edges

        blocks = [(ids, values.astype(np.float32)) for _, ids, values in self.edge_blocks()]
        kept = [(ids, values, values >= least) for ids, values in blocks]
        counts = np.concatenate([mask.sum(axis=1) for _, _, mask in kept])
        return Edges(
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate([ids[mask] for ids, _, mask in kept]),
            np.concatenate([values[mask] for _, values, mask in kept]),
        )

    def threshold(self, least: float) -> Edges:
        """The edges whose similarity is at least `least`."""
        return self.edges(least)

    def mutual(self) -> Edges:
        """The edges whose reverse is an edge too."""
        return self.edges().mutual()

    def symmetrized(self) -> Edges:
        """All edges and their reverses, each once."""
        return self.edges().symmetrized()

    def to_scipy(self) -> scipy.sparse.csr_array:
        """`Edges.to_scipy` of all edges."""
        return self.edges().to_scipy()

    def to_torch(self) -> torch.Tensor:
        """`Edges.to_torch` of all edges."""
        return self.edges().to_torch()

    def to_edge_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`Edges.to_edge_index` of all edges."""
        return self.edges().to_edge_index()

    def to_networkx(self) -> networkx.DiGraph:
        """`Edges.to_networkx` of all edges; for small graphs."""
        return self.edges().to_networkx()


def _as_ids(nodes: Any) -> Ids:
    """Node ids [...] as int64; InputError for a mask or floats, which a cast would take for other nodes."""
    ids = np.asarray(nodes)
    if ids.size and ids.dtype.kind not in "iu":
        raise InputError(
            f"node ids are {ids.dtype} {list(ids.shape)}", "pass integers; of a mask over nodes, np.flatnonzero(mask)"
        )
    return ids.astype(np.int64, copy=False)


def _cosines(vectors: Float32) -> Float32:
    """Products [B, B] of rows of unit norm, kept in [-1, 1]."""
    values = vectors @ vectors.T
    return np.clip(values, -1, 1, out=values)
