"""Exact engine: every pair of nodes, once, by int8 products; then proof.

Nodes fall into groups; a join task takes two groups (or one with itself) and offers each pair of a tile to
the lists of both its nodes, so it costs half the products of a search. Lists are longer than k; whether what they left
out can still belong to the k best is proved afterwards from the codes' error bound (`proved`), and rows where that
fails are searched again (`search_again`). Cost: N^2 d int8 operations, and 4 to 8 lists a node of scratch;
memory: codes and lists of two groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from graphbuild.knn import device as gpu
from graphbuild.knn import kernels, lists
from graphbuild.knn.codes import Codes
from graphbuild.knn.inputs import Inputs, write_leaders
from graphbuild.knn.leaders import floor_leader
from graphbuild.knn.products import TILE_ROWS, products, tile_memory, unit
from graphbuild.store.sharded import Array, ShardedArray
from graphbuild.store.store import Json, Writer

GROUP_ROWS = 25_600
LARGE = 1_000_000
BLOCK_ROWS = 8_192
AGAIN_ROWS = 1_024
FLOAT32_BITS = 2.0**-23  # a similarity is rounded to float32 once


@dataclass(frozen=True)
class Exact:
    """The engine; what its methods promise: `graphbuild.knn.engine.Engine`."""

    seed: int
    name: str = "exact"
    on_device: bool = True
    ordered: bool = False
    mapped_files: int = 4

    def settings(self) -> Json:
        return {}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        write_leaders(inputs, self.seed, writer)
        return {}

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        return {"floors": inputs.leaders.leaves(codes.codes, 0, floor_leader(k))[1]}

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[list[tuple[int, int]]]:
        """The pairs of groups, a group being (first node, count): every pair of nodes is in one of them."""
        count = min(math.ceil(nodes / GROUP_ROWS), 4 if nodes <= LARGE else 8)
        rows = min(math.ceil(nodes / count), at_once // 2)
        groups = [
            (first, min(rows, end - first))
            for begin, end in ((0, first_new), (first_new, nodes))
            for first in range(begin, end, rows)
        ]
        return [sorted({a, b}) for a, b in combinations_with_replacement(groups, 2) if b[0] >= first_new]

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        groups = round((2 * tasks + 0.25) ** 0.5 - 0.5)
        return 2 * nodes / groups, groups

    def beside(self, nodes: int) -> float:
        return 0.0

    def length(self, k: int, nodes: int) -> int:
        """So many that the proof nearly always succeeds."""
        return min(2 * k + 16, nodes - 1)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        """Lists of one group's nodes within it, or of two groups' nodes in the other."""
        import torch

        groups = [(int(first), int(count)) for first, count in argument]
        ids = np.concatenate([np.arange(first, first + count) for first, count in groups])
        if device != "cpu":
            return ids, _join_on_device(groups, inputs, length, device)
        code = torch.from_numpy(np.concatenate([inputs.of("codes").span(*group) for group in groups]))
        scale = np.concatenate([inputs.of("scales").span(*group)[:, 0] for group in groups])
        floors = np.concatenate([inputs.of("floors").span(*group)[:, 0] for group in groups])
        keys = np.full((len(ids), length), lists.EMPTY, np.int64)
        places = np.arange(len(ids))
        memory = tile_memory()
        split = groups[0][1]
        for a in range(0, split, TILE_ROWS):
            for b in range(a if len(groups) == 1 else split, len(ids), TILE_ROWS):
                rows = places[a : min(a + TILE_ROWS, split)]
                columns = places[b : b + TILE_ROWS]
                own, others = code[rows[0] : rows[-1] + 1], code[columns[0] : columns[-1] + 1]
                tile = products(own, others, memory, upper=a == b)
                kernels.join_tile(tile.numpy(), rows, columns, ids, scale, floors, keys, a == b)
        return ids, keys


def _join_on_device(groups: list[tuple[int, int]], inputs: Inputs, length: int, place: str) -> Array:
    """The same lists by torch operations alone, each pair from both sides: what a GPU runs."""
    import torch

    sides = [
        gpu.Side(
            group[0],
            torch.from_numpy(inputs.of("codes").span(*group)).to(place),
            torch.from_numpy(inputs.of("scales").span(*group)[:, 0].copy()).to(place),
            torch.from_numpy(inputs.of("floors").span(*group)[:, 0].copy()).to(place),
        )
        for group in groups
    ]
    keys = [
        gpu.keys(*part).cpu().numpy()
        for own, others in zip(sides, sides[::-1], strict=True)
        for part in gpu.search(own, others, length)
    ]
    return np.concatenate(keys)


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


def search_again(vectors: ShardedArray, ids: Array, keys: Array, gone: ShardedArray | None = None) -> None:
    """Make the lists keys int64 [n, k] of nodes `ids` the exact ones, ties and all, by comparing with every node.

    gone: bool [N, 1], nodes that no list may name.
    keys: exact similarities of some neighbours, or EMPTY. A float32 product, whose error is at most (d + 8) 2^-24 for
    unit vectors (Higham 2002, section 3.1), tells which nodes can reach a list; those are computed in float64.
    """
    queries = unit(vectors.take(ids))
    margin = (vectors.width + 8) * 2.0**-23
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = (queries @ unit(block).T).numpy()
        if gone is not None:
            tile[:, gone.span(first, len(block))[:, 0]] = np.nan  # no comparison with it holds
        kernels.offer_exactly(tile, ids, first, margin, keys, vectors.table(), vectors.width)
