"""Exact k-nearest-neighbour search by blocked matrix products, on CPU or CUDA through the same torch code.

Promise: each node's k neighbours by float32 similarity, ties by smaller id, itself left out by id; the result does not
depend on block sizes, device or threads. A float32 product picks k + slack candidates, these are scored again in
float64, and the product's rounding-error bound proves that no other node can belong to the list; rows where it does not
(ties beyond the slack) are searched again in float64. Similarity is the cosine of the stored float16 vectors, rounded
once to float32. Cost: 2 N d flop a node; memory: the query block, and one tile of TILE float32 scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from graphbuild.encoder import one_thread
from graphbuild.sharded import Array, ShardedArray

QUERY_ROWS = 1_024
BLOCK_ROWS = 8_192
RESCORE_ROWS = 256
Tensor = torch.Tensor


def search(vectors: ShardedArray, first: int, count: int, k: int, device: str) -> tuple[Array, Array, int]:
    """Neighbours of nodes first..first+count-1 among all.

    Returns ids int64 [count, k], similarities float32 [count, k] in descending order, and the number of rows that
    needed the second search. Requires k < len(vectors) < 2**31.
    """
    ids = np.empty((count, k), np.int64)
    similarities = np.empty((count, k), np.float32)
    searched_again = 0
    with one_thread(device), torch.inference_mode():
        for begin in range(first, first + count, QUERY_ROWS):
            query_ids = torch.arange(begin, min(begin + QUERY_ROWS, first + count))
            keys, again = _search_block(vectors, query_ids, k, device)
            rows = slice(begin - first, begin - first + len(query_ids))
            ids[rows], similarities[rows] = _unpack(keys)
            searched_again += again
    return ids, similarities, searched_again


def _search_block(vectors: ShardedArray, query_ids: Tensor, k: int, device: str) -> tuple[Tensor, int]:
    raw = torch.from_numpy(vectors.take(query_ids.numpy()))
    width = min(k + max(16, k // 4), len(vectors) - 1)
    scores, candidates = _candidates(vectors, unit(raw, torch.float32).to(device), query_ids.to(device), width)
    keys = torch.cat(
        [
            _rescored(vectors, raw[at : at + RESCORE_ROWS], candidates[at : at + RESCORE_ROWS].cpu(), k)
            for at in range(0, len(raw), RESCORE_ROWS)
        ]
    )
    if width < len(vectors) - 1:
        # |float32 product - exact| <= (d + 4) u for unit vectors (Higham 2002, section 3.1); one more u for rounding
        margin = (vectors.width + 8) * 2.0**-24
        kth = _similarity(keys[:, -1])
        unproved = torch.nonzero(kth <= scores.min(dim=1).values.cpu() + margin).squeeze(1)
        if len(unproved):
            keys[unproved] = _float64_search(vectors, raw[unproved], query_ids[unproved], k, device)
        return keys, len(unproved)
    return keys, 0


def _candidates(vectors: ShardedArray, queries: Tensor, query_ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best by float32 product, unordered: scores [q, width] and ids [q, width], on the queries' device."""
    q = len(queries)
    scores = torch.full((q, width), -torch.inf, device=queries.device)
    ids = torch.zeros((q, width), dtype=torch.int64, device=queries.device)
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = queries @ unit(torch.from_numpy(np.array(block)).to(queries.device), torch.float32).T
        _drop_self(tile, query_ids, first)
        floor = scores.min(dim=1).values
        row, column = torch.nonzero(tile > floor[:, None], as_tuple=True)
        if not len(row):
            continue
        survivors = torch.bincount(row, minlength=q)
        slot = torch.arange(len(row), device=row.device) - (survivors.cumsum(0) - survivors)[row]
        new_scores = torch.full((q, int(survivors.max())), -torch.inf, device=queries.device)
        new_ids = torch.zeros_like(new_scores, dtype=torch.int64)
        new_scores[row, slot] = tile[row, column]
        new_ids[row, slot] = column + first
        scores, best = torch.cat([scores, new_scores], dim=1).topk(width, dim=1, sorted=False)
        ids = torch.cat([ids, new_ids], dim=1).gather(1, best)
    return scores, ids


def _rescored(vectors: ShardedArray, raw: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k best candidates by float64 product, as sorted keys [q, k]."""
    others = unit(torch.from_numpy(vectors.take(candidates.numpy())), torch.float64)
    exact = torch.einsum("qd,qcd->qc", unit(raw, torch.float64), others)
    return _pack(exact.float(), candidates).sort(dim=1, descending=True).values[:, :k]


def _float64_search(vectors: ShardedArray, raw: Tensor, query_ids: Tensor, k: int, device: str) -> Tensor:
    """The same search with every product in float64: slow, and no tie escapes it. Keys [q, k]."""
    queries = unit(raw, torch.float64).to(device)
    best = torch.full((len(raw), k), torch.iinfo(torch.int64).min, device=device)
    for first, block in vectors.blocks(BLOCK_ROWS):
        tile = queries @ unit(torch.from_numpy(np.array(block)).to(device), torch.float64).T
        _drop_self(tile, query_ids.to(device), first)
        keys = _pack(tile.float(), torch.arange(first, first + tile.shape[1], device=device).expand_as(tile))
        best = torch.cat([best, keys.topk(min(k, keys.shape[1]), dim=1).values], dim=1).topk(k, dim=1).values
    return best.cpu()


def unit(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows scaled to unit norm in `dtype`, from stored float16 [..., d] (whose norm is 1 only to 1e-3)."""
    exact = raw.to(dtype)
    norms: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return exact / norms


def _drop_self(tile: Tensor, query_ids: Tensor, first: int) -> None:
    inside = torch.nonzero((query_ids >= first) & (query_ids < first + tile.shape[1])).squeeze(1)
    tile[inside, query_ids[inside] - first] = -torch.inf


def _pack(similarities: Tensor, ids: Tensor) -> Tensor:
    """int64 keys whose descending order is: larger float32 similarity first, then smaller id."""
    bits = similarities.contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0x7FFFFFFF - ids)


def _similarity(keys: Tensor) -> Tensor:
    ordered = keys >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32).view(torch.float32)


def _unpack(keys: Tensor) -> tuple[Any, Any]:
    return (0x7FFFFFFF - (keys & 0xFFFFFFFF)).numpy(), _similarity(keys).numpy()
