"""The certificate against float64 brute force: exact graphs pass, however alike their vectors; wrong ones never do."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from graphbuild.errors import QualityError
from graphbuild.graph.certify import certify_afresh
from graphbuild.job.steps import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store


def built(folder: Path, vectors: np.ndarray, **index: object) -> Store:
    if not (folder / "vectors.npy").exists():
        np.save(folder / "vectors.npy", vectors.astype(np.float32))
    recipe = Recipe(embed=Embed(vectors=str(folder / "vectors.npy")), index=Index(**index))  # type: ignore[arg-type]
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner)
    return store


def cone(nodes: int, width: int, noise: float) -> np.ndarray:
    """Vectors whose cosines are within about noise^2 of 1."""
    return 1 + noise * np.random.default_rng(0).standard_normal((nodes, width))


def cosines(store: Store) -> np.ndarray:
    """Of the stored vectors, float64 [N, N]; -inf with itself."""
    stored = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("nodes/*.npy"))]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    found = stored @ stored.T
    np.fill_diagonal(found, -np.inf)
    return found


def replace_lists(store: Store, lists: np.ndarray) -> None:
    """Put other neighbours [N, k] in place of a graph's."""
    begin = 0
    for path in sorted(Path(store.url).glob("graph/*.neighbors.npy")):
        rows = len(np.load(path))
        np.save(path, lists[begin : begin + rows].astype(np.uint32))
        begin += rows


@pytest.mark.parametrize(("nodes", "width", "noise"), [(60, 768, 1e-3), (400, 384, 1e-3), (400, 1024, 3e-3)])
def test_an_exact_graph_of_vectors_that_are_nearly_equal_is_certified(
    tmp_path: Path, nodes: int, width: int, noise: float
) -> None:
    store = built(tmp_path, cone(nodes, width, noise), k=5, engine="exact")
    certificate = store.manifest()["recall"]
    assert certificate["recall"] == certificate["worst_node_recall"] == 1
    listed = np.take_along_axis(cosines(store), np.load(tmp_path / "store/graph/00000.neighbors.npy").astype(int), 1)
    deficit = np.sort(cosines(store), axis=1)[:, -5:].mean() - listed.mean()
    assert certificate["mean_similarity_deficit"] == pytest.approx(deficit, abs=1e-9)


@pytest.mark.parametrize("noise", [1e-3, 3e-3, 0.1, 10.0])
def test_one_wrong_neighbour_costs_its_share_however_alike_the_vectors_are(tmp_path: Path, noise: float) -> None:
    store = built(tmp_path, cone(200, 96, noise), k=5, engine="exact")
    similar = cosines(store)
    order = np.argsort(-similar, axis=1)
    lists = order[:, :5].copy()
    spoiled = np.arange(0, 200, 3)
    lists[spoiled, 0] = order[spoiled, -2]  # the farthest but itself
    replace_lists(store, lists)
    certificate = certify_afresh(store, 200, seed=0)
    assert certificate["recall"] == pytest.approx(1 - len(spoiled) / 1_000, abs=1e-9)
    missed = (similar[spoiled, order[spoiled, 0]] - similar[spoiled, order[spoiled, -2]]).sum() / 1_000
    assert certificate["mean_similarity_deficit"] == pytest.approx(missed, abs=2e-9)


@pytest.mark.parametrize("noise", [1e-3, 10.0])
def test_lists_of_the_farthest_nodes_are_refused_by_the_command(tmp_path: Path, noise: float) -> None:
    vectors = cone(200, 96, noise)
    store = built(tmp_path, vectors, k=5, engine="exact", min_recall=0.5)
    replace_lists(store, np.argsort(cosines(store), axis=1)[:, 1:6])
    with pytest.raises(QualityError, match=r"recall@5 is 0\.000000"):
        built(tmp_path, vectors, k=5, engine="exact", min_recall=0.6)


def test_equal_vectors_are_ties_whichever_of_them_is_listed(tmp_path: Path) -> None:
    vectors = np.repeat(np.random.default_rng(3).standard_normal((20, 16)), 12, axis=0)
    store = built(tmp_path, vectors, k=5, engine="exact")
    others = np.arange(240)[:, None] // 12 * 12 + (np.arange(240)[:, None] + np.arange(7, 12)) % 12
    replace_lists(store, others)
    assert certify_afresh(store, 240, seed=0)["recall"] == 1


@pytest.mark.parametrize("bad", [False, True])
def test_memory_stays_whatever_the_graph(tmp_path: Path, bad: bool) -> None:
    store = built(tmp_path, np.random.default_rng(5).standard_normal((20_000, 8)), k=5, engine="exact")
    if bad:
        replace_lists(store, (np.arange(20_000)[:, None] + 7_000 + np.arange(5)) % 20_000)
    tracemalloc.start()
    try:
        certificate = certify_afresh(store, 300, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (certificate["recall"] < 0.01) == bad
    assert peak < 24e6
