"""From candidates to final lists: what tasks found of a shard's nodes, scored exactly, proved, and completed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from graphbuild.knn import exact, kernels, partition
from graphbuild.knn.inputs import LEADER_NODES, Inputs
from graphbuild.knn.lists import EMPTY, pack, unpack
from graphbuild.machine.threads import torch_threads
from graphbuild.runner.stage import records
from graphbuild.store.layout import SCRATCH
from graphbuild.store.remote import READERS
from graphbuild.store.sharded import Array, ShardedArray
from graphbuild.store.store import Store

ENTRIES, WALK = 32, 64  # leaders that a walk begins at; nodes that it keeps


def lists_of(store: Store, first: int, count: int) -> Iterator[tuple[Array, Array]]:
    """What each join task found of nodes first..first+count-1: their places among these, and keys [m, c]."""

    def of(name: str) -> tuple[Array, Array]:
        ids = store.array(f"{SCRATCH}/join/{name}.ids.npy")
        begin, end = np.searchsorted(ids, [first, first + count]).tolist()
        return ids[begin:end] - first, store.rows(f"{SCRATCH}/join/{name}.keys.npy", begin, end)

    names = list(records(store, "join"))
    with ThreadPoolExecutor(1 if store.is_local else READERS) as pool:
        for at in range(0, len(names), READERS):
            yield from pool.map(of, names[at : at + READERS])


def without_gone(keys: Array, gone: ShardedArray, there: Array) -> Array:
    """Take the nodes that no sample has out of the lists of nodes that are `there` [n], keys int64 [n, c] in place;
    bool [n]: which lists lost one."""
    named = (keys != EMPTY) & there[:, None]
    named[named] = gone.take(unpack(keys[named])[1])[:, 0]
    keys[named] = EMPTY
    keys[:, ::-1].sort(axis=1)
    return np.asarray(named.any(axis=1))


def exact_lists(inputs: Inputs, engine: str, first: int, count: int, k: int) -> tuple[Array, int]:
    """The final lists of nodes first.., keys int64 [count, k], and how many of them took a full search.

    Of candidates by code: refined where the engine is partition, scored by the vectors, proved where it is exact.
    """
    vectors, candidates = inputs.vectors, inputs.of("merged").span(first, count)
    scales = inputs.of("scales").span(first, count).astype(np.float64)
    slack = np.full(len(candidates), np.inf)
    gone, there, lost = None, np.ones(len(candidates), bool), np.zeros(len(candidates), bool)
    if inputs.manifest.get("gone"):
        gone = inputs.of("gone")
        there = ~gone.span(first, len(candidates))[:, 0]
        lost = without_gone(candidates, gone, there)
    if engine == "partition":
        _refine(inputs, first, candidates)
        if gone is not None:  # what was offered for want of others
            without_gone(candidates, gone, there)
    elif engine == "exact":
        slack = np.where(there, exact.slack(scales[:, 1], inputs.manifest["largest_rest"]), np.inf)
        candidates[lost, k - 1 :] = EMPTY  # what follows is unknown: a list that is not full is searched again
    rescored = kernels.exact_similarities(first, candidates, k, scales[:, 0], slack, vectors.table(), vectors.width)
    keys = np.ascontiguousarray(np.sort(rescored, axis=1)[:, : -k - 1 : -1])
    lacking = keys[:, -1] == EMPTY
    if engine == "exact":
        floors = inputs.of("floors").span(first, count)[:, 0]
        lacking |= ~exact.proved(candidates, floors, unpack(keys)[0], scales[:, 0], slack)
    if engine == "partition" and lacking.any():
        _complete_by_walk(inputs, first, keys, np.flatnonzero(lacking), gone)
        lacking = keys[:, -1] == EMPTY
    rows = np.flatnonzero(lacking)
    with torch_threads(1):
        for begin in range(0, len(rows), exact.AGAIN_ROWS):
            some = rows[begin : begin + exact.AGAIN_ROWS]
            lists = keys[some]
            exact.search_again(vectors, first + some, lists, gone)
            keys[some] = lists
    return keys, len(rows)


def _refine(inputs: Inputs, first: int, candidates: Array) -> None:
    """Neighbours' neighbours for the lists of nodes first.., keys int64 [n, c] in place."""
    leaves = inputs.of("leaves")
    tables = [part.table() for part in (*map(inputs.of, ("merged", "codes", "scales")), leaves)]
    depth = round(partition.DEPTH * candidates.shape[1])
    kernels.refine_lists(first, candidates, partition.EXPAND, depth, *tables, inputs.vectors.width, leaves.width)


def _complete_by_walk(inputs: Inputs, first: int, keys: Array, rows: Array, gone: ShardedArray | None) -> None:
    """Fill short lists, rows of exact keys int64 [n, k], by walking the other nodes' lists towards each row's node.

    A floor that was too high has emptied them, by chance: about one in 5,000. A full search of one would cost a pass
    over all vectors, and once a shard that adds up. A walk begins at the nearest leaders, keeps the WALK nearest nodes
    that it has met, and ends when their lists hold no others: some thousand products, however many nodes there are.
    """
    merged, vectors, k = inputs.of("merged"), inputs.vectors, keys.shape[1]
    leaders = inputs.places(inputs.store.array(LEADER_NODES))
    entries, _ = inputs.leaders.leaves(inputs.of("codes").take(first + rows), min(ENTRIES, len(leaders)), 1)
    nothing = np.full(1, np.inf)
    for row, near in zip(rows, entries, strict=True):
        node = first + row
        met = np.array([node])
        best = np.empty(0, np.int64)
        fresh = np.setdiff1d(np.concatenate([leaders[near], unpack(keys[row][keys[row] != EMPTY])[1]]), met)
        while len(fresh):
            met = np.union1d(met, fresh)
            offered = pack(np.zeros((1, len(fresh))), fresh)
            scored = kernels.exact_similarities(node, offered, k, nothing, nothing, vectors.table(), vectors.width)[0]
            best = np.sort(np.concatenate([best, scored]))[: -max(WALK, 2 * k) - 1 : -1]
            listed = merged.take(unpack(best)[1])
            fresh = np.setdiff1d(unpack(listed[listed != EMPTY])[1], met)
        if gone is not None:
            best = best[~gone.take(unpack(best)[1])[:, 0]]
        best = best[:k]
        keys[row, : len(best)] = best
