"""Leaders: a random sample of the nodes, and which of them each node is nearest to.

They cut the nodes into leaves (`graphbuild.knn.partition`), and tell how near a node's neighbours must at least be:
that spares the engines most of the work of filling lists. Cost a node: L / 128 + 12 x 128 products, L = N / 64.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphbuild.knn import kernels, lists
from graphbuild.knn.codes import encode
from graphbuild.knn.products import TILE_ROWS, products, tile_memory, unit
from graphbuild.store.sharded import Array, ShardedArray

if TYPE_CHECKING:
    from torch import Tensor

NODES_PER_LEADER = 64
GROUP_LEADERS = 128
PROBED_GROUPS = 12
FLAT_GROUPS = 48
FLOOR_FAILS = 2e-4


def leader_count(nodes: int) -> int:
    return math.ceil(nodes / NODES_PER_LEADER)


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
    def of(cls, vectors: Array) -> Leaders:
        """vectors float16 [L, d], as `draw_leaders` orders them. Memory: 10 bytes a number."""
        import torch

        count = 2 ** max(0, math.ceil(math.log2(len(vectors) / GROUP_LEADERS)))
        exact = unit(vectors)
        means = [exact[a:b].mean(dim=0) for a, b in itertools.pairwise(_bounds(len(vectors), count))]
        return cls(*encode(vectors), *encode(torch.stack(means).half().numpy()))

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
            near = np.full((len(codes), PROBED_GROUPS), lists.EMPTY, np.int64)
            _search(code, np.arange(len(code)), self.group_codes, self.group_scales, 0, near)
            probed = lists.unpack(near)[1].reshape(-1).astype(np.min_scalar_type(len(bounds)))
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


def draw_leaders(vectors: ShardedArray, seed: int) -> tuple[Array, Array]:
    """Random nodes int64 [L] and their vectors float16 [L, d], near ones behind each other (recursive bisection)."""
    nodes = len(vectors)
    ids = np.sort(np.random.default_rng(seed).choice(nodes, leader_count(nodes), replace=False))
    raw = vectors.take(ids)
    order = _bisected(unit(raw), np.arange(len(raw)))
    return ids[order], raw[order]


def _bisected(exact: Tensor, order: Array) -> Array:
    import torch

    if len(order) <= GROUP_LEADERS // 2:
        return order
    x = exact[torch.from_numpy(order)]
    x = x - x.mean(dim=0)
    direction = x[torch.linalg.vector_norm(x, dim=1).argmax()]
    for _ in range(6):  # power iteration: the direction of greatest spread
        direction = x.T @ (x @ direction)
        direction = direction / direction.norm().clamp_min(1e-30)
    order = order[torch.argsort(x @ direction, stable=True).numpy()]
    half = len(order) // 2
    return np.concatenate([_bisected(exact, order[:half]), _bisected(exact, order[half:])])
