"""What the graph says of nodes, as a batch holds it: from a store's memory-mapped arrays, or from sidecars in memory.

Both give, for nodes int64 [B]: neighbors int64 [B, k]; similarities float32 [B, k]; background float32 [B, 2];
node_count int64 [B], the graph's, which sidecars of older versions do not know; and embedding float32 [B, d], of unit
norm, or sketch float32 [B, b].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphbuild.errors import ConfigError
from graphbuild.export.quantized import unit_rows
from graphbuild.export.sidecar import SidecarHeader
from graphbuild.graph.sketch import BYTES, unpack
from graphbuild.store.remote import READERS
from graphbuild.torch.shards import Shard, read_sidecar

if TYPE_CHECKING:
    from graphbuild.graph.sample_graph import SampleGraph

Nodes = NDArray[np.int64]
GRAPH_FIELDS = ("embedding", "sketch", "neighbors", "similarities", "background", "node_count")


class StoreFields:
    """Fields from a store: nothing in memory, some pages of mapped files a node; embeddings as stored, in float16.

    ConfigError: the sidecars were exported from another graph.
    """

    def __init__(self, graph: SampleGraph, sidecar: str, header: SidecarHeader) -> None:
        if graph.fingerprint != header.graph:
            raise ConfigError(
                f"{sidecar} was exported from graph {header.graph!r}; {graph.url} holds {graph.fingerprint!r}",
                "open the graph of the sidecars' store, or run `graphbuild export` on that store again",
            )
        self._graph = graph

    def take(self, nodes: Nodes) -> dict[str, NDArray[Any]]:
        """The fields of nodes [B], by name."""
        neighbors, similarities = self._graph.neighbors(nodes)
        return {
            "neighbors": neighbors,
            "similarities": similarities,
            "background": self._graph.background(nodes),
            "embedding": self._graph.embeddings(nodes),
            "node_count": np.full(len(nodes), len(self._graph) - int(self._graph.gone.sum())),
        }


class SidecarFields:
    """Fields from the columns of all sidecars, in memory as they are stored, once for each of `nodes` that differs.

    Bytes a node: 6 k + 16, and d of int8 embeddings, 2 d of float16, or 64 of sketches.
    """

    def __init__(self, shards: Sequence[Shard], header: SidecarHeader, nodes: Nodes) -> None:
        self._header = header
        self._nodes = np.unique(nodes)
        count = len(self._nodes)
        self._columns: dict[str, NDArray[Any]] = {
            "neighbors": np.empty((count, header.k), np.uint32),
            "similarities": np.empty((count, header.k), np.float16),
            "background": np.empty((count, 2), np.float32),
        }
        if header.embeddings == "sketch:64":
            self._columns["sketch"] = np.empty((count, min(header.d, BYTES)), np.uint8)
        elif header.embeddings != "none":
            self._columns["embedding"] = np.empty((count, header.d), header.embeddings)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self._read, shards))

    def _read(self, shard: Shard) -> None:
        sidecar = read_sidecar(shard, self._header)
        wanted = np.isin(sidecar.node, self._nodes)
        places = np.searchsorted(self._nodes, sidecar.node[wanted])
        for name, column in self._columns.items():
            column[places] = getattr(sidecar, name)[wanted]

    def take(self, nodes: Nodes) -> dict[str, NDArray[Any]]:
        """The fields of nodes [B], by name."""
        places = np.searchsorted(self._nodes, nodes)
        return as_in_batch({name: column[places] for name, column in self._columns.items()}, self._header)


def as_in_batch(stored: Mapping[str, NDArray[Any]], header: SidecarHeader) -> dict[str, NDArray[Any]]:
    """GRAPH_FIELDS as a batch holds them, of rows [B] of a sidecar's columns; those that it lacks are left out."""
    types = {"neighbors": np.int64, "similarities": np.float32, "background": np.float32}
    fields = {name: stored[name].astype(kind) for name, kind in types.items()}
    if header.node_count is not None:
        fields["node_count"] = np.full(len(fields["background"]), header.node_count)
    if "embedding" in stored:
        fields["embedding"] = unit_rows(stored["embedding"])
    if "sketch" in stored:
        fields["sketch"] = unpack(stored["sketch"], np.array(header.sketch_steps, np.float32))
    return fields
