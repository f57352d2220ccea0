"""Leaders: a random sample of the nodes, and which of them each node is nearest to.

They cut the nodes into leaves (`graphbuild.knn.partition`), and tell how near a node's neighbours must at least be:
that spares the engines most of the work of filling lists. Cost a node: L / 128 + 12 x 128 products, L = N / 64; beyond
MOST_GROUPS x 128 leaders log (L) of 12 x 32 in place of L / 128. Memory to order them: ORDERED of them, 14 bytes a
number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from graphbuild.knn import kernels, lists
from graphbuild.knn.codes import encode
from graphbuild.knn.products import TILE_ROWS, products, tile_memory, unit
from graphbuild.store.sharded import Array

if TYPE_CHECKING:
    from torch import Tensor

NODES_PER_LEADER = 64
GROUP_LEADERS = 128
PROBED_GROUPS = 12
FLAT_GROUPS = 48
MOST_GROUPS = 1_024  # that all are compared with; of more, the near ones are found by groups of so many groups:
GROUP_GROUPS = 32
GROUPS_AT_ONCE = 512
ORDERED, DIRECTED = 2**18, 2**14  # leaders that are ordered at a time; of more, those that tell how to halve them
FILES = 4_096
ROWS_A_GROUP = 128  # nodes at least that are compared with a group at once: a call for a few costs as much
FLOOR_FAILS = 2e-4
BLOCK_NODES = 65_536
RANGE_NODES, RANGES, MOST_RANGE_NODES, SORTED_PARTS = 65_536, 128, 2**19, 4


def leader_count(nodes: int) -> int:
    return math.ceil(nodes / NODES_PER_LEADER)


def compared_at_once(nodes: int) -> int:
    """Of how many nodes at least `leaves` should be asked at once: the more groups, the fewer of them look at each; and
    that many at least, that not too many files are read by every range of leaders."""
    return max(math.ceil(ROWS_A_GROUP * leader_count(nodes) / GROUP_LEADERS / PROBED_GROUPS), nodes // FILES)


def ranges_of_leaders(nodes: int) -> list[int]:
    """Where ranges of leaders begin, whose nodes are put in order by a task each, and the last ends."""
    ranges = max(min(math.ceil(nodes / RANGE_NODES), RANGES), math.ceil(nodes / MOST_RANGE_NODES))
    bounds: list[int] = np.linspace(0, leader_count(nodes), ranges + 1).astype(int).tolist()
    return bounds


def parts_of_ranges(ranges: int) -> list[int]:
    """Which range each part of them begins with, and the last ends: what is sorted of a part goes before the next's."""
    bounds: list[int] = np.linspace(0, ranges, min(ranges, SORTED_PARTS) + 1).astype(int).tolist()
    return bounds


def floor_leader(k: int) -> int:
    """The rank of the leader that is farther than a node's k-th neighbour, but for one node in 5,000.

    Each of those neighbours is a leader with chance 1 / NODES_PER_LEADER: how many are is about Poisson distributed.
    """
    mean = k / NODES_PER_LEADER
    rank, term = 0, math.exp(-mean)
    rest = 1 - term
    while rest > FLOOR_FAILS:
        rank += 1
        term *= mean / rank
        rest -= term
    return rank + 1


