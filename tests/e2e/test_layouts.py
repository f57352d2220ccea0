"""New tars: in neighbour order, and with the fields inside. What lies in them is read by tarfile, pyarrow and numpy."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from graphbuild import SampleGraph
from graphbuild.errors import ShardError
from graphbuild.torch import GraphDataset, Targets, graph_webdataset

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
K, CHUNK, SHARD = 8, 16, 200
WITHOUT_CAPTION = 7


@pytest.fixture(scope="module")
def source(flickr: list[Picture], write_tar: WriteTar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 photographs in five tars whose keys are the same; seven have no caption, one a long name, one no picture."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(5):
        members: list[tuple[str, bytes]] = []
        for place, (image, caption) in enumerate(flickr[140 * number : 140 * (number + 1)]):
            key = f"{place:04d}" if place != 50 else "a" * 120
            if not (number == 2 and place == 9):
                members.append((f"{key}.JPG" if place % 2 else f"{key}.jpg", image))
            if not (number == 1 and place < WITHOUT_CAPTION):
                members.append((f"{key}.txt", caption.encode()))
            members.append((f"{key}.meta.json", json.dumps({"place": [number, place]}).encode()))
        write_tar(folder / f"part{number}.tar", members)
    return folder


@pytest.fixture(scope="module")
def store(source: Path, cli: Cli, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts") / "store"
    cli("embed", folder, "--shards", source, "--encoder", words, "--workers", 0)
    cli("index", folder, "--k", K, "--workers", 0)
    cli("export", folder, *CLUSTERED)
    return folder


CLUSTERED = ("--layout", "clustered", "--chunk", CHUNK, "--shard-size", SHARD, "--workers", 0)


def members_of(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def samples_of(store: Path) -> dict[str, list[Any]]:
    tables = [pq.read_table(path) for path in sorted((store / "samples").glob("*.parquet"))]
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in tables[0].column_names}


def test_every_sample_lies_once_in_a_clustered_tar_with_all_its_members(store: Path, source: Path) -> None:
    samples, of_source = (
        samples_of(store),
        functools.cache(lambda tar: {k.lower(): v for k, v in members_of(tar).items()}),
    )
    rows: list[int] = []
    for tar in sorted((store / "clustered").glob("*.tar")):
        found = members_of(tar)
        sidecar = pq.read_table(tar.with_suffix(".graph.parquet")).to_pylist()
        content = tar.read_bytes()
        assert json.loads((store / "clustered/sizes.json").read_text())[tar.name] == len(sidecar)
        assert list(dict.fromkeys(name.split(".", 1)[0] for name in found)) == [line["key"] for line in sidecar]
        for line in sidecar:
            row = line["row"]
            shard, key = f"part{row // 140}", samples["key"][row]
            old = of_source(source / f"{shard}.tar")
            mine = {name: body for name, body in found.items() if name.startswith(f"{line['key']}.")}
            assert line["key"] == f"{row:012d}"
            expected = {k.removeprefix(f"{key}."): v for k, v in old.items() if k.startswith(f"{key}.")}
            assert {name.split(".", 1)[1]: body for name, body in mine.items()} == expected
            assert (line["node"], line["caption"]) == (samples["node"][row], samples["caption"][row])
            if line["image_offset"] is not None:
                end = line["image_offset"] + line["image_size"]
                assert content[line["image_offset"] : end] == expected["jpg"]
            else:
                assert "jpg" not in expected
            rows.append(row)
    assert sorted(rows) == list(range(700)), "each row once"
    nodes = [samples["node"][row] for row in rows]
    assert nodes[-WITHOUT_CAPTION:] == [None] * WITHOUT_CAPTION, "samples without a caption come last"
    assert None not in nodes[:-WITHOUT_CAPTION]


def share_with_edge(nodes: np.ndarray, neighbors: np.ndarray) -> float:
    """The share of a batch's samples that list another one's node."""
    return float(np.mean([np.isin(own, nodes).any() for own in neighbors]))


def test_chunks_hold_neighbours_and_the_loader_keeps_them_together(store: Path) -> None:
    tars = sorted(map(str, (store / "clustered").glob("*.tar")))
    shuffled = graph_webdataset(tars, batch_size=64, shuffle=256, image_pixels=16)
    batches = [list(shuffled)]
    shuffled.set_epoch(1)
    batches.append(list(shuffled))
    for epoch in batches:
        rows = torch.cat([batch["row"] for batch in epoch]).tolist()
        assert len(rows) == len(set(rows)) == 700 - WITHOUT_CAPTION - 1
        shares = [share_with_edge(batch["node"].numpy(), batch["neighbors"].numpy()) for batch in epoch]
        assert np.average(shares, weights=[len(batch["row"]) for batch in epoch]) > 0.95
    assert [b["row"].tolist() for b in batches[0]] != [b["row"].tolist() for b in batches[1]]
    place = {
        row: (tar, position // CHUNK)
        for tar in tars
        for position, row in enumerate(pq.read_table(tar.replace(".tar", ".graph.parquet"))["row"].to_pylist())
    }
    order = [place[row] for batch in batches[0] for row in batch["row"].tolist()]
    assert sum(a != b for a, b in itertools.pairwise(order)) == len(set(order)) - 1, "chunks stay whole"
    assert order != sorted(order), "and are shuffled"
    fewest = SampleGraph.open(str(store))
    samples = np.random.default_rng(0).choice(np.flatnonzero(fewest.sample_nodes() >= 0), 64, replace=False)
    nodes = fewest.sample_nodes()[samples]
    assert share_with_edge(nodes, fewest.neighbors(nodes)[0]) < 0.8, "random batches of this size hold fewer"


def test_random_access_to_clustered_tars_gives_what_streaming_gives(store: Path) -> None:
    tars = sorted(map(str, (store / "clustered").glob("*.tar")))
    dataset = GraphDataset(tars, image_pixels=16)
    loader = DataLoader(dataset, batch_size=50, collate_fn=dataset.collate)
    streamed = graph_webdataset(tars, batch_size=50, shuffle=0, image_pixels=16)
    for one, other in zip(loader, streamed, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert values == other[name] if isinstance(values, list) else torch.equal(values, other[name]), name


def test_a_stream_of_chunks_goes_on_in_the_middle_of_an_epoch(store: Path) -> None:
    tars = sorted(map(str, (store / "clustered").glob("*.tar")))
    dataset = graph_webdataset(tars, batch_size=32, shuffle=128, image_pixels=8)
    whole = [batch["row"].tolist() for batch in dataset]
    dataset.set_epoch(0, skip_batches=9)
    assert [batch["row"].tolist() for batch in dataset] == whole[9:]


@pytest.mark.slow
def test_any_number_of_workers_and_a_second_run_give_the_same_bytes(store: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("clustered", "cluster"))
    cli("export", copy, *CLUSTERED[:-1], 2)
    names = sorted(path.name for path in (store / "clustered").iterdir())
    assert names == sorted(path.name for path in (copy / "clustered").iterdir())
    assert all((store / "clustered" / name).read_bytes() == (copy / "clustered" / name).read_bytes() for name in names)
    assert not list(copy.glob("_work*")), "scratch is gone"
    before = {path: path.stat().st_mtime_ns for path in (copy / "clustered").iterdir() if path.suffix == ".tar"}
    cli("export", copy, *CLUSTERED)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    refused = cli("export", copy, "--chunk", 32, code=2)
    assert "chunk: 16 -> 32" in refused.stderr
    cli("export", copy, "--chunk", 32, "--force", "--workers", 0)
    header = json.loads(pq.read_schema(copy / "clustered/00000.graph.parquet").metadata[b"graphbuild"])
    assert header["chunk"] == 32
    assert "no problems" in cli("verify", copy).stdout


def test_verify_finds_a_changed_clustered_tar(store: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    tar = copy / "clustered/00001.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    assert "clustered/00001.tar" in cli("verify", copy, code=1).stdout


@pytest.mark.slow
def test_a_source_that_changed_is_named(store: Path, source: Path, cli: Cli, tmp_path: Path) -> None:
    copy, moved = tmp_path / "store", tmp_path / "moved"
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("clustered", "cluster"))
    shutil.copytree(source, moved)
    try:
        one, other = source / "part0.tar", source / "part1.tar"
        one.write_bytes((moved / other.name).read_bytes())
        failed = cli("export", copy, *CLUSTERED, code=2)
        assert "part0.tar" in failed.stderr
        assert "does not lie at byte" in failed.stderr
    finally:
        shutil.copytree(moved, source, dirs_exist_ok=True)
    cli("export", copy, *CLUSTERED)
    assert (copy / "clustered/00000.tar").read_bytes() == (store / "clustered/00000.tar").read_bytes()


@pytest.mark.slow
def test_inline_tars_are_read_by_plain_webdataset(store: Path, source: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    said = cli("export", copy, "--layout", "inline", "--embeddings", "float16", "--workers", 2).stdout
    assert "700 samples in 5 tars, in inline/" in said
    graph, samples = SampleGraph.open(str(copy)), samples_of(copy)
    rows = []
    for number in range(5):
        tar = copy / f"inline/part{number}.tar"
        old, new = members_of(source / tar.name), members_of(tar)
        assert {name.lower(): body for name, body in old.items()} == {
            name: body for name, body in new.items() if not name.endswith(".graph.npz")
        }
        for sample in wds.WebDataset(str(tar), shardshuffle=False).decode():
            if "graph.npz" not in sample:
                continue
            fields = sample["graph.npz"]
            row, node = int(fields["row"]), int(fields["node"])
            assert (samples["key"][row], samples["node"][row]) == (sample["__key__"], node)
            assert np.array_equal(fields["neighbors"], graph.neighbors(node)[0])
            assert np.array_equal(fields["similarities"].astype(np.float32), graph.neighbors(node)[1])
            assert np.allclose(fields["embedding"].astype(np.float32), graph.embeddings(node), atol=1e-3)
            assert np.array_equal([fields["background_mean"], fields["background_std"]], graph.background(node))
            rows.append(row)
    assert sorted(rows) == [row for row, node in enumerate(samples["node"]) if node is not None]


def test_sidecars_with_sketches_give_targets_from_edges(store: Path, source: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    cli("export", copy, "--layout", "sidecars", "--embeddings", "sketch:64", "--workers", 0)
    assert "no problems" in cli("verify", copy).stdout
    graph = SampleGraph.open(str(copy))
    tars = str(source / "*.tar")
    (batch, *_) = graph_webdataset(tars, sidecars=copy / "shards", batch_size=256, image_pixels=8)
    assert "embedding" not in batch
    nodes = batch["node"].numpy()
    assert np.array_equal(batch["sketch"].numpy(), graph.sketches(nodes))
    dataset = GraphDataset(tars, sidecars=copy / "shards", image_pixels=8)
    item = int(np.flatnonzero(dataset.nodes == nodes[0])[0])
    assert torch.equal(dataset[item]["sketch"], batch["sketch"][0])
    for source_name in ("sketch", "edges"):
        known = {name: batch[name] for name in batch if name != "sketch" or source_name == "sketch"}
        expected = graph.block(nodes, source=source_name)[0]  # type: ignore[arg-type]
        np.fill_diagonal(expected, 1)
        found = Targets.from_batch(known, tau_s=0.1).block()
        assert torch.allclose(found, torch.from_numpy(expected), atol=1e-6)


@pytest.mark.slow
def test_layouts_that_cannot_be_made_say_why(source: Path, cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32))
    cli("embed", tmp_path / "ready", "--vectors", tmp_path / "vectors.npy", "--workers", 0)
    cli("index", tmp_path / "ready", "--k", 4, "--workers", 0)
    for layout in ("inline", "clustered"):
        assert "came from no tars" in cli("export", tmp_path / "ready", "--layout", layout, code=2).stderr
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/part.tgz").write_bytes(gzip.compress((source / "part0.tar").read_bytes()))
    cli("embed", tmp_path / "store", "--shards", tmp_path / "packed/part.tgz", "--workers", 0)
    cli("index", tmp_path / "store", "--k", 4, "--workers", 0)
    for layout in ("inline", "clustered"):
        refused = cli("export", tmp_path / "store", "--layout", layout, "--workers", 0, code=2).stderr
        assert "part.tgz is compressed" in refused
    sketched = cli("export", tmp_path / "store", "--layout", "inline", "--embeddings", "sketch:64", code=2).stderr
    assert "--layout inline has no sketches" in sketched


@pytest.mark.slow
def test_tars_of_two_layouts_do_not_mix(store: Path, source: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    cli("export", copy, "--layout", "sidecars", "--workers", 0)
    shutil.copy(copy / "shards/part0.graph.parquet", copy / "clustered")
    shutil.copy(source / "part0.tar", copy / "clustered")
    with pytest.raises(ShardError, match="chunk is None"):
        list(graph_webdataset(str(copy / "clustered/*.tar"), batch_size=8, shuffle=0))
