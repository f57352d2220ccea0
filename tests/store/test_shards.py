"""Shards: names whose order is that of their numbers, however many there are, and the table of what each holds."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphbuild import SampleGraph
from graphbuild.errors import GraphbuildError, StageError
from graphbuild.job.steps import step_of
from graphbuild.job.verbs import run_step, run_verb
from graphbuild.look.catalog import Catalog
from graphbuild.look.verify import verify_store
from graphbuild.nodes import encode, scan
from graphbuild.nodes.number import ASSIGN, NEW_TEXTS, NUMBER
from graphbuild.recipe import Embed, Recipe, resolve
from graphbuild.runner import runner
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, outputs, perform, records, sealed, state_path, write_manifest
from graphbuild.sources import download
from graphbuild.sources.fetched import last_tries
from graphbuild.store.layout import by_number, shard_name
from graphbuild.store.shards import Shard, shards_of, write_shards
from graphbuild.store.store import Json, Store, Writer

BILLION = 1_000_000_000
NUMBERS = st.one_of(st.integers(0, BILLION), st.integers(99_990, 100_010), st.integers(999_990, 1_000_010))


# ---- names


@given(st.lists(NUMBERS, unique=True))
def test_names_sort_as_their_numbers_do(numbers: list[int]) -> None:
    names = [shard_name(number) for number in numbers]
    assert [int(name) for name in sorted(names, key=by_number)] == sorted(numbers)
    paths = [f"_state/scan/{name}.done.json" for name in names]
    assert sorted(paths, key=by_number) == [f"_state/scan/{name}.done.json" for name in sorted(names, key=by_number)]


@given(st.lists(st.integers(0, 99_999), unique=True))
def test_names_of_five_digits_keep_the_order_that_they_had(numbers: list[int]) -> None:
    names = [shard_name(number) for number in numbers]
    assert sorted(names, key=by_number) == sorted(names)
    assert {len(name) for name in names} <= {5}


# ---- a store that grows beyond shard 99,999


def write_tar(path: Path, captions: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, caption in enumerate(captions):
            content = caption.encode()
            info = tarfile.TarInfo(f"{path.stem}{number}.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def number_next(store: Store, shard: int) -> None:
    """Let a store without shards go on from one number, as if all before it had their rows."""
    facts = {"shards": {shard_name(shard - 1): {}}}
    record = {"task": "all", "fingerprint": "", "settings": {}, "inputs": {}, "built": {}, "outputs": []}
    store.write_json(state_path("number", "all"), sealed({**record, "facts": facts, "seconds": 0}))


def embed_texts(store: Store, tars: Path) -> None:
    recipe = Recipe(embed=Embed(shards=f"{tars}/*.tar"))
    with Runner(workers=0) as runner:
        for stage in (scan.STAGE, NUMBER, NEW_TEXTS, encode.STAGE, ASSIGN):
            run_step(step_of(stage), recipe, store, runner)


def samples(store: Store) -> pl.DataFrame:
    """key, row, node and caption of every sample, in order of row."""
    return pl.read_parquet(f"{store.url}/samples/*.parquet").select("row", "key", "node", "caption").sort("row")


def test_tars_added_beyond_shard_99_999_renumber_no_row_and_no_node(tmp_path: Path) -> None:
    store, tars = Store(str(tmp_path / "store")), tmp_path / "tars"
    tars.mkdir()
    number_next(store, 99_998)
    for name in "ab":
        write_tar(tars / f"{name}.tar", [f"{name} one", f"{name} two", "both"])
    embed_texts(store, tars)
    before = samples(store)
    assert before["key"].to_list() == ["a0", "a1", "a2", "b0", "b1", "b2"]
    for name in "cd":
        write_tar(tars / f"{name}.tar", [f"{name} one", "a one", f"{name} two"])
    embed_texts(store, tars)
    after = samples(store)
    assert after[: len(before)].equals(before)
    assert after["key"].to_list()[len(before) :] == ["c0", "c1", "c2", "d0", "d1", "d2"]
    assert after["node"].to_list() == [0, 1, 2, 3, 4, 2, 5, 0, 6, 7, 0, 8]
    names = ["99998", "99999", "100000", "100001"]
    assert list(records(store, "assign")) == list(records(store, "scan")) == names
    (written,) = records(store, "number").values()
    begins = [written["facts"]["shards"][name]["first_row"] for name in names]
    assert begins == sorted(begins)


def test_lists_of_urls_beyond_shard_99_999_are_read_in_order_of_number(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with Writer(store) as writer:
        for number in (100_000, 99_999, 100_001, 9):
            writer.table(f"shards/{shard_name(number)}.parquet", pa.table({"key": [str(number)], "url": ["u"]}))
    paths = {output["path"]: output for output in writer.outputs}
    for path, output in paths.items():
        record = {"outputs": [output], "facts": {}}
        store.write_json(state_path("download", Path(path).stem), record)
    assert list(outputs(list(records(store, "download").values()))) == [
        f"shards/{name}.parquet" for name in ("00009", "99999", "100000", "100001")
    ]
    assert [key for tries in last_tries(store, ["url"]) for key in tries["key"]] == ["9", "99999", "100000", "100001"]


def test_img2dataset_names_shards_of_six_digits_as_their_tasks_are_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    keys = []
    for number in (99_999, 100_000):
        name = shard_name(number)
        with Writer(store) as writer:
            writer.table(f"_state/urls/{name}.parquet", pa.table({"url": ["http://127.0.0.1:1/x"], "caption": ["x"]}))
        recipe = Recipe().download
        hints = {"threads": 1, "host_connections": 1, "allow_private_hosts": True}
        task = Task(stage="download", name=name, settings=recipe.model_dump(), hints=hints)
        written = [output["path"] for output in perform(download.DOWNLOAD, task, store)["outputs"]]
        assert written == [f"shards/{name}{end}" for end in (".tar", ".parquet", "_stats.json")]
        keys += pl.read_parquet(f"{store.url}/shards/{name}.parquet")["key"].to_list()
    assert [(len(key), int(key) // 10_000) for key in keys] == [(9, 99_999), (10, 100_000)]


# ---- the table


def run(store: Store, *verbs: tuple[str, Json]) -> None:
    with Runner(workers=0) as workers:
        for verb, changes in verbs:
            run_verb(verb, resolve(store, verb, changes), store, workers, force="vectors" in changes)


def embed_vectors(folder: Path, store: Store, count: int) -> None:
    """Bring a store up to so many vectors, ten a shard."""
    file = folder / f"{count}.npy"
    if not file.exists():
        np.save(file, np.random.default_rng(3).normal(size=(count, 8)).astype(np.float32))
    run(store, ("embed", {"vectors": str(file), "shard_size": 10}))


def job(folder: Path, source: str) -> Callable[[Store, int], None]:
    """What brings a store up to so many shards of one of the sources, with its graph and sidecars."""

    def tars(store: Store, shards: int) -> None:
        (folder / "tars").mkdir(exist_ok=True)
        for number in range(shards):
            texts = [f"a {what} of shard {number}" for what in ("dog", "red car", "wooden table")]
            if not (folder / f"tars/{number}.tar").exists():
                write_tar(folder / f"tars/{number}.tar", [*texts, "the same"])
        run(store, ("embed", {"shards": f"{folder}/tars"}))

    def bring(store: Store, shards: int) -> None:
        embed_vectors(folder, store, 10 * shards) if source == "vectors" else tars(store, shards)
        run(store, ("index", {"k": 3}), ("export", {}))

    return bring


def as_format_version_1(store: Store) -> None:
    """Rewrite the manifest as graphbuild wrote it before there was a table."""
    manifest = store.manifest()
    manifest["shards"] = [
        {
            "shard": shard.name,
            "first_row": shard.first_row,
            "samples": shard.samples,
            "first_node": shard.first_node,
            "nodes": shard.nodes,
            "tar": shard.tar,
        }
        for shard in shards_of(store, manifest)
    ]
    stage = "vectors" if "vectors" in manifest["stages"] else "encode"
    manifest["embeddings"]["files"] = outputs(list(records(store, stage).values()), "nodes/", ".npy")
    write_manifest(store, manifest | {"format_version": 1})
    store.remove("shards.parquet")


def contents(store: Store) -> dict[str, Any]:
    """Every file's content; records without their seconds."""
    found: dict[str, Any] = {}
    for path in sorted(Path(store.url).rglob("*")):
        if path.is_file():
            name, content = str(path.relative_to(store.url)), path.read_bytes()
            found[name] = json.loads(content) | {"seconds": 0} if name.endswith(".done.json") else content
    return found


