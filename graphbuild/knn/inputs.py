"""What an engine's task reads: vectors, and what earlier stages of the build left in scratch, opened once a worker."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property, lru_cache

from graphbuild.knn.leaders import Leaders
from graphbuild.store.layout import SCRATCH, VECTORS
from graphbuild.store.sharded import ShardedArray, node_array
from graphbuild.store.shards import Shards, shards_of
from graphbuild.store.store import Json, Store, Writer

LEADERS, LEADER_NODES = f"{SCRATCH}/leaders/{{}}.npy", f"{SCRATCH}/leader_nodes.npy"


class Inputs:
    """What a task reads: the node's vectors, and what earlier stages of the build left in scratch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = store.manifest()

    def of(self, what: str) -> ShardedArray:
        """codes, scales, floors, leaves or gone, of the stage codes, or the merged lists."""
        stage = self.manifest["stages"]["merge" if what == "merged" else "codes"]
        return self._array(f"{SCRATCH}/{what}/{{}}.npy", stage)

    @cached_property
    def vectors(self) -> ShardedArray:
        return self._array(VECTORS, self.manifest["embeddings"])

    def _array(self, pattern: str, of: Json) -> ShardedArray:
        return _opened(self.store, shards_of(self.store, self.manifest), pattern, str(of["fingerprint"]))

    @property
    def leaders(self) -> Leaders:
        return _leaders(self.store, str(self.manifest["stages"]["prepare"]["fingerprint"]))


def write_leaders(leaders: Leaders, writer: Writer) -> None:
    for part in fields(leaders):
        writer.array(LEADERS.format(part.name), getattr(leaders, part.name), durable=False)


@lru_cache(maxsize=1)
def _leaders(store: Store, version: str) -> Leaders:
    """As `_opened`."""
    return Leaders(**{part.name: store.array(LEADERS.format(part.name)) for part in fields(Leaders)})


@lru_cache(maxsize=8)
def _opened(store: Store, shards: Shards, pattern: str, version: str) -> ShardedArray:
    """An array over all shards, kept open by a worker from task to task; `version` changes when its files may."""
    return node_array(store, shards, pattern)
