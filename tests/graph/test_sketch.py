"""Sketches against an uncompressed principal component analysis in float64."""

from __future__ import annotations

import numpy as np
import pytest

from graphbuild.graph import sketch


def anisotropic(n: int, d: int) -> np.ndarray:
    """Unit vectors around a mean, their spread falling off over rotated coordinates, as that of captions."""
    random = np.random.default_rng(d)
    rotation = np.linalg.qr(random.standard_normal((d, d)))[0]
    x = (random.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.6 + 0.5 * (np.arange(d) == 3)) @ rotation
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def moments(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.sum(axis=0)[None], x.T @ x])


@pytest.mark.parametrize("width", [1, 3, 64, 65, 100, 112, 200])
def test_products_of_sketches_are_those_of_the_principal_coordinates(width: int) -> None:
    x = anisotropic(500, width)
    basis = sketch.basis_of(moments(x), len(x))
    stored = sketch.pack(x.astype(np.float32), basis)
    assert stored.dtype == np.uint8
    assert stored.shape == (500, min(width, 64))
    found = sketch.unpack(stored, sketch.steps(basis))
    directions = np.linalg.svd(x, full_matrices=False)[2][: min(width, 112)]
    kept = x @ directions.T
    assert found.shape == kept.shape
    deviation = np.std(found @ found.T - kept @ kept.T)
    assert deviation < (0.004 if width <= 64 else 0.02)
    assert deviation < 0.2 * np.std(x @ x.T) + 1e-3


def test_more_coordinates_in_fewer_bits_beat_64_bytes_of_int8() -> None:
    x = anisotropic(2_000, 384)
    basis = sketch.basis_of(moments(x), len(x))
    found = sketch.unpack(sketch.pack(x.astype(np.float32), basis), sketch.steps(basis))
    coordinates = x @ np.linalg.svd(x, full_matrices=False)[2][:64].T
    step = np.abs(coordinates).max(axis=0) / 127
    plain = np.rint(coordinates / step) * step
    truth = x @ x.T
    assert np.square(found @ found.T - truth).mean() < 0.8 * np.square(plain @ plain.T - truth).mean()


def test_embeddings_that_lie_on_a_line_have_sketches() -> None:
    x = np.ones((5, 130)) / np.sqrt(130)
    basis = sketch.basis_of(moments(x), 5)
    found = sketch.unpack(sketch.pack(x.astype(np.float32), basis), sketch.steps(basis))
    np.testing.assert_allclose(found @ found.T, 1, atol=0.02)
