"""Tars that go, and tars with other captions: numbers stay, and lists are those of a store without what is gone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graphbuild import SampleGraph
from graphbuild.graph import grow
from tests.e2e.test_bad_input import graphbuild, refused, succeeded

# The engine, the share of nodes up to which lists are mended in place of made anew, and what recall may differ by.
ENGINES = [
    ("exact", 1.0, 1e-6),
    pytest.param("exact", 0.0, 1e-6, marks=pytest.mark.slow),
    ("partition", 0.03, 0.015),
]
CAPTIONS = [
    f"{count} {kind} {animal}s {at} the {place}"
    for count in (2, 3, 5, 7)
    for kind in ("old", "small", "red")
    for animal in ("dog", "cat", "horse", "bird", "fish")
    for at in ("at", "behind")
    for place in ("house", "sea", "road")
]
TARS = 4


def write_tar(path: Path, captions: Iterable[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, caption in enumerate(captions):
            info = tarfile.TarInfo(f"{path.stem}{number:04d}.txt")
            info.size = len(caption.encode())
            archive.addfile(info, io.BytesIO(caption.encode()))


def build(store: Path, tars: Path, encoder: str) -> None:
    succeeded(graphbuild("embed", store, "--shards", tars, "--encoder", encoder, "--workers", 0))


def index(store: Path, engine: str = "exact") -> None:
    succeeded(graphbuild("index", store, "--k", 5, "--engine", engine, "--workers", 0))


@pytest.fixture
def parts() -> list[list[str]]:
    """Captions of each tar; the last of each tar are also the first of the next one."""
    size = len(CAPTIONS) // TARS
    return [CAPTIONS[at * size : (at + 1) * size + 6] for at in range(TARS)]


@pytest.fixture
def made(tmp_path: Path, parts: list[list[str]], words: str) -> tuple[Path, Path]:
    """A finished store of four tars, and their folder."""
    for number, captions in enumerate(parts):
        write_tar(tmp_path / f"tars/{number}.tar", captions)
    build(tmp_path / "store", tmp_path / "tars", words)
    return tmp_path / "store", tmp_path / "tars"


def samples(store: Path) -> dict[int, tuple[str, int | None]]:
    """Row -> caption and node."""
    found = {}
    for path in sorted((store / "samples").glob("*.parquet")):
        table = pq.read_table(path, columns=["row", "caption", "node"]).to_pylist()
        found.update({line["row"]: (line["caption"], line["node"]) for line in table})
    return found


def lists_by_text(store: Path, left_out: Iterable[str] = ()) -> dict[str, list[float]]:
    """Caption -> the similarities of its list, and that no list names a node without a sample."""
    graph, named = SampleGraph.open(str(store)), samples(store)
    node_of = {caption: node for caption, node in named.values() if node is not None}
    assert not set(node_of) & set(left_out)
    text_of = {node: caption for caption, node in node_of.items()}
    found = {}
    for caption, node in node_of.items():
        neighbors, similarities = graph.neighbors([node])
        assert set(neighbors[0].tolist()) <= set(text_of), caption
        found[caption] = similarities[0].tolist()
    return found


def certificate(store: Path) -> dict[str, float]:
    recall: dict[str, float] = json.loads((store / "manifest.json").read_text())["recall"]
    return recall


@pytest.mark.parametrize(("engine", "mended", "differs"), ENGINES)
def test_a_tar_that_goes_leaves_all_other_numbers_and_no_trace_in_the_lists(
    made: tuple[Path, Path],
    parts: list[list[str]],
    words: str,
    tmp_path: Path,
    engine: str,
    mended: float,
    differs: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grow, "MOST_GONE", mended)
    store, tars = made
    index(store, engine)
    succeeded(graphbuild("export", store, "--workers", 0))
    before = samples(store)
    (tars / "1.tar").unlink()
    refused(graphbuild("embed", store, "--workers", 0), "no longer in the input: 00001", "1.tar", "--force")
    assert samples(store) == before
    succeeded(graphbuild("embed", store, "--workers", 0, "--force"))
    after = samples(store)
    gone = range(len(parts[0]), len(parts[0]) + len(parts[1]))
    assert {row: line for row, line in after.items() if row not in gone} == {
        row: line for row, line in before.items() if row not in gone
    }
    assert all(after[row] == (before[row][0], None) for row in gone)
    refused(graphbuild("export", store, "--workers", 0), "index")
    index(store, engine)
    # The same captions in a store that never had the tar.
    build(tmp_path / "fresh", tars, words)
    index(tmp_path / "fresh", engine)
    only = set(parts[1]) - set(parts[0]) - set(parts[2])
    found, fresh = lists_by_text(store, only), lists_by_text(tmp_path / "fresh")
    assert found.keys() == fresh.keys()
    if engine == "exact":
        for caption, similarities in fresh.items():
            np.testing.assert_allclose(found[caption], similarities, atol=1e-3, err_msg=caption)
    assert certificate(store)["recall"] == pytest.approx(certificate(tmp_path / "fresh")["recall"], abs=differs)
    succeeded(graphbuild("export", store, "--workers", 0))
    assert sorted(path.name for path in (store / "shards").glob("*.graph.parquet")) == [
        f"{name}.graph.parquet" for name in "023"
    ]
    assert "1.tar" not in json.loads((store / "shards/sizes.json").read_text())
    succeeded(graphbuild("verify", store))
    # Searches find no node of the tar, and of a text that it had first the sample that is left.
    shared, only_there = parts[1][-1], parts[1][10]
    for text, there in ((shared, True), (only_there, False)):
        said = succeeded(graphbuild("neighbors", store, "--text", text, "--count", 3))
        assert (text in said) == there, said
        (tmp_path / "asked.tsv").write_text(f"caption\n{text}\n")
        succeeded(graphbuild("match", store, "--captions", tmp_path / "asked.tsv"))
        matched = pq.read_table(next((store / "match").glob("*.parquet"))).to_pylist()
        assert (text in [line["caption"] for line in matched]) == there
        assert not {line["key"] for line in matched} & {f"1{place:04d}" for place in range(len(parts[1]))}
    assert "2 samples" not in said
    # And it comes back, as it was.
    write_tar(tars / "1.tar", parts[1])
    succeeded(graphbuild("embed", store, "--workers", 0))
    index(store, engine)
    assert sorted(caption for caption, node in samples(store).values() if node is not None) == sorted(
        caption for captions in parts for caption in captions
    )
    lists_by_text(store)


@pytest.mark.parametrize(("engine", "mended", "differs"), ENGINES)
def test_a_tar_with_other_captions_has_new_rows_and_all_else_is_kept(
    made: tuple[Path, Path],
    parts: list[list[str]],
    words: str,
    tmp_path: Path,
    engine: str,
    mended: float,
    differs: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grow, "MOST_GONE", mended)
    store, tars = made
    index(store, engine)
    before, total = samples(store), sum(map(len, parts))
    vectors = {path.name: path.read_bytes() for path in (store / "nodes").glob("*.npy")}
    new = [*parts[2][:20], *(f"a new {caption}" for caption in parts[2][20:])]
    write_tar(tars / "2.tar", new)
    refused(graphbuild("embed", store, "--workers", 0), "2.tar", "->", "--force")
    succeeded(graphbuild("embed", store, "--workers", 0, "--force"))
    after, first = samples(store), len(parts[0]) + len(parts[1])
    old = range(first, first + len(parts[2]))
    assert all(after[row] == line for row, line in before.items() if row not in old)
    assert [after[row] for row in old] == [(before[row][0], None) for row in old]
    assert [after[total + place][0] for place in range(len(new))] == new
    node_of = dict(before.values())
    assert [after[total + place][1] for place in range(20)] == [node_of[caption] for caption in new[:20]]
    nodes = {node for _, node in before.values() if node is not None}
    assert not nodes & {after[total + place][1] for place in range(20, len(new))}
    for name, content in vectors.items():
        assert (store / "nodes" / name).read_bytes() == content
    index(store, engine)
    build(tmp_path / "fresh", tars, words)
    index(tmp_path / "fresh", engine)
    found, fresh = lists_by_text(store), lists_by_text(tmp_path / "fresh")
    assert found.keys() == fresh.keys()
    if engine == "exact":
        for caption, similarities in fresh.items():
            np.testing.assert_allclose(found[caption], similarities, atol=1e-3, err_msg=caption)
    assert certificate(store)["recall"] == pytest.approx(certificate(tmp_path / "fresh")["recall"], abs=differs)
    succeeded(graphbuild("export", store, "--workers", 0))
    succeeded(graphbuild("verify", store))
    sidecar = pq.read_table(store / "shards/2.graph.parquet")
    assert sidecar["caption"].to_pylist() == new
