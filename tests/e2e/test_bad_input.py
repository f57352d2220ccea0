"""What users of web data meet: every bad input is refused with exit code 2, a message that names the thing and the next
step, and nothing half-written; what is odd but usable comes out unchanged.

Most commands run in this process, through the console script's own entry point; some in a process of their own.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.cli import main

JPEG = b"\xff\xd8 no real image: graphbuild reads captions alone \xff\xd9"
BUILT = ("samples", "nodes", "graph", "shards")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def graphbuild(*arguments: object, encoding: str = "utf-8") -> Outcome:
    """Run a command through `main`, in this process; whatever it raises but SystemExit fails the test."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    argv = ["graphbuild", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
    return Outcome(code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err)))  # type: ignore[attr-defined]


def graphbuild_process(*arguments: object, is_forked: bool = True) -> Outcome:
    """Run a command in a process of its own; is_forked: False starts it as a user's shell would."""
    command = [str(Path(sys.executable).with_name("graphbuild")), *map(str, arguments)]
    if is_forked:
        done = forked.run(command, os.environ, timeout=120)
    else:
        done = subprocess.run(command, capture_output=True, timeout=120, check=False, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def refused(outcome: Outcome, *named: object, code: int = 2) -> None:
    """Exit code, a short message with a next step, each of `named` in it, and no traceback."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("graphbuild: "))
    assert any(line.startswith("  -> ") for line in lines[begin:]), outcome.err
    assert len(lines) <= 8, outcome.err
    for name in named:
        assert str(name) in outcome.err, outcome.err


def succeeded(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def files(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())


def nothing_built(store: Path) -> None:
    """No data file, no temporary file and no record of a finished task that the refused input would be part of."""
    for name in files(store):
        assert name.split("/")[0] not in BUILT, name
        assert not Path(name).name.startswith("."), name
        assert not name.endswith(".tmp"), name
    manifest = store / "manifest.json"
    if manifest.exists():
        assert not {"number", "assign", "encode", "vectors"} & json.loads(manifest.read_text())["stages"].keys()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def table(store: Path, folder: str) -> pa.Table:
    parts = sorted((store / folder).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def column(store: Path, folder: str, name: str) -> list[Any]:
    return table(store, folder)[name].to_pylist()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def captioned(captions: Sequence[str | bytes | None], first: int = 0) -> Iterator[tuple[str, bytes]]:
    """Members of samples 000000, 000001, ...: an image each, and a caption where there is one."""
    for number, caption in enumerate(captions, first):
        yield f"{number:06d}.jpg", JPEG
        if caption is not None:
            yield f"{number:06d}.txt", caption.encode() if isinstance(caption, str) else caption


def write_list(path: Path, content: str | bytes | Mapping[str, Any]) -> Path:
    if isinstance(content, Mapping):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(autouse=True)
def no_temporary_files_stay(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# -- caption lists

BAD_LISTS: dict[str, tuple[str, Any, list[str], list[str]]] = {
    "missing file": ("a.csv", None, [], ["a.csv", "does not exist"]),
    "wrong column": ("a.csv", "id,text,url\n1,x,y\n", [], ["'caption'", "'id', 'text', 'url'", "--caption-column"]),
    "near column": ("a.csv", "id,Caption\n1,x\n", [], ["'Caption'", "--caption-column 'Caption'"]),
    "wrong key column": ("a.csv", "id,caption\n1,x\n", ["--key-column", "key"], ["'key'", "--key-column"]),
    "two columns of the name": ("a.csv", "caption,caption\nx,y\n", [], ["2 columns 'caption'"]),
    "empty": ("a.csv", "", [], ["a.csv", "no rows"]),
    "header alone": ("a.tsv", "caption\turl\n", [], ["a.tsv", "no rows"]),
    "empty jsonl": ("a.jsonl", "", [], ["no rows"]),
    "empty parquet": ("a.parquet", {"caption": pa.array([], pa.string())}, [], ["no rows"]),
    "headerless": ("a.tsv", "a dog\thttp://x/1.jpg\na cat\thttp://x/2.jpg\n", [], ["first line", "--preset cc3m"]),
    "headerless, url first": ("a.tsv", "http://x/1.jpg\ta dog\nhttp://x/2.jpg\ta cat\n", [], ["--preset cc12m"]),
    "preset with a header": ("a.tsv", "caption\turl\nx\thttp://y\n", ["--preset", "cc3m"], ["drop --preset"]),
    "another preset": ("a.tsv", "http://x/1.jpg\ta dog\n", ["--preset", "cc3m"], ["row 0", "--preset cc12m"]),
    "preset of a csv": ("a.csv", "caption\nx\n", ["--preset", "cc3m"], ["a.csv is no TSV", "drop --preset"]),
    "unknown extension": ("a.txt", "caption\nx\n", [], ["unknown extension", ".parquet, .csv"]),
    "gzip without .gz": ("a.csv", gzip.compress(b"caption\nx\n"), [], ["gzip data", ".gz"]),
    "spreadsheet": ("a.csv", b"PK\x03\x04" + bytes(900), [], ["spreadsheet"]),
    "UTF-16": ("a.csv", "caption\nx\n".encode("utf-16"), [], ["UTF-16", "iconv"]),
    "cut gzip": ("a.csv.gz", gzip.compress(b"caption\nx\n")[:-9], [], ["broken gzip"]),
    "cut parquet": ("a.parquet", b"PAR1" + bytes(50), [], ["not parquet"]),
    "no parquet": ("a.parquet", "caption\nx\n", [], ["not parquet"]),
    "no json": ("a.jsonl", "caption: x\n", [], ["JSON"]),
    "integers in parquet": ("a.parquet", {"caption": [1, 2]}, [], ["'caption' is int64, not text"]),
    "lists of numbers in parquet": ("a.parquet", {"caption": [[1], [2]]}, [], ["'caption' is list<", "not text"]),
    "integers in json": ("a.jsonl", '{"caption": 1}\n{"caption": 2}\n', [], ["'caption' is a number, not text"]),
    "folder without lists": ("a.csv", ..., [], ["no file matches", "a.csv/*.parquet"]),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_bad_caption_list_is_refused_before_anything_is_written(tmp_path: Path, store: Path, case: str) -> None:
    name, content, options, named = BAD_LISTS[case]
    if content is ...:
        (tmp_path / name).mkdir()
    elif content is not None:
        write_list(tmp_path / name, content)
    refused(
        graphbuild("embed", store, "--captions", tmp_path / name, "--workers", 0, *options), tmp_path / name, *named
    )
    assert not store.exists()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.csv", "caption\n  \n\t\n\u3000\n", ["no row has a caption", "3 rejected: empty caption"]),
        ("a.parquet", {"caption": pa.array([None, None], pa.string())}, ["no row has a caption", "no caption"]),
        ("a.tsv", "caption\turl\na\tb\tc\nd\n", ["1 rejected: 3 fields instead of 2", "1 fields instead of 2"]),
        ("a.csv.gz", gzip.compress(b"caption\n" + os.urandom(3_000_000).hex().encode())[:-9], ["broken gzip"]),
    ],
)
def test_a_list_without_one_usable_row_builds_nothing(
    tmp_path: Path, store: Path, name: str, content: Any, named: list[str]
) -> None:
    path = write_list(tmp_path / name, content)
    refused(graphbuild("embed", store, "--captions", path, "--workers", 0), path, *named)
    nothing_built(store)


def test_ragged_and_broken_rows_are_kept_with_position_reason_and_content(tmp_path: Path, store: Path) -> None:
    lines = [b"a dog\thttp://x/0", b"no url", b"a cat\thttp://x/2", b"a\tb\tc", b"", b"caf\xe9\thttp://x/5"]
    lines += [b"  \thttp://x/6", b"a dog\thttp://x/7", b'a "quoted" car\thttp://x/8']
    path = write_list(tmp_path / "a.tsv", b"\n".join([b"caption\turl", *lines, b""]))
    out = succeeded(graphbuild("embed", store, "--captions", path, "--workers", 0))
    assert "4 captions -> 3 nodes" in out
    for reason in ("1 rejected: 1 fields instead of 2", "1 rejected: 3 fields", "blank line", "UTF-8", "empty caption"):
        assert reason in out
    rejected = {row["position"]: row for row in table(store, "rejected/scan").to_pylist()}
    assert sorted(rejected) == [1, 3, 4, 5, 6]
    assert rejected[1]["content"] == "no url"
    assert rejected[3]["content"] == "a\tb\tc"
    assert rejected[5]["content"] == "caf\ufffd\thttp://x/5"
    assert column(store, "samples", "key") == ["0", "2", "7", "8"]
    assert column(store, "samples", "node") == [0, 1, 0, 2]
    counts = json.loads((store / "manifest.json").read_text())["stages"]["scan"]["counts"]
    assert counts == {"captions": 4, "rejected": 5, "samples": 4}


def test_reasons_stay_few_however_many_rows_are_broken_in_their_own_way(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"caption": "a dog"}\n' + "".join(f'{{"caption": {" " * n}oops}}\n' for n in range(50)))
    assert "50 rejected: malformed JSON" in succeeded(graphbuild("embed", store, "--captions", path, "--workers", 0))
    members = [("0.txt", b"a dog"), *((f"{n}.json", b" " * n + b"oops") for n in range(1, 40))]
    members += [(f"{n}.txt", b" " * n + b"\xff") for n in range(40, 80)]
    with_images = [member for number, member in enumerate(members) for member in (member, (f"{number}.jpg", JPEG))]
    tar = write_tar(tmp_path / "a.tar", with_images)
    out = succeeded(graphbuild("embed", tmp_path / "store2", "--shards", tar, "--workers", 0))
    assert "39 rejected: member .json is not valid JSON" in out
    assert "40 rejected: member .txt is not UTF-8" in out
    assert len(out.splitlines()) < 6


def test_a_refused_option_is_not_remembered(tmp_path: Path, store: Path) -> None:
    path = write_list(tmp_path / "a.tsv", "caption\turl\na dog\thttp://x/0\na cat\thttp://x/1\n")
    for options in (["--caption-column", "text"], ["--preset", "cc3m"], ["--encoder", "no/such"], ["--template", "x"]):
        refused(graphbuild("embed", store, "--captions", path, "--workers", 0, *options))
    assert "2 captions -> 2 nodes" in succeeded(graphbuild("embed", store, "--captions", path, "--workers", 0))


# -- tars


@pytest.fixture(scope="module")
def good_tar() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", captioned([f"caption number {n}" for n in range(20)]))
        return path.read_bytes()


def cut(length: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:length]


def spoil(place: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


BAD_TARS: dict[str, tuple[str, Callable[[bytes], bytes], list[str]]] = {
    "cut inside a member": ("b.tar", cut(512 * 9 + 20), ["not a whole tar", "'000002.jpg'"]),
    "cut inside a member's padding": ("b.tar", cut(512 * 10 - 20), ["not a whole tar"]),
    "cut at a member's border": ("b.tar", cut(512 * 8), ["not a whole tar"]),
    "cut inside a header": ("b.tar", cut(512 * 8 + 100), ["not a whole tar"]),
    "cut before its first header ends": ("b.tar", cut(100), ["not a whole tar"]),
    "of no bytes": ("b.tar", cut(0), ["not a whole tar"]),
    "with a corrupted header": ("b.tar", spoil(512 * 8 + 5), ["not a whole tar", "byte 4,096"]),
    "with a corrupted first header": ("b.tar", spoil(5), ["not a whole tar"]),
    "joined to another by cat": ("b.tar", lambda content: content + content, ["behind the archive's end"]),
    "an HTML page": ("b.tar", lambda _: b"<!DOCTYPE html><title>404</title>" * 50, ["not a whole tar"]),
    "a cut .tgz": ("b.tgz", lambda content: gzip.compress(content)[:-50], ["cannot be unpacked"]),
    "a .tgz cut in its head": ("b.tgz", lambda content: gzip.compress(content)[:5], ["cannot be unpacked"]),
    "a spoiled .tgz": ("b.tgz", lambda content: spoil(60)(gzip.compress(content)), ["cannot be unpacked"]),
    "a .tgz of a cut tar": ("b.tgz", lambda content: gzip.compress(content[: 512 * 8]), ["not a whole tar"]),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_a_damaged_tar_is_refused_by_name_and_nothing_is_built(
    tmp_path: Path, store: Path, good_tar: bytes, case: str
) -> None:
    name, damage, named = BAD_TARS[case]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(good_tar)
    (tmp_path / "tars" / name).write_bytes(damage(good_tar))
    outcome = graphbuild("embed", store, "--shards", tmp_path / "tars/*.t*", "--workers", 0)
    refused(outcome, tmp_path / "tars" / name, "again", *named)
    assert "a.tar" not in outcome.err.replace(str(tmp_path / "tars" / name), "")
    nothing_built(store)
    (tmp_path / "tars" / name).unlink()  # the next step that the message names
    out = succeeded(graphbuild("embed", store, "--shards", tmp_path / "tars/*.t*", "--workers", 0))
    assert "20 captions -> 20 nodes" in out


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([("0.jpg", JPEG), ("1.jpg", JPEG)], ["none of its 2 samples has a caption", "'.jpg'", "--caption-member"]),
        ([("0.jpg", JPEG), ("0.cls", b"3")], ["'.cls', '.jpg'", "--caption-member"]),
        ([("0.jpg", JPEG), ("0.\x1b[31m", b"")], ["'.\\x1b[31m'"]),
        (captioned(["", " \n", None, "\u3000"]), ["none of its 4 samples", "empty caption"]),
        ([("0.json", b'{"text": "x"}'), ("1.json", b"[]")], ["has no field 'caption'"]),
        ([("0.txt", b"a"), ("0.txt", b"b")], ["two members are '0.txt'", "byte 1,024"]),
        ([("0.txt", b"a"), ("1.txt", b"b"), ("0.jpg", JPEG)], ["key '0' appears twice"]),
        ([*captioned(["text"] * 3_000), ("000000.json", b"{}")], ["key '000000' appears twice"]),
        ([("README", b"nothing here")], ["no sample", "has a caption"]),
        ([], ["no sample", "has a caption", "give tars that hold samples"]),
    ],
)
def test_a_tar_whose_samples_cannot_be_used_is_refused(
    tmp_path: Path, store: Path, members: Iterable[tuple[str, bytes]], named: list[str]
) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    refused(graphbuild("embed", store, "--shards", path, "--workers", 0), *named)
    nothing_built(store)


def test_members_that_no_one_can_read_as_a_caption_are_rejected_each_with_its_reason(
    tmp_path: Path, store: Path
) -> None:
    members = {
        "good.txt": b"a dog",
        "latin.txt": "café".encode("latin-1"),
        "packed.txt.gz": gzip.compress(b"a packed dog"),
        "unpacked.txt.gz": b"a dog",
        "cutpacked.txt.gz": gzip.compress(b"a dog")[:-5],
        "spoiled.txt.gz": gzip.compress(b"a dog")[:10] + b"\xff" * 20,
        "bomb.txt.gz": gzip.compress(bytes(70 << 20)),
        "huge.txt": b"x" * 1_000_001,
        "broken.json": b'{"caption": ',
        "deep.json": b"[" * 100_000,
        "list.json": b"[1]",
        "null.json": b'{"caption": null}',
        "bool.json": b'{"caption": true}',
        "number.json": b'{"caption": 7}',
        "surrogate.json": rb'{"caption": "\ud83d alone"}',
        "digits.json": b'{"caption": ' + b"9" * 5_000 + b"}",
        "bom.txt": b"\xef\xbb\xbfa dog",
        "image.jpg": JPEG,
        "UPPER.TXT": b"A DOG",
    }
    path = write_tar(tmp_path / "a.tar", members.items())
    out = succeeded(graphbuild("embed", store, "--shards", path, "--workers", 0))
    assert "5 captions -> " in out
    rejected = {row["key"]: row for row in table(store, "rejected/scan").to_pylist()}
    reasons = {key: row["reason"] for key, row in rejected.items()}
    assert reasons == {
        "latin": "member .txt is not UTF-8",
        "unpacked": "member .txt.gz cannot be unpacked",
        "cutpacked": "member .txt.gz cannot be unpacked",
        "spoiled": "member .txt.gz cannot be unpacked",
        "bomb": "member .txt.gz unpacks to more than 67,108,864 bytes",
        "huge": "caption over 1,000,000 bytes",
        "broken": "member .json is not valid JSON",
        "deep": "member .json is not valid JSON",
        "list": "member .json has no field 'caption'",
        "null": "json field 'caption' is not a string",
        "bool": "json field 'caption' is not a string",
        "surrogate": "json field 'caption' is not Unicode text",
        "digits": "member .json is not valid JSON",
        "image": "no member .txt or .json",
    }
    assert rejected["latin"]["content"] == "caf\ufffd"
    assert rejected["surrogate"]["content"] == r'{"caption": "\ud83d alone"}'
    assert rejected["huge"]["content"] == "x" * 10_000
    samples = table(store, "samples").to_pylist()
    assert [sample["key"] for sample in samples] == [name.split(".")[0] for name in members]
    for sample in samples:
        assert (sample["node"] is None) == (sample["key"] in rejected)
    captions = {sample["key"]: sample["caption"] for sample in samples if sample["node"] is not None}
    assert captions == {
        "good": "a dog", "packed": "a packed dog", "number": "7", "bom": "a dog", "UPPER": "A DOG"
    }  # fmt: skip


@pytest.fixture(scope="module")
def half_captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of one tar whose samples have captions, or empty ones, or none; two captions are alike."""
    folder = tmp_path_factory.mktemp("half")
    captions = ["a dog", "", "a cat", None, " \t\n", "a  dog\n", "a red car", "\u00a0"]
    path = write_tar(folder / "half.tar", captioned(captions))
    store = folder / "store"
    out = succeeded(graphbuild("embed", store, "--shards", path, "--workers", 0))
    assert "4 captions -> 3 nodes" in out
    assert "3 rejected: empty caption" in out
    assert "1 rejected: no member .txt or .json" in out
    succeeded(graphbuild("index", store, "--k", 2, "--workers", 0))
    assert "4 samples without a usable caption" in succeeded(graphbuild("export", store, "--workers", 0))
    return store


def test_samples_without_a_caption_stay_as_rows_without_a_node(half_captioned: Path) -> None:
    assert column(half_captioned, "samples", "node") == [0, None, 1, None, None, 0, 2, None]
    assert column(half_captioned, "samples", "row") == list(range(8))
    assert column(half_captioned, "samples", "caption") == [
        "a dog",
        "",
        "a cat",
        None,
        " \t\n",
        "a  dog\n",
        "a red car",
        "\u00a0",
    ]
    rejected = table(half_captioned, "rejected/scan").to_pylist()
    assert [(row["position"], row["key"]) for row in rejected] == [(n, f"{n:06d}") for n in (1, 3, 4, 7)]
    sidecar = pq.read_table(half_captioned / "shards/half.graph.parquet")
    assert sidecar["node"].to_pylist() == [0, None, 1, None, None, 0, 2, None]
    assert [row is None for row in sidecar["neighbors"].to_pylist()] == [
        False,
        True,
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    assert "no problems" in succeeded(graphbuild("verify", half_captioned))


def test_captions_of_100_kb_pass_through_whole(tmp_path: Path, store: Path) -> None:
    captions = ["a dog " * 17_000 + "end", "犬" * 34_000, "x" * 100_000, "a dog"]
    path = write_tar(tmp_path / "a.tar", captioned(captions))
    succeeded(graphbuild("embed", store, "--shards", path, "--workers", 0))
    succeeded(graphbuild("index", store, "--k", 3, "--workers", 0))
    succeeded(graphbuild("export", store, "--workers", 0))
    assert column(store, "samples", "caption") == captions
    assert pq.read_table(store / "shards/a.graph.parquet")["caption"].to_pylist() == captions
    lines = succeeded(graphbuild("neighbors", store, "000000")).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 160
    as_list = write_list(tmp_path / "a.parquet", {"caption": captions})
    succeeded(graphbuild("embed", tmp_path / "store2", "--captions", as_list, "--workers", 0))
    assert column(tmp_path / "store2", "samples", "caption") == captions


def test_a_tar_of_no_samples_beside_good_ones_is_a_shard_of_no_rows(
    tmp_path: Path, store: Path, good_tar: bytes
) -> None:
    (tmp_path / "a.tar").write_bytes(good_tar)
    write_tar(tmp_path / "b.tar", [])
    write_tar(tmp_path / "c.tar", captioned(["caption number 3", "one more"], first=90))
    out = succeeded(graphbuild("embed", store, "--shards", tmp_path / "*.tar", "--workers", 0))
    assert "22 captions -> 21 nodes" in out
    succeeded(graphbuild("index", store, "--k", 4, "--workers", 0))
    succeeded(graphbuild("export", store, "--workers", 0))
    sizes = {name: pq.read_table(store / f"shards/{name}.graph.parquet").num_rows for name in "abc"}
    assert sizes == {"a": 20, "b": 0, "c": 2}
    assert json.loads((store / "shards/sizes.json").read_text()) == {"a.tar": 20, "b.tar": 0, "c.tar": 2}
    assert column(store, "samples", "node") == [*range(20), 3, 20]
    assert "no problems" in succeeded(graphbuild("verify", store))


def test_names_in_a_tar_are_keys_and_never_paths(tmp_path: Path, store: Path) -> None:
    outside = tmp_path / "outside"
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    special = {}
    for name, kind in kinds.items():
        info = tarfile.TarInfo(f"{name}.txt")
        info.type, info.linkname = kind, str(tmp_path / "secret")
        special[name] = (info, b"")
    names = [f"{outside}/0.txt", "../../up.txt", "./here.txt", "a/../b.txt", "C:\\x\\y.txt", "~/home.txt", "%2e%2e.txt"]
    tars = tmp_path / "tars"
    tars.mkdir()
    (tmp_path / "secret").write_text("a secret")
    own = [(name, f"text of {name}".encode()) for name in names]
    for name in ("link", "hard"):
        linked = write_tar(tars / "a.tar", [*own, special.pop(name)])
        outcome = graphbuild("embed", tmp_path / "refused", "--shards", linked, "--workers", 0)
        refused(outcome, linked, f"member '{name}.txt' is a", "link to")
    path = write_tar(tars / "a.tar", [*special.values(), *own])
    before = files(tmp_path)
    succeeded(graphbuild("embed", store, "--shards", path, "--workers", 0))
    assert [name for name in files(tmp_path) if not name.startswith("store/")] == before
    assert column(store, "samples", "key") == [name.removesuffix(".txt") for name in names]
    assert "a secret" not in column(store, "samples", "caption")
    succeeded(graphbuild("index", store, "--k", 2, "--workers", 0))
    succeeded(graphbuild("export", store, "--workers", 0))
    assert [name for name in files(tmp_path) if not name.startswith("store/")] == before
    assert succeeded(graphbuild("neighbors", store, "../../up")).startswith("../../up  node 1  text of")


def test_two_tars_of_one_name_are_refused(tmp_path: Path, store: Path, good_tar: bytes) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(good_tar)
    outcome = graphbuild("embed", store, "--shards", tmp_path / "{a,b}/0.tar", "--workers", 0)
    refused(outcome, tmp_path / "a/0.tar", tmp_path / "b/0.tar", "rename")
    assert not store.exists()


@pytest.mark.parametrize("pattern", ["missing.tar", "*.tar", "{0..3", "none/{000..002}.tar", "foo://a.tar", ""])
def test_shards_that_do_not_exist_are_refused(tmp_path: Path, store: Path, pattern: str) -> None:
    where = pattern if "://" in pattern or not pattern else f"{tmp_path}/{pattern}"
    refused(graphbuild("embed", store, "--shards", where, "--workers", 0))
    assert not store.exists()


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([b"0", b"2", b"-1"], "2 rejected: not a class number below 2"),
        ([b"0", b"cat", b"1.0", b"", b"1 \n"], "3 rejected: not a class number below 2"),
        ([b"1", b"0" * 19 + b"99", b"9" * 6_000], "2 rejected: not a class number below 2"),
    ],
)
def test_class_numbers_out_of_range_are_rejected(tmp_path: Path, store: Path, labels: list[bytes], named: str) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes("\ufefftench\r\ngold fish\r\n".encode())
    path = write_tar(tmp_path / "a.tar", [(f"{n}.cls", label) for n, label in enumerate(labels)])
    options = ["--class-names", names, "--caption-member", ".CLS", "--template", "a photo of a {}", "--workers", 0]
    assert named in succeeded(graphbuild("embed", store, "--shards", path, *options))
    texts = set(column(store, "nodes", "text"))
    assert texts <= {"a photo of a tench", "a photo of a gold fish"}
    rejected = table(store, "rejected/scan").to_pylist()
    assert [row["content"] for row in rejected] == [labels[row["position"]].decode()[:10_000] for row in rejected]
    path = write_tar(tmp_path / "b.tar", [("0.cls", b"2"), ("1.cls", b"3")])
    refused(graphbuild("embed", tmp_path / "s2", "--shards", path, *options), "not a class number below 2")
    nothing_built(tmp_path / "s2")