@dataclass(frozen=True)
class Leaders:
    """codes int8 [L, d] and scales float32 [L, 2] of the leaders, near ones behind each other, and those of the means
    of their groups [G, d]. Made once a build; workers map the files."""

    codes: Array
    scales: Array
    group_codes: Array
    group_scales: Array

    @classmethod
    def of(cls, vectors: Array, group: int | None = None) -> Leaders:
        """vectors float16 [L, d], near ones behind each other; group: how many in one at most, else GROUP_LEADERS."""
        return cls.coded(vectors.__getitem__, np.arange(len(vectors)), np.empty(vectors.shape, np.int8), group)

    @classmethod
    def coded(cls, read: Callable[[Array], Array], order: Array, codes: Array, group: int | None = None) -> Leaders:
        """Of the vectors float16 that `read` gives of numbers in `order` [L]; codes int8 [L, d] is written to."""
        import torch

        bounds = _bounds(len(order), 2 ** max(0, math.ceil(math.log2(len(order) / (group or GROUP_LEADERS)))))
        scales, means = np.empty((len(order), 2), np.float32), []
        for some in range(0, len(bounds) - 1, GROUPS_AT_ONCE):
            edges = bounds[some : some + GROUPS_AT_ONCE + 1]
            raw = read(order[edges[0] : edges[-1]])
            codes[edges[0] : edges[-1]], scales[edges[0] : edges[-1]] = encode(raw)
            means += [part.mean(dim=0) for part in torch.split(unit(raw), np.diff(edges).tolist())]
        return cls(codes, scales, *encode(torch.stack(means).half().numpy()))

    @cached_property
    def groups(self) -> Leaders:
        """The means of the groups, as leaders with groups of their own."""
        return Leaders.of((self.group_codes * self.group_scales[:, :1]).astype(np.float16), GROUP_GROUPS)

    @property
    def bounds(self) -> Array:
        """Where the groups begin and end, int64 [G + 1]."""
        return _bounds(len(self.codes), len(self.group_codes))

    def leaves(self, codes: Array, fan: int, floor_at: int) -> tuple[Array, Array]:
        """The `fan` nearest leaders of each of these nodes, nearest first: int32 [n, fan]; and a floor float32 [n, 1].

        Leaders being a sample of the nodes, some floor_at x NODES_PER_LEADER nodes are as near as the leader of that
        rank: a score below its own is not worth keeping.

        Searched in the PROBED_GROUPS nearest groups only, so the cost grows with the root of the number of leaders.
        """
        import torch

        code = torch.from_numpy(codes)
        bounds = self.bounds
        keys = np.full((len(codes), max(fan, floor_at)), lists.EMPTY, np.int64)
        if len(bounds) <= FLAT_GROUPS:  # choosing groups would cost more
            _search(code, np.arange(len(code)), self.codes, self.scales, 0, keys)
        else:
            if len(bounds) > MOST_GROUPS + 1:
                near = self.groups.leaves(codes, PROBED_GROUPS, 1)[0]
            else:
                keys_near = np.full((len(codes), PROBED_GROUPS), lists.EMPTY, np.int64)
                _search(code, np.arange(len(code)), self.group_codes, self.group_scales, 0, keys_near)
                near = lists.unpack(keys_near)[1]
            probed = near.reshape(-1).astype(np.min_scalar_type(len(bounds)))
            rows_of = np.argsort(probed, kind="stable")
            ends = np.searchsorted(probed[rows_of], np.arange(len(bounds)))
            for group, (a, b) in enumerate(itertools.pairwise(bounds)):
                rows = rows_of[ends[group] : ends[group + 1]] // PROBED_GROUPS
                _search(code, rows, self.codes[a:b], self.scales[a:b], a, keys)
        scores, leaves = lists.unpack(keys)
        return leaves[:, :fan].astype(np.int32), scores[:, floor_at - 1 : floor_at]


def _bounds(leaders: int, groups: int) -> Array:
    return np.linspace(0, leaders, groups + 1).astype(int)


def _search(code: Tensor, rows: Array, leader_codes: Array, scales: Array, first: int, keys: Array) -> None:
    """Offer leaders first, first + 1, ... to the lists of some rows."""
    import torch

    memory = tile_memory()
    for at in range(0, len(rows), TILE_ROWS):
        some = rows[at : at + TILE_ROWS]
        own = code.index_select(0, torch.from_numpy(some))
        for a in range(0, len(leader_codes), TILE_ROWS):
            tile = products(own, torch.from_numpy(leader_codes[a : a + TILE_ROWS].copy()), memory)
            kernels.search_tile(tile.numpy(), some, first + a, scales[a : a + TILE_ROWS, 0].copy(), keys)


def blocks_of(nodes: int, first_new: int) -> list[int]:
    """Where blocks of ordered nodes begin, a task of merge and refine each, and the last ends; none has old and new."""
    return [*range(0, first_new, BLOCK_NODES), *range(first_new, nodes, BLOCK_NODES), nodes]


def draw_leaders(nodes: int, seed: int) -> Array:
    """Random nodes int64 [L], ascending."""
    return np.sort(np.random.default_rng(seed).choice(nodes, leader_count(nodes), replace=False))


def order_leaders(read: Callable[[Array], Array], rows: Array) -> Array:
    """The numbers `rows` [L], of which `read` gives vectors float16, near ones behind each other: halved by the
    direction of greatest spread, and so on."""
    if len(rows) <= ORDERED:
        return np.asarray(rows[_bisected(unit(read(rows)), np.arange(len(rows)))])
    some = unit(read(rows[:: len(rows) // DIRECTED]))
    direction = _direction(some - some.mean(dim=0))
    blocks = (rows[begin : begin + DIRECTED] for begin in range(0, len(rows), DIRECTED))
    order = np.argsort(np.concatenate([(unit(read(block)) @ direction).numpy() for block in blocks]), kind="stable")
    halves = np.array_split(order, [len(rows) // 2])
    return np.concatenate([order_leaders(read, np.sort(rows[half])) for half in halves])


def _bisected(exact: Tensor, order: Array) -> Array:
    import torch

    if len(order) <= GROUP_LEADERS // 2:
        return order
    x = exact[torch.from_numpy(order)]
    x = x - x.mean(dim=0)
    order = order[torch.argsort(x @ _direction(x), stable=True).numpy()]
    half = len(order) // 2
    return np.concatenate([_bisected(exact, order[:half]), _bisected(exact, order[half:])])


def _direction(x: Tensor) -> Tensor:
    """Of the greatest spread of rows around 0, by power iteration."""
    import torch

    direction = x[torch.linalg.vector_norm(x, dim=1).argmax()]
    for _ in range(6):
        direction = x.T @ (x @ direction)
        direction = direction / direction.norm().clamp_min(1e-30)
    return direction
