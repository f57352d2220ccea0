"""The nodes nearest to vectors from outside the store, by comparing each with every node: nothing is approximate.

float32 products propose, float64 sums of the stored numbers decide. Cost: 2 Q N d operations, and a pass over the
vectors for each call. Memory: Q x BLOCK_ROWS float32 products, so some thousand queries at a time, and what is found.
"""

from __future__ import annotations

import numpy as np

from graphbuild.knn.device import offer
from graphbuild.knn.products import unit
from graphbuild.store.sharded import Array, Living, ShardedArray

BLOCK_ROWS = 8_192
SPARE = 16  # more than k are scored again: rounding may only decide between more than so many ties
PAIRS = 16_384


def search(
    vectors: ShardedArray | Living, queries: Array, *, k: int | None, least: float = -1.0, device: str = "cpu"
) -> tuple[Array, Array, Array]:
    """Of each query the k nearest nodes (None: all) whose cosine, as float32, is at least `least`.

    queries: float16 [q, d], no row of zeros. Returns places in queries int64 [p], node ids int64 [p] and cosines
    float32 [p], by place, descending cosine and id. What reaches `least` is all found: a float32 product of unit
    vectors is wrong by at most (d + 8) 2^-24, and by as much for their norms (Higham 2002, section 3.1).
    """
    import torch

    rough, margin = unit(queries).to(device), (vectors.width + 8) * 2.0**-23
    length = 0 if k is None else min(k + SPARE, len(vectors))
    best = torch.full((len(queries), length), -torch.inf, device=device)
    best_ids = torch.zeros((len(queries), length), dtype=torch.int64, device=device)
    found = [np.empty((2, 0), np.int64)]
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = rough @ unit(block).to(device).T
        if length:
            best, best_ids = offer(best, best_ids, tile, first)
        else:
            at, column = torch.nonzero(tile >= least - margin, as_tuple=True)
            found.append(torch.stack([at, column + first]).cpu().numpy())
    if length:
        found.append(np.stack([np.repeat(np.arange(len(queries)), length), best_ids.cpu().numpy().reshape(-1)]))
    places, ids = np.concatenate(found, axis=1)
    scores = _cosines(vectors, queries, places, ids)
    order = np.lexsort((ids, -scores, places))
    order = order[scores[order] >= np.float32(least)]
    if k is not None:
        begins = np.searchsorted(places[order], np.arange(len(queries)))
        order = order[np.arange(len(order)) - begins[places[order]] < k]
    return places[order], ids[order], scores[order]


def _cosines(vectors: ShardedArray | Living, queries: Array, places: Array, ids: Array) -> Array:
    """The cosine float32 [p] of each pair, from float64 sums of the stored float16 numbers."""
    result = np.empty(len(ids), np.float32)
    for begin in range(0, len(ids), PAIRS):
        part = slice(begin, begin + PAIRS)
        one, other = queries[places[part]].astype(np.float64), vectors.take(ids[part]).astype(np.float64)
        norms = np.einsum("id,id->i", one, one) * np.einsum("id,id->i", other, other)
        result[part] = np.einsum("id,id->i", one, other) / np.sqrt(norms)
    return np.clip(result, -1, 1)
