"""Candidate lists on one device by torch operations alone: the exact engine's search on a GPU.

int8 products of a tile of ROWS x COLUMNS pairs are compared with each row's worst score so far; only what passes is
compacted and selected from, so that selection does not cost more than the products. Memory: three tiles of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from graphbuild.knn.products import products

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16_384
COLUMNS = 32_768
NO_NODE = 0x7FFFFFFF


class Side(NamedTuple):
    """Nodes first..first+n-1 on the device: codes int8 [n, d], their scales [n], and floors [n] of their lists."""

    first: int
    codes: Tensor
    scales: Tensor
    floors: Tensor


def search(own: Side, others: Side, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The `length` best others of each own node, itself left out, ROWS nodes at a time, best first.

    Scores float32 [n, length] (product x scale of the other; -inf where there are too few) and ids int64 [n, length].
    """
    for at in range(0, len(own.codes), ROWS):
        part = Side(own.first + at, *(values[at : at + ROWS] for values in own[1:]))
        yield _search(part, others, length)


def _search(own: Side, others: Side, length: int) -> tuple[Tensor, Tensor]:
    import torch

    count, place = len(own.codes), own.codes.device
    best = torch.full((count, length), -torch.inf, device=place)
    best_ids = torch.full((count, length), NO_NODE, dtype=torch.int64, device=place)
    for at in range(0, len(others.codes), COLUMNS):
        tile = products(own.codes, others.codes[at : at + COLUMNS]) * others.scales[at : at + COLUMNS]
        first = others.first + at
        begin, end = max(own.first, first), min(own.first + count, first + tile.shape[1])
        same = torch.arange(begin, max(begin, end), device=place)
        tile[same - own.first, same - first] = -torch.inf
        best, best_ids = offer(best, best_ids, tile, first, own.floors)
    return best, best_ids


def offer(
    best: Tensor, best_ids: Tensor, tile: Tensor, first: int, floors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best of lists (scores and ids [n, c], descending) and of a tile's scores [n, m] of nodes first..first+m-1.

    What a full top-k of the tile would give, but only scores above a list's last, and its floor, are selected from.
    """
    import torch

    count, length = best.shape
    worst = best[:, -1] if floors is None else torch.maximum(best[:, -1], floors)
    if bool(torch.isinf(worst).all()):  # nothing to compare with yet
        top, where = tile.topk(min(length, tile.shape[1]), dim=1)
        new, new_ids = top, where + first
    else:
        row, column = torch.nonzero(tile > worst[:, None], as_tuple=True)
        if not len(row):
            return best, best_ids
        passed = torch.bincount(row, minlength=count)
        slot = torch.arange(len(row), device=tile.device) - (passed.cumsum(0) - passed)[row]
        new = torch.full((count, int(passed.max())), -torch.inf, device=tile.device)
        new_ids = torch.full_like(new, NO_NODE, dtype=torch.int64)
        new[row, slot] = tile[row, column]
        new_ids[row, slot] = column + first
    best, kept = torch.cat([best, new], dim=1).topk(length, dim=1)
    return best, torch.cat([best_ids, new_ids], dim=1).gather(1, kept)


def keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Keys int64 [n, c] of lists, as `graphbuild.knn.lists` packs them, in descending order."""
    import torch

    bits = scores.view(torch.int32).long()
    packed = (torch.where(bits < 0, bits ^ NO_NODE, bits) << 32) | (NO_NODE - ids)
    return packed.sort(dim=1, descending=True).values
