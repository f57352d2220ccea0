"""Leaders: a random sample of the nodes, and which of them each node is nearest to.

They cut the nodes into leaves (`graphbuild.knn.partition`), and tell how near a node's neighbours must at least be:
that spares the engines most of the work of filling lists. Cost a node: L / 128 + 12 x 128 products, L = N / 128.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from graphbuild.knn import kernels, lists
from graphbuild.knn.codes import encode
from graphbuild.knn.products import Tensor, products, unit
from graphbuild.sharded import Array, ShardedArray

NODES_PER_LEADER = 128
GROUP_LEADERS = 128
PROBED_GROUPS = 12
FLAT_ROWS = 512


def leader_count(nodes: int) -> int:
    return math.ceil(nodes / NODES_PER_LEADER)


def floor_leader(k: int) -> int:
    """The rank of the leader that is farther than a node's k-th neighbour, but for a few nodes in a thousand."""
    return 3 + k // 32


class Leaders:
    """codes int8 [L, d] and scales [L] of the leaders, near ones behind each other; and the mean codes of their groups,
    which end at `bounds`."""

    def __init__(self, vectors: Array) -> None:
        """vectors float16 [L, d], as `draw_leaders` orders them."""
        self.codes, self.scales = encode(vectors)
        count = 2 ** max(0, math.ceil(math.log2(len(vectors) / GROUP_LEADERS)))
        self.bounds = np.linspace(0, len(vectors), count + 1).astype(int)
        exact = unit(torch.from_numpy(vectors), torch.float32)
        means = torch.stack([exact[a:b].mean(dim=0) for a, b in itertools.pairwise(self.bounds)])
        self.group_codes, self.group_scales = encode(means.half().numpy())

    def leaves(self, codes: Array, fan: int, floor_at: int) -> tuple[Array, Array]:
        """The `fan` nearest leaders of each of these nodes, nearest first: int32 [n, fan]; and a floor float32 [n, 1].

        Leaders being a sample of the nodes, some floor_at x NODES_PER_LEADER nodes are as near as the leader of that
        rank: a score below its own is not worth keeping.

        Searched in the PROBED_GROUPS nearest groups only, so the cost grows with the root of the number of leaders.
        """
        code = torch.from_numpy(codes)
        keys = np.full((len(codes), max(fan, floor_at)), lists.EMPTY, np.int64)
        if len(self.bounds) <= 2 * PROBED_GROUPS:  # nearly all are probed anyway
            for at in range(0, len(code), FLAT_ROWS):
                tile = products(code[at : at + FLAT_ROWS], torch.from_numpy(self.codes))
                kernels.search_tile(tile.numpy(), np.arange(at, at + len(tile)), 0, self.scales[:, 0].copy(), keys)
            return self._leaves_and_floors(keys, fan, floor_at)
        near = products(code, torch.from_numpy(self.group_codes)).float() * torch.from_numpy(
            self.group_scales[:, 0].copy()
        )
        probed = near.topk(min(PROBED_GROUPS, near.shape[1]), dim=1).indices.numpy()
        rows_of = np.argsort(probed.reshape(-1), kind="stable")
        ends = np.searchsorted(probed.reshape(-1)[rows_of], np.arange(near.shape[1] + 1))
        for group, (a, b) in enumerate(itertools.pairwise(self.bounds)):
            rows = rows_of[ends[group] : ends[group + 1]] // probed.shape[1]
            if len(rows):
                tile = products(code.index_select(0, torch.from_numpy(rows)), torch.from_numpy(self.codes[a:b]))
                kernels.search_tile(tile.numpy(), rows, a, self.scales[a:b, 0].copy(), keys)
        return self._leaves_and_floors(keys, fan, floor_at)

    def _leaves_and_floors(self, keys: Array, fan: int, floor_at: int) -> tuple[Array, Array]:
        scores, leaves = lists.unpack(keys)
        return leaves[:, :fan].astype(np.int32), scores[:, floor_at - 1 : floor_at]


def draw_leaders(vectors: ShardedArray, seed: int) -> Array:
    """Vectors float16 [L, d] of random nodes, ordered so that near ones have near numbers (recursive bisection)."""
    nodes = len(vectors)
    ids = np.sort(np.random.default_rng(seed).choice(nodes, leader_count(nodes), replace=False))
    raw = vectors.take(ids)
    return raw[_bisected(unit(torch.from_numpy(raw), torch.float32), np.arange(len(raw)))]


def _bisected(exact: Tensor, order: Array) -> Array:
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