def times(store: Store) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(store.url).rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["vectors", "tars"])
def test_a_store_whose_manifest_lists_its_shards_opens_and_goes_on_as_one_with_a_table(
    source: str, tmp_path: Path
) -> None:
    bring, new = job(tmp_path, source), Store(str(tmp_path / "new"))
    bring(new, 3)
    old = Store(str(shutil.copytree(new.url, tmp_path / "old")))
    as_format_version_1(old)
    assert list(shards_of(old, old.manifest())) == list(shards_of(new, new.manifest()))
    assert verify_store(old).problems == []
    assert verify_store(old).shards == 3
    lists = [SampleGraph.open(store.url).neighbors([0, 9]) for store in (old, new)]
    np.testing.assert_array_equal(*(np.concatenate(both, axis=1) for both in lists))
    assert Catalog(Store(old.url)).neighbors(7, 2) == Catalog(Store(new.url)).neighbors(7, 2)
    before = times(old)
    bring(old, 3)
    assert times(old) == before, "nothing is to be done"
    for store in (old, new):
        bring(store, 5)
    assert contents(old) == contents(new)
    assert new.manifest()["graph"]["kept_nodes"] > 0
    assert new.manifest()["format_version"] == 2
    assert verify_store(old).problems == []


def test_anybody_reads_the_table_and_it_tells_rows_nodes_and_tars(tmp_path: Path) -> None:
    store, bring = Store(str(tmp_path / "store")), job(tmp_path, "tars")
    bring(store, 2)
    table = pl.read_parquet(f"{store.url}/shards.parquet")
    assert table.drop("tar_sha256", "tar_bytes").to_dicts() == [
        {
            "shard": f"0000{number}",
            "first_row": 4 * number,
            "samples": 4,
            "first_node": 4 * number,
            "nodes": 4 - number,
            "tar_url": f"{tmp_path}/tars/{number}.tar",
            "tar_name": f"{number}.tar",
        }
        for number in range(2)
    ]
    names = table.filter(pl.col("nodes") > 0)["shard"]
    neighbors = np.concatenate([np.load(f"{store.url}/graph/{name}.neighbors.npy") for name in names])
    np.testing.assert_array_equal(neighbors, SampleGraph.open(store.url).neighbors(np.arange(7))[0])
    tars = [(tmp_path / f"tars/{number}.tar").read_bytes() for number in range(2)]
    assert table["tar_bytes"].to_list() == [len(tar) for tar in tars]
    assert table["tar_sha256"].to_list() == [hashlib.sha256(tar).hexdigest() for tar in tars]