@pytest.mark.parametrize("content", [None, b"", b"tench\n\ngoldfish\n", b"caf\xe9\n", ...])
def test_bad_class_names_are_refused(tmp_path: Path, store: Path, content: Any) -> None:
    names = tmp_path / "names.txt"
    if content is ...:
        names.mkdir()
    elif content is not None:
        names.write_bytes(content)
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"0")])
    options = ["--class-names", names, "--caption-member", "cls"]
    refused(graphbuild("embed", store, "--shards", path, *options, "--workers", 0), names)
    assert not store.exists()


# -- hostile captions


@pytest.fixture(scope="module")
def naughty(shared_data: Path) -> list[str]:
    strings: list[str] = json.loads(gzip.decompress((shared_data / "hostile/naughty_strings.json.gz").read_bytes()))
    assert len(strings) == 515
    return strings


@pytest.fixture(scope="module")
def naughty_store(naughty: list[str], shallow: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every string as a caption of a list, its sha as the key; every node's neighbours are all the others."""
    folder = tmp_path_factory.mktemp("naughty")
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"caption": s, "key": f"k{n}"}) + "\n" for n, s in enumerate(naughty)))
    store = folder / "store"
    nodes = len({by_hand(s) for s in naughty if by_hand(s)})
    options = ["--key-column", "key", "--workers", 0, "--encoder", shallow]
    assert f"-> {nodes} nodes" in succeeded(graphbuild("embed", store, "--captions", path, *options))
    succeeded(graphbuild("index", store, "--k", nodes - 1, "--workers", 0))
    succeeded(graphbuild("export", store, "--workers", 0))
    return store


