"""One logical array over a store's shard files: rows 0..N-1, memory-mapped, read by block or gathered by id.

A shard's file is opened (of an object store: copied to this machine) when its rows are first asked for, so a task pays
for the shards that it reads, not for all. `table` opens them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from graphbuild.errors import InputError, StageError
from graphbuild.store.mapped import read_soon
from graphbuild.store.remote import READERS
from graphbuild.store.shards import Shards
from graphbuild.store.store import Store

Array = np.ndarray[Any, np.dtype[Any]]
LISTED_FROM = 100  # shards

APART = 32  # rows of which one is wanted, at most, where others are not to be read with it
REQUEST_BYTES = 1 << 18  # what an object store sends while one more small request is served, of READERS at a time


class ShardedArray:
    """Files `pattern` of these names, .npy arrays [n_s, width] behind each other. `len()` is the number of rows.

    few: `take` asks an object store for single rows, as long as only some of many shards are wanted, in place of files;
    and a disk for all of them at once, without what lies between them, of which a reader of ever more rows has use.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        lengths: Sequence[int] | Array,
        pattern: str = "{}",
        *,
        few: bool = False,
    ) -> None:
        self._store, self._names, self._pattern, self._few = store, names, pattern, few
        self._opened: dict[int, Array] = {}
        self._told: dict[str, tuple[int, object]] = {}  # of an object store's files, once many are wanted
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.width = self._part(0).shape[1]
        self.dtype = self._part(0).dtype

    def _part(self, number: int) -> Array:
        if number not in self._opened:
            name, length = self._pattern.format(self._names[number]), int(self.starts[number + 1] - self.starts[number])
            part = self._store.array(name, self._told.get(name))
            if len(part) != length:
                raise StageError(
                    f"{self._store.display(name)} has {len(part):,} rows; the manifest says {length:,}",
                    f"run `graphbuild verify {self._store.url}`",
                )
            self._opened[number] = part
        return self._opened[number]

    def _parts(self, numbers: Iterable[int]) -> list[Array]:
        """Some shards' arrays, those of an object store fetched side by side."""
        wanted = list(numbers)
        if self._store.is_local or len(wanted) < 2:
            return [self._part(number) for number in wanted]
        if len(wanted) > LISTED_FROM and not self._told:  # a listing tells as much as a thousand requests
            self._told = self._store.listed(self._pattern.rpartition("/")[0])
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._part, wanted))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, rows: int, shards: range | None = None) -> Iterator[tuple[int, Array]]:
        """(id of the first row, array [<= rows, width]) in order of id, never across a shard's end; of some shards, or
        all."""
        shards = range(len(self._names)) if shards is None else shards
        for first in range(shards.start, shards.stop, READERS):
            some = range(first, min(first + READERS, shards.stop))
            for number, part in zip(some, self._parts(some), strict=True):
                for begin in range(0, len(part), rows):
                    yield int(self.starts[number]) + begin, part[begin : begin + rows]

    def parts(self) -> list[ShardedArray]:
        """What a search may take side by side: all of it, as a task has one core."""
        return [self]

    def table(self) -> tuple[Array, Array, Array, int]:
        """What a compiled loop finds row `id` by: address and first id of each shard, the shard of each 256th id, and
        the bytes of a row. Valid as long as this object lives."""
        return self._table

    @cached_property
    def _table(self) -> tuple[Array, Array, Array, int]:
        addresses = np.array([part.ctypes.data for part in self._parts(range(len(self._names)))], np.int64)
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
            part[max(first - int(self.starts[s]), 0) : first + count - int(self.starts[s])]
            for s, part in zip(shards, self._parts(shards), strict=True)
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
        places = flat - self.starts[shard]
        order = np.argsort(shard, kind="stable")
        if self._few and not self._store.is_local:
            alone = self._alone(shard)
            names, at_rows = [self._pattern.format(self._names[s]) for s in shard[alone]], places[alone]
            with ThreadPoolExecutor(READERS) as pool:
                rows = pool.map(self._store.rows, names, at_rows.tolist(), (at_rows + 1).tolist())
                for at, row in zip(np.flatnonzero(alone), rows, strict=True):
                    result[at] = row[0]
            order = order[~alone[order]]
        numbers, begins = np.unique(shard[order], return_index=True)
        wanted = np.split(order, begins[1:])
        parts = self._parts(numbers.tolist())
        for part, mine in zip(parts if self._few else (), wanted, strict=False):
            if len(mine) * APART <= len(part):
                read_soon(part, places[mine])
        for part, mine in zip(parts, wanted, strict=False):
            result[mine] = part[places[mine]]
        return result.reshape(*np.shape(ids), self.width)

    def _alone(self, shard: Array) -> Array:
        """Which rows, of these shards [n], a request each reads sooner than one for all of the shard, bool [n]."""
        counts = np.bincount(shard, minlength=len(self._names))
        whole = np.diff(self.starts) * self.width * self.dtype.itemsize <= counts * REQUEST_BYTES
        whole[list(self._opened)] = True
        alone: Array = ~whole[shard]
        return alone


class Living:
    """An array of all nodes, as a search sees it: without the rows of nodes that are `gone`, bool [N]."""

    def __init__(self, array: ShardedArray, gone: Array) -> None:
        self._array, self._gone, self.width = array, gone, array.width

    def __len__(self) -> int:
        return len(self._array)

    def take(self, ids: Array) -> Array:
        return self._array.take(ids)

    def blocks(self, rows: int) -> Iterator[tuple[int, Array]]:
        """As `ShardedArray.blocks`, cut where nodes are gone."""
        return living_blocks(self._array.blocks(rows), self._gone)


def living_blocks(blocks: Iterator[tuple[int, Array]], gone: Array, begin: int = 0) -> Iterator[tuple[int, Array]]:
    """Of blocks the runs of rows that are not gone; gone: bool [n], of the nodes from `begin` on."""
    for first, block in blocks:
        there = np.flatnonzero(~gone[first - begin : first - begin + len(block)])
        for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if len(there) else ():
            yield first + int(run[0]), block[run[0] : run[-1] + 1]


def node_array(store: Store, shards: Shards, pattern: str, *, few: bool = False) -> ShardedArray:
    """The array of all nodes whose shard files are named by `pattern`, as in "graph/{}.neighbors.npy"."""
    return ShardedArray(store, shards.with_nodes.names, shards.with_nodes.column("nodes"), pattern, few=few)
