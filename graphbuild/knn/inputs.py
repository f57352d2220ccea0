"""What an engine's task reads: vectors, and what earlier stages of the build left in scratch, opened once a worker."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property, lru_cache

import numpy as np

from graphbuild.knn import sample
from graphbuild.knn.leaders import Leaders, blocks_of, draw_leaders, order_leaders
from graphbuild.runner.stage import records
from graphbuild.store.layout import SCRATCH, VECTORS, shard_name
from graphbuild.store.sharded import Array, ShardedArray, node_array
from graphbuild.store.shards import Shards, node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

LEADERS, LEADER_NODES = f"{SCRATCH}/leaders/{{}}.npy", f"{SCRATCH}/leader_nodes.npy"
ORDERED, IDS, PLACES, STARTS = (f"{SCRATCH}/ordered/{name}.npy" for name in ("{}/{}", "ids", "places", "starts"))
RANGE = f"{SCRATCH}/leaders/{{}}.{{}}.npy"  # of a range of shards: what of it `prepare` needs


class Inputs:
    """What a task reads: the node's vectors, and what earlier stages of the build left in scratch.

    ordered: rows of all arrays, and the numbers in lists, are places in the order of leaders
    (`graphbuild.graph.order`), not node ids. manifest: the store's, where it has been read.
    """

    def __init__(self, store: Store, *, ordered: bool = False, manifest: Json | None = None) -> None:
        self.store, self.ordered = store, ordered
        self.manifest = store.manifest() if manifest is None else manifest

    def of(self, what: str) -> ShardedArray:
        """codes, scales, floors, leaves or gone, or the merged lists; ordered: also vectors and refined lists."""
        stage = {"merged": "merge", "refined": "refine"}.get(what, "order" if self.ordered else "codes")
        pattern = f"{SCRATCH}/{'ordered/' * (stage == 'order')}{what}/{{}}.npy"
        starts = None
        if self.ordered:
            new = int(self.manifest["stages"].get("base", {}).get("counts", {}).get("nodes", 0))
            blocks = blocks_of(node_count(self.manifest), new)
            starts = tuple(self.store.array(STARTS).tolist() if stage == "order" else blocks)
        return self._array(pattern, self.manifest["stages"][stage], starts)

    @cached_property
    def vectors(self) -> ShardedArray:
        return self.of("vectors") if self.ordered else self._array(VECTORS, self.manifest["embeddings"])

    def ids(self, places: Array) -> Array:
        """The nodes at some places, int64 of their shape."""
        return self.store.array(IDS)[places].astype(np.int64) if self.ordered else places

    def places(self, ids: Array) -> Array:
        """Where some nodes have their place, int64 of their shape."""
        return self.store.array(PLACES)[ids].astype(np.int64) if self.ordered else ids

    def _array(self, pattern: str, of: Json, starts: tuple[int, ...] | None = None) -> ShardedArray:
        return _opened(self.store, starts or shards_of(self.store, self.manifest), pattern, str(of["fingerprint"]))

    @cached_property
    def few(self) -> ShardedArray:
        """The vectors, of which only some will be taken."""
        return node_array(self.store, shards_of(self.store, self.manifest), VECTORS, few=True)

    def ranges(self) -> list[str]:
        """The tasks of `prepare` that each read a range of shards, where one is too little."""
        return [name for name in records(self.store, "prepare") if name != "all"]

    @property
    def leaders(self) -> Leaders:
        return _leaders(self.store, str(self.manifest["stages"]["prepare"]["fingerprint"]))


def write_range(inputs: Inputs, shards: range, seed: int, k: int, name: str, writer: Writer) -> None:
    """What `prepare` needs of the nodes of some shards: the vectors of leaders, and the k nearest of sampled nodes."""
    bounds = inputs.vectors.starts[[shards.start, shards.stop]]
    leaders = draw_leaders(len(inputs.vectors), seed)
    drawn = inputs.vectors.take(leaders[slice(*np.searchsorted(leaders, bounds))])
    found = sample.true_neighbors(inputs.few, sample.draw(len(inputs.vectors), seed), k, shards)
    for what, values in zip(("drawn", "similarities", "ids"), (drawn, *found), strict=True):
        writer.array(RANGE.format(name, what), values, durable=False)


def true_neighbors(inputs: Inputs, ids: Array, k: int) -> tuple[Array, Array]:
    """As `sample.true_neighbors`: what the ranges have found, or else searched now."""
    names = inputs.ranges()
    if not names:
        return sample.true_neighbors(inputs.few, ids, k)
    scores, found = (
        np.concatenate([inputs.store.array(RANGE.format(name, what)) for name in names], axis=1)
        for what in ("similarities", "ids")
    )
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1)


def write_leaders(inputs: Inputs, seed: int, writer: Writer) -> tuple[Leaders, Array]:
    """Draw leaders, order them, and write them; returns them, and their nodes int64 [L]."""
    ids, names = draw_leaders(len(inputs.vectors), seed), inputs.ranges()
    lengths = [len(inputs.store.array(RANGE.format(name, "drawn"))) for name in names]
    drawn = ShardedArray(inputs.store, names, lengths, RANGE.format("{}", "drawn")) if names else None

    def read(places: Array) -> Array:
        return inputs.vectors.take(ids[places]) if drawn is None else drawn.take(places)

    order = order_leaders(read, np.arange(len(ids)))
    with writer.file(LEADERS.format("codes"), durable=False) as path:
        codes = np.lib.format.open_memmap(path, "w+", np.int8, (len(ids), inputs.vectors.width))
        leaders = Leaders.coded(read, order, codes)
        codes.flush()
    for part in ("scales", "group_codes", "group_scales"):
        writer.array(LEADERS.format(part), getattr(leaders, part), durable=False)
    return leaders, ids[order]


@lru_cache(maxsize=1)
def _leaders(store: Store, version: str) -> Leaders:
    """As `_opened`."""
    return Leaders(**{part.name: store.array(LEADERS.format(part.name)) for part in fields(Leaders)})


@lru_cache(maxsize=16)
def _opened(store: Store, of: Shards | tuple[int, ...], pattern: str, version: str) -> ShardedArray:
    """An array over all shards, or files that begin at these places, kept open by a worker from task to task; `version`
    changes when its files may."""
    if isinstance(of, Shards):
        return node_array(store, of, pattern)
    return ShardedArray(store, [shard_name(number) for number in range(len(of) - 1)], np.diff(of), pattern)