def by_hand(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption.removeprefix("\ufeff")).split())


def test_hostile_strings_come_back_unchanged_from_a_list(naughty: list[str], naughty_store: Path) -> None:
    usable = [string for string in naughty if by_hand(string)]
    assert column(naughty_store, "samples", "caption") == usable
    texts = column(naughty_store, "nodes", "text")
    assert texts == list(dict.fromkeys(map(by_hand, usable)))
    assert [texts[node] for node in column(naughty_store, "samples", "node")] == list(map(by_hand, usable))
    sidecars = sorted((naughty_store / "shards").glob("*.graph.parquet"))
    assert [c for path in sidecars for c in pq.read_table(path)["caption"].to_pylist()] == usable
    assert len(table(naughty_store, "rejected/scan")) == len(naughty) - len(usable)
    assert "no problems" in succeeded(graphbuild("verify", naughty_store))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tar"])
def test_hostile_strings_come_back_unchanged_from_csv_and_from_tars(
    naughty: list[str], naughty_store: Path, shallow: str, tmp_path: Path, store: Path, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, captioned(naughty))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["caption", "number"], *([s, n] for n, s in enumerate(naughty))])
    source = "--shards" if kind == "tar" else "--captions"
    succeeded(graphbuild("embed", store, source, path, "--workers", 0, "--encoder", shallow))
    captions = column(store, "samples", "caption")
    in_tar = [string.removeprefix("\ufeff") for string in naughty]  # a member's byte order mark is none of its text
    assert captions == (in_tar if kind == "tar" else [string for string in naughty if by_hand(string)])
    assert column(store, "nodes", "text") == column(naughty_store, "nodes", "text")


