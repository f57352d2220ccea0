"""What commands say a user can do next: it can be done, for that store and with what is installed."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from graphbuild.demo.run import _activate
from graphbuild.recipe import Embed, Recipe
from tests.e2e.test_bad_input import captioned, graphbuild, refused, succeeded, write_list, write_tar

CAPTIONS = ["a dog", "a cat", "a  dog", "a red car"]
NUMBERS = "all are numbers"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph over three captions of four samples in one tar, without sidecars."""
    folder = tmp_path_factory.mktemp("next")
    path = write_tar(folder / "a.tar", captioned(CAPTIONS))
    succeeded(graphbuild("embed", folder / "store", "--shards", path, "--workers", 0))
    succeeded(graphbuild("index", folder / "store", "--k", 2, "--workers", 0))
    return folder / "store"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    np.save(folder / "v.npy", np.random.default_rng(3).normal(size=(12, 8)))
    succeeded(graphbuild("embed", folder / "store", "--vectors", folder / "v.npy", "--workers", 0))
    succeeded(graphbuild("index", folder / "store", "--k", 2, "--workers", 0))
    return folder / "store"


def test_the_version_is_told() -> None:
    assert succeeded(graphbuild("--version")) == f"graphbuild {version('graphbuild')}\n"


def test_a_refused_choice_is_told_in_the_words_of_the_command_line(store: Path) -> None:
    outcome = graphbuild("mine", store, "--what", "dups")
    assert outcome.code == 2
    assert "Invalid value for '--what': 'dups' is not one of 'duplicates'" in outcome.err


