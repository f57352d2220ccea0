"""Compiled inner loops over neighbour lists (numba: machine code, cached, the GIL released).

A list is a row of int64 keys in descending order: the upper half a float32 score as an integer of the same order, the
lower half 2**31 - 1 - id, so that of equal scores the smaller id comes first. An empty place is EMPTY. Lists hold the
best of all pairs ever offered, whatever the order of offering: that is what makes results independent of task sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 32
LARGEST_ID = 0x7FFFFFFF
_BIT = (np.uint32(1) << np.arange(CHUNK, dtype=np.uint32)).astype(np.uint32)
GUESS_SHIFT = 8
_AHEAD = 4
_LEAF_MASK = 0x3FFF
_SEEN = 4_096  # slots of the table of nodes already looked at for one row


@intrinsic
def _float_bits(context: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def _bits_float(context: Any, value: Any) -> Any:
    return types.float32(types.int32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def _half(context: Any, value: Any) -> Any:
    """float16 bits as float32, exactly."""
    return types.float32(types.uint16), lambda ctx, b, sig, args: b.fpext(
        b.bitcast(args[0], ir.HalfType()), ir.FloatType()
    )


@intrinsic
def _lowest_bit(context: Any, value: Any) -> Any:
    return types.uint32(types.uint32), lambda ctx, b, sig, args: b.cttz(args[0], cgutils.true_bit)


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    return types.voidptr(types.int64), lambda ctx, b, sig, args: b.inttoptr(args[0], cgutils.voidptr_t)


@intrinsic
def _prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at an address before it is needed."""

    def generate(ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(function, [b.inttoptr(args[0], cgutils.voidptr_t), flag(0), flag(3), flag(1)])
        return ctx.get_dummy_value()

    return types.void(types.int64), generate


@njit(inline="always")
def key_of(score: Any, node: Any) -> Any:
    bits = _float_bits(score)
    if bits < 0:
        bits = bits ^ np.int32(LARGEST_ID)
    return (np.int64(bits) << 32) | (np.int64(LARGEST_ID) - np.int64(node))


@njit(inline="always")
def score_of(key: Any) -> Any:
    bits = np.int32(key >> 32)
    if bits < 0:
        bits = bits ^ np.int32(LARGEST_ID)
    return _bits_float(bits)


@njit(inline="always")
def node_of(key: Any) -> Any:
    return np.int64(LARGEST_ID) - (key & np.int64(LARGEST_ID))


def pack(scores: Any, ids: Any) -> Any:
    """`key_of`, for numpy arrays."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32).astype(np.int64)
    return (np.where(bits < 0, bits ^ LARGEST_ID, bits) << 32) | (LARGEST_ID - np.asarray(ids, np.int64))


def unpack(keys: Any) -> tuple[Any, Any]:
    """Scores float32 and ids int64 of keys, for numpy arrays; an empty place has score -inf."""
    bits = (keys >> 32).astype(np.int64)
    scores = np.where(bits < 0, bits ^ LARGEST_ID, bits).astype(np.int32).view(np.float32)
    return scores, LARGEST_ID - (keys & LARGEST_ID)


EMPTY = int(pack(np.float32([-np.inf]), [LARGEST_ID])[0])


@njit(inline="always")
def _offer(row: Any, key: Any) -> None:
    """Put a key in its place in a list, the last one falling out; one that is there already is not put twice."""
    last = row.shape[0] - 1
    if key <= row[last]:
        return
    known = False
    for place in range(row.shape[0]):
        known |= row[place] == key
    if known:
        return
    for place in range(last, 0, -1):  # without branches: each place keeps the second largest of its pair and the key
        moved = min(row[place - 1], key)
        row[place] = max(moved, row[place])
    row[0] = max(row[0], key)


@njit(nogil=True, fastmath={"nsz", "arcp", "contract", "afn", "reassoc"}, cache=True)
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
                products = row[start : start + CHUNK]
                others = column_scales[start : start + CHUNK]
                worst = column_floors[start : start + CHUNK]
                for j in range(CHUNK):
                    product = np.float32(products[j])
                    for_row |= _BIT[j] if product * others[j] >= floor else zero
                    for_column |= _BIT[j] if product * scale >= worst[j] else zero
            else:
                for j in range(n - start):
                    product = np.float32(row[start + j])
                    for_row |= _BIT[j] if product * column_scales[start + j] >= floor else zero
                    for_column |= _BIT[j] if product * scale >= column_floors[start + j] else zero
            if symmetric and start <= i:
                keep = np.uint32(np.uint64(0xFFFFFFFF) << np.uint64(i - start + 1))
                for_row &= keep
                for_column &= keep
            while for_row != zero:
                j = start + np.int64(_lowest_bit(for_row))
                for_row &= for_row - np.uint32(1)
                score = np.float32(row[j]) * column_scales[j]
                if score >= floor:
                    _offer(keys[place], key_of(score, ids[columns[j]]))
                    floor = max(floor, score_of(keys[place, last]))
            floors[place] = floor
            while for_column != zero:
                j = start + np.int64(_lowest_bit(for_column))
                for_column &= for_column - np.uint32(1)
                other = columns[j]
                _offer(keys[other], key_of(np.float32(row[j]) * scale, ids[place]))
                column_floors[j] = max(column_floors[j], score_of(keys[other, last]))
                floors[other] = column_floors[j]


@njit(nogil=True, fastmath={"nsz", "arcp", "contract", "afn", "reassoc"}, cache=True)
def search_tile(tile: Any, rows: Any, first: int, scales: Any, keys: Any) -> None:
    """Offer the columns of a tile int32 [m, n] (nodes first..first+n-1, codes' scales [n]) to the lists of its rows."""
    last = keys.shape[1] - 1
    n = tile.shape[1]
    for i in range(tile.shape[0]):
        row = keys[rows[i]]
        floor = score_of(row[last])
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            passed = False
            for j in range(start, stop):
                passed |= np.float32(tile[i, j]) * scales[j] >= floor
            if not passed:
                continue
            for j in range(start, stop):
                score = np.float32(tile[i, j]) * scales[j]
                if score >= floor:
                    _offer(row, key_of(score, first + j))
                    floor = score_of(row[last])


@njit(nogil=True, cache=True)
def merge_lists(keys: Any, places: Any, others: Any) -> None:
    """Offer each list of others int64 [m, c] to the list at its place in keys int64 [n, c]."""
    last = keys.shape[1] - 1
    for i in range(others.shape[0]):
        row = keys[places[i]]
        for q in range(others.shape[1]):
            if others[i, q] <= row[last]:
                break
            _offer(row, others[i, q])


@njit(inline="always")
def _address(table: Any, node: Any) -> Any:
    """Where a node's row begins in memory; table is `graphbuild.knn.rows.table`."""
    addresses, starts, guess, stride = table
    shard = guess[node >> GUESS_SHIFT]
    while node >= starts[shard + 1]:
        shard += 1
    return addresses[shard] + (node - starts[shard]) * stride


@njit(inline="always")
def _prefetch_row(address: Any, length: Any) -> None:
    for offset in range(0, length, 64):
        _prefetch(address + offset)


@njit(inline="always", fastmath=True)
def _code_product(a: Any, b: Any, width: Any) -> Any:
    left = carray(_pointer(a), width, np.int8)
    right = carray(_pointer(b), width, np.int8)
    total = np.int32(0)
    for j in range(width):
        total += np.int32(left[j]) * np.int32(right[j])
    return total


@njit(nogil=True, cache=True)
def refine_lists(
    first: int, keys: Any, expand: int, lists: Any, codes: Any, scales: Any, leaves: Any, width: int, fan: int
) -> int:
    """One round of neighbours' neighbours: offer nodes first..first+n-1 the lists of the `expand` best in theirs.

    keys int64 [n, c], in place; lists, codes, scales, leaves: tables of rows of all nodes. A pair that shared a leaf
    was compared when the leaf was joined, and is left out. Returns the number of products computed.
    """
    count, c = keys.shape
    seen = np.empty(_SEEN, np.int64)
    seen_by = np.full(_SEEN, -1, np.int64)
    wanted = np.empty(expand * c, np.int64)
    own = np.empty(c, np.int64)
    joined = np.full(_LEAF_MASK + 1, -1, np.int32)
    total = 0
    for r in range(count):
        node = first + r
        row = keys[r]
        own[:] = row
        own_code = _address(codes, node)
        own_leaves = carray(_pointer(_address(leaves, node)), fan, np.int32)
        for y in range(fan):
            joined[own_leaves[y] & _LEAF_MASK] = r
        for q in range(-1, c):  # itself and its own list need no second look
            other = node if q < 0 else node_of(own[q])
            slot = (other * 0x9E3779B1) >> 7 & (_SEEN - 1)
            while seen_by[slot] == r and seen[slot] != other:
                slot = (slot + 1) & (_SEEN - 1)
            seen[slot] = other
            seen_by[slot] = r
        found = 0
        for p in range(min(expand, c)):
            if own[p] == EMPTY:
                break
            list_of_neighbor = carray(_pointer(_address(lists, node_of(own[p]))), c, np.int64)
            for q in range(c):
                if list_of_neighbor[q] == EMPTY:
                    break
                other = node_of(list_of_neighbor[q])
                slot = (other * 0x9E3779B1) >> 7 & (_SEEN - 1)
                while seen_by[slot] == r and seen[slot] != other:
                    slot = (slot + 1) & (_SEEN - 1)
                if seen_by[slot] == r:
                    continue
                seen[slot] = other
                seen_by[slot] = r
                wanted[found] = other
                found += 1
            if found + 2 * c > _SEEN // 2:
                break
        for q in range(found):
            other = wanted[q]
            if q + _AHEAD < found:
                _prefetch_row(_address(leaves, wanted[q + _AHEAD]), 4 * fan)
                _prefetch_row(_address(codes, wanted[q + _AHEAD]), width)
            leaves_of_other = carray(_pointer(_address(leaves, other)), fan, np.int32)
            together = False
            for y in range(fan):
                together |= joined[leaves_of_other[y] & _LEAF_MASK] == r
            if together:
                continue
            total += 1
            product = _code_product(own_code, _address(codes, other), width)
            scale = carray(_pointer(_address(scales, other)), 1, np.float32)[0]
            _offer(row, key_of(np.float32(product) * scale, other))
    return total


@njit(nogil=True, fastmath={"nsz", "arcp", "contract", "afn", "reassoc"}, cache=True)
def encode_rows(raw: Any, codes: Any, scales: Any) -> None:
    """Codes int8 [n, d] and (scale, rest) float32 [n, 2] of float16 vectors, given as uint16 bits [n, d]."""
    n, width = raw.shape
    row = np.empty(width, np.float32)
    for i in range(n):
        norm = 0.0
        for j in range(width):
            row[j] = _half(raw[i, j])
            norm += np.float64(row[j]) * np.float64(row[j])
        shrink = np.float32(1.0 / np.sqrt(norm))
        largest = np.float32(0.0)
        for j in range(width):
            row[j] *= shrink
            largest = max(largest, abs(row[j]))
        scale = largest / np.float32(127.0)
        rest = np.float32(0.0)
        for j in range(width):
            code = np.rint(row[j] / scale)
            codes[i, j] = np.int8(code)
            rest += (row[j] - code * scale) ** 2
        scales[i, 0] = scale
        scales[i, 1] = np.sqrt(rest) * np.float32(1.0001) + np.float32(1e-6)


@njit(nogil=True, cache=True)
def offer_exactly(
    tile: Any, own: Any, first: int, margin: float, keys: Any, vectors: Any, width: int
) -> None:
    """Offer nodes first..first+n-1 to the exact lists keys int64 [m, k] of nodes own [m].

    tile float32 [m, n]: their similarities, wrong by at most `margin`; what can reach a list is computed in float64.
    """
    last = keys.shape[1] - 1
    one = np.full((1, 1), EMPTY, np.int64)
    for i in range(tile.shape[0]):
        row = keys[i]
        floor = score_of(row[last]) - margin
        for j in range(tile.shape[1]):
            if tile[i, j] >= floor and first + j != own[i]:
                one[0, 0] = key_of(np.float32(0.0), first + j)
                _offer(row, exact_similarities(own[i], one, vectors, width)[0, 0])
                floor = score_of(row[last]) - margin


@njit(nogil=True, fastmath=True, cache=True)
def exact_similarities(first: int, keys: Any, vectors: Any, width: int) -> Any:
    """The lists of nodes first..first+n-1 scored again: float32 cosines of the stored float16 vectors, sums in float64.

    keys int64 [n, c] of any scores; vectors: table of float16 rows. Returns keys [n, c] in no order.
    """
    count, c = keys.shape
    result = np.full((count, c), EMPTY, np.int64)
    own = np.empty(width, np.float32)
    for r in range(count):
        stored = carray(_pointer(_address(vectors, first + r)), width, np.uint16)
        own_norm = 0.0
        for j in range(width):
            own[j] = _half(stored[j])
            own_norm += np.float64(own[j] * own[j])
        for q in range(c):
            if keys[r, q] == EMPTY:
                continue
            if q + 1 < c and keys[r, q + 1] != EMPTY:
                _prefetch_row(_address(vectors, node_of(keys[r, q + 1])), 2 * width)
            other = node_of(keys[r, q])
            vector = carray(_pointer(_address(vectors, other)), width, np.uint16)
            dot = 0.0
            norm = 0.0
            for j in range(width):
                value = _half(vector[j])
                dot += np.float64(own[j] * value)
                norm += np.float64(value * value)
            result[r, q] = key_of(np.float32(dot / np.sqrt(own_norm * norm)), other)
    return result
