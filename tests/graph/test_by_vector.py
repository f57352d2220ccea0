"""Search by any vector, against float64 brute force over the same vectors."""

from __future__ import annotations

import numpy as np
import pytest

from graphbuild import SampleGraph
from graphbuild.graph import by_vector
from graphbuild.graph.by_vector import VectorSearch
from tests.graph.test_index import built

COUNT, QUERIES = 10, 100


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """8,000 vectors of 24 dimensions around 200 centres, and queries of the same kind behind them."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(200, 24))
    picked = centres[random.integers(0, 200, 8_000 + QUERIES)]
    return (picked + 0.7 * random.normal(size=picked.shape)).astype(np.float16)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> SampleGraph:
    return SampleGraph.open(built(tmp_path_factory.mktemp("by_vector"), vectors[:-QUERIES], k=16).url)


def brute_force(vectors: np.ndarray) -> list[set[int]]:
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return [set(row) for row in np.argsort(-(unit[-QUERIES:] @ unit[:-QUERIES].T), axis=1)[:, :COUNT].tolist()]


def recall(search: VectorSearch, vectors: np.ndarray) -> float:
    found = [set(search.nearest(query, COUNT)[0].tolist()) for query in vectors[-QUERIES:]]
    return float(np.mean([len(a & b) / COUNT for a, b in zip(found, brute_force(vectors), strict=True)]))


def test_a_pass_over_all_nodes_finds_the_nearest(graph: SampleGraph, vectors: np.ndarray) -> None:
    assert recall(VectorSearch(graph), vectors) > 0.995  # float16 rounding may swap the last


def test_a_walk_along_the_lists_finds_nearly_all_and_looks_at_a_part(
    graph: SampleGraph, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_vector, "ENTRIES", 400)
    seen: set[int] = set()
    read = SampleGraph.embeddings
    monkeypatch.setattr(SampleGraph, "embeddings", lambda self, ids: seen.update(ids.tolist()) or read(self, ids))
    search = VectorSearch(graph, exact_nodes=0)
    _, similarities = search.nearest(vectors[-1], COUNT)
    assert (np.diff(similarities) <= 0).all()
    assert len(seen) < len(graph) / 2
    assert recall(search, vectors) >= 0.95