def test_no_control_character_of_a_caption_reaches_the_terminal(naughty: list[str], naughty_store: Path) -> None:
    printed = succeeded(graphbuild("neighbors", naughty_store, "k1", "--count", 1_000))
    nodes = len(column(naughty_store, "nodes", "text"))
    assert len(printed.splitlines()) == nodes  # the sample and all other nodes, a line each
    wild = [n for n, string in enumerate(naughty) if by_hand(string) and not string.isprintable()]
    assert len(wild) > 10
    for number in wild:
        printed += succeeded(graphbuild("neighbors", naughty_store, f"k{number}", "--count", 1))
    assert all(character == "\n" or character.isprintable() for character in printed)


def test_keys_and_texts_with_control_characters_are_printed_harmlessly(tmp_path: Path, store: Path) -> None:
    key = "\x1b]0;owned\x07\x1b[2J"
    path = write_tar(tmp_path / "a.tar", [(f"{key}.txt", b"a dog\r\x1b[1A"), ("b.txt", b"a cat"), ("c.txt", b"a cow")])
    succeeded(graphbuild("embed", store, "--shards", path, "--workers", 0))
    succeeded(graphbuild("index", store, "--k", 1, "--workers", 0))
    for outcome in (graphbuild("neighbors", store, key), graphbuild("neighbors", store, f"{key} missing")):
        printed = outcome.out + outcome.err
        assert all(character == "\n" or character.isprintable() for character in printed), printed


