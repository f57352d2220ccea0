"""Does a picture find those of the same name by other authors? Costs two passes over [n, n] cosines, in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

PART = 512  # queries at once


def numbers_of(values: Sequence[str]) -> Tensor:
    """int64 [n]: equal values, equal numbers."""
    number = {value: place for place, value in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values])


def retrieval(features: Tensor, names: Sequence[str], authors: Sequence[str]) -> dict[str, float]:
    """Each picture whose name another author has asks all pictures of the other authors, by the cosine of features that
    are standardised over all.

    features: [n, f]. Returns the share whose nearest has the same name, the mean of 1 / rank of the nearest that has,
    where equal cosines count as nearer, and the number of queries.
    """
    deviation, mean = torch.std_mean(features, 0)
    x = normalize((features - mean) / deviation.clamp_min(1e-6))
    name, author = numbers_of(names), numbers_of(authors)
    ranks = []
    for part in torch.arange(len(x)).split(PART):
        others = author[part, None] != author
        same = (name[part, None] == name) & others
        cosine = x[part] @ x.T
        best = cosine.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        before = ((cosine >= best) & others & ~same).sum(1)
        ranks.append(1 + before[same.any(1)])
    rank = torch.cat(ranks)
    if not len(rank):
        return {"queries": 0.0}
    return {
        "recall at 1": (rank == 1).float().mean().item(),
        "mean reciprocal rank": (1 / rank.float()).mean().item(),
        "queries": float(len(rank)),
    }
