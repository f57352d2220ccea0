"""Random access against the stream, sample by sample, and against the files themselves; bad input by name."""

import io
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.sources import ranges
from graphbuild.store.store import Store
from graphbuild.torch import GraphDataset, NeighborBatchSampler, graph_webdataset
from tests.graph.test_index import built
from tests.torch.test_loader import (
    SAMPLES,
    SHARDS,
    D,
    K,
    error_text,
    members_of,
    picture,
    write_shard,
    write_sidecar,
    write_tar,
)

TENSORS = {"row", "node", "neighbors", "similarities", "background", "embedding"}
WITHOUT_NODE, WITHOUT_IMAGE = 13, 27


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Sample 13 has no node, sample 27 no image."""
    for number in range(SHARDS):
        write_shard(
            tmp_path,
            number,
            lambda row: members_of(row)[1:] if row == WITHOUT_IMAGE else members_of(row),
            without_node=(WITHOUT_NODE,),
        )
    return tmp_path


def by_row(batches: Iterator[dict[str, Any]] | Any) -> dict[int, dict[str, Any]]:
    """Row -> the fields of its sample."""
    return {
        int(row): {name: values[i] for name, values in batch.items()}
        for batch in batches
        for i, row in enumerate(batch["row"])
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


# The same samples as the stream


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pixels", [8, None])
def test_shuffled_batches_hold_the_samples_of_the_stream(store: Path, workers: int, pixels: int | None) -> None:
    streamed = list(graph_webdataset(f"{store}/*.tar", batch_size=8, image_pixels=pixels))
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=pixels)
    dataset[3]  # files opened before the workers are forked
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(dataset, batch_size=8, sampler=sampler, num_workers=workers, collate_fn=dataset.collate)
    batches = list(loader)
    assert [len(batch["key"]) for batch in batches] == [8] * 7 + [2]
    assert {name: type(values) for name, values in batches[0].items()} == {
        name: type(values) for name, values in streamed[0].items()
    }
    for name in (TENSORS | {"image"}) if pixels else TENSORS:
        assert batches[0][name].shape == streamed[0][name].shape
        assert batches[0][name].dtype == streamed[0][name].dtype
        assert batches[0][name].stride() == streamed[0][name].stride()
    expected, found = by_row(streamed), by_row(batches)
    assert list(found) != sorted(found)
    assert found.keys() == expected.keys() == set(range(SHARDS * SAMPLES)) - {WITHOUT_NODE, WITHOUT_IMAGE}
    for row, fields in expected.items():
        for name, value in fields.items():
            assert_same(found[row][name], value)


def test_items_are_in_order_and_know_their_nodes(store: Path) -> None:
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    rows = [row for row in range(SHARDS * SAMPLES) if row not in (WITHOUT_NODE, WITHOUT_IMAGE)]
    assert len(dataset) == len(rows)
    assert dataset.nodes.dtype == np.int64
    assert dataset.nodes.tolist() == [1000 + row for row in rows]
    samples = list(dataset)  # type: ignore[call-overload]
    assert [int(sample["row"]) for sample in samples] == rows
    assert [sample["key"] for sample in samples] == [f"{row:06d}" for row in rows]
    assert [int(sample["image"][0, 4, 4]) for sample in samples] == rows
    assert {name: tuple(samples[0][name].shape) for name in [*sorted(TENSORS), "image"]} == {
        "background": (2,),
        "embedding": (D,),
        "image": (3, 8, 8),
        "neighbors": (K,),
        "node": (),
        "row": (),
        "similarities": (K,),
    }


def test_a_transform_gives_what_it_gives_in_the_stream(store: Path) -> None:
    two_views = lambda image: (torch.tensor(image.size), torch.tensor(image.getpixel((0, 0))))  # noqa: E731
    dataset = GraphDataset(f"{store}/*.tar", transform=two_views)
    sizes, colours = dataset.collate(dataset.__getitems__([4, 0, 57]))["image"]
    assert sizes.tolist() == [[12, 8]] * 3
    assert colours.tolist() == [[row, 100, 200] for row in (4, 0, 59)]


@pytest.mark.parametrize("options", [{"image_pixels": 8}, {}, {"transform": lambda image: {"size": image.size}}])
def test_samples_collected_one_by_one_make_the_same_batch(store: Path, options: dict[str, Any]) -> None:
    dataset = GraphDataset(f"{store}/*.tar", **options)
    at_once = dataset.collate(dataset.__getitems__([41, 3, 20]))
    one_by_one = dataset.collate([dataset[i] for i in (41, 3, 20)])
    assert at_once.keys() == one_by_one.keys()
    for name in at_once.keys() - {"image"}:
        assert_same(one_by_one[name], at_once[name])
    torch.testing.assert_close(one_by_one["image"], at_once["image"], rtol=0, atol=0)


def test_reading_opens_no_sidecar(store: Path) -> None:
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    for path in store.glob("*.parquet"):
        path.unlink()
    assert len(list(DataLoader(dataset, batch_size=8, collate_fn=dataset.collate))) == 8


def test_spawned_workers_open_the_tars_anew(store: Path) -> None:
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    expected = [dataset[i]["row"] for i in range(len(dataset))]
    assert pickle.loads(pickle.dumps(dataset))[7]["key"] == dataset[7]["key"]
    loader = DataLoader(
        dataset, batch_size=30, num_workers=1, collate_fn=dataset.collate, multiprocessing_context="spawn"
    )
    assert torch.cat([batch["row"] for batch in loader]).tolist() == expected


def test_few_files_stay_open(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tars_open() -> int:
        files = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return sum(file.parent == store for file in files)

    monkeypatch.setattr(ranges, "OPEN_FILES", 2)
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    for _ in range(2):
        assert len(dataset.__getitems__(range(len(dataset)))) == len(dataset)
    assert tars_open() == 2
    del dataset
    assert tars_open() == 0


def test_remote_tars_and_sidecars(store: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in store.iterdir():
        memory.pipe_file(f"/random/{path.name}", path.read_bytes())
    dataset = GraphDataset("memory://random/*.tar", image_pixels=8)
    expected = by_row(graph_webdataset(f"{store}/*.tar", batch_size=8, image_pixels=8))
    order = np.random.default_rng(0).permutation(len(dataset))
    found = by_row([dataset.collate(dataset.__getitems__(order))])
    assert found.keys() == expected.keys()
    for row, fields in expected.items():
        for name, value in fields.items():
            assert_same(found[row][name], value)
    memory.rm("/random/00003.tar")
    with pytest.raises(InputError, match=r"memory://.*00003\.tar: there is no such tar"):
        dataset.__getitems__(order)
    memory.rm("/random", recursive=True)


def test_an_object_store_is_read_from_forked_workers(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        remote = fsspec.filesystem("s3")
        remote.mkdir("bucket")
        for path in store.iterdir():
            remote.put_file(str(path), f"bucket/{path.name}")
        dataset = GraphDataset("s3://bucket/*.tar", image_pixels=8)
        assert dataset[5]["key"] == "000005"
        loader = DataLoader(dataset, batch_size=20, num_workers=2, collate_fn=dataset.collate)
        rows = torch.cat([batch["row"] for batch in loader])
        assert rows.tolist() == [row for row in range(60) if row not in (WITHOUT_NODE, WITHOUT_IMAGE)]
    finally:
        server.stop()


# Fields from a store's graph


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    vectors = np.random.default_rng(5).standard_normal((70, D)).astype(np.float16)
    return SampleGraph.open(built(tmp_path_factory.mktemp("graph"), vectors, k=K).url)


def fingerprint(graph: SampleGraph) -> str:
    return str(Store(graph.url).manifest()["graph"]["fingerprint"])


def write_shards_of(graph: SampleGraph, folder: Path, **sidecar: Any) -> None:
    """Sample i of the store has node i."""
    for number in range(SHARDS):
        nodes = list(range(number * SAMPLES, (number + 1) * SAMPLES))
        write_shard(folder, number, nodes=nodes, graph=fingerprint(graph), **sidecar)


def test_with_a_graph_fields_are_the_stores_arrays(tmp_path: Path, graph: SampleGraph) -> None:
    write_shards_of(graph, tmp_path, embeddings="none")
    dataset = GraphDataset(f"{tmp_path}/*.tar", graph=graph, image_pixels=8)
    chosen = [41, 3, 59, 7]
    batch = dataset.collate(dataset.__getitems__(chosen))
    arrays = {
        name: np.load(Path(graph.url) / f"graph/00000.{name}.npy")
        for name in ("neighbors", "similarities", "background")
    }
    embeddings = np.load(Path(graph.url) / "nodes/00000.npy").astype(np.float64)[chosen]
    assert batch["node"].tolist() == chosen
    assert batch["neighbors"].tolist() == arrays["neighbors"][chosen].tolist()
    assert batch["similarities"].tolist() == arrays["similarities"][chosen].tolist()
    assert batch["background"].tolist() == arrays["background"][chosen].tolist()
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(batch["embedding"], embeddings / norms, atol=1e-6)
    streamed = next(iter(graph_webdataset(f"{tmp_path}/*.tar", batch_size=4, image_pixels=8)))
    assert {name: values.dtype for name, values in batch.items() if name in TENSORS - {"embedding"}} == {
        name: values.dtype for name, values in streamed.items() if name in TENSORS
    }


def test_neighbor_batches_of_a_graph(tmp_path: Path, graph: SampleGraph) -> None:
    write_shards_of(graph, tmp_path)
    dataset = GraphDataset(f"{tmp_path}/*.tar", graph=graph, image_pixels=8)
    sampler = NeighborBatchSampler(graph, 12, group=3, nodes=dataset.nodes)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=1)
    expected = by_row(graph_webdataset(f"{tmp_path}/*.tar", batch_size=4, image_pixels=8))
    found = by_row(loader)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[row]["image"], expected[row]["image"]) for row in expected)


def test_a_graph_of_another_build_is_refused(store: Path, graph: SampleGraph) -> None:
    with pytest.raises(ConfigError, match=r"00000\.graph\.parquet was exported from graph 'one'; .* holds '"):
        GraphDataset(f"{store}/*.tar", graph=graph)


def test_samples_of_one_caption_share_its_fields_in_memory(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path, number, nodes=[7, 9] * (SAMPLES // 2))
    dataset = GraphDataset(f"{tmp_path}/*.tar", image_pixels=8)
    expected = by_row(graph_webdataset(f"{tmp_path}/*.tar", batch_size=8, image_pixels=8))
    for row, fields in by_row([dataset.collate(dataset.__getitems__(range(20)))]).items():
        assert fields["node"] == (9 if row % 2 else 7)
        for name in TENSORS:
            assert_same(fields[name], expected[row][name])
    assert len(dataset._fields._nodes) == 2  # type: ignore[attr-defined]


# Names beyond the 100 bytes of a tar header


KEYS = ["k" * 95, "k" * 99, "k" * 180, "d" * 80 + "/" + "k" * 60, "clé", "日" * 70, "./a b"]
FORMS = [(key, form) for key in KEYS for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


@pytest.mark.parametrize(("key", "form"), [*FORMS, ("d" * 80 + "/" + "k" * 60, tarfile.USTAR_FORMAT)])
def test_keys_of_any_length_and_script(tmp_path: Path, key: str, form: int) -> None:
    tar = tmp_path / "00000.tar"
    keys = [f"{key}{i}" for i in range(3)]
    with tarfile.open(tar, "w", format=form) as archive:
        for i, name in enumerate(keys):
            for extension, content in (("txt", b"x"), ("png", picture(i))):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    with tarfile.open(tar) as archive:
        places = {
            member.name[:-4]: (member.offset_data, member.size) for member in archive if member.name[-3:] == "png"
        }
    write_sidecar(tar.with_suffix(".graph.parquet"), tar, [0, 1, 2], keys=keys, places=places)
    dataset = GraphDataset(tar, image_pixels=8)
    assert [dataset[i]["key"] for i in range(3)] == keys
    assert [int(dataset[i]["image"][0, 4, 4]) for i in range(3)] == [0, 1, 2]
    moved = {name: places[other] for name, other in zip(keys, [*keys[1:], keys[0]], strict=True)}
    write_sidecar(tar.with_suffix(".graph.parquet"), tar, [0, 1, 2], keys=keys, places=moved)
    with pytest.raises(InputError, match=r"has there the image of sample 0"):
        GraphDataset(tar)[0]


# What does not fit


def refuse(folder: Path, message: str, workers: int = 0) -> None:
    """Opening or reading all of it raises an InputError whose text matches and names the next step."""
    try:
        dataset = GraphDataset(f"{folder}/*.tar", image_pixels=8)
    except InputError as error:
        text = str(error)
    else:
        text = error_text(DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=dataset.collate))
    assert re.search(message, text), text
    assert "\n  -> " in text


def test_missing_files(store: Path) -> None:
    (store / "00003.graph.parquet").unlink()
    refuse(store, r"00003\.graph\.parquet: .*00003\.tar has no sidecar")
    with pytest.raises(InputError, match=r"00009\.tar: there is no such tar"):
        GraphDataset([store / "00000.tar", store / "00009.tar"])


def test_a_tar_that_vanishes_later(store: Path) -> None:
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    (store / "00002.tar").unlink()
    with pytest.raises(InputError, match=r"00002\.tar: there is no such tar"):
        dataset[25]


def test_a_tar_of_another_size(store: Path) -> None:
    tar = store / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:5000])
    refuse(store, rf"00001\.tar has 5000 bytes; .*00001\.graph\.parquet was written for {len(whole)}")
    tar.write_bytes(whole)
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    tar.write_bytes(whole[:5000])
    with pytest.raises(
        InputError, match=r"00001\.tar: at byte [\d,]+ the tar ends within .* sample 2, key '000012', .* \(row 12 "
    ):
        dataset.__getitems__(range(10, 19))


def test_swapped_tars_of_one_size(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path, number) for number in (0, 1))
    if first.stat().st_size != second.stat().st_size:
        pytest.fail("the test needs tars of one size")
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    refuse(
        tmp_path,
        r"00000\.tar: at byte 512 '000010\.png' of \d+ bytes begins; .*00000\.graph\.parquet has there the image of"
        r" sample 0, key '000000', \d+ bytes \(row 0 of the store\)",
    )


def test_swapped_sidecars(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path, number).with_suffix(".graph.parquet") for number in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    refuse(tmp_path, r"00000\.tar: at byte 512 '000000\.png' .* sample 0, key '000010', .* \(row 10 ", workers=1)


def test_a_reordered_tar(tmp_path: Path) -> None:
    tar = write_shard(tmp_path, 0)
    rows = [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]
    write_tar(tar, [member for row in rows for member in members_of(row)])
    refuse(tmp_path, r"00000\.tar: at byte [\d,]+ ('000004\.png' of \d+ bytes|no member) begins; .* key '000003'")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((513, 100), "at byte 513 no member begins"),
        ((1024 + 512, 1), r"at byte 1,536 '000000\.txt' of 1 bytes begins"),
        ((512, 17), r"at byte 512 '000000\.png' of \d+ bytes begins; .*, 17 bytes"),
        ((0, 100), r"sample 0 \(row 0\) has its image at byte 0, 100 bytes long: not within"),
        ((512, 1 << 20), "not within"),
        ((1 << 40, 100), "not within"),
        ((512, -1), "not within"),
    ],
)
def test_offsets_that_are_not_the_images(tmp_path: Path, place: tuple[int, int], message: str) -> None:
    tar = write_shard(tmp_path, 0)
    with tarfile.open(tar) as archive:
        first = archive.getmembers()[1]
    if place[0] == 1536:
        place = (first.offset_data, 1)
        message = message.replace("1,536", f"{first.offset_data:,}")
    write_sidecar(tar.with_suffix(".graph.parquet"), tar, list(range(SAMPLES)), places={"000000": place})
    refuse(tmp_path, message)


def test_a_sidecar_that_is_damaged_or_reordered(tmp_path: Path) -> None:
    tar = write_shard(tmp_path, 0)
    sidecar = tar.with_suffix(".graph.parquet")
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[:-100])
    refuse(tmp_path, r"00000\.graph\.parquet: not a readable Parquet file")
    sidecar.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    refuse(tmp_path, r"00000\.graph\.parquet: not a readable Parquet file")
    write_sidecar(sidecar, tar, [0, 1, 2, 4, 3, 5, 6, 7, 8, 9])
    refuse(tmp_path, r"00000\.graph\.parquet: row 4 follows 2 \(sample 3\)")
    write_sidecar(sidecar, tar, list(range(SAMPLES)), format_version=99)
    refuse(tmp_path, "format version 99")


def test_sidecars_of_two_builds(tmp_path: Path) -> None:
    write_shard(tmp_path, 0)
    write_shard(tmp_path, 1, graph="two")
    refuse(tmp_path, r"00001\.graph\.parquet: graph is 'two', but the first tar's sidecar has 'one'")


def test_compressed_tars_and_tars_without_captions(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, places={})
    refuse(tmp_path, r"00000\.graph\.parquet: no image has a place in .*00000\.tar: the tar is compressed")
    write_shard(tmp_path, 0, without_node=tuple(range(SAMPLES)))
    refuse(tmp_path, r"00000\.graph\.parquet: no sample")


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    broken = lambda row: [(f"{row:06d}.png", picture(row)[:40])] if row == 2 else members_of(row)  # noqa: E731
    write_shard(tmp_path, 0, broken)
    refuse(tmp_path, r"00000\.tar: sample 2, key '000002': the image cannot be decoded", workers=1)


def test_a_sample_twice_in_a_batch(store: Path) -> None:
    dataset = GraphDataset(f"{store}/*.tar")
    key = dataset[3]["key"]
    with pytest.raises(InputError, match=rf"00000\.tar: sample \d+, key '{key}' \(index 3\) is twice in one batch"):
        dataset.__getitems__([3, 5, 3, 1])


@pytest.mark.parametrize(("index", "workers"), [(-1, 0), (58, 0), (1 << 40, 0), (58, 1)])
def test_an_index_out_of_range(store: Path, index: int, workers: int) -> None:
    dataset = GraphDataset(f"{store}/*.tar", image_pixels=8)
    loader = DataLoader(dataset, batch_sampler=[[0, index]], num_workers=workers, collate_fn=dataset.collate)
    assert re.search(rf"index {index} is not in 0\.\.57, the samples of .*00000\.tar to", error_text(loader))


@pytest.mark.parametrize("index", [1.5, "3", [1, 2], True])
def test_what_is_no_index(store: Path, index: Any) -> None:
    with pytest.raises(InputError, match="no indices"):
        GraphDataset(f"{store}/*.tar")[index]


@pytest.mark.parametrize("options", [{"image_pixels": 0}, {"image_pixels": 8, "transform": str}])
def test_options_out_of_range(store: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GraphDataset(f"{store}/*.tar", **options)
