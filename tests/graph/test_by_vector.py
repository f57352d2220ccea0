"""Search by any vector, against float64 brute force over the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphbuild import SampleGraph
from graphbuild.graph.by_vector import VectorSearch
from graphbuild.store.layout import BASIS
from tests.graph.test_index import built

COUNT, QUERIES = 10, 100


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(24)


def clustered(d: int) -> np.ndarray:
    """8,000 vectors of d dimensions around 200 centres, and queries of the same kind behind them."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(200, d))
    picked = centres[random.integers(0, 200, 8_000 + QUERIES)]
    return (picked + 0.7 * random.normal(size=picked.shape)).astype(np.float16)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> SampleGraph:
    return SampleGraph.open(built(tmp_path_factory.mktemp("by_vector"), vectors[:-QUERIES], k=16).url)


def unit(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray) -> list[set[int]]:
    x = unit(vectors)
    return [set(row) for row in np.argsort(-(x[-QUERIES:] @ x[:-QUERIES].T), axis=1)[:, :COUNT].tolist()]


def recall(search: VectorSearch, vectors: np.ndarray) -> float:
    found = [set(search.nearest(query, COUNT)[0].tolist()) for query in vectors[-QUERIES:]]
    return float(np.mean([len(a & b) / COUNT for a, b in zip(found, brute_force(vectors), strict=True)]))


def test_a_pass_over_all_nodes_finds_the_nearest(graph: SampleGraph, vectors: np.ndarray) -> None:
    assert recall(VectorSearch(graph), vectors) > 0.995  # float16 rounding may swap the last


@pytest.mark.parametrize("d", [24, 200], ids=["fewer numbers than a sketch", "more"])
def test_a_pass_over_sketches_finds_nearly_all_and_looks_at_the_embeddings_of_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d: int
) -> None:
    x = clustered(d)
    graph = SampleGraph.open(built(tmp_path, x[:-QUERIES], k=16).url)
    gone = np.zeros(len(graph), bool)
    gone[np.argsort(-(unit(x[:-QUERIES]) @ unit(x)[-1]))[:5]] = True
    monkeypatch.setitem(graph.__dict__, "gone", gone)
    search = VectorSearch(graph, exact_nodes=0)
    ids, similarities = search.nearest(x[-1], COUNT)
    assert (np.diff(similarities) <= 0).all()
    assert not gone[ids].any()

    pool = search._by_sketches(unit(x)[-1], 256)
    assert set(ids) <= set(pool)
    assert len(np.unique(pool)) == len(pool) == 256
    basis = np.load(tmp_path / "store" / BASIS).astype(np.float64)
    of_query = basis @ unit(x)[-1] / np.linalg.norm(basis, axis=1)
    products = np.where(gone, -np.inf, graph.sketches(np.arange(len(graph))).astype(np.float64) @ of_query)
    others = np.setdiff1d(np.arange(len(graph)), pool)
    assert products[pool].min() >= products[others].max() - 1e-3
    monkeypatch.setitem(graph.__dict__, "gone", np.zeros(len(graph), bool))
    assert recall(search, x) >= 0.98


def test_a_store_without_sketches_is_searched_exactly(tmp_path: Path, vectors: np.ndarray) -> None:
    url = built(tmp_path, vectors[:1_000], k=8).url
    assert not VectorSearch(SampleGraph.open(url), exact_nodes=0).exact
    (tmp_path / "store" / BASIS).unlink()
    assert VectorSearch(SampleGraph.open(url), exact_nodes=0).exact
