"""A store whose records disagree, or whose vectors failed their check, is built on by no later verb."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from graphbuild.errors import ConfigError, QualityError, StageError
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.nodes import fidelity
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store


def recipe_of(folder: Path, letters: str, **embed: object) -> Recipe:
    if not (folder / "list.csv").exists():
        (folder / "list.csv").write_text("caption\nred\nblue\nold\nnew\ngreen\ngrass\n")
    source = {"captions": str(folder / "list.csv"), "shard_size": 2, "encoder": letters}
    return Recipe(embed=Embed.model_validate({**source, **embed}), index=Index(k=2))


def run(verbs: str, recipe: Recipe, store: Path, *, force: bool = False) -> None:
    with Runner(workers=0) as runner:
        for verb in verbs.split():
            run_verb(verb, recipe, Store(str(store)), runner, force=force)


@pytest.mark.parametrize("other", [{"prompt": "old "}, {"dim": 8}])
def test_shards_of_two_settings_are_refused_by_index_and_export_until_they_are_built_anew(
    tmp_path: Path, letters: str, other: dict[str, object]
) -> None:
    (tmp_path / "list").mkdir()
    recipe, mixed = recipe_of(tmp_path / "list", letters), tmp_path / "mixed"
    run("embed index export", recipe, mixed)
    shutil.copytree(mixed, tmp_path / "good")
    run("embed", recipe_of(tmp_path / "list", letters, **other), tmp_path / "other")
    for name in ("_state/encode/00001.done.json", "nodes/00001.npy"):
        shutil.copy(tmp_path / "other" / name, mixed / name)
    assert verify_store(Store(str(mixed))).problems
    for verb in ("index", "export"):
        with pytest.raises(StageError, match=r"_state/encode/ are not those") as refused:
            run(verb, recipe, mixed)
        assert f"run `graphbuild embed {mixed}` again" in refused.value.fix
    with pytest.raises(ConfigError, match=next(iter(other))):
        run("embed", recipe, mixed)
    run("embed", recipe, mixed, force=True)
    run("index export", recipe, mixed)
    assert verify_store(Store(str(mixed))).problems == []
    for path in (tmp_path / "good/graph").iterdir():
        assert (mixed / "graph" / path.name).read_bytes() == path.read_bytes()


def test_half_a_run_is_refused_and_finished_by_the_verb_that_the_error_names(tmp_path: Path, letters: str) -> None:
    recipe, store = recipe_of(tmp_path, letters), tmp_path / "store"
    run("embed", recipe, store)
    (store / "_state/assign/00002.done.json").unlink()
    with pytest.raises(StageError, match=r"_state/assign/ are not those"):
        run("index", recipe, store)
    run("embed index", recipe, store)
    assert verify_store(Store(str(store))).problems == []


def test_vectors_that_failed_fidelity_are_indexed_once_they_pass(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = recipe_of(tmp_path, letters), tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "MEAN_FLOOR", 1.1)  # of cosines: none reaches it
        with pytest.raises(StageError, match="mean cosine of"):
            run("embed", recipe, store)
    with pytest.raises(QualityError, match=r"mean cosine of .* under 1\.1") as refused:
        run("index", recipe, store)
    assert "choose another --encoder" in refused.value.fix  # the vectors are float32 ones
    run("embed index", recipe, store)
    assert verify_store(Store(str(store))).problems == []
