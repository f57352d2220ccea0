"""Hostile text and tars through the whole job: every string is a node or rejected with its reason, nothing is written
outside the store, no control character reaches the terminal, and what cannot be used is refused by name and place.

Single damaged lists and tars: test_bad_input.py, tests/sources/test_tars.py.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.cli import main
from graphbuild.look.catalog import printable
from graphbuild.torch import graph_webdataset

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Picture = tuple[bytes, str]
K = 5


@pytest.fixture
def cli() -> Cli:
    """`graphbuild ARGUMENTS` through the console script's entry point, but in this process: a second less each."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = ["graphbuild", *map(str, arguments)]
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                found = 0
            except SystemExit as ending:
                found = int(ending.code or 0)
        printed = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        assert found == code, printed
        return subprocess.CompletedProcess(command, found, *printed)

    return run


@pytest.fixture(scope="module")
def strings(shared_data: Path) -> list[str]:
    found: list[str] = json.loads(gzip.decompress((shared_data / "hostile/naughty_strings.json.gz").read_bytes()))
    assert len(found) == 515
    return found


def by_hand(caption: str) -> str:
    """What docs/reference/format.md says of a node's text."""
    return " ".join(unicodedata.normalize("NFC", caption.removeprefix("\ufeff")).split())


def rows(store: Path, folder: str, *columns: str) -> list[dict[str, Any]]:
    parts = sorted((store / folder).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part, columns=list(columns) or None).to_pylist()]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tame(*texts: str) -> None:
    """Fail when something printed could steer a terminal."""
    for text in texts:
        assert all(c == "\n" or c.isprintable() for c in text), [c for c in text if not c.isprintable()][:5]
        assert "Traceback" not in text


# -- captions


