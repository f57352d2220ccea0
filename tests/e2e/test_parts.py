"""Lists in several files: folders, patterns and braces, packed or not, and files that are added."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.errors import ConfigError, InputError
from graphbuild.job.retry import retry_store
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.sources.tables import TableSpec, read_chunks
from graphbuild.store.store import Store
from tests.e2e.test_switches import Picture
from tests.e2e.web import Refusal, serving
from tests.nodes.test_no_vector import column, content

TEXTS = {"part-1": ["one", "two", "three"], "part-2": ["four", "five"], "part-10": ["ten", "one", "seven", "eight"]}


def embed(store: Path, verbs: str = "embed", **settings: Any) -> dict[str, Any]:
    recipe = Recipe(embed=Embed.model_validate({"shard_size": 2, **settings}), index=Index(k=2))
    manifest: dict[str, Any] = {}
    with Runner(workers=0) as runner:
        for verb in verbs.split():
            manifest = run_verb(verb, recipe, Store(str(store)), runner)
    return manifest


def write_part(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"caption": TEXTS[name]}), folder / f"{name}.parquet")


@pytest.mark.parametrize("pattern", ["{folder}", "{folder}/*.parquet", "{folder}/part-{{10,2,1}}.parquet"])
def test_captions_of_many_files_are_one_list_in_the_order_of_their_numbers(
    tmp_path: Path, letters: str, pattern: str
) -> None:
    for name in TEXTS:
        write_part(tmp_path / "list", name)
    embed(tmp_path / "store", encoder=letters, captions=pattern.format(folder=tmp_path / "list"))
    assert column(tmp_path / "store", "samples", "caption") == [text for texts in TEXTS.values() for text in texts]
    assert column(tmp_path / "store", "samples", "key") == [str(row) for row in range(9)]
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "store/samples").iterdir())]
    assert sizes == [2, 1, 2, 2, 2], "no shard is of two files"
    assert verify_store(Store(str(tmp_path / "store"))).problems == []


def test_a_folder_of_one_file_gives_the_bytes_of_that_file(tmp_path: Path, letters: str) -> None:
    write_part(tmp_path / "list", "part-10")
    embed(tmp_path / "folder", encoder=letters, captions=str(tmp_path / "list"))
    embed(tmp_path / "file", encoder=letters, captions=str(tmp_path / "list/part-10.parquet"))
    found, expected = content(tmp_path / "folder"), content(tmp_path / "file")
    assert found.pop("manifest.json") != expected.pop("manifest.json"), "of two recipes"
    assert found == expected


def test_a_file_that_is_added_is_no_change_and_one_that_changed_or_is_gone_is(tmp_path: Path, letters: str) -> None:
    write_part(tmp_path / "list", "part-10")
    store, given = tmp_path / "store", {"encoder": letters, "captions": str(tmp_path / "list")}
    embed(store, "embed index", **given)
    before = {path: path.read_bytes() for name in ("samples", "nodes") for path in (store / name).iterdir()}
    write_part(tmp_path / "list", "part-2")  # before the other by its number, behind it in the store
    manifest = embed(store, "embed index", **given)
    assert {path: path.read_bytes() for path in before} == before
    assert column(store, "samples", "caption") == TEXTS["part-10"] + TEXTS["part-2"]
    assert manifest["graph"]["kept_nodes"] == 4
    assert verify_store(Store(str(store))).problems == []
    pq.write_table(pa.table({"caption": ["another"]}), tmp_path / "list/part-2.parquet")
    with pytest.raises(ConfigError, match=r"captions 2: part-2\.parquet, .* -> part-2\.parquet"):
        embed(store, **given)
    (tmp_path / "list/part-2.parquet").unlink()
    with pytest.raises(ConfigError, match=r"captions 2: part-2\.parquet, .* -> not set"):
        embed(store, **given)


def test_a_dozen_files_keep_their_order_when_more_are_added(tmp_path: Path, letters: str) -> None:
    texts = [
        f"{first} {second}" for first in ("old", "new", "red") for second in ("house", "tree", "dog", "cat", "man")
    ]
    (tmp_path / "list").mkdir()
    store, given = tmp_path / "store", {"encoder": letters, "captions": str(tmp_path / "list")}
    for count in (12, 12, 15):  # twice the same: nothing is a change
        for number in range(count):
            path = tmp_path / f"list/part-{number}.csv"
            if not path.exists():
                path.write_text(f"caption\n{texts[number]}\n")
        embed(store, **given)
        assert column(store, "samples", "caption") == texts[:count]


def test_a_rejected_row_is_named_by_its_file(tmp_path: Path, letters: str) -> None:
    (tmp_path / "list").mkdir()
    (tmp_path / "list/1.csv").write_text('caption\none\n""\n')
    (tmp_path / "list/2.jsonl").write_text('{"caption": "two"}\n{"caption"\n{"caption": "three"}\n{"caption": " "}\n')
    manifest = embed(tmp_path / "store", encoder=letters, captions=str(tmp_path / "list"))
    rows = [
        (row["position"], row["reason"])
        for path in sorted((tmp_path / "store/rejected/scan").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    places = [(position, *reason.rpartition("row ")[1:]) for position, reason in rows]
    assert sorted(places) == [(1, "row ", "1 of 1.csv"), (3, "row ", "1 of 2.jsonl"), (5, "row ", "3 of 2.jsonl")]
    assert sum(manifest["rejected"].values()) == 3
    assert not any("jsonl" in reason for reason in manifest["rejected"]), "counted by what is wrong, not by row"


def test_an_option_that_is_given_again_adds_its_files(
    tmp_path: Path, letters: str, cli: Callable[..., CompletedProcess[str]]
) -> None:
    odd = tmp_path / "a,{1} [v].csv"  # each mark of a pattern
    odd.write_text("caption\nodd\n")
    for name in ("part-2", "part-10"):
        write_part(tmp_path / "list", name)
    files = [odd, tmp_path / "list/*-10.parquet", tmp_path / "list/part-2.parquet"]
    options = [part for path in files for part in ("--captions", path)]
    cli("embed", tmp_path / "store", *options, "--encoder", letters, "--workers", 0)
    assert column(tmp_path / "store", "samples", "caption") == ["odd", *TEXTS["part-2"], *TEXTS["part-10"]]
    cli("embed", tmp_path / "store", "--workers", 0)  # by the store's recipe
    done = cli("download", tmp_path / "other", tmp_path / "x.csv", odd, "--workers", 0, code=2)
    assert "x.csv" in done.stderr
    done = cli("download", tmp_path / "other", odd, odd, "--workers", 0, code=2)
    assert f"URLS: {odd} is named twice" in done.stderr


def zst(text: bytes) -> bytes:
    return bytes(pa.compress(text, codec="zstd", asbytes=True))


def test_parts_may_be_packed_empty_and_of_several_formats(tmp_path: Path, letters: str) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    (folder / "0.csv").write_text("caption\none\ntwo\n")
    (folder / "1.csv.gz").write_bytes(gzip.compress(b"caption\nthree\n"))
    (folder / "2.jsonl.zst").write_bytes(zst(b'{"caption": "four"}\n{"caption": "five"}\n'))
    pq.write_table(pa.table({"caption": pa.array([], pa.string())}), folder / "3.parquet")
    pq.write_table(pa.table({"caption": ["six"]}), folder / "4.parquet")
    (folder / "_SUCCESS").write_text("")
    embed(tmp_path / "store", encoder=letters, captions=str(folder))
    assert column(tmp_path / "store", "samples", "caption") == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize("rows", [1, 50_000])
def test_zstd_is_read_as_what_it_holds_and_damage_is_named(tmp_path: Path, rows: int) -> None:
    text = "caption\n" + "".join(f"caption {number}\n" for number in range(rows))
    path = tmp_path / "list.csv.zst"
    path.write_bytes(zst(text.encode()))
    spec = TableSpec(path=str(path), columns={"caption": "caption"})
    found = [caption for chunk in read_chunks(spec) for caption in chunk.rows["caption"].to_pylist()]
    assert found == [f"caption {number}" for number in range(rows)]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="broken zstd"):
        list(read_chunks(spec))
    path.rename(tmp_path / "list.csv")
    with pytest.raises(InputError, match=r"holds zstd data\s+-> add \.zst"):
        list(read_chunks(TableSpec(path=str(tmp_path / "list.csv"), columns={"caption": "caption"})))


def test_a_column_of_another_type_or_name_in_one_part_is_refused_by_its_file(tmp_path: Path, letters: str) -> None:
    write_part(tmp_path / "list", "part-1")
    pq.write_table(pa.table({"caption": [1.5]}), tmp_path / "list/part-2.parquet")
    with pytest.raises(InputError, match=r"part-2\.parquet: column 'caption' is double, not text"):
        embed(tmp_path / "store", encoder=letters, captions=str(tmp_path / "list"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "list/part-2.parquet")
    with pytest.raises(InputError, match=r"part-2\.parquet has no column 'caption'"):
        embed(tmp_path / "store", encoder=letters, captions=str(tmp_path / "list"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file matches .*empty/\*\.parquet"):
        embed(tmp_path / "store", encoder=letters, captions=str(tmp_path / "empty"))


def test_vectors_of_many_files_are_nodes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(9, 8))
    (tmp_path / "v").mkdir()
    np.save(tmp_path / "v/10.npy", values[5:].astype(np.float32))
    given = {"vectors": str(tmp_path / "v"), "shard_size": 3}
    store = tmp_path / "store"
    embed(store, **given)
    first = {path: path.stat().st_mtime_ns for path in (store / "nodes").iterdir()}
    np.save(tmp_path / "v/2.npy", values[:5])
    embed(store, "embed index", **given)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    order = np.concatenate([values[5:], values[:5]])
    found = np.concatenate([np.load(path) for path in sorted(store.glob("nodes/*.npy"))])
    np.testing.assert_allclose(found, order / np.linalg.norm(order, axis=1, keepdims=True), atol=1e-3)
    assert column(store, "samples", "node") == list(range(9))
    assert verify_store(Store(str(store))).problems == []
    embed(tmp_path / "fresh", **given)
    fresh = np.concatenate([np.load(path) for path in sorted((tmp_path / "fresh").glob("nodes/*.npy"))])
    np.testing.assert_allclose(fresh, values / np.linalg.norm(values, axis=1, keepdims=True), atol=1e-3)
    np.save(tmp_path / "v/11.npy", values[:, :5])
    with pytest.raises(InputError, match=r"mixed length: 8 in .*10\.npy, 5 in .*11\.npy"):
        embed(store, **given)


def test_a_download_fetches_a_file_that_is_added_and_nothing_again(tmp_path: Path, pictures: list[Picture]) -> None:
    asked: list[str] = []

    def serve(path: str) -> bytes:
        asked.append(path)
        return pictures[int(path.strip("/"))][0]

    def download(store: str, urls: Path, **columns: str) -> None:
        settings = {"urls": str(urls), "shard_size": 2, "allow_private_hosts": True, "resize_mode": "no", **columns}
        with Runner(workers=0) as runner:
            run_verb("download", Recipe.model_validate({"download": settings}), Store(str(tmp_path / store)), runner)

    with serving(serve) as base:
        for name, numbers in (("part-10", (0, 1, 2)), ("part-2", (3, 4))):
            (tmp_path / "list").mkdir(exist_ok=True)
            rows = {"url": [f"{base}/{number}" for number in numbers], "caption": [f"c{number}" for number in numbers]}
            pq.write_table(pa.table(rows), tmp_path / f"list/{name}.parquet")
            download("store", tmp_path / "list")
        assert sorted(asked) == [f"/{number}" for number in range(5)]
        status = sorted(path for path in (tmp_path / "store/shards").glob("*.parquet"))
        assert [sorted(pq.read_table(path)["caption"].to_pylist()) for path in status] == [
            ["c0", "c1"],
            ["c2"],
            ["c3", "c4"],
        ]
        # What was written as status is a list again, and what is written of that one too.
        download("again", tmp_path / "store/shards")
        download("third", tmp_path / "again/shards")
        found = [pq.read_table(path) for path in sorted((tmp_path / "third/shards").glob("*.parquet"))]
        assert sorted(caption for table in found for caption in table["caption"].to_pylist()) == [
            "c0",
            "c1",
            "c2",
            "c3",
            "c4",
        ]
        assert {status for table in found for status in table["status"].to_pylist()} == {"success"}
        assert len(set(found[0].column_names)) == len(found[0].column_names)


def test_a_list_whose_urls_were_tried_again_takes_no_further_file(tmp_path: Path, pictures: list[Picture]) -> None:
    (tmp_path / "list").mkdir()
    store = Store(str(tmp_path / "store"))
    settings = {"urls": str(tmp_path / "list"), "allow_private_hosts": True, "resize_mode": "no", "retries": 0}
    recipe = Recipe.model_validate({"download": settings})
    down = True

    def serve(path: str) -> bytes | Refusal:
        return (503, None) if down and path == "/1" else pictures[0][0]

    with serving(serve) as base, Runner(workers=0) as runner:
        pq.write_table(
            pa.table({"url": [f"{base}/0", f"{base}/1"], "caption": ["a", "b"]}), tmp_path / "list/0.parquet"
        )
        run_verb("download", recipe, store, runner)
        down = False
        list(retry_store(store, runner, "passing", {"allow_private_hosts": True}))
        before = sorted(path.name for path in (tmp_path / "store/shards").iterdir())
        pq.write_table(pa.table({"url": [f"{base}/2"], "caption": ["c"]}), tmp_path / "list/1.parquet")
        with pytest.raises(ConfigError, match="URLs were tried again, and 1 files are new in its list"):
            run_verb("download", recipe, store, runner)
    assert sorted(path.name for path in (tmp_path / "store/shards").iterdir()) == before
