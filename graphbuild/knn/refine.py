"""The partition engine's last step: one round of neighbours' neighbours, then exact similarities, in leaf order.

Each list is offered the upper part of the lists of its best EXPAND (NN-descent: Dong et al., WWW 2011), and what it
then holds is scored by the vectors themselves. Nodes are taken leaf by leaf, BLOCK at a time: their neighbours are each
other's, so the rows that a block looks at are few. They are gathered into compact arrays first, where loops find them
in the cache; in files of millions of nodes nearly every look would miss it. Memory of a task: 4 bytes for each node of
the graph, and some 60 MB for a block of captions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from graphbuild.knn import kernels
from graphbuild.knn.lists import EMPTY, key_of, node_of, offer
from graphbuild.sharded import Array, ShardedArray

BLOCK = 4_096
BLOCK_ROWS = 65_536
_LEAF_MASK = 0x3FFF


def refine(
    span: tuple[int, int],
    leaves: ShardedArray,
    merged: ShardedArray,
    codes: ShardedArray,
    scales: ShardedArray,
    vectors: ShardedArray,
    k: int,
    expand: int,
    depth: int,
) -> tuple[Array, Array]:
    """Of the nodes whose nearest leader is first..end-1: ids int64 [m] ascending, and their k best, keys int64 [m, k].

    merged: lists by code, keys int64 [N, c]; the first `depth` of the lists of the `expand` best are offered. The
    result's keys hold float32 cosines of the stored vectors; places that are not filled are EMPTY.
    """
    first, end = span
    found, numbers = [], []
    for start, block in leaves.blocks(BLOCK_ROWS):
        hits = np.flatnonzero((block[:, 0] >= first) & (block[:, 0] < end))
        found.append(hits + start)
        numbers.append(block[hits, 0])
    ids = np.concatenate(found)
    order = np.argsort(np.concatenate(numbers), kind="stable")
    result = np.empty((len(ids), k), np.int64)
    place = np.full(len(leaves), -1, np.int32)  # of a node in a block's arrays
    for begin in range(0, len(ids), BLOCK):
        some = order[begin : begin + BLOCK]
        own = ids[some]
        keys = gathered(merged, own)
        _offer_neighbors(own, keys, place, leaves, merged, codes, scales, expand, depth)
        result[some] = _exactly(own, keys, place, vectors, k)
    return ids, result


def _offer_neighbors(
    own: Array,
    keys: Array,
    place: Array,
    leaves: ShardedArray,
    merged: ShardedArray,
    codes: ShardedArray,
    scales: ShardedArray,
    expand: int,
    depth: int,
) -> None:
    """The round of neighbours' neighbours for nodes `own`: keys int64 [m, c] in place."""
    heads = np.ascontiguousarray(keys[:, :expand])
    best, best_of = _numbered(own[:0], (heads,), place)
    others = np.ascontiguousarray(gathered(merged, best)[:, :depth])
    nodes, (own_places, other_places) = _numbered(own, (keys, others), place)
    rows = (gathered(codes, nodes), gathered(scales, nodes)[:, 0].copy(), gathered(leaves, nodes))
    _offer_block(keys, own_places, best_of[0], other_places, nodes, *rows)


def _exactly(own: Array, keys: Array, place: Array, vectors: ShardedArray, k: int) -> Array:
    """The k best of lists by code, keys int64 [m, c], by exact similarity: keys int64 [m, k], descending."""
    nodes, (places,) = _numbered(own, (keys,), place)
    raw = gathered(vectors, nodes)
    nothing = np.full(len(own), np.inf)
    rows = np.arange(len(own))
    table = kernels.table_of(raw)
    exact = kernels.exact_similarities(rows, places, keys, k, nothing, nothing, table, vectors.width)
    best: Array = np.sort(exact, axis=1)[:, : -k - 1 : -1]
    return best


def gathered(array: ShardedArray, ids: Array) -> Array:
    """Rows of any ids [n], as [n, width]; `ShardedArray.take` for many shards."""
    rows = np.empty((len(ids), array.width), array.dtype)
    kernels.gather(array.table(), ids, rows.view(np.uint8))
    return rows


def _numbered(own: Array, lists: tuple[Array, ...], place: Array) -> tuple[Array, tuple[Array, ...]]:
    """The nodes of a block, `own` first, each once, and the lists' entries as places among them; -1 for EMPTY.

    place int32 [N]: -1 everywhere, before and after.
    """
    nodes = np.empty(len(own) + sum(keys.size for keys in lists), np.int64)
    places = tuple(np.empty(keys.shape, np.int32) for keys in lists)
    nodes[: len(own)] = own
    place[own] = np.arange(len(own))
    count = len(own)
    for keys, target in zip(lists, places, strict=True):
        count = _number(keys, place, nodes, count, target)
    nodes = nodes[:count].copy()
    place[nodes] = -1
    return nodes, places


@njit(nogil=True, cache=True)
def _number(keys: Any, place: Any, nodes: Any, count: int, places: Any) -> int:
    for r in range(keys.shape[0]):
        for q in range(keys.shape[1]):
            if keys[r, q] == EMPTY:
                places[r, q] = -1
                continue
            node = node_of(keys[r, q])
            if place[node] < 0:
                place[node] = count
                nodes[count] = node
                count += 1
            places[r, q] = place[node]
    return count


@njit(nogil=True, cache=True)
def _offer_block(
    keys: Any, own_places: Any, best: Any, others: Any, nodes: Any, codes: Any, scales: Any, leaves: Any
) -> None:
    """Offer row r of keys int64 [m, c] the lists `others` of its best; nodes, codes, scales, leaves: by place.

    best int32 [m, expand]: rows of others int32 [a, depth]; row r's own place is r. A pair that shared a leaf was
    compared when the leaf was joined, and is left out.
    """
    count, c = keys.shape
    fan = leaves.shape[1]
    width = codes.shape[1]
    seen = np.full(len(nodes), -1, np.int32)
    joined = np.full(_LEAF_MASK + 1, -1, np.int32)
    wanted = np.empty(best.shape[1] * others.shape[1], np.int32)
    for r in range(count):
        row = keys[r]
        full = row[c - 1] != EMPTY
        for y in range(fan):
            joined[leaves[r, y] & _LEAF_MASK] = r
        seen[r] = r
        for q in range(c):
            if own_places[r, q] >= 0:
                seen[own_places[r, q]] = r
        found = 0
        for p in range(best.shape[1]):
            if best[r, p] < 0:
                break
            for q in range(others.shape[1]):
                other = others[best[r, p], q]
                if other < 0:
                    break
                if seen[other] == r:
                    continue
                seen[other] = r
                together = False
                if full:  # a list that is not full may have refused its leaf-mates for its floor
                    for y in range(fan):
                        together |= joined[leaves[other, y] & _LEAF_MASK] == r
                wanted[found] = other
                found += not together
        for q in range(found):
            other = wanted[q]
            product = np.int32(0)
            for j in range(width):
                product = np.int32(product + np.int32(codes[r, j]) * np.int32(codes[other, j]))
            offer(row, key_of(np.float32(product) * scales[other], nodes[other]))
