"""Options made from the recipe's fields: their values, how each is unset, and what a bad one is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from graphbuild.cli import app
from graphbuild.errors import ConfigError


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="graphbuild")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of a list of 20 captions, whose vectors a matrix gives."""
    np.save(tmp_path / "matrix.npy", np.eye(20))
    (tmp_path / "names.txt").write_text("".join(f"class {number}\n" for number in range(20)))
    keys = ["none", r"\none", "None", "none "]  # columns
    rows = [",".join(["caption", *keys]), *(f"class {number}" + f",k{number}" * 4 for number in range(20))]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    given = ("--encoder", f"matrix:{tmp_path / 'matrix.npy'}", "--class-names", tmp_path / "names.txt")
    given += ("--template", "a {}", "--key-column", "None")
    done = run("embed", tmp_path / "store", "--captions", tmp_path / "list.csv", *given, "--workers", 0)
    assert done.exit_code == 0, done.output
    return tmp_path / "store"


def embed_settings(store: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((store / "recipe.yaml").read_text())["embed"]
    return settings


def test_options_are_kept_by_the_store_as_their_fields_types(store: Path) -> None:
    settings = embed_settings(store)
    assert {name: settings[name] for name in ("key_column", "template")} == {"key_column": "None", "template": "a {}"}
    assert run("embed", store, "--workers", 0).exit_code == 0
    assert embed_settings(store) == settings, "a command that names none changes none"
    done = run("index", store, "--k", 4, "--memory", 2, "--min-recall", 1, "--workers", 0)
    assert done.exit_code == 0, done.output
    settings = yaml.safe_load((store / "recipe.yaml").read_text())["index"]
    assert [settings[name] for name in ("k", "memory", "min_recall")] == [4, 2.0, 1.0]


@pytest.mark.parametrize(("option", "default"), [("--key-column", None), ("--template", "{}")])
def test_none_puts_a_setting_back_to_its_default(store: Path, option: str, default: object) -> None:
    before = embed_settings(store)
    done = run("embed", store, option, "none", "--workers", 0, "--force")
    assert done.exit_code == 0, done.output
    assert embed_settings(store) == before | {option[2:].replace("-", "_"): default}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("embed", "--prompt", "query: "), "--prompt is not read with a matrix as --encoder"),
        (("embed", "--vectors", "x.npy", "--key-column", "id"), "--key-column is not read with --vectors"),
        (("embed", "--vectors", "x.npy", "--vector-column", "v"), "--vector-column is not read with a .npy file"),
        (("embed", "--vectors", "x.parquet", "--encoder", "e5"), "--encoder is not read with --vectors"),
        (("embed", "--shards", "x.tar", "--caption-column", "t"), "--caption-column is not read with --shards"),
        (("embed", "--captions", "none", "--preset", "cc3m"), "--preset is not read with the tars of the store"),
        (("embed", "--caption-member", "txt"), "--caption-member is not read with --captions"),
        (
            ("embed", "--template", "{a} {b}", "--caption-column", "c"),
            "--caption-column is not read with named fields in --template",
        ),
        (("index", "--engine", "exact", "--recall", "0.9"), "--recall is not read with --engine exact"),
        (("export", "--chunk", "8", "--shard-size", "10000"), "--chunk is not read with --layout sidecars"),
        (("export", "--layout", "inline", "--shard-size", "8"), "--shard-size is not read with --layout inline"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(store: Path, given: tuple[str, ...], why: str) -> None:
    before = (store / "recipe.yaml").read_bytes()
    done = run(given[0], store, *given[1:], "--workers", 0)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == f"{why}\n  -> leave it out"
    assert (store / "recipe.yaml").read_bytes() == before


def test_a_store_whose_recipe_has_what_is_not_read_goes_on_and_a_recipe_that_a_user_gives_is_refused(
    store: Path, tmp_path: Path
) -> None:
    ignored = embed_settings(store) | {"caption_member": "cls", "dim": 8}
    (store / "recipe.yaml").write_text(yaml.safe_dump({"embed": ignored}))
    done = run("embed", store, "--workers", 0)
    assert done.exit_code == 0, done.output
    done = run("run", store / "recipe.yaml", tmp_path / "other", "--workers", 0)
    assert isinstance(done.exception, ConfigError)
    assert done.exception.cause == f"{store / 'recipe.yaml'}: embed.caption_member is not read with --captions"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("retry", "--all", "--reason", "timeout"), "--all and --reason exclude each other"),
        (("index", "--workers", 0, "--address", "auto"), "--workers 0 runs in this process, not on the cluster"),
    ],
)
def test_options_that_exclude_each_other_are_refused(store: Path, given: tuple[object, ...], why: str) -> None:
    done = run(given[0], store, *given[1:])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.cause.startswith(why)


@pytest.mark.parametrize(
    ("given", "kept"), [(r"\none", "none"), (r"\\none", r"\none"), ("None", "None"), ("none ", "none ")]
)
def test_the_word_none_is_written_with_a_backslash(store: Path, given: str, kept: str) -> None:
    done = run("embed", store, "--key-column", given, "--workers", 0, "--force")
    assert done.exit_code == 0, done.output
    assert embed_settings(store)["key_column"] == kept


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
