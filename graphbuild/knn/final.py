"""From candidates to final lists: what tasks found of a shard's nodes, scored exactly, proved, and completed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphbuild.index import SCRATCH
from graphbuild.knn import exact as exact_engine
from graphbuild.knn import kernels
from graphbuild.knn.inputs import Inputs
from graphbuild.knn.lists import EMPTY, unpack
from graphbuild.sharded import Array, ShardedArray
from graphbuild.stage import records
from graphbuild.store import Store
from graphbuild.threads import torch_threads


def lists_of(store: Store, stage: str, first: int, count: int) -> Iterator[tuple[Array, Array]]:
    """What each task of a stage found of nodes first..first+count-1: their places among these, and keys [m, c]."""
    for name in records(store, stage):
        ids = store.array(f"{SCRATCH}/{stage}/{name}.ids.npy")
        begin, end = np.searchsorted(ids, [first, first + count])
        if begin < end:
            yield ids[begin:end] - first, store.array(f"{SCRATCH}/{stage}/{name}.keys.npy")[begin:end]


def scored_again(inputs: Inputs, shard: str, first: int, k: int, *, exact: bool) -> tuple[Array, Array]:
    """The k best of a shard's merged candidates, keys int64 [n, k], and which are short or, if exact, unproved."""
    store, vectors = inputs.store, inputs.vectors
    candidates = np.array(store.array(f"{SCRATCH}/merged/{shard}.npy"))
    scales = np.array(store.array(f"{SCRATCH}/scales/{shard}.npy"), np.float64)
    rows, places = np.arange(first, first + len(candidates)), unpack(candidates)[1]
    slack = np.full(len(rows), np.inf)
    if exact:
        slack = exact_engine.slack(scales[:, 1], inputs.manifest["largest_rest"])
    rescored = kernels.exact_similarities(
        rows, places, candidates, k, scales[:, 0], slack, vectors.table(), vectors.width
    )
    keys = np.ascontiguousarray(np.sort(rescored, axis=1)[:, : -k - 1 : -1])
    lacking = keys[:, -1] == EMPTY
    if exact:
        floors = np.array(store.array(f"{SCRATCH}/floors/{shard}.npy"))[:, 0]
        lacking |= ~exact_engine.proved(candidates, floors, unpack(keys)[0], scales[:, 0], slack)
    return keys, lacking


def search_lacking(vectors: ShardedArray, first: int, keys: Array, lacking: Array) -> int:
    """Complete the lists keys int64 [n, k] that lack something, bool [n], by full searches; returns how many."""
    rows = np.flatnonzero(lacking)
    with torch_threads(1):
        for begin in range(0, len(rows), exact_engine.AGAIN_ROWS):
            some = rows[begin : begin + exact_engine.AGAIN_ROWS]
            lists = keys[some]
            exact_engine.search_again(vectors, first + some, lists)
            keys[some] = lists
    return len(rows)
