"""Captions to node texts: the normalisation that decides which captions are the same node, and its 128-bit hash.

Unicode NFC, every run of white space to one space, ends stripped; case, accents and scripts stay. About 2 us a caption.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_CAPTION_BYTES = 1_000_000


def normalize(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption).split())


def usable_text(caption: str | None) -> tuple[str | None, str | None]:
    """(normalised text, None), or (None, the reason why this caption cannot be a node)."""
    if caption is None:
        return None, "no caption"
    try:
        if len(caption.encode()) > MAX_CAPTION_BYTES:
            return None, f"caption over {MAX_CAPTION_BYTES:,} bytes"
    except UnicodeEncodeError:
        return None, "a lone surrogate, which is no Unicode text"
    text = normalize(caption)
    return (text, None) if text else (None, "empty caption")


def hashes(texts: Sequence[str | None]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """blake2b-128 of each text as uint64 [n, 2]; zeros where there is none."""
    none = bytes(16)
    joined = b"".join(none if t is None else hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)
