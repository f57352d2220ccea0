"""Partition engine: approximate search by many small overlapping leaves, and one look at neighbours' neighbours.

One node in NODES_PER_LEADER is drawn as a leader; a node joins the leaves of its `fan` nearest leaders, and all pairs
of a leaf are compared (Dasgupta and Freund's random partitions in the form of PiPNN, arXiv 2602.21247). Many small leaves beat few
large ones: at equal recall 32 nodes a leader and fan 8 need a quarter of the pairs of 700 and 4. Then each list is
offered the lists of its best EXPAND (a round of NN-descent, Dong et al. 2011), which halves what is missing. `fan` follows from
the recall asked for, measured on a sample at full N (`calibrate`). Results do not depend on how leaves fall into tasks.
Cost: about 32 x fan^2 / 2 pairs a node; memory: codes and lists of one task's nodes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from graphbuild.knn import kernels
from graphbuild.knn.codes import Tensor, encode, products, unit
from graphbuild.sharded import Array, ShardedArray

NODES_PER_LEADER = 128
FANS = range(2, 25)
EXPAND = 8
MISSING_AFTER_REFINEMENT = 0.55  # of what the leaves miss, at EXPAND = 8; measured in benchmarks/knn.py
SAMPLE = 400
GROUP_LEADERS = 128
FLOOR_LEADER = 3
PROBED_GROUPS = 12
TASK_NODES = 65_536
TASKS = 128
TILE_ROWS = 512
LARGEST_LEAF = 8_192  # a larger one is cut: equal vectors would all meet in one
BLOCK_ROWS = 8_192


def list_length(k: int, nodes: int) -> int:
    return min(k + max(8, k // 8), nodes - 1)


def leader_count(nodes: int) -> int:
    return math.ceil(nodes / NODES_PER_LEADER)


def joins(nodes: int) -> list[tuple[int, int]]:
    """Ranges of leaves (first, end), one task each; neighbouring leaves have neighbouring numbers."""
    tasks = min(math.ceil(nodes / TASK_NODES), TASKS)
    bounds = np.linspace(0, leader_count(nodes), tasks + 1).astype(int).tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))


class Leaders:
    """codes int8 [L, d] and scales [L] of the leaders, in `groups` of near ones; and the groups' mean codes."""

    def __init__(self, vectors: Array) -> None:
        """vectors float16 [L, d], in the order of `ordered`."""
        self.codes, self.scales = encode(vectors)
        count = 2 ** max(0, math.ceil(math.log2(len(vectors) / GROUP_LEADERS)))
        self.bounds = np.linspace(0, len(vectors), count + 1).astype(int)
        exact = unit(torch.from_numpy(vectors), torch.float32)
        means = torch.stack([exact[a:b].mean(dim=0) for a, b in zip(self.bounds[:-1], self.bounds[1:], strict=True)])
        self.group_codes, self.group_scales = encode(means.half().numpy())

    def leaves(self, codes: Array, fan: int) -> tuple[Array, Array]:
        """The `fan` nearest leaders of each of these nodes, nearest first: int32 [n, fan]; and a floor float32 [n, 1].

        Leaders being a sample of the nodes, some FLOOR_LEADER x NODES_PER_LEADER nodes are as near as the leader of
        that rank: a score below its own is not worth keeping.

        Searched in the PROBED_GROUPS nearest groups only, so the cost grows with the root of the number of leaders.
        """
        code = torch.from_numpy(codes)
        keys = np.full((len(codes), fan), kernels.EMPTY, np.int64)
        near = products(code, torch.from_numpy(self.group_codes)).float() * torch.from_numpy(self.group_scales[:, 0].copy())
        probed = near.topk(min(PROBED_GROUPS, near.shape[1]), dim=1).indices.numpy()
        rows_of = np.argsort(probed.reshape(-1), kind="stable")
        ends = np.searchsorted(probed.reshape(-1)[rows_of], np.arange(near.shape[1] + 1))
        for group, (a, b) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            rows = rows_of[ends[group] : ends[group + 1]] // probed.shape[1]
            if len(rows):
                tile = products(code[torch.from_numpy(rows)], torch.from_numpy(self.codes[a:b]))
                kernels.search_tile(tile.numpy(), rows, a, self.scales[a:b, 0].copy(), keys)
        scores, leaves = kernels.unpack(keys)
        floor = scores[:, FLOOR_LEADER - 1 :][:, :1] if fan >= FLOOR_LEADER else np.full((len(codes), 1), -np.inf)
        return leaves.astype(np.int32), floor.astype(np.float32)


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


