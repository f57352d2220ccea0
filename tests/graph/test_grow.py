"""A graph that nodes are added to: the same as one built from nothing where it is exact, certified where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphbuild.graph import certify, grow, index, tasks
from graphbuild.graph.certify import certify_afresh
from graphbuild.job.steps import STEPS
from graphbuild.job.verbs import run_step, run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

SHARD, K = 200, 10
NODES, OLD = 1_500, 1_000


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """1,500 vectors around 30 centres, a tenth of them twice."""
    random = np.random.default_rng(5)
    centres = random.normal(size=(30, 24))
    made = centres[random.integers(0, 30, NODES)] + 0.6 * random.normal(size=(NODES, 24))
    made[1_350:] = made[random.integers(0, 1_350, 150)]
    return made.astype(np.float32)


def recipe(folder: Path, vectors: np.ndarray, **options: Any) -> Recipe:
    np.save(folder / "vectors.npy", vectors)
    embed = Embed(vectors=str(folder / "vectors.npy"), shard_size=SHARD)
    return Recipe(embed=embed, index=Index(**{"k": K, "engine": "exact", "recall_sample": NODES, **options}))


def build(folder: Path, vectors: np.ndarray, workers: int = 0, **options: Any) -> Store:
    """A store of these vectors, or the one that is there brought up to them."""
    store, settings = Store(str(folder / "store")), recipe(folder, vectors, **options)
    with Runner(workers=workers) as runner:
        run_verb("embed", settings, store, runner, force=True)
        run_verb("index", settings, store, runner)
    return store


Begun = Callable[..., Store]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> Begun:
    """`begun(folder, **options)`: a copy in that folder of the store that `build` makes of the old vectors."""
    made: dict[tuple[Any, ...], Path] = {}

    def copy(folder: Path, **options: Any) -> Store:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("begun")
            build(made[key], vectors[:OLD], **options)
        shutil.copytree(made[key] / "store", folder / "store")
        return Store(str(folder / "store"))

    return copy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> dict[str, bytes]:
    """The exact graph of all vectors, built from nothing."""
    return graph(build(tmp_path_factory.mktemp("whole"), vectors))


def graph(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(store.url).glob("graph/*.npy"))}


def kept_nodes(store: Store) -> int:
    return int(store.manifest()["graph"].get("kept_nodes", 0))


@pytest.mark.parametrize(("old", "workers"), [(1_000, 0), pytest.param(600, 2, marks=pytest.mark.slow), (1_400, 0)])
def test_an_exact_graph_that_grew_is_that_of_all_nodes(
    old: int, workers: int, tmp_path: Path, vectors: np.ndarray, whole: dict[str, bytes]
) -> None:
    store = build(tmp_path, vectors[:old])
    assert kept_nodes(store) == 0
    build(tmp_path, vectors, workers=workers)
    assert kept_nodes(store) == old // SHARD * SHARD, "all whole shards"
    assert graph(store) == whole
    assert store.manifest()["recall"]["recall"] == 1.0
    assert not list(Path(store.url).glob("_work*"))
    assert not list(Path(store.url).glob("_state/base"))


def test_a_graph_grows_again_and_again(tmp_path: Path, vectors: np.ndarray, whole: dict[str, bytes]) -> None:
    for end in (400, 800, 1_200, 1_500):
        store = build(tmp_path, vectors[:end])
        assert kept_nodes(store) == {400: 0, 800: 400, 1_200: 800, 1_500: 1_200}[end]
    assert graph(store) == whole


def test_an_approximate_graph_that_grew_has_no_less_recall_and_no_neighbour_twice(
    tmp_path: Path, vectors: np.ndarray
) -> None:
    options = {"engine": "partition", "recall": 0.9, "min_recall": 0.0}
    (tmp_path / "whole").mkdir()
    whole = certify_afresh(build(tmp_path / "whole", vectors, **options), NODES, 1)["recall"]
    build(tmp_path, vectors[:OLD], **options)
    store = build(tmp_path, vectors, **options)
    assert kept_nodes(store) == OLD
    assert certify_afresh(store, NODES, 1)["recall"] >= whole - 0.01  # checks every list's structure too
    x = vectors.astype(np.float16).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similar = x @ x.T
    np.fill_diagonal(similar, -2)
    least = np.sort(similar, axis=1)[:, -K]
    lists = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("graph/*.neighbors.npy"))])
    found = (np.take_along_axis(similar, lists.astype(np.int64), axis=1) >= least[:, None] - 1e-6).mean(axis=1)
    assert found[:OLD].mean() > 0.9
    assert found[OLD:].mean() > 0.9


@pytest.mark.parametrize(
    "change",
    [{"k": K + 1}, {"engine": "partition"}],
    ids=["another k", "an exact graph under the approximate engine"],
)
def test_what_is_kept_fits_the_settings(
    change: dict[str, Any], tmp_path: Path, vectors: np.ndarray, begun: Begun
) -> None:
    store = begun(tmp_path)
    settings = recipe(tmp_path, vectors, **change)
    with Runner(workers=0) as runner:
        run_verb("embed", settings, store, runner, force=True)
        run_verb("index", settings, store, runner, force=True)
    assert kept_nodes(store) == (OLD if "engine" in change else 0)


def test_old_vectors_that_changed_keep_nothing(tmp_path: Path, vectors: np.ndarray, begun: Begun) -> None:
    begun(tmp_path)
    changed = vectors.copy()
    changed[7] *= -1
    store = build(tmp_path, changed)
    assert kept_nodes(store) == 0
    (tmp_path / "whole").mkdir()
    assert graph(store) == graph(build(tmp_path / "whole", changed))


@pytest.mark.parametrize("engine", [pytest.param("exact", marks=pytest.mark.slow), "partition"])
def test_a_stop_at_any_stage_loses_no_old_list(engine: str, tmp_path: Path, vectors: np.ndarray, begun: Begun) -> None:
    options = {"engine": engine, "min_recall": 0.0, "recall_sample": 100}
    (tmp_path / "straight").mkdir()
    begun(tmp_path / "straight", **options)
    expected = graph(build(tmp_path / "straight", vectors, **options))
    steps = [step for step in STEPS if step.verb == "index" and step.stage is not certify.STAGE]
    for stop in range(1, len(steps)):
        folder = tmp_path / f"stopped{stop}"
        folder.mkdir()
        store, settings = begun(folder, **options), recipe(folder, vectors, **options)
        with Runner(workers=0) as runner:
            run_verb("embed", settings, store, runner, force=True)
            for step in steps[:stop]:
                run_step(step, settings, store, runner)
            if stop == len(steps) - 1:  # in the midst of the search, when old files are gone
                runner.run(index.SEARCH, settings, store)
                for record in list(Path(store.url).glob("_state/search/*.done.json"))[2:]:
                    for output in json.loads(record.read_text())["outputs"]:
                        Path(store.url, output["path"]).unlink()
                    record.unlink()
            run_verb("index", settings, store, runner)
        assert graph(store) == expected, f"stopped before {steps[stop].name}"
        assert kept_nodes(store) == OLD


def test_a_half_searched_graph_is_no_base(tmp_path: Path, vectors: np.ndarray, whole: dict[str, bytes]) -> None:
    store = build(tmp_path, vectors)
    for record in sorted(Path(store.url).glob("_state/search/*.done.json"))[2:]:
        for output in json.loads(record.read_text())["outputs"]:
            Path(store.url, output["path"]).unlink()
        record.unlink()
    settings = recipe(tmp_path, vectors)
    with Runner(workers=0) as runner:
        assert runner.run(grow.STAGE, settings, store) == {}
        run_verb("index", settings, store, runner)
    assert graph(store) == whole


def test_the_plan_says_what_is_kept(tmp_path: Path, vectors: np.ndarray, begun: Begun) -> None:
    store, settings = begun(tmp_path), recipe(tmp_path, vectors)
    with Runner(workers=0) as runner:
        run_verb("embed", settings, store, runner, force=True)
        runner.run(grow.STAGE, settings, store)
        said = tasks.forecast(settings, store)
    assert "500 new nodes, the lists of 1,000 are kept" in said
    assert certify.STAGE.name not in store.manifest()["stages"]
