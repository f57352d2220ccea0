"""SampleGraph against the arrays it was built from."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import networkx
import numpy as np
import polars as pl
import pytest

import graphbuild
from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.graph.test_index import built, cosines


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
    listed = [dict(zip(*each, strict=True)) for each in zip(neighbors.tolist(), similarities.tolist(), strict=True)]
    for i, node in enumerate(nodes):
        for j, other in enumerate(nodes):
            of_other = listed[j].get(int(node))  # listed by the other one alone
            expected = 1.0 if node == other else listed[i].get(int(other), of_other)
            assert known[i, j] == (expected is not None)
            absent = background[i, 0] + background[i, 1] ** 2 / 0.2
            assert values[i, j] == pytest.approx(min(absent, 1) if expected is None else expected, abs=1e-6)


def test_block_from_sketches_knows_edges_and_approximates_the_rest(graph: SampleGraph, vectors: np.ndarray) -> None:
    nodes = np.random.default_rng(0).integers(0, 200, 64)
    values, known = graph.block(nodes, source="sketch")
    np.testing.assert_array_equal(known, graph.block(nodes, source="edges")[1])
    exact = cosines(vectors)[np.ix_(nodes, nodes)]
    np.testing.assert_allclose(values[known], exact[known], atol=2e-3)
    assert np.abs(values - exact).max() < 0.05  # 12 coordinates, all in 8 bits


def test_an_unknown_source_is_refused(graph: SampleGraph) -> None:
    with pytest.raises(ConfigError, match="magic"):
        graph.block(np.arange(3), source="magic")  # type: ignore[arg-type]


def test_block_of_one_node_and_of_none(graph: SampleGraph) -> None:
    for source in ("embeddings", "sketch", "edges"):
        np.testing.assert_allclose(graph.block([7], source=source)[0], [[1]], atol=1e-6)  # type: ignore[arg-type]
        assert graph.block(np.empty(0, np.int64), source=source)[0].shape == (0, 0)  # type: ignore[arg-type]


def dense(graph: SampleGraph) -> np.ndarray:
    """[M, M] of stored similarities, 0 where there is no edge."""
    matrix = np.zeros((200, 200), np.float32)
    neighbors, similarities = graph.neighbors(np.arange(200))
    np.put_along_axis(matrix, neighbors, similarities, axis=1)
    return matrix


def test_filters_and_exports_say_what_the_matrix_says(graph: SampleGraph) -> None:
    matrix = dense(graph)
    stored = matrix != 0
    cases = {
        "all": (graph.edges(), stored),
        "threshold": (graph.threshold(0.6), stored & (matrix >= 0.6)),
        "threshold of edges": (graph.edges().threshold(0.6), stored & (matrix >= 0.6)),
        "mutual": (graph.mutual(), stored & stored.T),
        "symmetrized": (graph.symmetrized(), stored | stored.T),
    }
    for name, (edges, expected) in cases.items():
        both = np.where(stored, matrix, matrix.T)
        assert len(edges) == expected.sum() > 0, name
        np.testing.assert_array_equal(edges.to_scipy().toarray(), np.where(expected, both, 0), err_msg=name)
        np.testing.assert_array_equal(edges.to_torch().to_dense().numpy(), np.where(expected, both, 0), err_msg=name)
        rows = [edges.similarities[a:b] for a, b in zip(edges.offsets, edges.offsets[1:], strict=False)]
        assert all((np.diff(row) <= 0).all() for row in rows), name


def test_edge_index_and_networkx_hold_the_same_edges(graph: SampleGraph) -> None:
    matrix = dense(graph)
    index, weight = graph.to_edge_index()
    assert index.shape == (2, 1_800)
    np.testing.assert_array_equal(matrix[index[0], index[1]], weight)
    nodes = graph.to_networkx()
    assert isinstance(nodes, networkx.DiGraph)
    np.testing.assert_array_equal(networkx.to_numpy_array(nodes, weight="similarity", dtype=np.float32), matrix)


def test_networkx_of_a_large_graph_is_refused(graph: SampleGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphbuild.graph.edges.NETWORKX_EDGES", 100)
    with pytest.raises(ConfigError, match="to_scipy"):
        graph.to_networkx()


def test_edge_blocks_are_the_whole_graph_without_a_copy(graph: SampleGraph) -> None:
    neighbors, similarities = graph.neighbors(np.arange(200))
    blocks = list(graph.edge_blocks())
    assert [first for first, _, _ in blocks] == [0, 70, 140]
    assert not any(ids.base.flags.owndata or values.base.flags.owndata for _, ids, values in blocks)
    np.testing.assert_array_equal(np.concatenate([ids for _, ids, _ in blocks]), neighbors)
    np.testing.assert_array_equal(np.concatenate([values for _, _, values in blocks]), similarities)


def test_samples_of_a_node_are_the_rows_that_carry_its_caption(tmp_path: Path) -> None:
    words = np.array(["red cat", "blue dog", "green bird", "old ship"])
    captions = words[np.random.default_rng(0).integers(0, 4, 60)]
    pl.DataFrame({"caption": captions}).write_parquet(tmp_path / "captions.parquet")
    store = str(tmp_path / "store")
    with Runner(workers=0) as runner:
        recipe = Recipe(embed=Embed(captions=str(tmp_path / "captions.parquet"), shard_size=25), index=Index(k=3))
        for verb in ("embed", "index"):
            run_verb(verb, recipe, Store(store), runner)
    graph = SampleGraph.open(store)
    names = dict.fromkeys(captions.tolist())
    assert len(graph) == 4
    for node, name in enumerate(names):
        np.testing.assert_array_equal(graph.samples_of(node), np.flatnonzero(captions == name))
    np.testing.assert_array_equal(np.array(list(names))[graph.sample_nodes()], captions)
    with pytest.raises(InputError, match="node id 4 "):
        graph.samples_of(4)


def test_a_pickled_graph_is_opened_again(graph: SampleGraph) -> None:
    content = pickle.dumps(graph)
    assert len(content) < 1_000
    np.testing.assert_array_equal(pickle.loads(content).neighbors([5])[0], graph.neighbors([5])[0])


def test_neighbors_keep_the_shape_of_the_ids(graph: SampleGraph) -> None:
    ids, similarities = graph.neighbors(np.array([[0, 1], [2, 199]]))
    assert ids.shape == similarities.shape == (2, 2, 9)
    assert (np.diff(similarities, axis=-1) <= 0).all()


@pytest.mark.parametrize("node", [-1, 200])
def test_a_node_out_of_range_is_refused_by_name(graph: SampleGraph, node: int) -> None:
    with pytest.raises(InputError, match=f"node id {node} "):
        graph.block(np.array([0, node]))


@pytest.mark.parametrize("nodes", [np.arange(200) < 2, [1.0, 2.0], np.array([0.5]), [True]])
def test_nodes_that_are_no_ids_are_refused(graph: SampleGraph, nodes: object) -> None:
    for read in (graph.neighbors, graph.embeddings, graph.sketches, graph.background, graph.block):
        with pytest.raises(InputError, match=r"node ids are (bool|float64).*\n.*flatnonzero"):
            read(nodes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int32, np.uint64])
def test_integers_of_any_kind_are_ids(graph: SampleGraph, dtype: type) -> None:
    np.testing.assert_array_equal(graph.neighbors(np.array([3, 71], dtype))[0], graph.neighbors([3, 71])[0])
    assert graph.neighbors([])[0].shape == (0, 9)


@pytest.mark.parametrize("source", ["embeddings", "sketch"])
def test_a_block_holds_one_matrix_of_floats_and_one_of_bits(graph: SampleGraph, source: str) -> None:
    nodes = np.random.default_rng(0).integers(0, 200, 1_500)
    graph.block(nodes[:2], source=source)  # type: ignore[arg-type]
    tracemalloc.start()
    graph.block(nodes, source=source)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 4 * len(nodes) ** 2


def test_a_store_without_a_graph_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="graphbuild index"):
        SampleGraph.open(str(tmp_path))


def test_the_package_shows_its_public_api_only() -> None:
    assert graphbuild.__all__ == ["SampleGraph"]
    with pytest.raises(AttributeError):
        _ = graphbuild.nothing  # type: ignore[attr-defined]
