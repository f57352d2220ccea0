"""From candidates to final lists: what tasks found of a shard's nodes, scored exactly, proved, and completed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphbuild.index import SCRATCH
from graphbuild.knn import exact, kernels, partition
from graphbuild.knn.inputs import Inputs
from graphbuild.knn.leaders import leader_count
from graphbuild.knn.lists import EMPTY, pack, unpack
from graphbuild.sharded import Array
from graphbuild.stage import records
from graphbuild.store import Store
from graphbuild.threads import torch_threads

BLOCK_ROWS = 65_536
LEAF_ROUNDS = 4


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
        _refine(inputs, first, candidates)
    elif engine == "exact":
        slack = exact.slack(scales[:, 1], inputs.manifest["largest_rest"])
    rescored = kernels.exact_similarities(first, candidates, k, scales[:, 0], slack, vectors.table(), vectors.width)
    keys = np.ascontiguousarray(np.sort(rescored, axis=1)[:, : -k - 1 : -1])
    lacking = keys[:, -1] == EMPTY
    if engine == "exact":
        floors = np.array(store.array(f"{SCRATCH}/floors/{shard}.npy"))[:, 0]
        lacking |= ~exact.proved(candidates, floors, unpack(keys)[0], scales[:, 0], slack)
    if engine == "partition" and lacking.any():
        _complete_from_leaves(inputs, first, keys, np.flatnonzero(lacking))
        lacking = keys[:, -1] == EMPTY
    rows = np.flatnonzero(lacking)
    with torch_threads(1):
        for begin in range(0, len(rows), exact.AGAIN_ROWS):
            some = rows[begin : begin + exact.AGAIN_ROWS]
            lists = keys[some]
            exact.search_again(vectors, first + some, lists)
            keys[some] = lists
    return keys, len(rows)


def _refine(inputs: Inputs, first: int, candidates: Array) -> None:
    """Neighbours' neighbours for a shard's lists, keys int64 [n, c] in place."""
    leaves = inputs.of("leaves")
    tables = [part.table() for part in (inputs.of("merged"), inputs.codes, inputs.scales, leaves)]
    depth = round(partition.DEPTH * candidates.shape[1])
    kernels.refine_lists(first, candidates, partition.EXPAND, depth, *tables, inputs.vectors.width, leaves.width)


def _complete_from_leaves(inputs: Inputs, first: int, keys: Array, rows: Array) -> None:
    """Fill short lists, rows of exact keys int64 [n, k], with the nearest of all nodes that share a leaf with theirs.

    A floor that was too high has emptied them, by chance: about one in 10,000. A full search of one would cost a pass
    over all vectors, and once a shard that adds up; this costs a pass over the leaves, and one more where leaves are so
    small that their members' other leaves are needed.
    """
    leaves, vectors = inputs.of("leaves"), inputs.vectors
    nothing, k = np.full(1, np.inf), keys.shape[1]
    for row in rows:
        wanted = np.zeros(leader_count(len(leaves)), bool)
        mates = np.array([first + row])
        for _ in range(LEAF_ROUNDS):
            wanted[leaves.take(mates)] = True
            blocks = leaves.blocks(BLOCK_ROWS)
            mates = np.concatenate([np.flatnonzero(wanted[block].any(axis=1)) + at for at, block in blocks])
            if len(mates) > k:
                break
        offered = pack(np.zeros((1, len(mates) - 1)), mates[mates != first + row])
        scored = kernels.exact_similarities(first + row, offered, k, nothing, nothing, vectors.table(), vectors.width)
        every = np.unique(np.concatenate([scored[0], keys[row]]))
        best = every[every != EMPTY][: -k - 1 : -1]
        keys[row, : len(best)] = best
