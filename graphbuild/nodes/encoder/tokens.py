"""Token ids of texts: tokenised once, in Rust, without padding; how many texts were longer than the encoder reads.

Memory: 4 bytes a token. A text's ids are those that the encoder's own tokenizer gives, truncation included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Tokens:
    """ids: int64 [sum of lengths], text after text. lengths: int64 [n]. truncated: texts cut at the longest length."""

    ids: Ints
    lengths: Ints
    truncated: int

    @property
    def starts(self) -> Ints:
        return np.cumsum(self.lengths) - self.lengths


def tokenize(tokenizer: Any, texts: Sequence[str], longest: int) -> Tokens:
    """Token ids of texts, at most `longest` each, special tokens included; of a fast (Rust) transformers tokenizer."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(longest)
    found = backend.encode_batch_fast(list(texts))
    parts = [np.asarray(encoding.ids, dtype=np.int64) for encoding in found]
    lengths = np.array([len(ids) for ids in parts], dtype=np.int64)
    ids = np.concatenate([np.empty(0, np.int64), *parts])
    return Tokens(ids, lengths, sum(bool(encoding.overflowing) for encoding in found))


def equal_batches(lengths: Ints, budget: int) -> list[Ints]:
    """Indices of texts, shortest first, in batches of one length and at most `budget` tokens; one text at least."""
    order = np.argsort(lengths, kind="stable")
    sizes, firsts = np.unique(lengths[order], return_index=True)
    found = []
    for size, group in zip(sizes.tolist(), np.split(order, firsts[1:]), strict=True):
        step = max(budget // max(size, 1), 1)
        found += [group[first : first + step] for first in range(0, len(group), step)]
    return found


def batches(lengths: Ints, budget: int) -> list[Ints]:
    """Indices of texts, shortest first, in batches of at most `budget` tokens; one text a batch at least."""
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    found, start, before = [], 0, 0
    while start < len(order):
        stop = max(int(np.searchsorted(ends, before + budget, side="right")), start + 1)
        found.append(order[start:stop])
        start, before = stop, int(ends[stop - 1])
    return found