class Reads:
    """What is read of a store's manifest and table: times and bytes, by who reads: the planner or tasks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.tasks = 0
        reader, attempt, who = Store.read_bytes, runner.attempt, ["planner"]

        def read_bytes(store: Store, name: str) -> bytes:
            content = reader(store, name)
            self.count[who[0], name] += 1
            self.bytes[who[0], name] += len(content)
            return content

        def in_a_task(stage: Stage, task: Task, store: Store) -> Any:
            self.tasks += 1
            who[0] = "task"
            try:
                return attempt(stage, task, store)
            finally:
                who[0] = "planner"

        monkeypatch.setattr(Store, "read_bytes", read_bytes)
        monkeypatch.setattr(runner, "attempt", in_a_task)


def test_a_task_reads_the_manifest_once_and_neither_reads_nor_bytes_grow_with_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for shards in (12, 48):
        folder = tmp_path / str(shards)
        folder.mkdir()
        store = Store(str(folder / "store"))
        embed_vectors(folder, store, 10 * shards)
        with monkeypatch.context() as patch:
            reads = Reads(patch)
            run(store, ("index", {"k": 3}), ("export", {}))
        assert reads.tasks >= 4 * shards
        assert reads.count["task", "manifest.json"] <= reads.tasks
        assert reads.count["task", "shards.parquet"] + reads.count["planner", "shards.parquet"] == 1
        a_task = reads.bytes["task", "manifest.json"] / reads.tasks
        found[shards] = (reads.count["planner", "manifest.json"], a_task)
    (few, few_bytes), (many, many_bytes) = found[12], found[48]
    assert many == few
    assert many_bytes < 1.1 * few_bytes


def write_table(store: Store, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Another table, and a manifest that names it as its own."""
    change(pl.read_parquet(f"{store.url}/shards.parquet")).write_parquet(f"{store.url}/shards.parquet")
    content = store.read_bytes("shards.parquet")
    manifest = store.manifest()
    manifest["shards"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(store, manifest)


def test_verify_finds_a_table_that_is_not_what_the_records_tell(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    embed_vectors(tmp_path, store, 30)
    assert verify_store(store).problems == []
    whole = contents(store)
    write_table(store, lambda table: table.with_columns(nodes=pl.Series([10, 9, 11])))
    assert verify_store(store).problems == ["shards.parquet: not the shards that the records in _state/ tell"]
    for name in ("shards.parquet", "manifest.json"):
        store.write_bytes(name, whole[name])
    as_format_version_1(store)
    manifest = store.manifest()
    manifest["shards"][1]["first_row"] += 1
    write_manifest(store, manifest)
    assert verify_store(store).problems == ["manifest.json: not the shards that the records in _state/ tell"]


@pytest.mark.parametrize("damage", [None, b"", b"PAR1"])
def test_a_lost_or_cut_table_is_named_and_written_anew_by_embed(damage: bytes | None, tmp_path: Path) -> None:
    store, bring = Store(str(tmp_path / "store")), job(tmp_path, "vectors")
    bring(store, 3)
    whole = contents(store)
    store.remove("shards.parquet")
    if damage is not None:
        store.write_bytes("shards.parquet", damage)
    shards_of.__globals__["_read"].cache_clear()  # another process
    assert [problem.partition(":")[0] for problem in verify_store(store).problems] == ["shards.parquet"]
    with pytest.raises(StageError, match=r"shards.parquet is .*\n.*graphbuild embed"):
        SampleGraph.open(store.url)
    bring(store, 3)
    assert contents(store) == whole


class CutError(GraphbuildError):
    """The command ends here."""


def test_a_stop_between_table_and_manifest_loses_and_renumbers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tars").mkdir()
    for name in "bd":
        write_tar(tmp_path / f"tars/{name}.tar", [f"{name} one", f"{name} two"])
    straight, stopped = Store(str(tmp_path / "straight")), Store(str(tmp_path / "stopped"))
    for store in (straight, stopped):
        embed_texts(store, tmp_path / "tars")
    for name in "ac":
        write_tar(tmp_path / f"tars/{name}.tar", [f"{name} one", f"{name} two"])
    embed_texts(straight, tmp_path / "tars")

    def cut(store: Store, manifest: Json) -> None:
        if "assign" in manifest["stages"]:
            raise CutError("stopped", "")
        write_manifest(store, manifest)

    monkeypatch.setattr(runner, "write_manifest", cut)
    with pytest.raises(CutError):
        embed_texts(stopped, tmp_path / "tars")
    monkeypatch.undo()
    assert stopped.read_bytes("shards.parquet") == straight.read_bytes("shards.parquet")
    assert stopped.manifest()["shards"]["shards"] == 2, "the manifest is that of before"
    assert verify_store(stopped).problems == []
    for name in records(stopped, "scan"):  # as another template does, which is then stopped as well
        stopped.remove(state_path("scan", name))
    embed_texts(stopped, tmp_path / "tars")
    assert contents(stopped) == contents(straight)
    order = [shard.tar["name"] for shard in shards_of(stopped, stopped.manifest()) if shard.tar]
    assert order == ["b.tar", "d.tar", "a.tar", "c.tar"]


def test_shards_of_six_digits_are_found_through_the_table(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    made = [
        Shard(shard_name(number), 4 * at, 4, 3 * at, 3, None) for at, number in enumerate((99_999, 100_000, 1_000_000))
    ]
    manifest = store.manifest() | write_shards(store, made)
    assert shards_of(store, manifest).names == ["99999", "100000", "1000000"]
    assert list(shards_of(store, manifest)) == made
    assert (manifest["shards"]["samples"], manifest["shards"]["nodes"]) == (12, 9)


THREADS = """
import os, sys

import pyarrow.parquet

from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store

store = Store(sys.argv[1])
manifest, before = store.manifest(), len(os.listdir("/proc/self/task"))
assert len(shards_of(store, manifest)) == 2
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_the_table_is_read_without_threads_that_may_outlive_the_interpreter(tmp_path: Path) -> None:
    """Such a thread aborts a program that ends, now and then, when it frees a Python object."""
    store = Store(str(tmp_path))
    shards = [Shard(shard_name(number), 2 * number, 2, 2 * number, 2, None) for number in range(2)]
    store.write_json("manifest.json", store.manifest() | write_shards(store, shards))
    done = subprocess.run([sys.executable, "-c", THREADS, store.url], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")
