"""Shards: names whose order is that of their numbers, however many there are, and the table of what each holds."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import polars as pl
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from graphbuild import download, scan
from graphbuild.fetched import last_tries
from graphbuild.number import ASSIGN, NUMBER
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner import Runner
from graphbuild.stage import Task, outputs, perform, records, sealed, state_path
from graphbuild.store import Store, Writer, by_number, shard_name

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
        for stage in (scan.STAGE, NUMBER, ASSIGN):
            runner.run(stage, recipe, store)


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
    paths = {output["path"]: output for output in writer.records()}
    for path, output in paths.items():
        record = {"outputs": [output], "facts": {}}
        store.write_json(state_path("download", Path(path).stem), record)
    assert list(outputs(list(records(store, "download").values()))) == [
        f"shards/{name}.parquet" for name in ("00009", "99999", "100000", "100001")
    ]
    assert last_tries(store, ["url"])["key"].to_list() == ["9", "99999", "100000", "100001"]


def test_img2dataset_names_shards_of_six_digits_as_their_tasks_are_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    keys = []
    for number in (99_999, 100_000):
        name = shard_name(number)
        with Writer(store) as writer:
            writer.table(f"_state/urls/{name}.parquet", pa.table({"url": ["http://127.0.0.1:1/x"], "caption": ["x"]}))
        recipe = Recipe().download
        task = Task(stage="download", name=name, settings=recipe.model_dump(), built={}, hints={"threads": 1, **HERE})
        written = [output["path"] for output in perform(download.DOWNLOAD, task, store)["outputs"]]
        assert written == [f"shards/{name}{end}" for end in (".tar", ".parquet", "_stats.json")]
        keys += pl.read_parquet(f"{store.url}/shards/{name}.parquet")["key"].to_list()
    assert [(len(key), int(key) // 10_000) for key in keys] == [(9, 99_999), (10, 100_000)]


HERE = {"host_connections": 1, "allow_private_hosts": True}
