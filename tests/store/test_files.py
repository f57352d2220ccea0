"""Input files: what is read of them, and how often they are asked for."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from graphbuild.errors import InputError
from graphbuild.nodes import scan, vectors
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner.stage import perform
from graphbuild.store.store import Store

ROWS, D, SHARD = 1_000, 384, 100


def stored(name: str, content: bytes) -> str:
    MemoryFileSystem().pipe_file(f"/source/{name}", content)
    return f"memory://source/{name}"


def as_npy(values: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def as_parquet(values: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    flat = pa.array(values.ravel().astype(np.float32))
    column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    pq.write_table(pa.table({"embedding": column}), stream, row_group_size=SHARD)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "write", "order"),
    [("c.npy", as_npy, "C"), ("fortran.npy", as_npy, "F"), ("x.parquet", as_parquet, "C")],
)
def test_a_task_reads_its_own_rows_of_a_file_of_vectors(
    name: str, write: Any, order: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32)
    content = write(np.asarray(values, order=order))
    recipe = Recipe(embed=Embed(vectors=stored(name, content), shard_size=SHARD))
    store, read = Store(str(tmp_path)), Counter[str]()
    whole = MemoryFile.read

    def counted(self: MemoryFile, *arguments: Any) -> bytes:
        found = whole(self, *arguments)
        read["bytes"] += len(found)
        return found

    monkeypatch.setattr(MemoryFile, "read", counted)
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda *_, **__: pytest.fail("copies the whole file"))
    tasks = vectors.plan(recipe, store)
    assert len(tasks) == ROWS // SHARD
    assert read["bytes"] < len(content) / 5
    read.clear()
    for task in tasks:
        perform(vectors.STAGE, task, store)
    assert read["bytes"] < 2 * len(content)
    unit = values.astype(np.float64) / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    found = np.concatenate([np.load(tmp_path / f"nodes/{task.name}.npy") for task in tasks])
    np.testing.assert_array_equal(found, unit.astype(np.float16))


def test_a_cut_or_absent_file_of_vectors_is_named(tmp_path: Path) -> None:
    content = as_npy(np.ones((ROWS, D), np.float32))
    for name, kept, message in (("cut.npy", content[:-1], "it is cut"), ("gone.npy", None, "does not exist")):
        url = f"memory://source/{name}" if kept is None else stored(name, kept)
        with pytest.raises(InputError, match=rf"source/{name}.*{message}"):
            vectors.plan(Recipe(embed=Embed(vectors=url)), Store(str(tmp_path)))


def test_a_scan_fetches_a_tar_once_and_names_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for key in ("a", "b"):
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 5
            archive.addfile(info, io.BytesIO(f"cat {key}".encode()))
    urls = [stored(f"{number}.tar", stream.getvalue()) for number in range(3)]
    fetched, get = Counter[str](), MemoryFileSystem.get_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "get_file",
        lambda self, path, *rest, **options: fetched.update([path]) or get(self, path, *rest, **options),
    )
    recipe, store = Recipe(embed=Embed(shards="memory://source/{0..2}.tar")), Store(str(tmp_path))
    records = [perform(scan.STAGE, task, store) for task in scan.plan(recipe, store)]
    assert fetched == Counter(f"/source/{number}.tar" for number in range(3))
    tars = [shard["tar"] for record in records for shard in record["facts"]["shards"].values()]
    assert [tar["url"] for tar in tars] == urls
    assert {tar["sha256"] for tar in tars} == {hashlib.sha256(stream.getvalue()).hexdigest()}


@pytest.mark.parametrize("option", ["vectors", "class_names"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, option: str) -> None:
    given = {"shards": str(tmp_path / "x.tar")} if option == "class_names" else {}
    recipe = Recipe(embed=Embed(**{**given, option: str(tmp_path)}))
    named = {"vectors": rf"no file matches {tmp_path}/\*\.npy", "class_names": rf"{tmp_path} is a folder\n.*name one"}
    with pytest.raises(InputError, match=named[option]):
        (vectors if option == "vectors" else scan).plan(recipe, Store(str(tmp_path / "store")))
