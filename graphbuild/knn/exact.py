"""Exact engine: every pair of nodes, once, by int8 products; then proof.

Nodes fall into groups; a join task takes two groups (or one with itself) and offers each pair of a tile to
the lists of both its nodes, so it costs half the products of a search. Lists are longer than k; whether what they left
out can still belong to the k best is proved afterwards from the codes' error bound (`proved`), and rows where that
fails are searched again (`search_again`). Cost: N^2 d int8 operations, and 4 to 8 lists a node of scratch;
memory: codes and lists of two groups.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import torch

from graphbuild.knn import device, kernels, lists
from graphbuild.knn.products import TILE_ROWS, products, tile_memory, unit
from graphbuild.store.sharded import Array, ShardedArray

GROUP_ROWS = 25_600
LARGE = 1_000_000
BLOCK_ROWS = 8_192
AGAIN_ROWS = 1_024
FLOAT32_BITS = 2.0**-23  # a similarity is rounded to float32 once


def list_length(k: int, nodes: int) -> int:
    """Candidates kept a node, so that the proof nearly always succeeds."""
    return min(2 * k + 16, nodes - 1)


def joins(nodes: int, at_once: int, first_new: int) -> list[list[tuple[int, int]]]:
    """The pairs of groups, a group being (first node, count): one task each, of at most `at_once` nodes.

    Every pair of nodes is in one of them, apart from pairs of nodes below `first_new`.
    """
    count = min(math.ceil(nodes / GROUP_ROWS), 4 if nodes <= LARGE else 8)
    rows = min(math.ceil(nodes / count), at_once // 2)
    groups = [
        (first, min(rows, end - first))
        for begin, end in ((0, first_new), (first_new, nodes))
        for first in range(begin, end, rows)
    ]
    return [sorted({a, b}) for a, b in combinations_with_replacement(groups, 2) if b[0] >= first_new]


def spread(nodes: int, tasks: int) -> tuple[float, float]:
    groups = round((2 * tasks + 0.25) ** 0.5 - 0.5)
    return 2 * nodes / groups, groups


def join(
    groups: list[tuple[int, int]], codes: ShardedArray, scales: ShardedArray, floor: ShardedArray, length: int
) -> tuple[Array, Array]:
    """Lists of one group's nodes within it, or of two groups' nodes in the other.

    floor float32 [N, 1]: scores below it are not kept (`Leaders.leaves`).
    Returns ids int64 [m], keys int64 [m, length].
    """
    ids = np.concatenate([np.arange(first, first + count) for first, count in groups])
    code = torch.from_numpy(np.concatenate([codes.span(first, count) for first, count in groups]))
    scale = np.concatenate([scales.span(first, count)[:, 0] for first, count in groups])
    keys = np.full((len(ids), length), lists.EMPTY, np.int64)
    floors = np.concatenate([floor.span(first, count)[:, 0] for first, count in groups])
    places = np.arange(len(ids))
    memory = tile_memory()
    split = groups[0][1]
    for a in range(0, split, TILE_ROWS):
        for b in range(a if len(groups) == 1 else split, len(ids), TILE_ROWS):
            rows = places[a : min(a + TILE_ROWS, split)]
            columns = places[b : b + TILE_ROWS]
            tile = products(code[rows[0] : rows[-1] + 1], code[columns[0] : columns[-1] + 1], memory)
            kernels.join_tile(tile.numpy(), rows, columns, ids, scale, floors, keys, a == b)
    return ids, keys


def join_on_device(
    groups: list[tuple[int, int]],
    codes: ShardedArray,
    scales: ShardedArray,
    floor: ShardedArray,
    length: int,
    place: str,
) -> tuple[Array, Array]:
    """The same lists by torch operations alone, each pair from both sides: what a GPU runs."""
    sides = [
        device.Side(
            first,
            torch.from_numpy(codes.span(first, count)).to(place),
            torch.from_numpy(scales.span(first, count)[:, 0].copy()).to(place),
            torch.from_numpy(floor.span(first, count)[:, 0].copy()).to(place),
        )
        for first, count in groups
    ]
    keys = [
        device.keys(*part).cpu().numpy()
        for own, others in zip(sides, sides[::-1], strict=True)
        for part in device.search(own, others, length)
    ]
    return np.concatenate([np.arange(first, first + count) for first, count in groups]), np.concatenate(keys)


def slack(rests: Array, largest_rest: float) -> Array:
    """How much more than the codes tell a similarity may be, float64 [n]; rests [n] of the rows' codes."""
    rest = rests.astype(np.float64)
    result: Array = rest + largest_rest + rest * largest_rest + FLOAT32_BITS
    return result


def proved(candidates: Array, floors: Array, exact: Array, scales: Array, slack: Array) -> Array:
    """bool [n]: whether no node outside the candidates can be among a row's k best.

    candidates int64 [n, c]: lists by code, descending; floors float32 [n]: scores below were not kept; exact float32
    [n, k]: true similarities of the k best of them; scales [n] of the rows' codes; slack [n].
    """
    worst = np.maximum(lists.unpack(candidates[:, -1])[0], floors).astype(np.float64)
    result: Array = worst * scales + slack < exact[:, -1]
    return result


def search_again(vectors: ShardedArray, ids: Array, keys: Array) -> None:
    """Make the lists keys int64 [n, k] of nodes `ids` the exact ones, ties and all, by comparing with every node.

    keys: exact similarities of some neighbours, or EMPTY. A float32 product, whose error is at most (d + 8) 2^-24 for
    unit vectors (Higham 2002, section 3.1), tells which nodes can reach a list; those are computed in float64.
    """
    queries = unit(torch.from_numpy(vectors.take(ids)), torch.float32)
    margin = (vectors.width + 8) * 2.0**-23
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = (queries @ unit(torch.from_numpy(np.array(block)), torch.float32).T).numpy()
        kernels.offer_exactly(tile, ids, first, margin, keys, vectors.table(), vectors.width)
