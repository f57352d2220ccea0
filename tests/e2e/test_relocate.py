"""Tars that were moved or renamed: found by their content, and nothing is scanned or encoded again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from graphbuild.torch import GraphDataset

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
Picture = tuple[bytes, str]


def members(pictures: list[Picture]) -> list[tuple[str, bytes]]:
    return [
        (f"{i:03d}.{extension}", content)
        for i, (image, text) in enumerate(pictures)
        for extension, content in (("jpg", image), ("txt", text.encode()))
    ]


@pytest.fixture(scope="module")
def finished(
    cli: Cli, write_tar: WriteTar, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A folder in which a store was made over three tars, and a copy of it."""
    work = tmp_path_factory.mktemp("relocate") / "work"
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        write_tar(work / f"old/{name}.tar", members(pictures[first : first + 20]))
    cli("embed", work / "out", "--shards", work / "old", "--workers", 0)
    cli("index", work / "out", "--k", 3, "--workers", 0)
    cli("export", work / "out", "--workers", 0)
    return work, Path(shutil.copytree(work, work.with_name("copy")))


@pytest.fixture
def store(finished: tuple[Path, Path]) -> Path:
    """A finished store over three tars, where it was made."""
    work, copy = finished
    shutil.rmtree(work)
    shutil.copytree(copy, work)
    return work / "out"


def made(store: Path) -> dict[str, tuple[int, bytes]]:
    """The files of all that takes long, with the time of their last change."""
    paths = [path for folder in ("nodes", "samples", "graph") for path in (store / folder).iterdir()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_moved_and_renamed_tars_are_found_and_only_sidecars_are_written_again(store: Path, cli: Cli) -> None:
    before = made(store)
    (store.parent / "new [v2]").mkdir()
    for old, new in (("a", "9"), ("b", "b"), ("c", "0")):
        (store.parent / f"old/{old}.tar").rename(store.parent / f"new [v2]/{new}.tar")
    assert "graphbuild relocate" in cli("verify", store, code=1).stderr
    refused = cli("embed", store, "--shards", store.parent / "new [v2]", "--workers", 0, code=2)
    assert f"graphbuild relocate {store}" in refused.stderr
    said = cli("relocate", store, store.parent / "new [v2]", "--workers", 0)
    assert "3 tars found by their content" in said.stdout
    assert "encoding  up to date" in said.stderr
    assert made(store) == before
    cli("export", store, "--workers", 0)
    assert "no problems" in cli("verify", store).stdout
    assert sorted(path.name for path in (store / "shards").glob("*.graph.parquet")) == [
        f"{name}.graph.parquet" for name in ("0", "9", "b")
    ]
    keys = pq.read_table(store / "samples/00000.parquet")["key"].to_pylist()
    assert pq.read_table(store / "shards/9.graph.parquet")["key"].to_pylist() == keys
    dataset = GraphDataset(store.parent / "new [v2]", sidecars=store / "shards", image_pixels=16)
    assert len(dataset) == 60
    again = cli("embed", store, "--workers", 0).stderr
    assert again.count("up to date") == len(again.strip().splitlines())
    assert "graphbuild export" not in cli("verify", store).stdout


def test_a_tar_that_is_not_there_or_has_changed_is_named_and_nothing_changes(
    store: Path, cli: Cli, write_tar: WriteTar, pictures: list[Picture]
) -> None:
    (store.parent / "old").rename(store.parent / "new")
    write_tar(store.parent / "new/b.tar", members(pictures[21:41]))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    refused = cli("relocate", store, store.parent / "new", "--workers", 0, code=2)
    assert "1 of the 3 tars" in refused.stderr
    assert "old/b.tar" in refused.stderr
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_half_a_relocation_goes_on_with_the_same_command(store: Path, cli: Cli) -> None:
    before = made(store)
    (store.parent / "old").rename(store.parent / "new")
    done = store / "_state/scan/00001.done.json"
    kept = done.read_text()
    cli("relocate", store, store.parent / "new", "--workers", 0)
    done.write_text(kept)  # as if the command had stopped before it wrote this record
    assert str(store.parent / "old") in json.loads(kept)["facts"]["shards"]["00001"]["tar"]["url"]
    cli("relocate", store, store.parent / "new", "--workers", 0)
    assert made(store) == before
    cli("export", store, "--workers", 0)
    assert "no problems" in cli("verify", store).stdout


def test_a_store_of_a_list_has_no_tars_to_relocate(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("caption\na dog\na cat\n")
    cli("embed", tmp_path / "out", "--captions", tmp_path / "list.csv", "--workers", 0)
    assert "was not made from tars" in cli("relocate", tmp_path / "out", tmp_path, "--workers", 0, code=2).stderr
