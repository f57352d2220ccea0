"""The table of the job's steps: who owns which file, what builds on what, and that the code keeps to it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from graphbuild.job.steps import STEPS, Step, readers, served, steps_of
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import records
from graphbuild.store.store import Store

BESIDE = {"manifest.json", "recipe.yaml", "shards.parquet"}  # made when a step or verb ends, by no task


def owners(path: str) -> list[Step]:
    """The steps whose patterns, written out as regular expressions, name a file."""
    signs = {"#": "[0-9]+", "*": "[^/]+", ".": "[.]"}

    def covers(pattern: str) -> bool:
        written = "".join(signs.get(sign, sign) for sign in pattern)
        return re.fullmatch(written + (".*" if pattern.endswith("/") else ""), path) is not None

    return [step for step in STEPS if any(map(covers, step.owns.split()))]


def names(steps: object) -> list[str]:
    return [step.name for step in steps]  # type: ignore[attr-defined]


def recipes() -> list[Recipe]:
    embeds = [{}, {"shards": "a.tar"}, {"captions": "a.csv"}, {"vectors": "a.npy"}]
    layouts = ["sidecars", "inline", "clustered", "columns"]
    return [
        Recipe.model_validate({"embed": embed, "export": {"layout": layout}})
        for embed, layout in itertools.product(embeds, layouts)
    ]


def test_a_file_has_one_owner_among_the_steps_that_can_make_one_store() -> None:
    patterns = {pattern for step in STEPS for pattern in step.owns.split()}
    paths = [one.replace("#", "00000").replace("*", "a") + "a" * one.endswith("/") for one in patterns]
    owned = {path: owners(path) for path in paths}
    for recipe, verb in itertools.product(recipes(), ("download", "pack", "embed", "index", "export")):
        chosen = steps_of(verb, recipe)
        for path in paths:
            assert len([one for one in owned[path] if one in chosen]) <= 1, path


def test_every_file_of_a_store_belongs_to_the_step_whose_record_names_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("caption\n \n" + "".join(f"{number} red dogs\n" for number in range(9)))
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32))
    for source in ({"captions": str(tmp_path / "list.csv")}, {"vectors": str(tmp_path / "vectors.npy")}):
        store = Store(str(tmp_path / next(iter(source))))
        recipe = Recipe.model_validate({"embed": {**source, "shard_size": 4}, "index": {"k": 3}})
        with Runner(workers=0) as runner:
            manifest = run_verb("run", recipe, store, runner)
        named = {
            output["path"]: step.name
            for step in STEPS
            for record in records(store, step.name).values()
            for output in record["outputs"]
        }
        for path, name in named.items():
            assert name in names(owners(path)), path
        root = Path(store.root)
        files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        kept = {name for name in files if name.startswith("_state/") and name.endswith(".done.json")}
        assert files - kept - named.keys() - BESIDE == set()
        assert {key for step in STEPS for key in step.stage.entries} >= manifest.keys() - {
            *("format_version", "stages", "versions", "recipe", "checksum")
        }
        assert not (root / "_work").exists()


@pytest.mark.parametrize(
    ("step", "stale"),
    [
        ("encode", ["fidelity", "base", "search", "certify", "export"]),
        ("certify", ["export", "inline", "columns", "cluster", "mine", "match"]),
        ("fidelity", []),
        ("export", []),
        ("inline", []),
        ("columns", []),
        ("pack", ["scan", "number", "assign", "encode", "search", "certify", "export", "columns"]),
        ("download", ["scan", "number", "assign", "encode", "search", "certify", "export"]),
    ],
)
def test_what_builds_on_a_step_follows_from_what_it_owns(step: str, stale: list[str]) -> None:
    (found,) = (readers(one) for one in STEPS if one.name == step)
    assert set(stale) <= set(names(found))
    assert bool(found) == bool(stale)
    assert names(found) == [name for name in names(STEPS) if name in names(found)]


def test_no_step_builds_on_a_later_one() -> None:
    for number, step in enumerate(STEPS):
        assert step not in readers(step)
        others = {one.name for one in STEPS if one.verb == step.verb} if step.name == "vectors" else set()
        assert not (set(names(STEPS[:number])) - others) & set(names(readers(step))), step.name


def test_scratch_is_for_the_steps_whose_files_stay() -> None:
    expected = {"base": ["search"], "prepare": ["moments", "search"], "codes": ["moments", "search"]}
    expected |= {"count": ["urls"]}
    expected |= {name: ["number"] for name in ("split", "unique", "mark")}
    expected |= {name: ["search"] for name in ("order", "join", "merge", "refine")}
    expected |= {"cells": ["cluster"], "arrange": ["cluster"], "scatter": ["cluster"]}
    assert {step.name: names(served(step)) for step in STEPS if step.stage.scratch} == expected