def test_a_terminal_that_does_not_know_a_character_gets_its_escape(naughty_store: Path, naughty: list[str]) -> None:
    key = next(n for n, string in enumerate(naughty) if "田中" in string)
    outcome = graphbuild("neighbors", naughty_store, f"k{key}", encoding="latin-1")
    assert "\\u7530\\u4e2d" in succeeded(outcome)


# -- neighbors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["missing"], ["no sample", "'missing'"]),
        (["000001"], ["'000001' has no usable caption", "rejected/scan"]),
        ([], ["give a KEY, --text or --node"]),
        (["000000", "--text", "x"], ["give a KEY, --text or --node"]),
        (["--text", " \n"], ["--text", "empty caption"]),
        (["--text", "\udcff"], ["--text", "surrogate"]),
    ],
)
def test_a_question_that_has_no_answer_is_refused(half_captioned: Path, arguments: list[str], named: list[str]) -> None:
    refused(graphbuild("neighbors", half_captioned, *arguments), *named)


def test_a_text_finds_the_node_it_normalises_to(half_captioned: Path) -> None:
    found = succeeded(graphbuild("neighbors", half_captioned, "--text", "  a\tred\ncar ", "--count", 1))
    assert found.split() == ["1.000", "node", "2", "1", "sample:", "000006", "a", "red", "car"]


def test_a_key_of_several_samples_is_told(tmp_path: Path, store: Path) -> None:
    path = write_list(tmp_path / "a.csv", "caption,id\na dog,x\na cat,x\na cow,y\n")
    succeeded(graphbuild("embed", store, "--captions", path, "--key-column", "id", "--workers", 0))
    succeeded(graphbuild("index", store, "--k", 1, "--workers", 0))
    refused(graphbuild("neighbors", store, "x"), "2 samples have the key 'x'", "row 0", "row 1", "--text")


# -- stores, options, recipes


