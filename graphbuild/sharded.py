"""One logical array over a store's shard files: rows 0..N-1, memory-mapped, read by block or gathered by id.

Opening costs one file open a shard; nothing is copied until read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from graphbuild.errors import InputError, StageError
from graphbuild.store import Json, Store

Array = np.ndarray[Any, np.dtype[Any]]


class ShardedArray:
    """Shards' .npy files [n_s, width] behind each other. `len()` is the number of rows."""

    def __init__(self, store: Store, names: Sequence[str], lengths: Sequence[int]) -> None:
        self._parts = [store.array(name) for name in names]
        for name, part, length in zip(names, self._parts, lengths, strict=True):
            if len(part) != length:
                raise StageError(
                    f"{store.display(name)} has {len(part):,} rows; the manifest says {length:,}",
                    f"run `graphbuild verify {store.url}`",
                )
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.width = self._parts[0].shape[1]
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, rows: int) -> Iterator[tuple[int, Array]]:
        """(id of the first row, array [<= rows, width]) in order of id, never across a shard's end."""
        for start, part in zip(self.starts, self._parts, strict=False):
            for begin in range(0, len(part), rows):
                yield int(start) + begin, part[begin : begin + rows]

    def table(self) -> tuple[Array, Array, Array, int]:
        """What a compiled loop finds row `id` by: address and first id of each shard, the shard of each 256th id, and
        the bytes of a row. Valid as long as this object lives."""
        addresses = np.array([part.ctypes.data for part in self._parts], np.int64)
        every = np.arange(0, len(self), 256)
        guess = (np.searchsorted(self.starts, every, side="right") - 1).astype(np.int32)
        return addresses, self.starts, guess, self.width * self.dtype.itemsize

    def span(self, first: int, count: int) -> Array:
        """Rows first..first+count-1, copied into one array."""
        shards = range(
            int(np.searchsorted(self.starts, first, side="right")) - 1,
            int(np.searchsorted(self.starts, first + count, side="left")),
        )
        parts = [
            self._parts[s][max(first - int(self.starts[s]), 0) : first + count - int(self.starts[s])] for s in shards
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.width), self.dtype)

    def take(self, ids: Array) -> Array:
        """Rows of any ids [...] in their order, as [..., width]; InputError names an id out of range."""
        flat = np.asarray(ids).reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            bad = flat[(flat < 0) | (flat >= len(self))][0]
            raise InputError(f"node id {bad} is not in 0..{len(self) - 1}", "use ids of this store's nodes")
        result = np.empty((flat.size, self.width), self.dtype)
        shard = np.searchsorted(self.starts, flat, side="right") - 1
        order = np.argsort(shard, kind="stable")
        bounds = np.searchsorted(shard[order], np.arange(len(self._parts) + 1))
        for index in np.unique(shard):
            mine = order[bounds[index] : bounds[index + 1]]
            result[mine] = self._parts[index][flat[mine] - self.starts[index]]
        return result.reshape(*np.shape(ids), self.width)


def node_array(store: Store, manifest: Json, pattern: str) -> ShardedArray:
    """The array of all nodes whose shard files are named by `pattern`, as in "graph/{}.neighbors.npy"."""
    shards = [shard for shard in manifest["shards"] if shard["nodes"]]
    return ShardedArray(store, [pattern.format(s["shard"]) for s in shards], [s["nodes"] for s in shards])
