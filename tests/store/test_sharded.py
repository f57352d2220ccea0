"""Arrays in many files: what they give, and that a task pays for the files it reads alone."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphbuild.errors import ConfigError, StageError
from graphbuild.graph import prepare
from graphbuild.recipe import Index, Recipe
from graphbuild.store import mapped, remote, sharded
from graphbuild.store.sharded import ShardedArray
from graphbuild.store.store import Store

LENGTHS = [7, 1, 300, 40, 5, 512, 3] * 10


@pytest.fixture(params=["disk", "memory://sharded"])
def stored(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Store, list[str], np.ndarray[Any, Any]]:
    """A store, its files' names, and all their rows in one array."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Store(str(tmp_path / "store") if request.param == "disk" else f"{request.param}/{tmp_path.name}")
    values = np.random.default_rng(0).standard_normal((sum(LENGTHS), 6)).astype(np.float16)
    names = [f"x/{number:05d}.npy" for number in range(len(LENGTHS))]
    for name, part in zip(names, np.split(values, np.cumsum(LENGTHS)[:-1]), strict=True):
        with store.staged(name) as path, path.open("wb") as file:
            np.save(file, part)
    return store, names, values


def test_rows_are_those_of_the_files_joined(stored: tuple[Store, list[str], np.ndarray[Any, Any]]) -> None:
    store, names, values = stored
    array = ShardedArray(store, names, LENGTHS)
    ids = np.random.default_rng(1).integers(0, len(values), (50, 3))
    np.testing.assert_array_equal(array.take(ids), values[ids])
    assert array.take(np.empty(0, np.int64)).shape == (0, 6)
    for first, count in ((0, len(values)), (5, 400), (8, 0), (len(values) - 2, 2)):
        np.testing.assert_array_equal(array.span(first, count), values[first : first + count])
    blocks = list(array.blocks(100))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), values)
    assert [first for first, _ in blocks] == np.cumsum([0, *(len(block) for _, block in blocks)])[:-1].tolist()
    addresses, starts, guess, row_bytes = array.table()
    assert array.table() is array.table(), "it is made once, however many blocks ask for it"
    assert len(addresses) == len(names)
    assert starts[-1] == len(values)
    assert len(guess) == -(-len(values) // 256)
    assert row_bytes == 12


def test_a_few_rows_that_lie_apart_are_asked_for_together(
    stored: tuple[Store, list[str], np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names, values = stored
    monkeypatch.setattr(sharded, "REQUEST_BYTES", 1 << 30)  # an object store's files are fetched
    asked: list[int] = []
    monkeypatch.setattr(
        sharded, "read_soon", lambda part, rows: asked.append(len(rows)) or mapped.read_soon(part, rows)
    )
    starts = np.cumsum([0, *LENGTHS])
    wanted = {2: 9, 5: 20, 9: 10, 12: 16}  # rows of files of 300, 512, 300 and 512
    ids = np.concatenate([starts[file] + np.arange(count) for file, count in wanted.items()])
    np.testing.assert_array_equal(ShardedArray(store, names, LENGTHS, few=True).take(ids), values[ids])
    np.testing.assert_array_equal(ShardedArray(store, names, LENGTHS).take(ids), values[ids])
    assert asked == [9, 16], "one row of 32, at most"


def test_rows_that_are_asked_for_are_read_and_not_what_lies_between_them(tmp_path: Path) -> None:
    values = np.arange(1 << 22, dtype=np.int64).reshape(-1, 64)  # 32 MB
    np.save(tmp_path / "x.npy", values)
    rows = np.array([9_000, 3, 40_000])
    with (tmp_path / "x.npy").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    array, libc, there = mapped.map_array(tmp_path / "x.npy"), ctypes.CDLL(None), ctypes.c_ubyte()

    def in_memory(row: int) -> bool:
        address = array[row].ctypes.data
        assert (
            libc.mincore(ctypes.c_void_p(address - address % mmap.PAGESIZE), ctypes.c_size_t(1), ctypes.byref(there))
            == 0
        )
        return bool(there.value & 1)

    if in_memory(20_000):
        pytest.skip("the folder is in memory")
    mapped.read_soon(array, rows)
    for _ in range(200):
        if all(in_memory(row) for row in rows.tolist()):
            break
        time.sleep(0.05)
    assert [in_memory(row) for row in [*rows.tolist(), 20_000, 60_000]] == [True] * 3 + [False] * 2
    np.testing.assert_array_equal(array[rows], values[rows])


def test_a_few_rows_of_a_remote_store_are_fetched_without_their_files(
    stored: tuple[Store, list[str], np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names, values = stored
    array = ShardedArray(store, names, LENGTHS, few=True)
    monkeypatch.setattr(sharded, "REQUEST_BYTES", 1)
    if not store.is_local:
        monkeypatch.setattr(store.fs, "get_file", None)  # which copies whole files
    ids = np.random.default_rng(1).integers(0, len(values), (50, 3))
    np.testing.assert_array_equal(array.take(ids), values[ids])
    assert array.take(np.empty(0, np.int64)).shape == (0, 6)


def test_a_file_of_a_remote_store_of_which_many_rows_are_wanted_is_fetched_once(
    stored: tuple[Store, list[str], np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names, values = stored
    array = ShardedArray(store, names, LENGTHS, few=True)
    monkeypatch.setattr(sharded, "REQUEST_BYTES", 240)  # 20 rows: a file of 300 is worth 15 requests
    alone: list[str] = []
    read = Store.rows
    monkeypatch.setattr(Store, "rows", lambda self, name, *span: alone.append(name) or read(self, name, *span))
    starts = np.cumsum([0, *LENGTHS])
    wanted = {9: 15, 16: 14, 19: 26}  # files of 300, 300 and 512 rows
    ids = np.concatenate([starts[file] + np.arange(count) for file, count in wanted.items()])
    np.testing.assert_array_equal(array.take(ids), values[ids])
    assert sorted(alone) == ([] if store.is_local else [names[16]] * 14)
    np.testing.assert_array_equal(array.take(ids[:1]), values[ids[:1]])
    assert len(alone) == (0 if store.is_local else 14), "what is there is not asked for again"


def test_blocks_of_some_files_have_the_rows_of_these_alone(
    stored: tuple[Store, list[str], np.ndarray[Any, Any]],
) -> None:
    store, names, values = stored
    begin = sum(LENGTHS[:5])
    blocks = list(ShardedArray(store, names, LENGTHS).blocks(100, range(5, 47)))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), values[begin : sum(LENGTHS[:47])])
    assert blocks[0][0] == begin
    assert not list(ShardedArray(store, names, LENGTHS).blocks(100, range(3, 3)))


def test_only_files_whose_rows_are_asked_for_are_opened(
    stored: tuple[Store, list[str], np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names, values = stored
    opened = []
    read = Store.array
    monkeypatch.setattr(Store, "array", lambda self, name, *told: opened.append(name) or read(self, name))
    array = ShardedArray(store, names, LENGTHS)
    starts = np.cumsum([0, *LENGTHS])
    ids = np.array([starts[30], starts[62], starts[30]])
    np.testing.assert_array_equal(array.take(ids), values[ids])
    array.span(int(starts[62]), 1)
    assert sorted(opened) == [names[0], names[30], names[62]]


def test_a_file_of_other_length_is_named_when_it_is_read(
    stored: tuple[Store, list[str], np.ndarray[Any, Any]],
) -> None:
    store, names, _ = stored
    array = ShardedArray(store, names, [*LENGTHS[:-1], 4])
    with pytest.raises(StageError, match=r"x/00069.npy has 3 rows; the manifest says 4"):
        array.span(len(array) - 1, 1)


def test_a_process_that_may_map_no_more_files_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(4))
    program = (
        "import resource, sys\nfrom graphbuild.store.store import Store\n"
        "store = Store(sys.argv[1])\nstore.array('x.npy')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1, 1))\nstore.array('x.npy')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert "StorageError" in done.stderr
    assert "x.npy cannot be mapped" in done.stderr
    assert "raise vm.max_map_count" in done.stderr


def test_an_index_of_more_shards_than_a_process_may_map_is_refused_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = tmp_path / "max_map_count"
    monkeypatch.setattr(mapped, "MOST", most)
    shards = [
        {"shard": f"{i:05d}", "first_node": 50 * i, "nodes": 50, "samples": 50, "tar": None} for i in range(11_000)
    ]
    manifest = {
        "format_version": 1,
        "stages": {"vectors": {}},
        "embeddings": {"d": 8, "fingerprint": "e", "files": {}},
        "shards": shards,
    }
    store = Store(str(tmp_path / "store"))
    store.write_json("manifest.json", manifest)
    for engine, files in (("exact", 44_000), ("partition", 66_000)):
        recipe = Recipe(index=Index(engine=engine))
        most.write_text(f"{files + mapped.OTHERS}\n")
        assert len(prepare.plan(recipe, store)) == {"exact": 1, "partition": 3}[engine], (
            "a task a range of its 550,000 nodes"
        )
        most.write_text(f"{files + mapped.OTHERS - 1}\n")
        with pytest.raises(
            ConfigError, match=rf"will map {files:,} files.*\n.*sysctl -w vm.max_map_count={2 * files + 2000}"
        ):
            prepare.plan(recipe, store)


# ---- copies of remote files


def test_workers_that_want_one_file_fetch_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Store(f"memory://herd/{tmp_path.name}")
    store.write_bytes("x.bin", b"content")
    fetched = []
    get = type(store.fs).get_file

    def slow(self: Any, path: str, target: str, **options: Any) -> None:
        fetched.append(path)
        time.sleep(0.2)
        get(self, path, target, **options)

    monkeypatch.setattr(type(store.fs), "get_file", slow)
    copies: list[Path] = []
    threads = [threading.Thread(target=lambda: copies.append(store.local_copy("x.bin"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert len(set(copies)) == 1
    assert copies[0].read_bytes() == b"content"
    assert set(copies[0].parent.iterdir()) == {copies[0], copies[0].with_suffix(remote.SUM)}


def test_looking_for_old_copies_costs_each_new_one_the_same_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote, "_until_pruned", 0)
    store, looks = Store(f"memory://many/{tmp_path.name}"), []
    prune = remote.prune
    monkeypatch.setattr(remote, "prune", lambda folder: looks.append(prune(folder)) or looks[-1])
    for number in range(1_000):
        store.write_bytes(f"{number}.bin", b"x")
        store.local_copy(f"{number}.bin")
    assert sum(looks) < 1_000 * 2 * remote.PRUNE_LOOKS
    assert len(list(remote.cache_folder().glob("*.sha256"))) == 1_000