def test_a_store_of_another_format_version_is_refused_and_untouched(half_captioned: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name, content in snapshot(half_captioned).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    (store / "recipe.yaml").write_text("from_the_future: {}\n")
    before = snapshot(store)
    captions = write_list(tmp_path / "a.csv", "caption\nx\n")
    for arguments in (
        ["embed", store, "--captions", captions],
        ["embed", store, "--force"],
        ["index", store],
        ["export", store],
        ["neighbors", store, "000000"],
        ["neighbors", store, "--text", "a dog"],
        ["verify", store],
    ):
        refused(graphbuild(*arguments), store / "manifest.json", "format version 3", "new folder")
    assert snapshot(store) == before


STORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda folder: folder / "file", "is a file"),
    "below a file": (lambda folder: folder / "file/store", "is a file"),
    "far below a file": (lambda folder: folder / "file/a/b/c", "is a file"),
    "in /proc": (lambda folder: "/proc/graphbuild-store", "cannot write to the store"),
    "empty": (lambda folder: "", "STORE is empty"),
    "of an unknown protocol": (lambda folder: "nosuch://bucket/store", "nosuch"),
    "too long": (lambda folder: folder / ("x" * 300), "x" * 300),
}


@pytest.mark.parametrize("case", STORES)
def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path, case: str) -> None:
    if case == "in /proc" and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    place, named = STORES[case]
    (tmp_path / "file").write_text("a file of the user's")
    captions = write_list(tmp_path / "a.csv", "caption\na dog\na cat\n")
    vectors = tmp_path / "v.npy"
    np.save(vectors, np.eye(4, dtype=np.float32))
    before = snapshot(tmp_path)
    refused(graphbuild("embed", place(tmp_path), "--captions", captions, "--workers", 0), named, "folder")
    refused(graphbuild("embed", place(tmp_path), "--vectors", vectors, "--workers", 0), named, "folder")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("verb", "named"),
    [
        (["index"], "graphbuild embed"),
        (["export"], "graphbuild index"),
        (["neighbors", "key"], "graphbuild index"),
        (["neighbors", "--text", "x"], "graphbuild index"),
        (["verify"], "run a stage first"),
        (["embed"], "graphbuild download"),
    ],
)
def test_a_verb_before_its_turn_names_the_one_to_run_first(store: Path, verb: list[str], named: str) -> None:
    refused(graphbuild(verb[0], store, *verb[1:]), store, named)
    assert not store.exists()


def test_export_before_index_names_index(tmp_path: Path, store: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(4, dtype=np.float32))
    succeeded(graphbuild("embed", store, "--vectors", tmp_path / "v.npy", "--workers", 0))
    before = snapshot(store)
    refused(graphbuild("export", store, "--workers", 0), "graphbuild index")
    assert snapshot(store) == before


SOURCES = {"--shards": "a.tar", "--captions": "a.csv", "--vectors": "a.npy"}


@pytest.mark.parametrize("pair", [("--shards", "--captions"), ("--captions", "--vectors")])
def test_two_sources_at_once_are_refused(store: Path, pair: tuple[str, str]) -> None:
    outcome = graphbuild("embed", store, *(part for option in pair for part in (option, SOURCES[option])))
    refused(outcome, f"{pair[0][2:]} and {pair[1][2:]} exclude each other")
    assert not store.exists()


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "", "{0}"])
def test_a_template_without_one_place_for_the_caption_is_refused(tmp_path: Path, store: Path, template: str) -> None:
    captions = write_list(tmp_path / "a.csv", "caption\nx\n")
    refused(graphbuild("embed", store, "--captions", captions, "--template", template), "--template", "{} once")
    assert not store.exists()


def test_an_encoder_that_cannot_be_loaded_is_refused_in_seconds(tmp_path: Path, store: Path) -> None:
    captions = write_list(tmp_path / "a.csv", "caption\nx\ny\n")
    begin = time.monotonic()
    arguments = ("embed", store, "--captions", captions, "--encoder", "graphbuild-tests/no-such-model")
    outcome = graphbuild_process(*arguments, is_forked=False)
    refused(outcome, "'graphbuild-tests/no-such-model'", "--encoder")
    assert time.monotonic() - begin < 30
    assert not store.exists()


ENCODERS: dict[str, dict[str, bytes]] = {
    "an empty folder": {},
    "pickled weights": {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."},
    "cut weights": {"config.json": b"{}", "model.safetensors": b"\xff\x00\x00\x00\x00\x00\x00\x00{"},
    "empty weights": {"config.json": b"{}", "model.safetensors": b""},
    "weights alone": {"model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}"},
}


@pytest.mark.parametrize("case", ENCODERS)
def test_a_folder_that_holds_no_encoder_is_refused(tmp_path: Path, store: Path, case: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, content in ENCODERS[case].items():
        (model / name).write_bytes(content)
    captions = write_list(tmp_path / "a.csv", "caption\nx\ny\n")
    refused(graphbuild("embed", store, "--captions", captions, "--encoder", model, "--workers", 0), model)
    assert not store.exists()


@pytest.mark.parametrize("name", ["", "../up", "a b", "a/b/c", "https://x/y", "x" * 500, "é/ü"])
def test_a_name_that_no_encoder_can_have_is_refused(tmp_path: Path, store: Path, name: str) -> None:
    captions = write_list(tmp_path / "a.csv", "caption\nx\ny\n")
    refused(graphbuild("embed", store, "--captions", captions, "--encoder", name, "--workers", 0), "encoder")
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["embed", "s", "--nosuch"], "--nosuch"),
        (["embed", "s", "--caption", "x"], "--captions"),
        (["index", "s", "--k", "many"], "--k"),
        (["index", "s", "--device", "tpu"], "--device"),
        (["embed", "s", "--workers", "-1"], "--workers"),
        (["embed"], "STORE"),
        (["embed", "s", "--shards", "0.tar", "1.tar"], "Quote patterns"),
        (["nosuch"], "nosuch"),
    ],
)
def test_unknown_verbs_and_options_are_usage_errors(arguments: list[str], named: str) -> None:
    outcome = graphbuild(*arguments)
    assert outcome.code == 2
    assert "Usage: " in outcome.err
    assert named in outcome.err
    assert not Path("s").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["index", "--k", "-1"], "--k"),
        (["index", "--k", "3000"], "--k"),
        (["index", "--min-recall", "2"], "--min-recall"),
        (["download", "x.csv", "--shard-size", "0"], "--shard-size"),
        (["download", "x.csv", "--timeout-seconds", "-1"], "--timeout-seconds"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_option(store: Path, arguments: list[str], named: str) -> None:
    refused(graphbuild(arguments[0], store, *arguments[1:]), named)
    assert not store.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("embed: [\n", "YAML"),
        ("embed:\n  captions: a.csv\n  caption_colum: x\n", "embed.caption_colum: no such setting"),
        ("embeds:\n  captions: a.csv\n", "embeds: no such setting"),
        ("index: {k: many}\n", "index.k"),
        ("embed: a.csv\n", "embed: "),
        ("embed: {captions: a.csv, shards: b.tar}\n", "exclude each other"),
        (b"\xff\xfe\x00\x01", "YAML"),
        (None, "there is no recipe"),
    ],
)
def test_a_bad_recipe_is_refused_by_naming_file_and_field(
    tmp_path: Path, store: Path, content: str | bytes | None, named: str
) -> None:
    recipe = tmp_path / "job.yaml"
    if content is not None:
        write_list(recipe, content)
    refused(graphbuild("run", recipe, store, "--workers", 0), recipe, named)
    assert not store.exists()


