"""Options made from the recipe's fields: their values, how each is unset, and what a bad one is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from graphbuild.cli import app


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="graphbuild")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 20 ready vectors; its recipe names settings that vectors do not heed."""
    vectors = np.eye(20, dtype=np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    given = ("--dim", 8, "--prompt", "query: ", "--precision", "int8", "--key-column", "id")
    done = run("embed", tmp_path / "store", "--vectors", tmp_path / "vectors.npy", *given, "--workers", 0)
    assert done.exit_code == 0, done.output
    return tmp_path / "store"


def embed_settings(store: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((store / "recipe.yaml").read_text())["embed"]
    return settings


def test_options_are_kept_by_the_store_as_their_fields_types(store: Path) -> None:
    settings = embed_settings(store)
    assert {name: settings[name] for name in ("dim", "prompt", "precision", "key_column")} == {
        "dim": 8,
        "prompt": "query: ",
        "precision": "int8",
        "key_column": "id",
    }
    assert run("embed", store, "--workers", 0).exit_code == 0
    assert embed_settings(store) == settings, "a command that names none changes none"


@pytest.mark.parametrize(
    ("option", "default"),
    [("--dim", None), ("--prompt", None), ("--precision", "auto"), ("--key-column", None)],
)
def test_none_puts_a_setting_back_to_its_default(store: Path, option: str, default: object) -> None:
    before = embed_settings(store)
    assert run("embed", store, option, "none", "--workers", 0).exit_code == 0
    assert embed_settings(store) == before | {option[2:].replace("-", "_"): default}


@pytest.mark.parametrize(
    ("given", "kept"), [(r"\none", "none"), (r"\\none", r"\none"), ("None", "None"), ("none ", "none ")]
)
def test_the_word_none_is_written_with_a_backslash(store: Path, given: str, kept: str) -> None:
    assert run("embed", store, "--prompt", given, "--workers", 0).exit_code == 0
    assert embed_settings(store)["prompt"] == kept


def test_where_none_is_a_choice_it_is_that_choice(store: Path) -> None:
    done = run("index", store, "--k", 4, "--workers", 0)
    assert done.exit_code == 0, done.output
    done = run("export", store, "--embeddings", "none", "--workers", 0)
    assert yaml.safe_load((store / "recipe.yaml").read_text())["export"]["embeddings"] == "none", done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("index", "--k", "many"), "Invalid value for '--k': 'many': input should be a valid integer"),
        (("index", "--memory", "x"), "Invalid value for '--memory': 'x': input should be a valid number"),
        (("index", "--device", "tpu"), "'tpu': input should be 'auto', 'cpu' or 'cuda'"),
        (("embed", "--min-recall", "1"), "No such option: --min-recall"),
        (("embed", "--precision", "half"), "Invalid value for '--precision': 'half': input should be 'auto', "),
        (("download", "l.csv", "--preset", "cc"), "Invalid value for '--preset': 'cc': input should be 'cc3m' or"),
        (("embed", "--shards", "a.tar", "b.tar"), "unexpected b.tar. Quote patterns"),
    ],
)
def test_a_bad_value_is_refused_by_its_option_with_what_is_allowed(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = run(arguments[0], tmp_path / "store", *arguments[1:])
    assert done.exit_code == 2
    assert "Usage: graphbuild" in done.output
    assert said in done.output
    assert not (tmp_path / "store").exists()
