"""Scratch of an index goes as soon as nobody reads it any more; a build that was stopped goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphbuild.graph import order
from graphbuild.job.steps import STEPS, folders
from graphbuild.job.verbs import run_step, run_verb
from graphbuild.knn import leaders
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task
from graphbuild.store.store import Json, Store, Writer

ENGINES = ("partition", "exact", "faiss:HNSW8")
INDEX = [step for step in STEPS if step.verb == "index"]
Build = Callable[..., tuple[Store, set[str]]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    vectors = np.random.default_rng(3).standard_normal((600, 16)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)

    def run(engine: str, name: str, steps: object = INDEX) -> tuple[Store, set[str]]:
        """These steps of an index, of a store with that name; and the stages of which a task ran."""
        index = Index(k=8, engine=engine, recall=0.8, min_recall=0.0, recall_sample=100)
        embed = Embed(vectors=str(tmp_path / "vectors.npy"), shard_size=200)
        recipe, store = Recipe(embed=embed, index=index), Store(str(tmp_path / name))
        with Runner(workers=0) as runner:
            run_verb("embed", recipe, store, runner)
            runner.ran.clear()
            for step in steps:  # type: ignore[attr-defined]
                run_step(step, recipe, store, runner)
            return store, set(runner.ran)

    return run


def graph(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(store.url).glob("graph/*.npy")}


def scratch(store: Store) -> set[str]:
    """The folders of _work that have files."""
    work = Path(store.url) / "_work"
    return {f"_work/{path.relative_to(work).parts[0]}/" for path in work.rglob("*/*") if path.is_file()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_of_scratch_goes_after_the_last_step_that_reads_it(engine: str, build: Build) -> None:
    reads = {step.name: step.reads.split() for step in INDEX}
    made: set[str] = set()
    for number, step in enumerate(INDEX):
        store, _ = build(engine, "store", [step])
        made |= scratch(store)
        later = {folder for other in INDEX[number + 1 :] for folder in reads[other.name]}
        assert scratch(store) <= later, step.name
        if step.name == "order":
            assert ("_work/sorted/" in made - scratch(store)) == (engine == "partition")
    assert {"_work/join/", "_work/merged/", "_work/moments/"} <= made
    assert not scratch(store)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_build_that_stops_after_any_step_does_nothing_twice(engine: str, build: Build) -> None:
    expected = graph(build(engine, "whole")[0])
    for last in range(len(INDEX)):
        _, before = build(engine, f"stopped{last}", INDEX[: last + 1])
        store, ran = build(engine, f"stopped{last}")
        assert not before & ran, INDEX[last].name
        assert graph(store) == expected


@pytest.mark.parametrize("lost", ["_work/ordered/codes/00000.npy", "_work/merged/00000.npy"])
def test_what_was_made_from_scratch_that_is_gone_is_made_again_from_the_start(lost: str, build: Build) -> None:
    expected = graph(build("partition", "whole")[0])
    until = INDEX[: [step.name for step in INDEX].index("merge") + 1]
    store, _ = build("partition", "store", until)
    (Path(store.url) / lost).unlink()
    store, ran = build("partition", "store")
    assert ("codes" in ran) == ("ordered" in lost)
    assert "join" in ran
    assert graph(store) == expected


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes sorted in two parts of the leaders, of two ranges each."""
    monkeypatch.setattr(leaders, "RANGE_NODES", 150)
    monkeypatch.setattr(leaders, "SORTED_PARTS", 2)


@pytest.mark.usefixtures("two_parts")
@pytest.mark.parametrize("lost", [None, "_work/ordered/codes/00000.npy", "_work/sorted/1/00000.rows"])
def test_what_is_sorted_of_a_part_goes_with_the_last_task_that_reads_it(
    lost: str | None, build: Build, tmp_path: Path
) -> None:
    expected = graph(build("partition", "whole")[0])
    begun: list[str] = []
    run = order.STAGE.run

    def run_three(task: Task, store: Store, writer: Writer) -> Json:
        begun.append(task.name)
        if len(begun) > 3:
            raise KeyboardInterrupt
        return run(task, store, writer)

    step = next(step for step in INDEX if step.name == "order")
    until = INDEX[: INDEX.index(step)]
    with pytest.raises(KeyboardInterrupt):
        build("partition", "store", [*until, replace(step, stage=replace(order.STAGE, run=run_three))])
    assert begun == ["00000", "00001", "00002", "00003"]
    store = tmp_path / "store"
    assert sorted(path.name for path in store.glob("_work/sorted/*")) == ["1"]
    if lost:
        (store / lost).unlink()
    built, ran = build("partition", "store")
    assert ("codes" in ran) == (lost is not None)
    assert "order" in ran
    assert graph(built) == expected


def test_whoever_reads_scratch_has_the_verb_of_who_made_it_and_comes_later() -> None:
    for number, step in enumerate(STEPS):
        for last in folders(step).values():
            assert last.verb == step.verb
            assert STEPS.index(last) > number
