"""Embeddings as sidecars store them: in int8 with a scale a row, and back to unit norm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphbuild.errors import InputError


def quantize_int8(
    vectors: NDArray[np.floating[Any]],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 quantisation, a scale for each row: vectors are about `values * scale[:, None]`.

    Args:
        vectors: [n, d], any float type, finite, no zero row.

    Returns:
        values int8 [n, d] in -127..127, and scale float32 [n] = max |x| of the row / 127.

    Raises:
        InputError: not a matrix, or a row that is zero or not finite.
    """
    if vectors.ndim != 2:
        raise InputError(f"vectors to quantise have shape {vectors.shape}", "pass a matrix [n, d]")
    exact = np.asarray(vectors, dtype=np.float32)
    peak = np.abs(exact).max(axis=1, initial=0.0)
    bad = np.flatnonzero(~(np.isfinite(peak) & (peak > 0)))
    if len(bad):
        raise InputError(f"vector {bad[0]} is zero or not finite ({len(bad)} such rows)", "embed these captions again")
    scale = (peak / 127).astype(np.float32)
    values = np.clip(np.rint(exact / scale[:, None]), -127, 127).astype(np.int8)
    return values, scale


def unit_rows(values: NDArray[np.int8] | NDArray[np.float16]) -> NDArray[np.float32]:
    """Stored embeddings [n, d] as unit-norm float32 [n, d].

    A positive scale per row cancels in the norm, so int8 values need none. Rows of zeros stay zero.
    """
    vectors = values.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.divide(vectors, norms, out=vectors, where=norms > 0)
    return vectors
