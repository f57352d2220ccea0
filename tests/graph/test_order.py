"""Partition's nodes in the order of their leaders: a row for each, where its leader puts it, and the same graph however
they are cut into blocks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from graphbuild.graph.codes import member_rows
from graphbuild.job.steps import STEPS
from graphbuild.job.verbs import run_step, run_verb
from graphbuild.knn import leaders, partition
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import records
from graphbuild.store.store import Store

NODES, OLD, SHARD, K = 1_500, 1_000, 250, 10


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """1,500 vectors around 30 centres; the last 150 are copies of others, so that similarities are equal."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(30, 24))
    made = centres[random.integers(0, 30, NODES)] + 0.6 * random.normal(size=(NODES, 24))
    made[1_350:] = made[random.integers(0, 1_350, 150)]
    return made.astype(np.float32)


def build(folder: Path, vectors: np.ndarray, until: str = "certify") -> Store:
    """A store of these vectors, or the one that is there brought up to them; `until`: the last step."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "vectors.npy", vectors)
    index = Index(k=K, engine="partition", recall=0.8, min_recall=0.0, recall_sample=100)
    recipe = Recipe(embed=Embed(vectors=str(folder / "vectors.npy"), shard_size=SHARD), index=index)
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner, force=True)
        for step in (step for step in STEPS if step.verb == "index"):
            run_step(step, recipe, store, runner)
            if step.name == until:
                break
    return store


def files(store: Store, pattern: str) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(Path(store.url).glob(pattern))]


def graph(store: Store) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(store.url).glob("graph/*.npy"))]


@pytest.mark.parametrize("old", [0, OLD])
def test_nodes_lie_by_nearest_leader_then_id_and_old_ones_before_new_ones(
    old: int, tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaders, "RANGE_NODES", 400)
    monkeypatch.setattr(leaders, "compared_at_once", lambda nodes: 300)
    if old:
        build(tmp_path, vectors[:old])
    store = build(tmp_path, vectors, until="codes")
    row = member_rows(records(store, "codes")["00000"]["facts"]["fan"], vectors.shape[1])
    sorted_rows = [np.fromfile(path, row) for path in Path(store.url).glob("_work/sorted/*/*.rows")]
    assert len({path.parent for path in Path(store.url).glob("_work/sorted/*/*.rows")}) == 4
    members = np.concatenate(sorted_rows)
    nearest = members[np.argsort(members["id"])]["leaves"][:, 0]
    store = build(tmp_path, vectors, until="order")
    expected = np.lexsort((np.arange(NODES), nearest, np.arange(NODES) >= old))
    (ids,), (places,) = files(store, "_work/ordered/ids.npy"), files(store, "_work/ordered/places.npy")
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(places[expected], np.arange(NODES))
    stored = np.concatenate(files(store, "nodes/*.npy"))[expected]
    assert len(files(store, "_work/ordered/vectors/*.npy")) >= 4
    np.testing.assert_array_equal(np.concatenate(files(store, "_work/ordered/vectors/*.npy")), stored)
    unit = stored.astype(np.float64) / np.linalg.norm(stored.astype(np.float64), axis=1, keepdims=True)
    scales = np.abs(unit).max(axis=1) / 127
    codes = np.concatenate(files(store, "_work/ordered/codes/*.npy"))
    assert np.abs(codes - unit / scales[:, None]).max() < 0.501
    np.testing.assert_allclose(np.concatenate(files(store, "_work/ordered/scales/*.npy"))[:, 0], scales, rtol=1e-6)


def test_the_graph_does_not_depend_on_the_blocks_also_when_it_has_grown(
    tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", vectors[:OLD])
    whole = graph(build(tmp_path / "whole", vectors))
    monkeypatch.setattr(leaders, "BLOCK_NODES", 170)
    monkeypatch.setattr(partition, "TASK_NODES", 400)
    monkeypatch.setattr(leaders, "RANGE_NODES", 300)
    build(tmp_path / "parts", vectors[:OLD])
    store = build(tmp_path / "parts", vectors, until="refine")
    bounds = np.cumsum([0, *map(len, files(store, "_work/refined/*.npy"))])
    assert OLD in bounds
    assert max(end - begin for begin, end in pairwise(bounds)) == 170
    assert graph(build(tmp_path / "parts", vectors)) == whole


def test_of_equally_near_nodes_the_smaller_id_comes_first(tmp_path: Path, vectors: np.ndarray) -> None:
    store = build(tmp_path, vectors)
    lists = np.concatenate(files(store, "graph/*.neighbors.npy")).astype(np.int64)
    stored = np.concatenate(files(store, "nodes/*.npy"))
    same = (stored[lists[:, 1:]] == stored[lists[:, :-1]]).all(axis=2)
    assert same.sum() > 500
    assert (lists[:, 1:] > lists[:, :-1])[same].all()