def test_each_verb_names_the_next_until_the_store_is_verified(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", captioned(CAPTIONS))
    said = succeeded(graphbuild("embed", tmp_path / "store", "--shards", path, "--workers", 0))
    verbs, options = [], {"index": ["--k", 2, "--workers", 0], "export": ["--workers", 0]}
    while found := re.search(r"^next +graphbuild (.*)$", said, re.M):
        words = shlex.split(found[1])
        verbs.append(words[0])
        said = succeeded(graphbuild(*words, *options.get(words[0], [])))
        if words[0] == "export":
            assert "4 samples in 1 sidecar, in shards/" in said
    assert verbs == ["index", "export", "verify"]
    assert "no problems" in said
    assert ", 1 shard;" in said


def test_a_store_without_captions_is_told_every_source(tmp_path: Path) -> None:
    sources = ("--shards", "--captions", "--vectors", "graphbuild download")
    refused(graphbuild("embed", tmp_path / "store"), tmp_path / "store", *sources)
    refused(graphbuild("embed", tmp_path / "store", "--dry-run"), *sources)


def test_an_unknown_setting_is_told_which_there_are(tmp_path: Path) -> None:
    recipe = write_list(tmp_path / "job.yaml", "source: {shards: x}\n")
    refused(graphbuild("run", recipe, tmp_path / "store"), "source: no such setting", *Recipe.model_fields)
    write_list(recipe, "embed: {shardz: x}\n")
    refused(graphbuild("run", recipe, tmp_path / "store"), "embed.shardz: no such setting", *Embed.model_fields)


# -- neighbors


def test_a_neighbour_is_told_with_the_number_of_its_samples_and_a_key_to_ask_by(store: Path) -> None:
    asked, *lines = succeeded(graphbuild("neighbors", store, "000001")).splitlines()
    assert asked == "000001  node 1  a cat"
    found = [re.split(" {2,}", line.strip())[1:] for line in lines]
    assert sorted(found) == [
        ["node 0", "2 samples: 000000, ...", "a dog"],
        ["node 2", "1 sample: 000003", "a red car"],
    ]
    assert succeeded(graphbuild("neighbors", store, "000003")).startswith("000003  node 2  a red car\n")


def test_a_key_of_several_rows_can_be_asked_for_by_node(tmp_path: Path) -> None:
    path = write_list(tmp_path / "a.csv", "caption,id\na dog,x\na cat,x\na cow,y\n")
    succeeded(graphbuild("embed", tmp_path / "store", "--captions", path, "--key-column", "id", "--workers", 0))
    succeeded(graphbuild("index", tmp_path / "store", "--k", 1, "--workers", 0))
    outcome = graphbuild("neighbors", tmp_path / "store", "x")
    refused(outcome, "row 0: node 0, row 1: node 1", "--node")
    assert "a cat" in succeeded(graphbuild("neighbors", tmp_path / "store", "--node", 1)).splitlines()[0]


@pytest.mark.parametrize("question", [[], ["3", "--node", "3"], ["--text", "a dog"], ["3"]])
def test_ready_vectors_are_asked_by_node_alone(vectors: Path, question: list[str]) -> None:
    outcome = graphbuild("neighbors", vectors, *question)
    refused(outcome, "--node")
    assert "KEY" not in outcome.err
    assert "--text" not in outcome.err


def test_ready_vectors_have_no_samples_to_tell_of(vectors: Path) -> None:
    for line in succeeded(graphbuild("neighbors", vectors, "--node", 3)).splitlines()[-2:]:
        assert re.fullmatch(r"  -?\d\.\d{3}  node \d+ *  \(no text\)", line), line


# -- class numbers


def labelled(path: Path, labels: list[str]) -> Path:
    return write_tar(path, [(f"{n}.cls", label.encode()) for n, label in enumerate(labels)])


@pytest.mark.parametrize("options", [[], ["--template", "a photo of a {}"]])
def test_class_numbers_without_names_are_warned_of(
    tmp_path: Path, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = labelled(tmp_path / "a.tar", ["0", "1\n", "12"])
    embed = ["embed", tmp_path / "store", "--shards", path, "--caption-member", "cls", "--workers", 0, *options]
    with caplog.at_level(logging.WARNING, "graphbuild"):
        succeeded(graphbuild(*embed))
    assert f"captions  {NUMBERS}" in caplog.text
    assert "--class-names" in caplog.text
    caplog.clear()
    names = write_list(tmp_path / "names.txt", "".join(f"{n}\n" for n in range(13)))
    succeeded(graphbuild(*embed, "--class-names", names, "--force"))  # the next step that the warning names
    assert NUMBERS not in caplog.text


def test_numbers_in_a_list_are_warned_of_without_an_option_that_lists_do_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_list(tmp_path / "a.csv", "caption\n3\n4\n")
    succeeded(graphbuild("embed", tmp_path / "store", "--captions", path, "--workers", 0))
    assert NUMBERS in caplog.text
    assert "--class-names" not in caplog.text


def test_a_caption_that_is_no_number_among_numbers_keeps_the_warning_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = labelled(tmp_path / "a.tar", ["0", "1", "a dog"])
    succeeded(graphbuild("embed", tmp_path / "s", "--shards", path, "--caption-member", "cls", "--workers", 0))
    assert NUMBERS not in caplog.text


# -- the demo's environment


def test_an_environment_that_the_shell_does_not_know_is_to_be_activated_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / ".venv" / "bin" / "activate"
    script.parent.mkdir(parents=True)
    script.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert _activate() == f"first     source {script}\n"
    monkeypatch.chdir(tmp_path)
    assert _activate() == "first     source .venv/bin/activate\n"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert _activate() == ""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script.unlink()
    assert _activate() == ""


def test_a_list_with_several_captions_a_key_passes_its_verification(tmp_path: Path) -> None:
    rows = "\n".join(f"{number // 2},{caption} {number}" for number, caption in enumerate(CAPTIONS * 2))
    (tmp_path / "list.csv").write_text(f"image,caption\n{rows}\n")
    options = ("--captions", tmp_path / "list.csv", "--key-column", "image", "--workers", 0)
    succeeded(graphbuild("embed", tmp_path / "store", *options))
    succeeded(graphbuild("index", tmp_path / "store", "--k", 2, "--workers", 0))
    succeeded(graphbuild("export", tmp_path / "store", "--workers", 0))
    assert "no problems" in succeeded(graphbuild("verify", tmp_path / "store"))
