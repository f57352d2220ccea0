"""Neighbour lists: rows of int64 keys in descending order, and how compiled loops and numpy make and change them.

A key's upper half is a float32 score as an integer of the same order, its lower half 2**31 - 1 - id, so that of equal
scores the smaller id comes first. An empty place is EMPTY. A list holds the best of all pairs ever offered, whatever
the order of offering: that makes results independent of the sizes of tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from graphbuild.machine.compiled import compiled, inlined

LARGEST_ID = 0x7FFFFFFF


@intrinsic
def _float_bits(context: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def _bits_float(context: Any, value: Any) -> Any:
    return types.float32(types.int32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.FloatType())


@inlined
def key_of(score: Any, node: Any) -> Any:
    bits = _float_bits(score)
    if bits < 0:
        bits = bits ^ np.int32(LARGEST_ID)
    return (np.int64(bits) << 32) | (np.int64(LARGEST_ID) - np.int64(node))


@inlined
def score_of(key: Any) -> Any:
    bits = np.int32(key >> 32)
    if bits < 0:
        bits = bits ^ np.int32(LARGEST_ID)
    return _bits_float(bits)


@inlined
def node_of(key: Any) -> Any:
    return np.int64(LARGEST_ID) - (key & np.int64(LARGEST_ID))


def pack(scores: Any, ids: Any) -> Any:
    """`key_of`, for numpy arrays. ValueError for ids beyond LARGEST_ID, which a key cannot hold."""
    if np.size(ids) and np.max(ids) > LARGEST_ID:
        raise ValueError(f"node id {np.max(ids)} is beyond {LARGEST_ID}")
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32).astype(np.int64)
    return (np.where(bits < 0, bits ^ LARGEST_ID, bits) << 32) | (LARGEST_ID - np.asarray(ids, np.int64))


def unpack(keys: Any) -> tuple[Any, Any]:
    """Scores float32 and ids int64 of keys, for numpy arrays; an empty place has score -inf."""
    bits = (keys >> 32).astype(np.int64)
    scores = np.where(bits < 0, bits ^ LARGEST_ID, bits).astype(np.int32).view(np.float32)
    return scores, LARGEST_ID - (keys & LARGEST_ID)


EMPTY = int(pack(np.array([-np.inf]), [LARGEST_ID])[0])


@inlined
def offer(row: Any, key: Any) -> None:
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


@compiled()
def merge_lists(keys: Any, places: Any, others: Any) -> None:
    """Offer each list of others int64 [m, c] to the list at its place in keys int64 [n, c]."""
    last = keys.shape[1] - 1
    for i in range(others.shape[0]):
        row = keys[places[i]]
        for q in range(others.shape[1]):
            if others[i, q] <= row[last]:
                break
            offer(row, others[i, q])
