"""What shortened vectors rule out is never near, by any metric, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from graphbuild.graph.recall import narrowing, recall
from graphbuild.graph.recall.metric import Array, Metric, Name
from graphbuild.graph.recall.narrowing import Narrowing

METRICS: tuple[Name, ...] = ("cosine", "inner-product", "l2")


def clustered(rng: np.random.Generator, rows: int, d: int, spread: float) -> Array:
    """Around 40 centres in a quarter of the dimensions, and noise in all."""
    centres = rng.standard_normal((40, d)) * (np.arange(d) < d // 4)
    return centres[rng.integers(0, 40, rows)] + spread * rng.standard_normal((rows, d))


def true_scores(metric: Metric, queries: Array, others: Array) -> Array:
    one, two = metric.prepare(queries.astype(np.float64)), metric.prepare(others.astype(np.float64))
    if metric.name == "l2":
        return -((one[:, None] - two[None]) ** 2).sum(axis=2)
    return one @ two.T


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("d", [64, 100, 384])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_no_vector_is_ruled_out_that_scores_the_floor(name: Name, d: int, scale: float) -> None:
    rng = np.random.default_rng(d)
    queries, others = (clustered(rng, rows, d, 0.05) * scale for rows in (50, 300))
    others[:3], others[3:10], others[10] = queries[:3], 2 * queries[:7], 0
    metric = Metric.of(name, others)
    rough, block = (metric.prepare(raw, np.float32) for raw in (queries, others))
    found = Narrowing(rough, metric)
    scores = true_scores(metric, queries, others)
    ruled_out = 0
    for rank in (1, 5, 40):
        floor = np.sort(scores, axis=1)[:, -rank, None]  # those that are equal to it may not be ruled out
        found.look_at(block)
        for begin in range(0, 50, 10):
            rows = slice(begin, begin + 10)
            columns = np.arange(300)[found.columns(rows, floor[rows], metric.margin(rough, block)[rows])]
            near = np.flatnonzero((scores[rows] >= floor[rows]).any(axis=0))
            assert np.isin(near, columns).all()
            ruled_out += 300 - len(columns)
    assert ruled_out > 100, "and some are"


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "case",
    ["clustered", "without clusters", "one direction", "beyond squares of float32", "below products of float32"],
)
def test_the_nodes_that_a_list_lacks_are_those_of_brute_force(
    name: Name, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    vectors = clustered(rng, 3_000, 96, 0.03 if case == "clustered" else 5.0)
    if case == "one direction":
        vectors = vectors[:, :1] * rng.standard_normal(96) + 1e-3 * vectors
    if case == "beyond squares of float32" and name != "l2":  # whose scores they are
        vectors[::7] *= 1e20 if name == "cosine" else 1e18
        vectors[::11] *= 1e-45
    if case == "below products of float32":
        vectors *= 1e-21
    ids = rng.choice(3_000, 150, replace=False)
    metric = Metric.of(name, vectors)
    scores = true_scores(metric, vectors[ids], vectors)
    scores[np.arange(150), ids] = -np.inf
    order = np.argsort(-scores, axis=1)
    listed = order[:, 5:15]  # all lack their five nearest
    least = np.take_along_axis(scores, listed, axis=1).min(axis=1, keepdims=True)
    monkeypatch.setattr(recall, "TILE_ROWS", 32)
    monkeypatch.setattr(narrowing, "PARTS", (6, 3))
    blocks = ((begin, vectors[begin : begin + 500]) for begin in range(0, 3_000, 500))
    found = recall.unlisted(blocks, metric.prepare(vectors[ids]), ids, listed, least, metric)
    exceed = np.where(scores > least, scores, -np.inf)
    np.put_along_axis(exceed, listed, -np.inf, axis=1)
    expected = np.sort(exceed, axis=1)[:, -10:]
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(scores[np.isfinite(scores)]).max())
