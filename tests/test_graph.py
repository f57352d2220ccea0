"""SampleGraph against the arrays it was built from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphbuild
from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from tests.test_index import built, cosines


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((200, 12)).astype(np.float16)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> SampleGraph:
    return SampleGraph.open(built(tmp_path_factory.mktemp("graph"), vectors, k=9).url)


def test_block_from_embeddings_is_the_cosine_matrix_and_all_exact(graph: SampleGraph, vectors: np.ndarray) -> None:
    nodes = np.array([3, 150, 3, 71])
    values, known = graph.block(nodes)
    assert values.dtype == np.float32
    assert known.all()
    np.testing.assert_allclose(values, cosines(vectors)[np.ix_(nodes, nodes)], atol=2e-3)


def test_block_from_edges_knows_edges_and_equal_nodes_only(graph: SampleGraph) -> None:
    nodes = np.random.default_rng(0).integers(0, 200, 64)
    values, known = graph.block(nodes, source="edges", tau_s=0.1)
    neighbors, similarities = graph.neighbors(nodes)
    background = graph.background(nodes)
    for i, node in enumerate(nodes):
        listed = dict(zip(neighbors[i].tolist(), similarities[i].tolist(), strict=True))
        for j, other in enumerate(nodes):
            expected = 1.0 if node == other else listed.get(int(other))
            assert known[i, j] == (expected is not None)
            absent = background[i, 0] + background[i, 1] ** 2 / 0.2
            assert values[i, j] == pytest.approx(min(absent, 1) if expected is None else expected, abs=1e-6)


def test_neighbors_keep_the_shape_of_the_ids(graph: SampleGraph) -> None:
    ids, similarities = graph.neighbors(np.array([[0, 1], [2, 199]]))
    assert ids.shape == similarities.shape == (2, 2, 9)
    assert (np.diff(similarities, axis=-1) <= 0).all()


@pytest.mark.parametrize("node", [-1, 200])
def test_a_node_out_of_range_is_refused_by_name(graph: SampleGraph, node: int) -> None:
    with pytest.raises(InputError, match=f"node id {node} "):
        graph.block(np.array([0, node]))


def test_a_store_without_a_graph_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="graphbuild index"):
        SampleGraph.open(str(tmp_path))


def test_the_package_shows_its_public_api_only() -> None:
    assert graphbuild.__all__ == ["SampleGraph"]
    with pytest.raises(AttributeError):
        _ = graphbuild.nothing  # type: ignore[attr-defined]
