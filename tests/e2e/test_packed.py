"""`graphbuild pack` from the command line: the same bytes with workers and after kills, tars that the other verbs take,
columns that go back beside the source, and switches between packed and downloaded tars."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild import SampleGraph
from tests.e2e import forked
from tests.e2e.test_runs import digests, wait_for
from tests.e2e.web import serving

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FILES, ROWS, SHARD, K = 3, 30, 20, 4
WITHOUT = (4, 21)  # rows of each file that have no image


@pytest.fixture(scope="module")
def source(pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 30 rows; two rows of each have no image, one has no caption."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "data").mkdir()
    for part in range(FILES):
        mine = pictures[part * ROWS : (part + 1) * ROWS]
        images = [None if n in WITHOUT else {"bytes": one[0], "path": f"{n}.jpg"} for n, one in enumerate(mine)]
        captions = [None if n == 9 else one[1] for n, one in enumerate(mine)]
        table = pa.table({"image": pa.array(images, IMAGE), "caption": captions, "number": range(ROWS)})
        pq.write_table(table, folder / f"data/train-{part:05d}.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, cli: Cli, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed and exported by a recipe, with columns."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "recipe.yaml").write_text(
        f"pack: {{source: {source}, shard_size: {SHARD}}}\nembed: {{encoder: {words}}}\nindex: {{k: {K}}}\n"
        "export: {layout: columns, embeddings: float16}\n"
    )
    said = cli("run", folder / "recipe.yaml", folder / "store", "--workers", 0).stdout
    assert "pack      90 rows -> 84 samples in 6 tars, in shards/" in said
    assert "export    84 samples in 3 parquet files, in columns/" in said
    return folder / "store"


def test_the_verbs_one_by_one_give_the_bytes_of_the_recipe(
    source: Path, built: Path, cli: Cli, words: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    said = cli("pack", store, source, "--shard-size", SHARD, "--dry-run").stdout
    assert "90 samples; 6 shards" in said
    assert not store.exists()
    said = cli("pack", store, source, "--shard-size", SHARD, "--workers", 0).stdout
    assert f"next      graphbuild embed {store}" in said
    assert "6 rejected: no image" in said
    cli("embed", store, "--encoder", words, "--workers", 0)
    cli("index", store, "--k", K, "--workers", 0)
    cli("export", store, "--layout", "columns", "--embeddings", "float16", "--workers", 0)
    assert digests(store) == digests(built)
    assert "no problems" in cli("verify", store).stdout


def test_columns_have_a_row_for_each_row_of_the_source(source: Path, built: Path) -> None:
    nodes, places = {}, {}  # by caption, and by file and row, as the tars tell
    for path in sorted((built / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                if info.name.endswith(".json"):
                    told = json.load(archive.extractfile(info))  # type: ignore[arg-type]
                    places[told["origin"]["file"], told["origin"]["row"]] = told["key"]
    for path in (built / "nodes").glob("*.parquet"):
        nodes |= {row["text"]: row["node"] for row in pq.read_table(path).to_pylist()}
    shards = pq.read_table(built / "shards.parquet")["shard"].to_pylist()
    vectors = np.concatenate([np.load(built / f"nodes/{name}.npy") for name in shards])
    neighbors = np.concatenate([np.load(built / f"graph/{name}.neighbors.npy") for name in shards])
    similarities = np.concatenate([np.load(built / f"graph/{name}.similarities.npy") for name in shards])
    background = np.concatenate([np.load(built / f"graph/{name}.background.npy") for name in shards])
    files = sorted(path.relative_to(source) for path in source.rglob("*.parquet"))
    assert files == sorted(path.relative_to(built / "columns") for path in (built / "columns").rglob("*.parquet"))
    for file in files:
        rows, found = pq.read_table(source / file).to_pylist(), pq.read_table(built / "columns" / file)
        names = "key node embedding neighbors similarities background_mean background_std"
        assert found.column_names == names.split()
        assert len(found) == len(rows) == ROWS
        for number, (row, one) in enumerate(zip(rows, found.to_pylist(), strict=True)):
            assert one["key"] == places.get((str(file), number))
            assert (one["key"] is None) == (number in WITHOUT)
            if number in WITHOUT or row["caption"] is None:
                assert {value for name, value in one.items() if name != "key"} == {None}
                continue
            node = nodes[row["caption"]]
            assert one["node"] == node
            assert one["neighbors"] == neighbors[node].tolist()
            np.testing.assert_array_equal(np.array(one["embedding"], np.float16), vectors[node])
            np.testing.assert_array_equal(np.array(one["similarities"], np.float16), similarities[node])
            assert [one["background_mean"], one["background_std"]] == background[node].tolist()


def test_several_captions_of_a_row_stand_in_its_row_of_the_columns(
    pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    texts = [[one[1] for one in pictures[n : n + 1 + n % 3]] if n < 6 else [pictures[n][1]] for n in range(12)]
    images = [None if n == 2 else one[0] for n, one in enumerate(pictures[:12])]
    pq.write_table(pa.table({"image": images, "captions": texts}), tmp_path / "a.parquet")
    store = tmp_path / "store"
    cli("pack", store, tmp_path / "a.parquet", "--shard-size", 6, "--workers", 0)
    cli("embed", store, "--caption-member", "json:captions", "--workers", 0)
    cli("index", store, "--k", K, "--workers", 0)
    cli("export", store, "--layout", "columns", "--embeddings", "none", "--workers", 0)
    tables = [pq.read_table(path).to_pylist() for path in (store / "nodes").glob("*.parquet")]
    named = {row["node"]: row["text"] for rows in tables for row in rows}
    found = pq.read_table(store / "columns/a.parquet").to_pylist()
    assert len(found) == 12
    for number, row in enumerate(found):
        nodes = [row["node"], *(one["node"] for one in row["more_captions"] or [])]
        assert [named.get(node) for node in nodes] == ([None] if number == 2 else texts[number])
        assert all(len(one["neighbors"]) == K for one in row["more_captions"] or [])


def test_loaders_take_packed_tars(built: Path, cli: Cli, pictures: list[Picture], tmp_path: Path) -> None:
    from graphbuild.torch import GraphDataset

    store = tmp_path / "store"
    shutil.copytree(built, store)
    cli("export", store, "--layout", "sidecars", "--workers", 0)
    dataset = GraphDataset(str(store / "shards/*.tar"))
    assert len(dataset) == FILES * (ROWS - len(WITHOUT) - 1)
    assert len(SampleGraph.open(str(store))) == len(dataset)


@pytest.mark.parametrize(("after", "workers"), [(1, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_killed_pack_is_resumed_to_the_same_bytes(
    after: int, workers: int, source: Path, program: Path, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    arguments = ("pack", tmp_path / "store", source, "--shard-size", 7, "--workers", 0)
    command = [str(program), *map(str, arguments)]
    records = tmp_path / "store/_state/pack"
    process = forked.Started(command, environment)
    wait_for(lambda: len(list(records.glob("*.done.json"))) >= after, process)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in records.glob("*.done.json")}
    cli(*arguments)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    cli("pack", tmp_path / "whole", source, "--shard-size", 7, "--workers", workers)
    assert digests(tmp_path / "store") == digests(tmp_path / "whole")


def test_packed_and_downloaded_tars_replace_each_other_only_by_force(
    source: Path, pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    store, urls = tmp_path / "store", tmp_path / "urls.csv"
    download = ("download", store, urls, "--allow-private-hosts", "--resize-mode", "no", "--workers", 0)
    packing = ("--shard-size", SHARD, "--workers", 0)
    with serving(lambda path: pictures[int(path.strip("/"))][0]) as base:
        urls.write_text("url,caption\n" + "".join(f'{base}/{n},"{pictures[n][1]}"\n' for n in range(12)))
        cli(*download)
        before = digests(store)
        refusal = cli("pack", store, source, *packing, code=2).stderr
        assert f"{store} was made from urls, and this is another source (images)" in refusal
        assert "shards/" in refusal
        assert digests(store) == before
        cli("pack", store, source, *packing, "--force")
        cli("pack", tmp_path / "fresh", source, *packing)
        tars = {name: one for name, one in digests(tmp_path / "fresh").items() if "/" in name}
        assert {name: one for name, one in digests(store).items() if "/" in name} == tars
        assert "--force" in cli(*download, code=2).stderr
        cli(*download, "--force")
        assert {path.name for path in (store / "shards").iterdir()} == {
            "00000.tar",
            "00000.parquet",
            "00000_stats.json",
        }
        assert not (store / "rejected/pack").exists() or not list((store / "rejected/pack").iterdir())


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for of a dataset U/N: the folder `root`."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path == "/api/datasets/U/N":
            return self.answer(json.dumps({"id": "U/N", "sha": "a" * 40}).encode())
        if path.startswith("/api/datasets/U/N/tree/main"):
            folder = self.root / path.removeprefix("/api/datasets/U/N/tree/main").strip("/")
            entries = [self.entry(one) for one in sorted(folder.iterdir())]
            return self.answer(json.dumps(entries).encode())
        file = self.root / path.removeprefix("/datasets/U/N/resolve/main/")
        if not path.startswith("/datasets/") or not file.is_file():
            return self.answer(b"", 404)
        content, asked = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        Hub.asked.append(f"{file.name} {'in part' if asked else 'whole'}")
        if not asked:
            return self.answer(content)
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        return self.answer(content[first : last + 1], 206, f"bytes {first}-{last}/{len(content)}")

    def entry(self, path: Path) -> dict[str, Any]:
        told = {"path": str(path.relative_to(self.root)), "oid": hashlib.sha1(path.name.encode()).hexdigest()}
        return told | ({"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size})

    def answer(self, body: bytes, code: int = 200, places: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if places:
            self.send_header("Content-Range", places)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_dataset_of_the_hub_is_packed_by_its_url(source: Path, built: Path, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    Hub.root = source
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        url = "hf://datasets/U/N/data/*.parquet"
        cli("pack", tmp_path / "store", url, "--shard-size", SHARD, "--workers", 0, env=hub)
        server.shutdown()
    for number in range(6):
        packed = tmp_path / f"store/shards/{number:05d}.tar"
        with tarfile.open(packed) as ours, tarfile.open(built / f"shards/{number:05d}.tar") as theirs:
            assert [one.name for one in ours] == [one.name for one in theirs]
            for one in ours:
                if not one.name.endswith(".json"):  # `file` is told from another folder
                    mine, other = ours.extractfile(one), theirs.extractfile(one.name)
                    assert mine.read() == other.read()  # type: ignore[union-attr]
    assert Hub.asked.count("train-00000.parquet whole") == 2, "once for each of its tars, and not to plan"


def test_columns_of_what_was_not_packed_are_refused(
    pictures: list[Picture], write_tar: Callable[..., None], cli: Cli, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.txt", text.encode()) for n, (_, text) in enumerate(pictures[:9])])
    store = tmp_path / "store"
    cli("embed", store, "--shards", tmp_path / "a.tar", "--workers", 0)
    cli("index", store, "--k", 3, "--workers", 0)
    refusal = cli("export", store, "--layout", "columns", "--workers", 0, code=2).stderr
    assert "--layout columns goes beside files that were packed" in refusal
    assert "use the default layout" in refusal
