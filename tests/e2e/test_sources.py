"""Each line of the table of docs/how-to/sources.md, run as it is written on data of that kind, and its graph."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.torch import graph_webdataset
from tests.e2e.web import serving
from tests.sources.test_pack import COUNT, hugging_face, img2dataset, metadata_jsonl, twins

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "sources.md"
ROWS = 12
VECTORS = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
KEYS = [f"{row:04d}" for row in range(ROWS)]


def table() -> dict[str, str]:
    """What one has -> the command."""
    return dict(re.findall(r"^\| (.+?) \| `(graphbuild .+)` \|$", PAGE.read_text(), re.M))


def npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


class Sources:
    """Makes data of each kind in a folder; returns how many samples and nodes a store of it has."""

    def __init__(self, folder: Path, pictures: list[Picture], write_tar: WriteTar, site: str) -> None:
        self.folder, self.pictures, self.write_tar, self.site = folder, pictures[:ROWS], write_tar, site

    def tars(self, *extras: Callable[[int], tuple[str, bytes]]) -> None:
        for tar in range(2):
            members = [
                member
                for row in range(ROWS)[tar::2]
                for member in (
                    (f"{KEYS[row]}.jpg", self.pictures[row][0]),
                    *(
                        (f"{KEYS[row]}.{name}", content)
                        for name, content in {
                            "txt": f"caption {row}".encode(),
                            **dict(extra(row) for extra in extras),
                        }.items()
                    ),
                )
            ]
            self.write_tar(self.folder / f"tars/{tar}.tar", members)

    def make(self, what: str) -> tuple[int, int]:
        folder, one_each = self.folder, (ROWS, ROWS)
        lines = [f"{self.site}/{row},caption {row}\n" for row in range(ROWS)]

        def as_json(row: int) -> tuple[str, bytes]:
            told = {
                "recaption": f"another {row % 5}",
                "text": f"text {row % 7}",
                "captions": [f"a {row}", f"b {row % 5}"],
            }
            return "json", json.dumps(told).encode()

        extras = {
            "json": as_json,
            "several places": as_json,
            "a line each": lambda row: ("txt", f"a {row}\nb {row % 5}\n".encode()),
            "class": lambda row: ("cls", str(row % 3).encode()),
            "hold": lambda row: ("npy", npy(VECTORS[row])),
        }
        if what.startswith("tars"):
            self.tars(*(extra for word, extra in extras.items() if word in what))
        match what:
            case "tars with `0001.txt`, or with `0001.json` that has a field `caption`":
                self.write_tar(  # the second has no txt
                    folder / "tars/1.tar",
                    [
                        (f"{KEYS[row]}.{name}", content)
                        for row in range(ROWS)[1::2]
                        for name, content in (
                            ("jpg", self.pictures[row][0]),
                            ("json", json.dumps({"caption": f"caption {row}"}).encode()),
                        )
                    ],
                )
            case "tars with the caption in another field of `0001.json`":
                return ROWS, 7
            case _ if what.startswith("tars with several captions an image"):
                return ROWS, ROWS + 5
            case "tars with class numbers":
                (folder / "names.txt").write_text("cat\ndog\nox\n")
                return ROWS, 3
            case "a list of URLs":
                (folder / "urls.csv").write_text("url,caption\n" + "".join(lines))
            case "a list of URLs in many files":
                (folder / "urls").mkdir()
                for number, part in enumerate((lines[:7], lines[7:])):
                    (folder / f"urls/part-{number}.csv").write_text("url,caption\n" + "".join(part))
            case "Hugging Face parquet with images":
                hugging_face(folder)
                return COUNT, COUNT
            case "img2dataset's output as `parquet` or `files`":
                (folder / "out").mkdir()
                found = len(img2dataset(folder / "out", "ParquetSampleWriter"))
                return found, found
            case "a folder of images with `metadata.jsonl`, `.csv` or `.parquet`":
                (folder / "images").mkdir()
                return len(metadata_jsonl(folder / "images")), COUNT
            case "a folder of images with a `.txt` (and `.json`) beside each":
                (folder / "images").mkdir()
                return len(twins(folder / "images")), COUNT
            case "captions alone" | "captions in several columns":
                rows = (f"caption {row},another {row % 5}\n" for row in range(ROWS))
                (folder / "captions.csv").write_text("caption,recaption\n" + "".join(rows))
                return (ROWS, ROWS + 5) if "several" in what else one_each
            case "vectors alone":
                np.save(folder / "vectors.npy", VECTORS)
            case "tars, and vectors of them in other files":
                self.vectors("emb", "keys", "key")
            case "tars, and clip-retrieval's output of them":
                self.vectors("img_emb", "metadata", "image_path")
        return one_each

    def vectors(self, vectors: str, keys: str, column: str) -> None:
        """Two files of each, in another order than the tars."""
        for name in (vectors, keys):
            (self.folder / name).mkdir()
        for number, rows in enumerate(np.array_split(np.random.default_rng(1).permutation(ROWS), 2)):
            np.save(self.folder / f"{vectors}/{vectors}_{number}.npy", VECTORS[rows])
            pq.write_table(
                pa.table({column: [KEYS[row] for row in rows]}), self.folder / f"{keys}/{keys}_{number}.parquet"
            )


@pytest.fixture
def sources(tmp_path: Path, pictures: list[Picture], write_tar: WriteTar) -> Iterator[Sources]:
    with serving(lambda path: pictures[int(path.strip("/"))][0]) as site:
        yield Sources(tmp_path, pictures, write_tar, site)


@pytest.mark.parametrize("what", table())
def test_what_one_has_becomes_a_graph_by_the_command_beside_it(
    what: str, sources: Sources, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, nodes = sources.make(what)
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    said = ""
    for command in [*table()[what].split(" && "), "graphbuild index STORE --k 2", "graphbuild export STORE"]:
        words = [str(store) if word == "STORE" else word for word in shlex.split(command)[1:]]
        said = cli(*words, "--workers", 0, *(["--allow-private-hosts"] if words[0] == "download" else [])).stdout
    tables = [pq.read_table(path) for path in sorted((store / "shards").glob("*.graph.parquet"))]
    assert sum(map(len, tables)) == samples
    assert sum(len(pq.read_table(path)) for path in (store / "nodes").glob("*.parquet")) == nodes
    assert all(table["node"].null_count == 0 for table in tables)
    (loader,) = re.findall("^train     graphbuild.torch.(.*)$", said, re.M) or [None]
    assert (loader is None) == ("--captions" in table()[what] or what == "vectors alone")
    if loader is not None:
        batch = next(iter(eval(loader.replace("...", str(samples)), {"graph_webdataset": graph_webdataset})))
        assert sorted(batch["key"]) == sorted(key for table in tables for key in table["key"].to_pylist())
    if "vectors of them" in what or "clip-retrieval" in what or "hold vectors" in what:
        for part in tables:
            stored = np.concatenate([np.load(path) for path in sorted((store / "nodes").glob("*.npy"))])[part["node"]]
            own = VECTORS[[int(key) for key in part["key"].to_pylist()]]
            np.testing.assert_allclose(stored, own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-3)


def test_the_table_has_a_line_for_each_kind_of_source() -> None:
    verbs = {line.split(" ")[1] for line in table().values()}
    assert verbs == {"embed", "download", "pack"}
    assert len(table()) == PAGE.read_text().split("\n## ")[0].count("| `graphbuild ")
