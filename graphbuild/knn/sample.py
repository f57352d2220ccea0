"""A sample of nodes and their true neighbours, by which an approximate engine is set for the recall asked for."""

from __future__ import annotations

import numpy as np

from graphbuild.knn import device
from graphbuild.knn.products import unit
from graphbuild.store.sharded import Array, ShardedArray

SAMPLE = 400
BLOCK_ROWS = 8_192


def draw(nodes: int, seed: int) -> Array:
    """int64 [min(SAMPLE, nodes)], ascending."""
    return np.sort(np.random.default_rng(seed).choice(nodes, min(SAMPLE, nodes), replace=False))


def true_neighbors(vectors: ShardedArray, ids: Array, k: int, shards: range | None = None) -> tuple[Array, Array]:
    """Similarities float32 [n, k] and ids int64 [n, k] of the k nearest of each node, itself left out, best first.

    By float32 products with all N vectors: 2 n N d operations. shards: only those of some, and -inf where they hold
    fewer.
    """
    import torch

    queries = unit(vectors.take(ids))
    best = torch.full((len(ids), k), -torch.inf)
    best_ids = torch.zeros((len(ids), k), dtype=torch.int64)
    for first, block in vectors.blocks(BLOCK_ROWS, shards):
        tile = queries @ unit(block).T
        inside = torch.from_numpy(np.flatnonzero((ids >= first) & (ids < first + len(block))))
        tile[inside, torch.from_numpy(ids)[inside] - first] = -torch.inf
        best, best_ids = device.offer(best, best_ids, tile, first)
    return best.numpy(), best_ids.numpy()
