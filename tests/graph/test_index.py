"""Background moments, recall certificate and their failures, against formulas written out in numpy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from graphbuild import SampleGraph
from graphbuild.errors import GraphbuildError, QualityError, StageError
from graphbuild.graph.certify import certify_afresh, check_lists, check_similarities, require_graph
from graphbuild.graph.moments import background_of
from graphbuild.graph.recall.recall import unlisted
from graphbuild.job.verbs import run_verb
from graphbuild.look.catalog import Catalog
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.layout import MOMENTS
from graphbuild.store.sharded import ShardedArray
from graphbuild.store.store import Store


def built(folder: Path, vectors: np.ndarray, **index: object) -> Store:
    if not (folder / "vectors.npy").exists():
        np.save(folder / "vectors.npy", vectors)
    store = Store(str(folder / "store"))
    recipe = Recipe(embed=Embed(vectors=str(folder / "vectors.npy"), shard_size=70), index=Index(**index))  # type: ignore[arg-type]
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner)
    return store


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((200, 12))


def cosines(vectors: np.ndarray) -> np.ndarray:
    x = vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def test_background_is_mean_and_deviation_over_the_nodes_outside_the_list(tmp_path: Path, vectors: np.ndarray) -> None:
    store = built(tmp_path, vectors, k=9)
    stored = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("nodes/*.npy"))])
    neighbors = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("graph/*.neighbors.npy"))])
    background = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("graph/*.background.npy"))])
    similar = cosines(stored)
    for node in range(200):
        outside = np.delete(similar[node], [node, *neighbors[node].tolist()])
        np.testing.assert_allclose(background[node], [outside.mean(), outside.std()], atol=1e-6)


def test_background_is_zero_when_every_other_node_is_a_neighbour() -> None:
    assert not background_of(torch.eye(3), np.zeros((3, 2), np.float32), np.zeros((4, 3)), 3).any()


def test_certificate_of_an_exact_graph_is_one(tmp_path: Path, vectors: np.ndarray) -> None:
    certificate = built(tmp_path, vectors, k=9, recall_sample=1_000).manifest()["recall"]
    assert certificate["recall"] == 1.0
    assert certificate["sampled_nodes"] == 200
    assert abs(certificate["mean_similarity_deficit"]) < 1e-6


def spoil(store: Store, row: int, change: np.ndarray) -> None:
    path = Path(store.url) / "graph" / "00000.neighbors.npy"
    neighbors = np.load(path)
    neighbors[row] = change
    np.save(path, neighbors)


def test_certificate_sees_wrong_neighbours(tmp_path: Path, vectors: np.ndarray) -> None:
    store = built(tmp_path, vectors, k=9)
    farthest = np.argsort(cosines(vectors)[3])[:9]
    spoil(store, 3, farthest)
    certificate = certify_afresh(store, 200, seed=0)
    assert certificate["recall"] == pytest.approx(1 - 1 / 200)
    assert certificate["worst_node_recall"] == 0
    assert certificate["mean_similarity_deficit"] > 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ([3, 4, 5, 6, 7, 8, 9, 10, 11], "itself"),
        ([4, 4, 5, 6, 7, 8, 9, 10, 11], "twice"),
        ([4, 5, 6, 7, 8, 9, 10, 11, 200], "exist"),
    ],
)
def test_certificate_refuses_lists_that_are_no_lists(
    tmp_path: Path, vectors: np.ndarray, change: list[int], what: str
) -> None:
    store = built(tmp_path, vectors, k=9)
    spoil(store, 3, np.array(change))
    with pytest.raises(StageError, match=f"node 3.*{what}"):
        certify_afresh(store, 200, seed=0)


def test_a_graph_under_the_floor_fails_and_is_not_marked_done(
    tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphbuild.knn import exact, lists

    def poor(*_: object) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(200)
        keys = lists.pack(np.zeros((200, 9)), (ids[:, None] + 1 + np.arange(9)) % 200)
        return ids, np.sort(keys, axis=1)[:, ::-1]

    monkeypatch.setattr(exact.Exact, "join", poor)
    monkeypatch.setattr(exact, "proved", lambda candidates, *rest: np.ones(len(candidates), bool))
    with pytest.raises(GraphbuildError, match="under the floor") as error:
        built(tmp_path, vectors, k=9)
    assert error.value.exit_code == QualityError.exit_code == 1
    store = Store(str(tmp_path / "store"))
    said = r"store: recall@9 is 0\.\d{6} \(95%: 0\.\d{4} to 0\.\d{4}; worst node 0\.\d{4}\), under the floor of 0\.999$"
    assert re.search(said, error.value.cause)
    for look in (Catalog, lambda store: SampleGraph.open(store.url), require_graph):  # what needs the graph says why
        with pytest.raises(QualityError) as again:
            look(store)
        assert again.value.cause == error.value.cause
        assert f"`graphbuild verify {store.url}`" in again.value.fix
    assert "certify" not in store.manifest()["stages"]
    assert store.exists("graph/00000.neighbors.npy")
    with pytest.raises(QualityError, match="under the floor"):  # and fails again, though no task is left to run
        built(tmp_path, vectors, k=9)
    built(tmp_path, vectors, k=9, min_recall=0.0)  # another floor only judges anew
    assert "certify" in store.manifest()["stages"]


def test_raising_the_floor_over_a_finished_graph_fails_it(tmp_path: Path, vectors: np.ndarray) -> None:
    store = built(tmp_path, vectors, k=9, min_recall=0.5)
    spoil(store, 3, np.argsort(cosines(vectors)[3])[:9])
    with pytest.raises(QualityError, match=r"under the floor of 1\.0"):
        built(tmp_path, vectors, k=9, min_recall=1.0)
    assert "certify" not in store.manifest()["stages"]


def test_similarities_out_of_order_or_not_finite_are_refused() -> None:
    good = np.array([[0.9, 0.5], [0.4, 0.4]], np.float16)
    check_similarities(np.array([7, 8]), good)
    for bad in ([0.4, 0.5], [np.nan, 0.1], [1.5, 0.2]):
        with pytest.raises(StageError, match="node 8"):
            check_similarities(np.array([7, 8]), np.array([[0.9, 0.5], bad], np.float16))


def test_the_nearest_that_lists_do_not_name_are_those_of_a_full_sort(tmp_path: Path, vectors: np.ndarray) -> None:
    x = vectors.astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    array = ShardedArray(Store(str(tmp_path)), ["x.npy"], [200])
    ids = np.array([0, 17, 199])
    similar = cosines(x)
    np.fill_diagonal(similar, -np.inf)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    order = np.argsort(-similar[ids], axis=1)
    for rank in (0, 5, 120):  # however poor the list under judgement
        listed = order[:, rank : rank + 9]
        least = np.take_along_axis(similar[ids], listed[:, -1:], axis=1)
        seen = unlisted(array.blocks(64), unit[ids], ids, listed, least)
        better = np.take_along_axis(similar[ids], order[:, :rank], axis=1)[:, :9]
        np.testing.assert_allclose(seen[:, ::-1][:, : better.shape[1]], better, atol=1e-12)
        assert (seen[:, : 9 - better.shape[1]] == -np.inf).all()


def test_check_lists_passes_good_lists() -> None:
    check_lists(np.array([0, 1]), np.array([[1, 2], [0, 2]]), 3)


def test_moments_are_the_sum_and_the_outer_products(tmp_path: Path, vectors: np.ndarray) -> None:
    store = built(tmp_path, vectors, k=3)
    stored = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("nodes/*.npy"))]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    moments = np.load(Path(store.url) / MOMENTS)
    np.testing.assert_allclose(moments[0], stored.sum(axis=0), atol=1e-4)
    np.testing.assert_allclose(moments[1:], stored.T @ stored, atol=1e-4)