def calibrate(vectors: ShardedArray, leaders: Leaders, k: int, recall: float, seed: int) -> tuple[int, float]:
    """The smallest fan that promises `recall` after refinement, and the recall it promises.

    Measured, at full N, on SAMPLE nodes: how many of their true k neighbours share a leaf with them.
    """
    nodes = len(vectors)
    ids = np.sort(np.random.default_rng(seed).choice(nodes, min(SAMPLE, nodes), replace=False))
    true = _true_neighbors(vectors, ids, k)
    fan = min(FANS[-1], len(leaders.codes))
    own, _ = leaders.leaves(encode(vectors.take(ids)).codes, fan)
    theirs, _ = leaders.leaves(encode(vectors.take(true.reshape(-1))).codes, fan)
    theirs = theirs.reshape(len(ids), k, fan)
    for tried in range(min(FANS[0], fan), fan + 1):
        together = (own[:, None, :tried, None] == theirs[:, :, None, :tried]).any(axis=(2, 3)).mean()
        promised = 1 - (1 - float(together)) * MISSING_AFTER_REFINEMENT
        if promised >= recall or tried == fan:
            break
    return tried, promised


def _true_neighbors(vectors: ShardedArray, ids: Array, k: int) -> Array:
    queries = torch.from_numpy(vectors.take(ids)).float()  # of norm 1 to 1e-3: near enough to count by
    best = torch.full((len(ids), k), -torch.inf)
    best_ids = torch.zeros((len(ids), k), dtype=torch.int64)
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = queries @ torch.from_numpy(np.array(block)).float().T
        inside = torch.from_numpy(np.flatnonzero((ids >= first) & (ids < first + len(block))))
        tile[inside, torch.from_numpy(ids)[inside] - first] = -torch.inf
        top, at = tile.topk(min(k, tile.shape[1]), dim=1)
        best, kept = torch.cat([best, top], dim=1).topk(k, dim=1)
        best_ids = torch.cat([best_ids, at + first], dim=1).gather(1, kept)
    result: Array = best_ids.numpy()
    return result


def join(
    span: tuple[int, int],
    leaves: ShardedArray,
    floor: ShardedArray,
    codes: ShardedArray,
    scales: ShardedArray,
    length: int,
) -> tuple[Array, Array]:
    """All pairs of each leaf in the span: lists of the nodes in them, ids int64 [m] ascending, keys int64 [m, length]."""
    first, end = span
    nodes, numbers = [], []
    for start, block in leaves.blocks(BLOCK_ROWS):
        row, column = np.nonzero((block >= first) & (block < end))
        nodes.append(row + start)
        numbers.append(block[row, column])
    node, leaf = np.concatenate(nodes), np.concatenate(numbers)
    ids, place = np.unique(node, return_inverse=True)
    code = torch.from_numpy(codes.take(ids))
    scale = scales.take(ids)[:, 0].copy()
    keys = np.full((len(ids), length), kernels.EMPTY, np.int64)
    floors = floor.take(ids)[:, 0].copy()
    members = place[np.argsort(leaf, kind="stable")]
    ends = np.searchsorted(np.sort(leaf), np.arange(first, end + 1))
    for begin, stop in zip(ends[:-1], ends[1:], strict=True):
        for cut in range(begin, stop, LARGEST_LEAF):
            _join_leaf(members[cut : min(cut + LARGEST_LEAF, stop)], code, ids, scale, floors, keys)
    return ids, keys


def _join_leaf(members: Array, code: Tensor, ids: Array, scale: Array, floors: Array, keys: Array) -> None:
    own = code[torch.from_numpy(members)]
    rows = math.ceil(len(members) / max(1, round(len(members) / TILE_ROWS)))
    for a in range(0, len(members), rows):
        for b in range(a, len(members), rows):
            tile = products(own[a : a + rows], own[b : b + rows])
            kernels.join_tile(
                tile.numpy(), members[a : a + rows], members[b : b + rows], ids, scale, floors, keys, a == b
            )
