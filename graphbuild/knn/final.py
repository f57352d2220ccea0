"""From candidates to final lists: what tasks found of a shard's nodes, scored exactly, proved, and completed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphbuild.index import SCRATCH
from graphbuild.knn import exact, kernels, partition
from graphbuild.knn.inputs import Inputs
from graphbuild.knn.lists import EMPTY, unpack
from graphbuild.sharded import Array
from graphbuild.stage import records
from graphbuild.store import Store
from graphbuild.threads import torch_threads

ROUNDS_FOR_SHORT = 3


def lists_of(store: Store, stage: str, first: int, count: int) -> Iterator[tuple[Array, Array]]:
    """What each task of a stage found of nodes first..first+count-1: their places among these, and keys [m, c]."""
    for name in records(store, stage):
        ids = store.array(f"{SCRATCH}/{stage}/{name}.ids.npy")
        begin, end = np.searchsorted(ids, [first, first + count])
        if begin < end:
            yield ids[begin:end] - first, store.array(f"{SCRATCH}/{stage}/{name}.keys.npy")[begin:end]


def exact_lists(inputs: Inputs, engine: str, shard: str, first: int, k: int) -> tuple[Array, int]:
    """The final lists of a shard's nodes first.., keys int64 [n, k], and how many of them took a full search.

    Of candidates by code: refined where the engine is partition, scored by the vectors, proved where it is exact.
    """
    store, vectors = inputs.store, inputs.vectors
    candidates = np.array(store.array(f"{SCRATCH}/merged/{shard}.npy"))
    scales = np.array(store.array(f"{SCRATCH}/scales/{shard}.npy"), np.float64)
    slack = np.full(len(candidates), np.inf)
    if engine == "partition":
        _refine(inputs, first, candidates, k)
    elif engine == "exact":
        slack = exact.slack(scales[:, 1], inputs.manifest["largest_rest"])
    rescored = kernels.exact_similarities(first, candidates, k, scales[:, 0], slack, vectors.table(), vectors.width)
    keys = np.ascontiguousarray(np.sort(rescored, axis=1)[:, : -k - 1 : -1])
    lacking = keys[:, -1] == EMPTY
    if engine == "exact":
        floors = np.array(store.array(f"{SCRATCH}/floors/{shard}.npy"))[:, 0]
        lacking |= ~exact.proved(candidates, floors, unpack(keys)[0], scales[:, 0], slack)
    rows = np.flatnonzero(lacking)
    with torch_threads(1):
        for begin in range(0, len(rows), exact.AGAIN_ROWS):
            some = rows[begin : begin + exact.AGAIN_ROWS]
            lists = keys[some]
            exact.search_again(vectors, first + some, lists)
            keys[some] = lists
    return keys, len(rows)


def _refine(inputs: Inputs, first: int, candidates: Array, k: int) -> None:
    """Neighbours' neighbours for a shard's lists, keys int64 [n, c] in place; all of them for lists of fewer than k.

    Those are few; a full search of one would cost a pass over all vectors, and once a shard that adds up.
    """
    leaves = inputs.of("leaves")
    tables = [part.table() for part in (inputs.of("merged"), inputs.codes, inputs.scales, leaves)]
    length = candidates.shape[1]
    depth = round(partition.DEPTH * length)
    kernels.refine_lists(first, candidates, partition.EXPAND, depth, *tables, inputs.vectors.width, leaves.width)
    for _ in range(ROUNDS_FOR_SHORT):
        for row in np.flatnonzero(candidates[:, k - 1] == EMPTY):
            short = candidates[row : row + 1]
            kernels.refine_lists(first + row, short, length, length, *tables, inputs.vectors.width, leaves.width)
