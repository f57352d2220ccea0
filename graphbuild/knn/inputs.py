"""What an engine's task reads: vectors, and what earlier stages of the build left in scratch, opened once a worker."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from graphbuild.index import SCRATCH, VECTORS
from graphbuild.knn.leaders import Leaders
from graphbuild.sharded import ShardedArray, node_array
from graphbuild.store import Store

LEADERS, LEADER_NODES = f"{SCRATCH}/leaders.npy", f"{SCRATCH}/leader_nodes.npy"


class Inputs:
    """What a task reads: the node's vectors, and what earlier stages of the build left in scratch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = store.manifest()

    def of(self, what: str) -> ShardedArray:
        """codes, scales, floors or leaves, of the stage codes, or the merged lists."""
        stage = self.manifest["stages"]["merge" if what == "merged" else "codes"]
        return _opened(self.store, f"{SCRATCH}/{what}/{{}}.npy", str(stage["fingerprint"]))

    @cached_property
    def vectors(self) -> ShardedArray:
        return _opened(self.store, VECTORS, str(self.manifest["embeddings"]["fingerprint"]))

    @cached_property
    def leaders(self) -> Leaders:
        return Leaders(np.array(self.store.array(LEADERS)))

    @cached_property
    def floors(self) -> ShardedArray:
        return self.of("floors")

    @cached_property
    def codes(self) -> ShardedArray:
        return self.of("codes")

    @cached_property
    def scales(self) -> ShardedArray:
        return self.of("scales")


@lru_cache(maxsize=8)
def _opened(store: Store, pattern: str, version: str) -> ShardedArray:
    """An array over all shards, kept open by a worker from task to task; `version` changes when its files may."""
    return node_array(store, store.manifest(), pattern)