@pytest.mark.parametrize(
    "way", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("parquet", "jsonl")), "tars"]
)
def test_every_hostile_string_becomes_a_node_or_is_rejected_and_the_whole_job_goes_on(
    way: str, strings: list[str], pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    jpeg = pictures[0][0]
    if way == "tars":
        for part in range(3):
            mine = [(n, string) for n, string in enumerate(strings) if n % 3 == part]
            members = [m for n, s in mine for m in ((f"{n:04d}.jpg", jpeg), (f"{n:04d}.txt", s.encode()))]
            write_tar(tmp_path / f"{part}.tar", members)
        source: list[object] = ["--shards", f"{tmp_path}/{{0,1,2}}.tar"]
        order = sorted(range(len(strings)), key=lambda n: (n % 3, n))
    elif way == "jsonl":
        lines = [json.dumps({"caption": s, "key": f"{n:04d} {s}"}) + "\n" for n, s in enumerate(strings)]
        (tmp_path / "a.jsonl").write_text("".join(lines))
        source, order = ["--captions", tmp_path / "a.jsonl", "--key-column", "key"], list(range(len(strings)))
    else:
        pq.write_table(pa.table({"caption": strings}), tmp_path / "a.parquet")
        source, order = ["--captions", tmp_path / "a.parquet"], list(range(len(strings)))
    usable = [strings[n] for n in order if by_hand(strings[n])]
    done = [cli("embed", store, *source, "--workers", 0), cli("index", store, "--k", K, "--workers", 0)]
    done += [cli("export", store, "--workers", 0)]

    texts = [row["text"] for row in rows(store, "nodes", "text")]
    assert texts == list(dict.fromkeys(map(by_hand, usable)))
    samples = rows(store, "samples", "key", "node", "caption")
    named = [sample for sample in samples if sample["node"] is not None]
    assert [sample["caption"] for sample in named] == usable
    assert [texts[sample["node"]] for sample in named] == list(map(by_hand, usable))
    rejected = rows(store, "rejected/scan")
    assert Counter(row["reason"] for row in rejected) == {"empty caption": len(strings) - len(usable)}
    assert len(named) + len(rejected) == len(strings)
    assert len(samples) == (len(strings) if way == "tars" else len(usable))
    if way == "jsonl":
        assert [s["key"] for s in named] == [f"{n:04d} {strings[n]}" for n in order if by_hand(strings[n])]
    sidecars = [pq.read_table(path).to_pylist() for path in sorted((store / "shards").glob("*.graph.parquet"))]
    assert [row["caption"] for part in sidecars for row in part if row["node"] is not None] == usable

    done += [cli("mine", store, "--what", "duplicates", "--threshold", 0.9)]
    done += [cli("mine", store, "--what", "hard-negatives", "--count", 2)]
    assert pq.read_metadata(store / "mined/hard-negatives.parquet").num_rows > 0
    wildest = max(named, key=lambda sample: sum(not c.isprintable() for c in sample["caption"]))
    done += [cli("neighbors", store, wildest["key"])]
    assert printable(wildest["caption"]) in done[-1].stdout
    done += [cli("verify", store)]
    assert "no problems" in done[-1].stdout
    for command in done:
        tame(command.stdout, command.stderr)
    if way == "tars":
        dataset = graph_webdataset(str(tmp_path / "{0..2}.tar"), batch_size=64, sidecars=store / "shards", shuffle=0)
        assert [caption for batch in dataset for caption in batch["caption"]] == usable


# -- tars


def test_member_names_reach_no_file_and_no_terminal_in_any_layout(
    pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    keys = [
        "/etc/cron.d/x",
        "../../up",
        "a/../../b",
        "~/.ssh/id",
        "C:\\x",
        "a\nb",
        "\x1b]0;owned\x07\x1b[2J",
        "\u202eexe",
    ]
    keys += ["$(touch owned)", "`touch owned`", "; rm -rf x", "-rf", "%s%n", "<script>", "k" * 150, " ", "\u200b", "犬"]
    work = tmp_path / "work"
    work.mkdir()
    members = [
        m
        for key, (jpeg, text) in zip(keys, pictures, strict=False)
        for m in ((f"{key}.jpg", jpeg), (f"{key}.txt", f"{text} \x1b[31m{key}".encode()))
    ]
    tar = write_tar(work / "a.tar", members)
    store = work / "store"
    done = [cli("embed", store, "--shards", tar, "--workers", 0), cli("index", store, "--k", K, "--workers", 0)]
    done += [cli("export", store, "--workers", 0)]
    for layout in (["inline"], ["clustered", "--chunk", 4]):
        done += [cli("export", store, "--layout", *layout, "--workers", 0)]
    done += [cli("verify", store), *(cli("neighbors", store, key) for key in (keys[1], keys[6]))]
    done += [cli("neighbors", store, "\x1b[2J no such key", code=2)]
    for command in done:
        tame(command.stdout, command.stderr)
    assert "no problems" in done[5].stdout
    assert {path.name for path in work.iterdir()} == {"a.tar", "store"}
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    folders = {"shards", "samples", "nodes", "graph", "inline", "clustered", "_state", "manifest.json", "recipe.yaml"}
    folders.add("shards.parquet")
    assert {path.name for path in store.iterdir()} == folders
    assert [row["key"] for row in rows(store, "samples", "key")] == keys
    with tarfile.open(store / "inline/a.tar") as archive:
        kept = {name: archive.extractfile(name).read() for name, _ in members}  # type: ignore[union-attr]
    assert kept == dict(members)
    with tarfile.open(store / "clustered/00000.tar") as archive:
        assert all(member.name[:12].isdigit() for member in archive)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


REST = bytes(1_024)
SMALL = header("0.txt", 5) + b"a dog".ljust(512, b"\0")
REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "8 GB declared": (SMALL + header("1.jpg", 8 << 30) + REST, ["not a whole tar", "'1.jpg'"]),
    "8 GB of a name declared": (SMALL + header("x", 8 << 30, tarfile.GNUTYPE_LONGNAME) + REST, ["not a whole tar"]),
    "8 GB of attributes declared": (SMALL + header("x", 8 << 30, tarfile.XHDTYPE) + REST, ["not a whole tar"]),
    "a sparse file": (SMALL + header("1.npy", 0, tarfile.GNUTYPE_SPARSE) + REST, ["'1.npy'", "sparse"]),
    "a name that is not UTF-8": (SMALL + header("1\udcff.txt", 0) + REST, ["not UTF-8", "byte 1,024"]),
    "an escape code as a key, twice": (
        (header("\x1b[2J.txt", 0) + header("\x1b[2Jb.txt", 0) + header("\x1b[2J.txt", 0)) + REST,
        ["appears twice", "\\x1b[2J", "byte 1,024"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tar_made_to_mislead_is_refused_by_name_and_place(case: str, cli: Cli, tmp_path: Path) -> None:
    content, named = REFUSED[case]
    (tmp_path / "a.tar").write_bytes(content)
    done = cli("embed", tmp_path / "store", "--shards", tmp_path / "a.tar", "--workers", 0, code=2)
    tame(done.stdout, done.stderr)
    for words in [*named, str(tmp_path / "a.tar"), "  -> "]:
        assert words in done.stderr
    assert {name.split("/")[0] for name in tree(tmp_path / "store")} <= {"_state"}


def test_a_tar_whose_own_name_holds_escape_codes_is_refused_harmlessly(program: Path, tmp_path: Path) -> None:
    (tmp_path / "\x1b[2Ja.tar").write_bytes(b"no tar")
    command = [program, "embed", tmp_path / "store", "--shards", tmp_path, "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    tame(done.stdout, done.stderr)
    assert "\\x1b[2Ja.tar is not a whole tar" in done.stderr


def test_names_with_nul_devices_and_pipes_are_neutralised(pictures: list[Picture], cli: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    plain = [
        m for n, (jpeg, text) in enumerate(pictures[:9]) for m in ((f"{n}.jpg", jpeg), (f"{n}.txt", text.encode()))
    ]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        kinds = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]  # links: test_tars.py
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"special{number}.txt")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        info = tarfile.TarInfo("x")
        info.pax_headers = {"path": "nul\0name.txt", "comment": "c" * 10_000, "GRAPH.bogus": "1"}
        archive.addfile(info)
        for name, content in plain:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    store = tmp_path / "store"
    cli("embed", store, "--shards", tmp_path / "a.tar", "--workers", 0)
    cli("index", store, "--k", K, "--workers", 0)
    cli("export", store, "--workers", 0)
    refused = cli("export", store, "--layout", "inline", "--workers", 0, code=2)
    assert "a.tar: 'nul\\x00name.txt', 0 bytes, does not lie at byte" in refused.stderr
    samples = rows(store, "samples", "key", "caption")
    assert "a secret" not in {sample["caption"] for sample in samples}
    assert [s["key"] for s in samples if "\0" not in s["key"]] == [str(n) for n in range(9)]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "secret", "store"}
    assert "no problems" in cli("verify", store).stdout


@pytest.mark.slow
def test_a_caption_of_100_megabytes_is_rejected_and_the_others_go_on(cli: Cli, tmp_path: Path) -> None:
    huge = b"dog " * (25 << 20)
    tar = write_tar(tmp_path / "a.tar", [("0.txt", b"a dog"), ("1.txt", huge), ("2.json", b"[" * 200_000)])
    lines = [
        b'{"caption": "a dog"}',
        b'{"caption": "' + huge + b'"}',
        b'{"caption": ' + b"[" * 200_000,
        b'{"caption": 1}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    for source, path in (("--shards", tar), ("--captions", tmp_path / "a.jsonl")):
        store = tmp_path / source
        tame(cli("embed", store, source, path, "--workers", 0).stdout)
        rejected = rows(store, "rejected/scan")
        reasons = [row["reason"].partition(": ")[0] for row in rejected]
        assert [row["position"] for row in rejected] == ([1, 2] if source == "--shards" else [1, 2, 3])
        assert reasons[0] in ("caption over 1,000,000 bytes", "longer than 33,554,432 bytes")
        assert max(len(row["content"]) for row in rejected) <= 10_001
        assert len(rows(store, "nodes")) == 1


# -- lists


def nested(depth: int) -> str:
    return "[" * depth + "NaN" + "]" * depth


WRONG_LISTS: dict[str, tuple[str, Any, list[str]]] = {
    "structs in parquet": ("a.parquet", {"caption": [{"text": "x"}]}, ["'caption' is struct", "not text"]),
    "floats and NaN in parquet": ("a.parquet", {"caption": [1.5, float("nan")]}, ["'caption' is double, not text"]),
    "booleans in parquet": ("a.parquet", {"caption": [True]}, ["'caption' is bool, not text"]),
    "one column twice in parquet": ("a.parquet", ["caption", "caption"], ["2 columns 'caption'"]),
    "nothing but nulls": ("a.parquet", {"caption": pa.array([None, None], pa.null())}, ["no row has a caption"]),
    "lists of lists in JSON": ("a.jsonl", '{"caption": [["y"]]}\n', ["no row has a caption", "holds what is no text"]),
    "objects in JSON": ("a.jsonl", '{"caption": {"a": 1}}\n', ["'caption' is an object, not text"]),
    "nested NaN": ("a.jsonl", f'{{"caption": {nested(50)}}}\n', ["no row has a caption", "holds what is no text"]),
    "NaN": ("a.jsonl", '{"caption": NaN}\n', ["'caption' is a number, not text"]),
    "keys that are objects": ("a.jsonl", '{"caption": "x", "key": {}}\n', ["'key' is an object", "--key-column"]),
    "an escape code as a column": ("a.csv", "\x1b[2J,b\nx,y\n", ["no column 'caption'", "\\x1b[2J"]),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_a_list_of_the_wrong_types_is_refused_by_column(case: str, cli: Cli, tmp_path: Path) -> None:
    name, content, named = WRONG_LISTS[case]
    path = tmp_path / name
    if isinstance(content, list):
        pq.write_table(pa.table([["x"]] * len(content), names=content), path)
    elif isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_text(content)
    options = ["--key-column", "key"] if "keys" in case else []
    done = cli("embed", tmp_path / "store", "--captions", path, "--workers", 0, *options, code=2)
    tame(done.stdout, done.stderr)
    for words in [*named, str(path), "  -> "]:
        assert words in done.stderr
    assert {name.split("/")[0] for name in tree(tmp_path / "store")} <= {"_state", "rejected"}


def test_rows_of_the_wrong_type_among_good_ones_are_rejected_alone(cli: Cli, tmp_path: Path) -> None:
    odd = ["1", "1.5", "NaN", "-Infinity", "true", "null", "[7]", '{"a": "b"}', nested(400), "9" * 400, '"\\ud800"']
    lines = [
        '{"caption": "a dog"}',
        *(f'{{"caption": {value}}}' for value in odd),
        '{"caption": "a cat", "caption": "b"}',
        '{"caption": ["x"]}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = tmp_path / "store"
    cli("embed", store, "--captions", tmp_path / "a.jsonl", "--workers", 0)
    rejected = rows(store, "rejected/scan")
    assert sorted(row["position"] for row in rejected) == list(range(1, 1 + len(odd)))
    assert all(row["reason"] for row in rejected)
    assert [sample["caption"] for sample in rows(store, "samples", "caption")] == ["a dog", "b", "x"]


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_a_million_tiny_members_are_a_million_rows(cli: Cli, tmp_path: Path) -> None:
    def members() -> Iterator[bytes]:
        for n in range(1_000_000):
            yield header(f"{n:07d}.txt", 3) + f"{n % 999:03d}".encode().ljust(512, b"\0")

    with (tmp_path / "a.tar").open("wb") as file:
        file.writelines(members())
        file.write(REST)
    store = tmp_path / "store"
    cli("embed", store, "--shards", tmp_path / "a.tar", "--workers", 0)
    assert pq.read_metadata(store / "samples/00000.parquet").num_rows == 1_000_000
    assert pq.read_metadata(store / "nodes/00000.parquet").num_rows == 999
