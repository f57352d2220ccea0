"""Compiled inner loops of the engines (numba: machine code, cached on disk, the GIL released; no compiler is needed).

They read the rows of all nodes where the shards' files are mapped in memory, by `ShardedArray.table`, and change lists
(`graphbuild.knn.lists`) in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from graphbuild.knn.intrinsics import (
    CHUNK,
    COLUMNS,
    ROWS,
    block_products,
    half,
    lowest_bit,
    passing_one_floor,
    passing_one_scale,
    pointer,
    prefetch,
)
from graphbuild.knn.lists import EMPTY, key_of, node_of, offer, score_of
from graphbuild.machine.compiled import compiled, inlined

GUESS_SHIFT = 8
_AHEAD = 6  # rows asked for before they are read
_NEXT = 3
_LEAF_MASK = 0x3FFF  # of the place at which a leaf is noted


@compiled()
def multiply(a: Any, b: Any, out: Any, upper: bool) -> None:
    """Integer products int32 [m, n] of codes int8 [m, d] and [n, d]: m, n and d ROWS, COLUMNS and STEP at least, d a
    multiple of it. upper: only those right of the diagonal are wanted, where a and b are the same."""
    m, width = a.shape
    n = b.shape[0]
    for begin in range(0, n, COLUMNS):
        column = min(begin, n - COLUMNS)
        for first in range(0, min(m, column + COLUMNS) if upper else m, ROWS):
            row = min(first, m - ROWS)
            block_products(
                a.ctypes.data + row * a.strides[0],
                a.strides[0],
                b.ctypes.data + column * b.strides[0],
                b.strides[0],
                width,
                out.ctypes.data + row * out.strides[0] + 4 * column,
                out.strides[0],
            )


@compiled()
def join_tile(
    tile: Any, rows: Any, columns: Any, ids: Any, scales: Any, floors: Any, keys: Any, symmetric: bool
) -> None:
    """Offer every pair of a tile of int8 products to the lists of both its nodes.

    tile int32 [m, n]; rows [m], columns [n]: places of their nodes in ids, scales (of the codes), floors (each list's
    worst score) and keys. A list scores neighbour j by product x scale of j. symmetric: the same nodes on both sides.
    """
    m, n = tile.shape
    last = keys.shape[1] - 1
    zero = np.uint32(0)
    column_scales = scales[columns]
    column_floors = floors[columns]
    for i in range(m):
        place = rows[i]
        scale = scales[place]
        floor = floors[place]  # never below where it began, even while the list is not full
        row = tile[i]
        for start in range(i // CHUNK * CHUNK if symmetric else 0, n, CHUNK):
            for_row = zero
            for_column = zero
            if start + CHUNK <= n:
                products = row.ctypes.data + 4 * start
                for_row = passing_one_floor(products, column_scales.ctypes.data + 4 * start, floor)
                for_column = passing_one_scale(products, scale, column_floors.ctypes.data + 4 * start)
            else:
                for j in range(n - start):
                    product = np.float32(row[start + j])
                    bit = np.uint32(1) << np.uint32(j)
                    for_row |= bit if product * column_scales[start + j] >= floor else zero
                    for_column |= bit if product * scale >= column_floors[start + j] else zero
            if symmetric and start <= i:
                keep = np.uint32(np.uint64(0xFFFFFFFF) << np.uint64(i - start + 1))
                for_row &= keep
                for_column &= keep
            while for_row != zero:
                j = start + np.int64(lowest_bit(for_row))
                for_row &= for_row - np.uint32(1)
                score = np.float32(row[j]) * column_scales[j]
                if score >= floor:
                    offer(keys[place], key_of(score, ids[columns[j]]))
                    floor = max(floor, score_of(keys[place, last]))
            floors[place] = floor
            while for_column != zero:
                j = start + np.int64(lowest_bit(for_column))
                for_column &= for_column - np.uint32(1)
                other = columns[j]
                offer(keys[other], key_of(np.float32(row[j]) * scale, ids[place]))
                column_floors[j] = max(column_floors[j], score_of(keys[other, last]))
                floors[other] = column_floors[j]


@compiled()
def search_tile(tile: Any, rows: Any, first: int, scales: Any, keys: Any) -> None:
    """Offer the columns of a tile int32 [m, n] (nodes first..first+n-1, codes' scales [n]) to the lists of its rows."""
    last = keys.shape[1] - 1
    n = tile.shape[1]
    whole = n // CHUNK * CHUNK
    for i in range(tile.shape[0]):
        row = keys[rows[i]]
        products = tile[i]
        floor = score_of(row[last])
        for start in range(0, whole, CHUNK):
            passing = passing_one_floor(products.ctypes.data + 4 * start, scales.ctypes.data + 4 * start, floor)
            while passing != np.uint32(0):
                j = start + np.int64(lowest_bit(passing))
                passing &= passing - np.uint32(1)
                offer(row, key_of(np.float32(products[j]) * scales[j], first + j))
                floor = score_of(row[last])
        for j in range(whole, n):
            offer(row, key_of(np.float32(products[j]) * scales[j], first + j))


@inlined
def row_address(table: Any, node: Any) -> Any:
    """Where a node's row begins in memory; table is `ShardedArray.table()` (graphbuild.store.sharded)."""
    addresses, starts, guess, stride = table
    shard = guess[node >> GUESS_SHIFT]
    while node >= starts[shard + 1]:
        shard += 1
    return addresses[shard] + (node - starts[shard]) * stride


@inlined
def prefetch_row(address: Any, length: Any) -> None:
    for offset in range(0, length, 64):
        prefetch(address + offset)


@inlined
def _code_product(a: Any, b: Any, width: Any) -> Any:
    left = carray(pointer(a), width, np.int8)
    right = carray(pointer(b), width, np.int8)
    total = np.int32(0)
    for j in range(width):
        total = np.int32(total + np.int32(left[j]) * np.int32(right[j]))
    return total


@inlined
def _is_new(seen: Any, node: Any, row: Any) -> Any:
    """Whether a node was not yet met for this row (0, 1, ...); from now on it was. seen int64: zeros, 2^i."""
    here = (np.int64(row + 1) << 32) | node
    slot = ((node * 0x9E3779B1) >> 7) & (seen.shape[0] - 1)
    while seen[slot] >> 32 == row + 1:
        if seen[slot] == here:
            return False
        slot = (slot + 1) & (seen.shape[0] - 1)
    seen[slot] = here
    return True


@compiled()
def refine_lists(
    first: int,
    keys: Any,
    expand: int,
    depth: int,
    lists: Any,
    codes: Any,
    scales: Any,
    leaves: Any,
    width: int,
    fan: int,
) -> int:
    """One round of neighbours' neighbours: offer nodes first.. the `depth` best of each of their `expand` best.

    keys int64 [n, c], in place; lists, codes, scales, leaves: tables of rows of all nodes. A pair that shared a leaf
    was compared when the leaf was joined, and is left out. Returns the number of products computed.
    """
    count, c = keys.shape
    best = min(expand, c)
    slots = 1
    while slots < 2 * (best + 1) * (c + 1):
        slots *= 2
    seen = np.zeros(slots, np.int64)
    wanted = np.empty(best * c, np.int64)
    own = np.empty(c, np.int64)
    joined = np.full(_LEAF_MASK + 1, -1, np.int64)  # row and leaf; where two share a place the first is forgotten
    total = 0
    for r in range(count):
        node = first + r
        row = keys[r]
        own[:] = row
        own_code = row_address(codes, node)
        own_leaves = carray(pointer(row_address(leaves, node)), fan, np.int32)
        for y in range(fan):
            joined[own_leaves[y] & _LEAF_MASK] = (np.int64(r) << 32) | own_leaves[y]
        if r + 1 < count:
            for p in range(best):
                if keys[r + 1, p] != EMPTY:
                    prefetch_row(row_address(lists, node_of(keys[r + 1, p])), 8 * min(depth, c))
        _is_new(seen, node, r)  # itself and its own list need no second look
        for q in range(c):
            _is_new(seen, node_of(own[q]), r)
        found = 0
        for p in range(best):
            if own[p] == EMPTY:
                break
            list_of_neighbor = carray(pointer(row_address(lists, node_of(own[p]))), c, np.int64)
            for q in range(min(depth, c)):
                if list_of_neighbor[q] == EMPTY:
                    break
                other = node_of(list_of_neighbor[q])
                if _is_new(seen, other, r):
                    wanted[found] = other
                    prefetch(row_address(leaves, other))
                    found += 1
        if own[c - 1] != EMPTY:  # a list that is not full may have refused its leaf-mates for its floor
            apart = 0
            for q in range(found):
                leaves_of_other = carray(pointer(row_address(leaves, wanted[q])), fan, np.int32)
                together = False
                for y in range(fan):
                    leaf = np.int64(leaves_of_other[y])
                    together |= joined[leaf & _LEAF_MASK] == (np.int64(r) << 32) | leaf
                wanted[apart] = wanted[q]
                apart += not together
            found = apart
        for q in range(min(_AHEAD, found)):
            prefetch_row(row_address(codes, wanted[q]), width)
        for q in range(found):
            other = wanted[q]
            if q + _AHEAD < found:
                prefetch_row(row_address(codes, wanted[q + _AHEAD]), width)
            product = _code_product(own_code, row_address(codes, other), width)
            scale = carray(pointer(row_address(scales, other)), 1, np.float32)[0]
            offer(row, key_of(np.float32(product) * scale, other))
        total += found
    return total


@compiled(fastmath={"nsz", "arcp", "contract", "afn", "reassoc"})
def encode_rows(raw: Any, codes: Any, scales: Any) -> None:
    """Codes int8 [n, d] and (scale, rest) float32 [n, 2] of float16 vectors, given as uint16 bits [n, d].

    The scale is 0 where a vector is zeros or holds NaN.
    """
    n, width = raw.shape
    row = np.empty(width, np.float32)
    for i in range(n):
        norm = 0.0
        for j in range(width):
            row[j] = half(raw[i, j])
            norm += np.float64(row[j]) * np.float64(row[j])
        shrink = np.float32(1.0 / np.sqrt(max(norm, 1e-30)))  # stage codes refuses zeros
        largest = np.float32(1e-30)
        for j in range(width):
            row[j] *= shrink
            largest = max(largest, abs(row[j]))
        scale = largest / np.float32(127.0)
        rest = np.float32(0.0)
        for j in range(width):
            code = np.rint(row[j] / scale)
            codes[i, j] = np.int8(code)
            rest += (row[j] - code * scale) ** 2
        scales[i, 0] = scale if norm > 0 else np.float32(0.0)
        scales[i, 1] = np.sqrt(rest) * np.float32(1.0001) + np.float32(1e-6)


@compiled()
def offer_exactly(tile: Any, own: Any, first: int, margin: float, keys: Any, vectors: Any, width: int) -> None:
    """Offer nodes first..first+n-1 to the exact lists keys int64 [m, k] of nodes own [m].

    tile float32 [m, n]: their similarities, wrong by at most `margin`; what can reach a list is computed in float64.
    """
    last = keys.shape[1] - 1
    one = np.full((1, 1), EMPTY, np.int64)
    nothing = np.full(1, np.inf)
    for i in range(tile.shape[0]):
        row = keys[i]
        floor = score_of(row[last]) - margin
        for j in range(tile.shape[1]):
            if tile[i, j] >= floor and first + j != own[i]:
                one[0, 0] = key_of(np.float32(0.0), first + j)
                offer(row, exact_similarities(own[i], one, 1, nothing, nothing, vectors, width)[0, 0])
                floor = score_of(row[last]) - margin


@compiled(fastmath={"nsz", "arcp", "contract", "afn", "reassoc"})
def exact_similarities(first: int, keys: Any, k: int, scales: Any, slack: Any, vectors: Any, width: int) -> Any:
    """The lists of nodes first..first+n-1 scored again: float32 cosines of the stored float16 vectors, sums in float64.

    keys int64 [n, c], descending; vectors: table of float16 rows. A true similarity is at most score x scales [n] +
    slack [n] (infinite: nothing is known): candidates that cannot belong to the k best are left out. Returns keys int64
    [n, c] in no order, the rest EMPTY.
    """
    count, c = keys.shape
    result = np.full((count, c), EMPTY, np.int64)
    own = np.empty(width, np.float64)
    for r in range(count):
        stored = carray(pointer(row_address(vectors, first + r)), width, np.uint16)
        own_norm = 0.0
        for j in range(width):
            own[j] = half(stored[j])
            own_norm += own[j] * own[j]
        worst = EMPTY  # of the first k: the k-th best is no worse
        for q in range(c):
            if keys[r, q] == EMPTY:
                break
            if q == k:
                worst = result[r, :k].min()
            if q >= k and score_of(keys[r, q]) * scales[r] + slack[r] < score_of(worst):
                break
            if q + _NEXT < c and keys[r, q + _NEXT] != EMPTY:
                prefetch_row(row_address(vectors, node_of(keys[r, q + _NEXT])), 2 * width)
            other = node_of(keys[r, q])
            vector = carray(pointer(row_address(vectors, other)), width, np.uint16)
            dot = 0.0
            norm = 0.0
            for j in range(width):
                value = np.float64(half(vector[j]))
                dot += own[j] * value
                norm += value * value
            result[r, q] = key_of(np.float32(dot / np.sqrt(own_norm * norm)), other)
    return result
