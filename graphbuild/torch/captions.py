"""Which captions of its samples a batch holds, where samples have several: the first, one drawn by weight, all, or the
mean of all.

A draw follows from seed, epoch and row alone: it is the same whatever the ranks, workers, order and interruptions.
Below, a batch of B samples has T texts side by side; those of sample i are offsets[i] .. offsets[i+1] - 1. Costs some
microseconds a sample, and for the mean a sort of its c k neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from graphbuild.errors import ConfigError
from graphbuild.export.sidecar import SidecarHeader

CaptionChoice = Literal["first", "draw", "all", "mean"]
Ints = NDArray[np.int64]
PAD = -1  # in place of a neighbour


def check_choice(choice: str, header: SidecarHeader | None = None) -> None:
    """ConfigError for no such choice, or the mean where sidecars carry no embeddings."""
    if choice not in get_args(CaptionChoice):
        raise ConfigError(f"captions = {choice!r}", f"use one of {', '.join(get_args(CaptionChoice))}")
    if choice == "mean" and header is not None and header.embeddings not in ("int8", "float16"):
        raise ConfigError(
            f'captions="mean" needs embeddings, and the sidecars carry {header.embeddings}',
            "run `graphbuild export --embeddings int8` on the store, or pass graph= to GraphDataset",
        )


def spread(positions: Ints, first_more: Ints) -> tuple[Ints, Ints]:
    """The texts [T] of samples [B], as `Sidecar` numbers them, and offsets [B + 1]."""
    samples, more = len(first_more) - 1, first_more[positions + 1] - first_more[positions]
    offsets = np.concatenate([[0], np.cumsum(more + 1)])
    texts = np.repeat(samples + first_more[positions] - 1 - offsets[:-1], more + 1) + np.arange(offsets[-1])
    texts[offsets[:-1]] = positions
    return texts, offsets


def drawn(rows: Ints, weights: NDArray[Any], offsets: Ints, *, seed: int, epoch: int) -> Ints:
    """Which of T texts each sample's is, [B], by their weights [T]. rows: of the samples in the store."""
    sums = np.cumsum(weights, dtype=np.float64)
    before = np.concatenate([[0.0], sums])[offsets]
    picked = np.searchsorted(sums, before[:-1] + uniform(rows, seed, epoch) * np.diff(before), side="right")
    return np.clip(picked, offsets[:-1], offsets[1:] - 1)


def uniform(rows: Ints, seed: int, epoch: int, *, of: str = "captions") -> NDArray[np.float64]:
    """A number in [0, 1) for each row [B], another in each epoch: the output of SplitMix64 (Steele, Lea and Flood 2014)
    at that place of a stream of this seed and epoch. of: what is drawn; each thing has a stream of its own."""
    start = int.from_bytes(hashlib.blake2b(f"{of} {seed} {epoch}".encode(), digest_size=8).digest(), "little")
    state = np.uint64(start) + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) / np.float64(2**64)


def gathered(
    choice: CaptionChoice,
    columns: dict[str, NDArray[Any]],
    captions: list[str],
    weights: NDArray[np.float32],
    offsets: Ints,
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """What a batch holds of nodes, the graph's fields and captions of T texts, or of B that were chosen already."""
    if choice == "mean":
        first = offsets[:-1]
        columns = {**mean(columns, weights, offsets), "node": columns["node"][first]}
        captions = [captions[i] for i in first.tolist()]
    if choice == "all":
        columns = {**columns, "weight": weights, "offsets": offsets}
    return columns, captions


def mean(fields: Mapping[str, NDArray[Any]], weights: NDArray[Any], offsets: Ints) -> dict[str, NDArray[Any]]:
    """The fields of B samples out of those of their T texts.

    embedding: the weighted mean, of unit norm. neighbors int64 and similarities float32 [B, K], K the most that one
    has: all that a text of the sample lists, once, with the largest similarity, descending; then PAD with 0.
    background: the weighted means; of the mean similarity exact up to the embedding's norm, of the deviation no less.
    """
    begin = offsets[:-1]
    total = np.add.reduceat(weights, begin)
    shares = (weights / np.repeat(np.where(total > 0, total, 1), np.diff(offsets)))[:, None].astype(np.float32)
    embedding = np.add.reduceat(fields["embedding"] * shares, begin)
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    lists = [
        _united(fields["neighbors"][start:end].ravel(), fields["similarities"][start:end].ravel())
        for start, end in zip(begin.tolist(), offsets[1:].tolist(), strict=True)
    ]
    width = max(len(ids) for ids, _ in lists)
    return {
        "embedding": embedding / np.where(norm > 0, norm, 1),
        "background": np.add.reduceat(fields["background"] * shares, begin),
        "neighbors": np.stack([np.pad(ids, (0, width - len(ids)), constant_values=PAD) for ids, _ in lists]),
        "similarities": np.stack([np.pad(values, (0, width - len(values))) for _, values in lists]),
    }


def _united(ids: Ints, similarities: NDArray[Any]) -> tuple[Ints, NDArray[Any]]:
    """Each id once with its largest similarity, descending; equal ones by id."""
    order = np.lexsort((ids, -similarities))
    ids, similarities = ids[order], similarities[order]
    first = np.sort(np.unique(ids, return_index=True)[1])
    return ids[first], similarities[first]