def test_a_recipe_runs_and_its_settings_come_into_the_store(tmp_path: Path, store: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(9, 4)))
    recipe = write_list(tmp_path / "job.yaml", f"embed: {{vectors: {tmp_path}/v.npy}}\nindex: {{k: 8}}\n")
    out = succeeded(graphbuild("run", recipe, store, "--workers", 0))
    assert "72 edges, k = 8" in out
    assert "k: 8" in (store / "recipe.yaml").read_text()


# -- ready vectors


def float_lists(rows: list[Any], kind: pa.DataType | None = None) -> dict[str, pa.Array]:
    return {"embedding": pa.array(rows, kind or pa.list_(pa.float32()))}


def npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


ROWS = np.random.default_rng(3).normal(size=(20, 8))


def with_row(number: int, value: float) -> np.ndarray[Any, Any]:
    values = ROWS.astype(np.float32)
    values[number] = value
    return values


BAD_VECTORS: dict[str, tuple[str, Any, list[str]]] = {
    "missing": ("v.npy", None, ["does not exist"]),
    "cut": ("v.npy", npy(ROWS)[:-9], ["not a whole .npy"]),
    "cut in its header": ("v.npy", npy(ROWS)[:30], ["not a whole .npy"]),
    "of no bytes": ("v.npy", b"", ["not a whole .npy"]),
    "no .npy at all": ("v.npy", b"caption\nx\n", ["not a whole .npy"]),
    "one-dimensional": ("v.npy", npy(ROWS[0]), ["float64 [8]", "[n, d]"]),
    "three-dimensional": ("v.npy", npy(ROWS.reshape(2, 10, 8)), ["float64 [2, 10, 8]"]),
    "a scalar": ("v.npy", npy(np.float32(1)), ["float32 []"]),
    "integer": ("v.npy", npy(np.ones((20, 8), np.int64)), ["int64 [20, 8]", "float array"]),
    "complex": ("v.npy", npy(ROWS.astype(np.complex64)), ["complex64"]),
    "text": ("v.npy", npy(np.array([["a", "b"]])), ["float array"]),
    "pickled": ("v.npy", npy(np.array([[1.0, object()]], object), allow_pickle=True), ["not a whole .npy"]),
    "no rows": ("v.npy", npy(ROWS[:0]), ["no vectors"]),
    "no columns": ("v.npy", npy(ROWS[:, :0]), ["[20, 0]"]),
    "a NaN": ("v.npy", npy(with_row(13, np.nan)), ["row 13 holds NaN"]),
    "an infinity": ("v.npy", npy(with_row(7, -np.inf)), ["row 7 holds NaN or infinity"]),
    "a zero row": ("v.npy", npy(with_row(19, 0)), ["row 19 is a zero vector"]),
    "numbers too large": ("v.npy", npy(np.full((3, 4), 1e200)), ["row 0 is too long"]),
    "an archive": ("v.npz", npy(ROWS), ["v.npz is no .npz file"]),
    "torch": ("v.pt", b"PK\x03\x04" + bytes(900), ["v.pt is neither .npy nor parquet"]),
    "missing column": ("v.parquet", {"vec": [1.0], "x": ["a"]}, ["no column 'embedding'", "'vec', 'x'"]),
    "a column of text": ("v.parquet", {"embedding": ["[1, 2]"]}, ["'embedding' is string", "lists of floats"]),
    "a column of numbers": ("v.parquet", {"embedding": [1.0, 2.0]}, ["'embedding' is double"]),
    "lists of integers": ("v.parquet", {"embedding": [[1, 2], [3, 4]]}, ["list<element: int64>"]),
    "lists of text": ("v.parquet", {"embedding": [["a"], ["b"]]}, ["lists of floats"]),
    "lists of mixed length": ("v.parquet", float_lists([[1, 2]] * 9 + [[1, 2, 3]]), ["row 9", "3 numbers, not 2"]),
    "a missing list": ("v.parquet", float_lists([[1, 2], None, [3, 4]]), ["row 1", "no vector"]),
    "a missing first list": ("v.parquet", float_lists([None, [3, 4]]), ["row 0", "no vector"]),
    "a missing fixed list": (
        "v.parquet",
        float_lists([[1, 2], None], pa.list_(pa.float32(), 2)),
        ["row 1", "no vector"],
    ),
    "empty lists": ("v.parquet", float_lists([[], []]), ["row 0", "no vector"]),
    "a null in a list": ("v.parquet", float_lists([[1, 2], [3, None]]), ["row 1 holds NaN"]),
    "empty parquet": ("v.parquet", float_lists([]), ["no vectors"]),
    "cut parquet": ("v.parquet", b"PAR1" + bytes(99), ["neither .npy nor parquet"]),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_bad_vectors_are_refused_with_their_row_and_nothing_is_built(tmp_path: Path, store: Path, case: str) -> None:
    name, content, named = BAD_VECTORS[case]
    if content is not None:
        write_list(tmp_path / name, content)
    refused(graphbuild("embed", store, "--vectors", tmp_path / name, "--workers", 0), tmp_path / name, *named)
    nothing_built(store)


def test_a_spoiled_page_of_parquet_vectors_is_refused(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table(float_lists(ROWS.tolist())), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[40:200] = b"\xff" * 160
    path.write_bytes(content)
    refused(graphbuild("embed", store, "--vectors", path, "--workers", 0), path, "damaged")
    nothing_built(store)


def test_a_bad_row_is_named_by_its_number_in_the_file_whatever_the_shards(tmp_path: Path, store: Path) -> None:
    np.save(tmp_path / "v.npy", with_row(13, np.nan))
    recipe = write_list(
        tmp_path / "job.yaml", f"embed: {{vectors: {tmp_path}/v.npy, shard_size: 6}}\nindex: {{k: 3}}\n"
    )
    refused(graphbuild("run", recipe, store, "--workers", 0), "1 task failed", "row 13 holds NaN")
    assert not (store / "manifest.json").exists()  # two of three shards are there, but nothing may build on them
    np.save(tmp_path / "v.npy", with_row(13, 1))
    refused(graphbuild("run", recipe, store, "--workers", 0), "built differently", "vectors: v.npy", "--force")
    succeeded(graphbuild("run", recipe, store, "--workers", 0, "--force"))
    assert "no problems" in succeeded(graphbuild("verify", store))


def stored_neighbors(store: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    parts = sorted((store / "graph").glob("*.neighbors.npy"))
    similarities = sorted((store / "graph").glob("*.similarities.npy"))
    return np.concatenate([np.load(p) for p in parts]), np.concatenate([np.load(p) for p in similarities])


def true_neighbors(vectors: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """By float64 brute force on the stored vectors: larger float32 similarity first, ties by smaller id, no self."""
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    similarities = np.einsum("id,jd->ij", exact, exact).astype(np.float32)
    ids = np.arange(len(exact))
    lists = np.stack([np.lexsort((ids, -row))[np.lexsort((ids, -row)) != n][:k] for n, row in enumerate(similarities)])
    return lists, np.take_along_axis(similarities, lists, axis=1)


def few_repeats() -> np.ndarray[Any, Any]:
    draw = np.random.default_rng(5)
    values = draw.normal(size=(200, 16))
    values[draw.choice(200, 60, replace=False)] = values[draw.choice(200, 60)]
    return values


@pytest.mark.parametrize(
    ("values", "k"),
    [
        (ROWS, 19),
        (ROWS.astype(np.float32), 5),
        (ROWS.astype(">f4"), 5),
        (np.asfortranarray(ROWS), 5),
        (ROWS.astype(np.float16) * np.float16(100), 5),
        (np.ones((50, 8)), 10),
        (np.ones((50, 8)), 49),
        (few_repeats(), 20),
        (np.repeat(np.eye(4), 30, axis=0), 40),
        (np.vstack([ROWS, -ROWS, ROWS * 1e-3]), 30),
        (np.eye(2), 1),
    ],
)
def test_odd_vectors_give_exact_lists_with_ties_by_smaller_id(
    tmp_path: Path, store: Path, values: np.ndarray[Any, Any], k: int
) -> None:
    np.save(tmp_path / "v.npy", values)
    succeeded(graphbuild("embed", store, "--vectors", tmp_path / "v.npy", "--workers", 0))
    succeeded(graphbuild("index", store, "--k", k, "--workers", 0))
    stored = np.concatenate([np.load(path) for path in sorted((store / "nodes").glob("*.npy"))])
    given = values.astype(np.float64)
    np.testing.assert_allclose(stored, given / np.linalg.norm(given, axis=1, keepdims=True), atol=1e-3)
    neighbors, similarities = stored_neighbors(store)
    expected, exact = true_neighbors(stored, k)
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_array_equal(similarities, exact.astype(np.float16))
    succeeded(graphbuild("export", store, "--workers", 0))
    assert "no problems" in succeeded(graphbuild("verify", store))


def test_parquet_vectors_are_those_of_npy(tmp_path: Path, store: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS)
    succeeded(graphbuild("embed", store, "--vectors", tmp_path / "v.npy", "--workers", 0))
    kinds = [pa.list_(pa.float64()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 8)]
    for number, kind in enumerate(kinds):
        pq.write_table(pa.table({"v": pa.array(ROWS.tolist(), kind)}), tmp_path / "v.parquet", row_group_size=7)
        other = tmp_path / f"store{number}"
        options = ["--vector-column", "v", "--workers", 0]
        succeeded(graphbuild("embed", other, "--vectors", tmp_path / "v.parquet", *options))
        assert (other / "nodes/00000.npy").read_bytes() == (store / "nodes/00000.npy").read_bytes()


@pytest.mark.parametrize(("rows", "k", "named"), [(5, 5, "--k 4"), (5, 64, "--k 4"), (1, 1, "two different captions")])
def test_a_k_that_the_nodes_cannot_fill_is_refused_with_the_largest_that_they_can(
    tmp_path: Path, store: Path, rows: int, k: int, named: str
) -> None:
    np.save(tmp_path / "v.npy", ROWS[:rows])
    succeeded(graphbuild("embed", store, "--vectors", tmp_path / "v.npy", "--workers", 0))
    before = snapshot(store)
    refused(graphbuild("index", store, "--k", k, "--workers", 0), f"--k {k}", f"{rows} node", named)
    assert snapshot(store) == before


def test_ready_vectors_have_no_encoder_for_a_text(tmp_path: Path, store: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS)
    succeeded(graphbuild("embed", store, "--vectors", tmp_path / "v.npy", "--workers", 0))
    succeeded(graphbuild("index", store, "--k", 2, "--workers", 0))
    refused(graphbuild("neighbors", store, "--text", "a dog"), "ready vectors", "--node")
    refused(graphbuild("neighbors", store, "3"), "no keys", "--node")
    assert "(no text)" in succeeded(graphbuild("neighbors", store, "--node", "3"))


# -- as a process of its own


@pytest.mark.slow
def test_a_process_says_the_same_and_shows_no_traceback(tmp_path: Path, store: Path, good_tar: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(good_tar)
    (tmp_path / "b.tar").write_bytes(good_tar[:5_000])
    for workers in (0, 1):
        arguments = ("embed", store, "--shards", tmp_path / "*.tar", "--workers", workers)
        outcome = graphbuild_process(*arguments, is_forked=workers == 1)
        refused(outcome, tmp_path / "b.tar", "not a whole tar", "1 FAILED", "fetch or write it again")
        nothing_built(store)
    outcome = graphbuild_process("embed", store, "--captions", tmp_path / "missing.csv")
    refused(outcome, tmp_path / "missing.csv", "does not exist")
    outcome = graphbuild_process("embed", tmp_path / "a.tar/store", "--captions", tmp_path / "missing.csv")
    refused(outcome, tmp_path / "a.tar")
