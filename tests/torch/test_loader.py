"""Real tars and sidecars: what belongs together arrives together, once; what does not is refused by name."""

import gzip
import io
import json
import logging
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError, InputError
from graphbuild.export.quantized import quantize_int8
from graphbuild.export.sidecar import Sidecar, SidecarHeader, TarIdentity, sidecar_schema
from graphbuild.torch import GraphDataset, Targets, XSampleLoss, graph_webdataset

D, K, SAMPLES, SHARDS = 8, 4, 10, 6
Member = tuple[str, bytes]


def picture(number: int, kind: str = "png", size: tuple[int, int] = (12, 8)) -> bytes:
    """A picture of one colour that tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, 100, 200)).save(stream, {"jpg": "jpeg"}.get(kind, kind), quality=100)
    return stream.getvalue()


def members_of(row: int, kind: str = "png") -> list[Member]:
    key = f"{row:06d}"
    label = json.dumps({"row": row}).encode()
    return [(f"{key}.{kind}", picture(row, kind)), (f"{key}.txt", b"x"), (f"{key}.json", label)]


def write_tar(path: Path, members: list[Member]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def embedding_of(row: int) -> np.ndarray:
    return np.random.default_rng(row).normal(size=D).astype(np.float32)


def image_places(tar: Path) -> dict[str, tuple[int, int]]:
    """Key -> offset and size of its first image."""
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            if extension.lower().rsplit(".", 1)[-1] in ("jpg", "jpeg", "png", "webp"):
                places.setdefault(key, (member.offset_data, member.size))
    return places


def write_sidecar(
    path: Path,
    tar: Path,
    rows: list[int],
    *,
    keys: list[str] | None = None,
    nodes: list[int] | None = None,
    places: dict[str, tuple[int, int]] | None = None,
    without_node: tuple[int, ...] = (),
    tar_bytes: int | None = None,
    embeddings: Any = "int8",
    **changes: Any,
) -> None:
    texts = nodes or rows  # what tells the fields of a node
    vectors = np.stack([embedding_of(text) for text in texts])
    values, scale = quantize_int8(vectors)
    keys = keys or [f"{row:06d}" for row in rows]
    places = image_places(tar) if places is None else places
    data: dict[str, list[Any]] = {
        "row": rows,
        "key": keys,
        "node": nodes or [1000 + row for row in rows],
        "caption": [f"caption {row}" for row in rows],
        "embedding": list(values if embeddings == "int8" else vectors.astype(np.float16)),
        "embedding_scale": list(scale),
        "neighbors": [[text + i for i in range(1, K + 1)] for text in texts],
        "similarities": [list(np.float16([0.9, 0.8, 0.7, text / 100])) for text in texts],
        "background_mean": [text / 10 for text in texts],
        "background_std": [0.5 for _ in rows],
        "image_offset": [places.get(key, (None, None))[0] for key in keys],
        "image_size": [places.get(key, (None, None))[1] for key in keys],
    }
    for name in set(data) - {"row", "key", "image_offset", "image_size"}:
        data[name] = [None if row in without_node else value for row, value in zip(rows, data[name], strict=True)]
    facts = {
        "encoder": "test",
        "d": D,
        "k": K,
        "embeddings": embeddings,
        "graph": "one",
        "shard": tar.stem,
        "tar": TarIdentity(name=tar.name, bytes=tar_bytes or tar.stat().st_size, sha256=""),
        "rows": len(rows),
    }
    schema = sidecar_schema(D, K, embeddings).with_metadata(SidecarHeader(**{**facts, **changes}).metadata())
    pq.write_table(pa.table({name: data[name] for name in schema.names}, schema=schema), path)


def write_shard(
    folder: Path,
    number: int,
    members: Callable[[int], list[Member]] = members_of,
    samples: int = SAMPLES,
    **sidecar: Any,
) -> Path:
    """Shard n holds rows n * SAMPLES and on."""
    rows = list(range(number * SAMPLES, number * SAMPLES + samples))
    tar = folder / f"{number:05d}.tar"
    write_tar(tar, [member for row in rows for member in members(row)])
    write_sidecar(tar.with_suffix(".graph.parquet"), tar, rows, **sidecar)
    return tar


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for number in range(SHARDS):
        write_shard(tmp_path, number)
    return tmp_path


def rows_of(batches: Iterator[dict[str, Any]] | Any) -> list[int]:
    return [row for batch in batches for row in batch["row"].tolist()]


def refuse(folder: Path, message: str, workers: int = 0, **options: Any) -> None:
    """Reading all of it raises an InputError whose text matches and names the next step."""
    loader = DataLoader(
        graph_webdataset(f"{folder}/*.tar", batch_size=4, **options), batch_size=None, num_workers=workers
    )
    text = error_text(loader)
    assert re.search(message, text), text
    assert "\n  -> " in text


def error_text(loader: DataLoader) -> str:
    """What reading all of it raises. No traceback keeps the loader alive: its workers end at once."""
    try:
        list(loader)
    except InputError as error:
        error.__traceback__ = None
        return str(error)
    pytest.fail("no error was raised")


# What a batch holds


def test_every_field_belongs_to_its_row(store: Path) -> None:
    dataset = graph_webdataset(f"{store}/{{00000..00005}}.tar", batch_size=7, image_pixels=8, extra=["json", "txt"])
    for batch in dataset:
        rows = batch["row"].tolist()
        assert batch["image"].shape == (len(rows), 3, 8, 8)
        assert batch["image"].dtype == torch.uint8
        assert batch["image"][:, 0, 4, 4].tolist() == rows
        assert batch["key"] == [f"{row:06d}" for row in rows]
        assert batch["caption"] == [f"caption {row}" for row in rows]
        assert batch["node"].tolist() == [1000 + row for row in rows]
        assert batch["neighbors"].tolist() == [[row + i for i in range(1, K + 1)] for row in rows]
        assert batch["json"] == [{"row": row} for row in rows]
        assert batch["txt"] == ["x"] * len(rows)
        exact = np.stack([embedding_of(row) for row in rows])
        cosine = (batch["embedding"].numpy() * exact).sum(1) / np.linalg.norm(exact, axis=1)
        assert cosine.min() > 0.9999
        torch.testing.assert_close(batch["embedding"].norm(dim=1), torch.ones(len(rows)))
        torch.testing.assert_close(batch["similarities"][:, 3], batch["row"] / 100, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            batch["background"], torch.stack([batch["row"] / 10, torch.full((len(rows),), 0.5)], 1)
        )
        assert {batch[name].dtype for name in ("row", "node", "neighbors")} == {torch.int64}
        assert {batch[name].dtype for name in ("embedding", "similarities", "background")} == {torch.float32}


def test_batches_know_the_size_of_the_graph_where_their_sidecars_do(tmp_path: Path) -> None:
    def batches(number: int, **header: Any) -> list[dict[str, Any]]:
        tar = write_shard(tmp_path, number, samples=4, **header)
        dataset = GraphDataset(tar)
        one_by_one = dataset.collate([dataset[i] for i in range(4)])
        together = dataset.collate(dataset.__getitems__([0, 1, 2, 3]))
        return [next(iter(graph_webdataset(tar, batch_size=4, shuffle=0))), together, one_by_one]

    z = torch.randn(2, 4, 3)
    for batch in batches(0, node_count=5_000):
        assert batch["node_count"].tolist() == [5_000] * 4
        assert XSampleLoss(tau_s="calibrated")(*z, Targets.from_batch(batch)).isfinite()
    for batch in batches(1):
        assert "node_count" not in batch
        with pytest.raises(ConfigError, match=r"no calibration.*\n.*delete"):
            XSampleLoss(tau_s="calibrated")(*z, Targets.from_batch(batch))


def test_without_a_size_images_come_as_a_list_and_a_transform_replaces_both(store: Path) -> None:
    tars = sorted(store.glob("*.tar"))
    batch = next(iter(graph_webdataset(tars, batch_size=3)))
    assert [image.shape for image in batch["image"]] == [(3, 8, 12)] * 3
    two_views = lambda image: (torch.tensor(image.size), torch.tensor(image.getpixel((0, 0))))  # noqa: E731
    sizes, colours = next(iter(graph_webdataset(tars, batch_size=3, shuffle=0, transform=two_views)))["image"]
    assert sizes.tolist() == [[12, 8]] * 3
    assert colours.tolist() == [[row, 100, 200] for row in range(3)]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG", "input.png"])
def test_image_extensions(tmp_path: Path, extension: str) -> None:
    kind = extension.lower().rsplit(".", 1)[-1].replace("jpeg", "jpg")
    tar = write_shard(
        tmp_path, 0, lambda row: [(f"{row:06d}.cls", b"0"), (f"{row:06d}.{extension}", picture(row, kind))]
    )
    batch = next(iter(graph_webdataset(tar, batch_size=SAMPLES, shuffle=0, image_pixels=8)))
    torch.testing.assert_close(batch["image"][:, 0, 4, 4].float(), torch.arange(10.0), atol=4, rtol=0)


def test_float16_embeddings_and_none(tmp_path: Path) -> None:
    tar = write_shard(tmp_path, 0, embeddings="float16")
    embedding = next(iter(graph_webdataset(tar, batch_size=SAMPLES, shuffle=0)))["embedding"]
    exact = torch.from_numpy(np.stack([embedding_of(row) for row in range(SAMPLES)]))
    torch.testing.assert_close(embedding, torch.nn.functional.normalize(exact), atol=1e-3, rtol=0)
    write_shard(tmp_path, 0, embeddings="none")
    assert "embedding" not in next(iter(graph_webdataset(tar, batch_size=SAMPLES)))


def test_samples_without_a_node_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path, 0, without_node=(2, 7))
    dataset = graph_webdataset(f"{tmp_path}/*.tar", batch_size=4, shuffle=0)
    with caplog.at_level(logging.INFO, "graphbuild"):
        assert rows_of(dataset) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/00000.tar: 8 of 10 samples used; 2 without a usable caption, 0 without an image"
    ]
    assert dataset.count_samples() == 8


def test_a_sample_that_never_had_an_image_is_left_out(tmp_path: Path) -> None:
    imageless = lambda row: members_of(row)[1:] if row == 3 else members_of(row)  # noqa: E731
    write_shard(tmp_path, 0, imageless)
    dataset = graph_webdataset(f"{tmp_path}/*.tar", batch_size=4, shuffle=0)
    assert rows_of(dataset) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert dataset.count_samples() == 9


def test_partial_false_drops_the_last_smaller_batch(store: Path) -> None:
    sizes = [len(batch["key"]) for batch in graph_webdataset(f"{store}/*.tar", batch_size=16)]
    assert sizes == [16, 16, 16, 12]
    sizes = [len(batch["key"]) for batch in graph_webdataset(f"{store}/*.tar", batch_size=16, partial=False)]
    assert sizes == [16, 16, 16]


# Where tars and sidecars are found


def test_sidecars_in_another_folder_or_url(store: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in store.glob("*.graph.parquet"):
        memory.pipe_file(f"/elsewhere/{path.name}", path.read_bytes())
        path.unlink()
    dataset = graph_webdataset(f"{store}/*.tar", sidecars="memory://elsewhere/", batch_size=8, shuffle=0)
    assert rows_of(dataset) == list(range(SHARDS * SAMPLES))
    memory.rm("/elsewhere", recursive=True)


def test_tars_from_an_fsspec_url(store: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in store.iterdir():
        memory.pipe_file(f"/remote/{path.name}", path.read_bytes())
    for urls in ("memory://remote/*.tar", "memory://remote/{00000..00005}.tar"):
        assert rows_of(graph_webdataset(urls, batch_size=8, shuffle=0)) == list(range(SHARDS * SAMPLES))
    memory.rm("/remote", recursive=True)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "no tars"),
        ("{}/none*.tar", "matches no file"),
        ("{}/{{0..1.tar", "unbalanced"),
        ("{}/x.zip", "not end"),
    ],
)
def test_patterns_that_name_no_tar(tmp_path: Path, urls: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graph_webdataset(urls.format(tmp_path) if isinstance(urls, str) else urls, batch_size=4)


@pytest.mark.parametrize("pattern", ["*.tar", "{{00000..00005}}.tar"])
def test_sidecars_without_tars_lead_to_tars_of_ones_own(store: Path, tmp_path: Path, pattern: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for tar in store.glob("*.tar"):
        tar.rename(own / tar.name)
    with pytest.raises((InputError, ConfigError), match=rf"sidecars without tars: .* sidecars='{store}'"):
        graph_webdataset(f"{store}/{pattern.format()}", batch_size=4)
    assert len(rows_of(graph_webdataset(f"{own}/{pattern.format()}", sidecars=store, batch_size=4))) == SHARDS * SAMPLES
    with pytest.raises((InputError, ConfigError)) as caught:
        graph_webdataset(f"{own}/elsewhere/{pattern.format()}", batch_size=4)
    assert "without tars" not in str(caught.value)


def test_tars_with_the_fields_inside_lead_to_those_they_were_made_from(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*members_of(0), ("000001.png", b"x"), ("000001.graph.npz", b"x")])
    with pytest.raises(InputError, match=r"0\.tar has no sidecar there; `export --layout inline`(.|\n)*made from"):
        graph_webdataset(f"{tmp_path}/*.tar", batch_size=4)
    write_tar(tmp_path / "0.tar", members_of(0))
    with pytest.raises(InputError) as caught:
        graph_webdataset(f"{tmp_path}/*.tar", batch_size=4)
    assert "inline" not in str(caught.value)


def test_a_tar_named_twice_is_refused(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"00001\.tar is named twice"):
        graph_webdataset([f"{store}/*.tar", f"{store}/00001.tar"], batch_size=4)


def test_missing_files_are_found_before_training_starts(store: Path) -> None:
    with pytest.raises(InputError, match=r"00006\.tar: there is no such tar"):
        graph_webdataset(f"{store}/{{00000..00006}}.tar", batch_size=4)
    (store / "00003.graph.parquet").unlink()
    with pytest.raises(InputError, match=r"00003\.graph\.parquet: .*00003\.tar has no sidecar"):
        graph_webdataset(f"{store}/*.tar", batch_size=4)


def test_files_that_vanish_later_are_named_too(store: Path) -> None:
    dataset = graph_webdataset(f"{store}/*.tar", batch_size=4)
    (store / "00003.tar").unlink()
    with pytest.raises(InputError, match=r"00003\.tar: there is no such tar"):
        list(dataset)
    dataset = graph_webdataset(f"{store}/00002.tar", batch_size=4)
    (store / "00002.graph.parquet").unlink()
    with pytest.raises(InputError, match=r"00002\.graph\.parquet: there is no such sidecar"):
        list(dataset)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 4, "shuffle": -1},
        {"batch_size": 4, "image_pixels": 0},
        {"batch_size": 4, "image_pixels": 8, "transform": str},
        {"batch_size": 4, "extra": "json"},
        {"batch_size": 4, "extra": ["key"]},
    ],
)
def test_options_out_of_range(store: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        graph_webdataset(f"{store}/*.tar", **options)


# Pairs that do not fit


def test_a_key_that_differs_names_both(tmp_path: Path) -> None:
    keys = [f"{row:06d}" for row in range(SAMPLES)]
    keys[4], keys[5] = keys[5], keys[4]
    write_shard(tmp_path, 0, keys=keys)
    refuse(
        tmp_path,
        r"00000\.tar: sample 4 has key '000004', but .*00000\.graph\.parquet has '000005' there \(row 4 ",
    )


def test_a_tar_with_fewer_samples_than_rows(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, lambda row: members_of(row) if row < 8 else [])
    refuse(tmp_path, r"00000\.tar holds 8 samples, .* 10 rows: the tar ends before row 8, key '000008'")


def test_a_tar_with_more_samples_than_rows(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, lambda row: members_of(row) + (members_of(77) if row == 9 else []))
    refuse(tmp_path, r"00000\.tar holds more samples than .* rows \(10\): sample 10 has key '000077'")


def test_a_tar_without_samples(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, lambda row: [])
    refuse(tmp_path, r"00000\.tar holds 0 samples")


def test_a_tar_of_another_size(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, tar_bytes=1234)
    refuse(tmp_path, r"00000\.tar has \d+ bytes; .*00000\.graph\.parquet was written for 1234")


def test_a_cut_tar(tmp_path: Path) -> None:
    tar = write_shard(tmp_path, 0)
    tar.write_bytes(tar.read_bytes()[:3000])
    rows = list(range(SAMPLES))
    write_sidecar(tar.with_suffix(".graph.parquet"), tar, rows, places={})  # the size fits, the content does not
    refuse(tmp_path, r"00000\.tar: .*(unexpected end|damaged)")


def test_a_split_sample(tmp_path: Path) -> None:
    split = lambda row: [*members_of(row), ("000001.cls", b"0")] if row == 4 else members_of(row)  # noqa: E731
    write_shard(tmp_path, 0, split)
    refuse(tmp_path, r"key '000001' stands at sample 1 and again at sample 5: a duplicate key, or one sample")


def test_a_duplicate_key(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, lambda row: members_of(3 if row == 6 else row))
    refuse(tmp_path, r"key '000003' stands at sample 3 and again at sample 6")


def test_a_member_that_stands_twice(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, lambda row: members_of(row) + members_of(row)[:1])
    refuse(tmp_path, r"00000\.tar: 000000\.png: duplicate file name")


def test_a_sample_that_lost_its_image(tmp_path: Path) -> None:
    lost = lambda row: members_of(row)[1:] if row == 3 else members_of(row)  # noqa: E731
    write_shard(tmp_path, 0, lost, places={"000003": (512, 100)})
    refuse(tmp_path, r"00000\.tar: sample 3, key '000003', has lost its image")


def test_a_sample_with_another_image_than_its_sidecar_was_written_for(tmp_path: Path) -> None:
    places = image_places(write_shard(tmp_path, 0))
    offset, size = places["000003"]
    write_shard(tmp_path, 0, places={**places, "000003": (offset, size + 1)})
    refuse(tmp_path, r"00000\.tar: sample 3, key '000003', has lost its image, or has another")


def test_a_sample_whose_sidecar_names_no_image_is_left_out_and_not_counted(tmp_path: Path) -> None:
    places = image_places(write_shard(tmp_path, 0))
    del places["000003"]
    write_shard(tmp_path, 0, places=places)
    dataset = graph_webdataset(f"{tmp_path}/*.tar", batch_size=1, shuffle=0, image_pixels=8)
    assert [key for batch in dataset for key in batch["key"]] == list(places)
    assert dataset.batches_per_epoch(0) == len(places) < SAMPLES


def test_a_sidecar_whose_bytes_are_damaged(tmp_path: Path) -> None:
    sidecar = write_shard(tmp_path, 0).with_suffix(".graph.parquet")
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[:-100])
    refuse(tmp_path, r"00000\.graph\.parquet: not a readable Parquet file")
    sidecar.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    refuse(tmp_path, r"00000\.graph\.parquet: not a readable Parquet file")


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    broken = lambda row: [(f"{row:06d}.png", picture(row)[:40])] if row == 2 else members_of(row)  # noqa: E731
    write_shard(tmp_path, 0, broken)
    refuse(tmp_path, r"00000\.tar: sample 2, key '000002': the image cannot be decoded")


def test_extra_members_that_are_absent_or_malformed(tmp_path: Path) -> None:
    tar = write_shard(tmp_path, 0, lambda row: [*members_of(row)[:1], (f"{row:06d}.meta.json", b"{")])
    refuse(tmp_path, r"sample 0, key '000000', has no member 'json'", extra=["json"])
    with pytest.raises(InputError, match=r"member 'meta\.json' is malformed"):
        list(graph_webdataset(tar, batch_size=4, extra=["meta.json"]))


def test_another_format_version(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, format_version=99)
    refuse(tmp_path, "format version 99")


def test_errors_of_worker_processes_arrive_as_they_are(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, tar_bytes=5)
    refuse(tmp_path, r"00000\.tar has \d+ bytes", workers=1)


def test_shards_of_two_graphs_do_not_mix(tmp_path: Path) -> None:
    write_shard(tmp_path, 0)
    write_shard(tmp_path, 1, graph="two")
    refuse(tmp_path, r"00001\.graph\.parquet: graph is 'two', but the first tar's sidecar has 'one'")


# Order, ranks and workers


def test_order_follows_seed_and_epoch(store: Path) -> None:
    def order(epoch: int, seed: int = 0, shuffle: int = 20) -> list[int]:
        dataset = graph_webdataset(f"{store}/*.tar", batch_size=8, seed=seed, shuffle=shuffle)
        dataset.set_epoch(epoch)
        return rows_of(dataset)

    first = order(0)
    assert sorted(first) == list(range(SHARDS * SAMPLES))
    assert order(0) == first
    assert len({tuple(order(*arguments)) for arguments in [(0,), (1,), (0, 1)]}) == 3
    assert order(3, shuffle=0) == list(range(SHARDS * SAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_deliver_each_sample_once(store: Path, workers: int) -> None:
    dataset = graph_webdataset(f"{store}/*.tar", batch_size=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert sorted(rows_of(loader)) == list(range(SHARDS * SAMPLES))


def test_workers_that_live_on_see_the_new_epoch(store: Path) -> None:
    dataset = graph_webdataset(f"{store}/*.tar", batch_size=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(rows_of(loader))
    assert orders[0] == orders[2] != orders[1]


def test_two_ranks_of_two_workers_deliver_each_sample_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        loader = DataLoader(graph_webdataset(f"{store}/*.tar", batch_size=8), batch_size=None, num_workers=2)
        ranks.append(rows_of(loader))
    assert [len(rows) for rows in ranks] == [30, 30]
    assert sorted(ranks[0] + ranks[1]) == list(range(SHARDS * SAMPLES))
    everything = graph_webdataset(f"{store}/*.tar", batch_size=8, split_by_rank=False)
    assert sorted(rows_of(everything)) == list(range(SHARDS * SAMPLES))


def test_more_workers_than_tars_leave_some_idle_but_more_ranks_are_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = graph_webdataset(f"{store}/00000.tar", batch_size=8)
    assert sorted(rows_of(DataLoader(one, batch_size=None, num_workers=2))) == list(range(SAMPLES))
    dataset = graph_webdataset(f"{store}/0000[01].tar", batch_size=8)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match=r"2 tar\(s\) for 3 ranks"):
        list(dataset)


def test_a_copy_for_another_process_remembers_its_rank(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    dataset = graph_webdataset(f"{store}/*.tar", batch_size=8, shuffle=0)
    expected = rows_of(dataset)
    copy = pickle.dumps(dataset)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert rows_of(pickle.loads(copy)) == expected


def test_sidecar_and_batches_agree_on_embeddings(store: Path) -> None:
    batch = next(iter(graph_webdataset(f"{store}/00002.tar", batch_size=SAMPLES, shuffle=0)))
    stored = Sidecar.read(f"{store}/00002.graph.parquet").embedding.astype(np.float64)
    np.testing.assert_allclose(batch["embedding"], stored / np.linalg.norm(stored, axis=1, keepdims=True), atol=1e-7)


def test_relative_paths_find_their_sidecars(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    assert rows_of(graph_webdataset("00001.tar", batch_size=8, shuffle=0)) == list(range(10, 20))


# Going on in the middle of an epoch


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Workers run out at different times: shards of 10, 3, 7, 1, 9 and 5 samples."""
    for number, samples in enumerate([10, 3, 7, 1, 9, 5]):
        write_shard(tmp_path, number, samples=samples, without_node=(number * SAMPLES + 2,))
    return tmp_path


def told(batch: dict[str, Any]) -> tuple[list[str], bytes]:
    return batch["key"], batch["image"].numpy().tobytes()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("partial", "shuffle"), [(True, 6), (False, 6), (True, 0)])
def test_a_resumed_epoch_gives_what_is_left_and_nothing_else(
    uneven: Path, workers: int, partial: bool, shuffle: int
) -> None:
    dataset = graph_webdataset(f"{uneven}/*.tar", batch_size=3, image_pixels=8, partial=partial, shuffle=shuffle)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    dataset.set_epoch(4)
    whole = [told(batch) for batch in loader]
    assert len(whole) >= 7
    for taken in range(len(whole) + 1):
        dataset.set_epoch(4, skip_batches=taken)
        assert [told(batch) for batch in loader] == whole[taken:], taken
    dataset.set_epoch(4)
    assert [told(batch) for batch in loader] == whole


def test_a_new_process_resumes_each_rank_where_it_was_stopped(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    remaining = []
    for rank, taken in ((0, 2), (1, 2), (0, 4)):
        monkeypatch.setenv("RANK", str(rank))

        def loader() -> tuple[Any, DataLoader]:
            dataset = graph_webdataset(f"{uneven}/*.tar", batch_size=2, image_pixels=8, shuffle=6)
            return dataset, DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=3)

        _, first = loader()
        stream = iter(first)
        before = [told(next(stream)) for _ in range(taken)]
        expected = [told(batch) for batch in stream]
        dataset, second = loader()
        dataset.set_epoch(0, skip_batches=taken)
        after = [told(batch) for batch in second]
        assert after == expected
        assert len(after) > 1
        remaining.append([key for keys, _ in before + after for key in keys])
    assert sorted(remaining[0] + remaining[1]) == sorted(
        f"{number * SAMPLES + i:06d}" for number, n in enumerate([10, 3, 7, 1, 9, 5]) for i in range(n) if i != 2
    )


def test_a_resumed_epoch_decodes_only_what_is_left(uneven: Path) -> None:
    seen: list[int] = []
    dataset = graph_webdataset(
        f"{uneven}/*.tar", batch_size=3, shuffle=0, transform=lambda image: seen.append(image.getpixel((0, 0))[0]) or 0
    )
    dataset.set_epoch(0, skip_batches=5)
    rows = rows_of(dataset)
    assert seen == rows
    assert len(rows) == 9 + 2 + 6 + 1 + 8 + 4 - 5 * 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_a_compressed_tar_is_counted_by_its_images(tmp_path: Path) -> None:
    """Its sidecar has no offsets, so it does not tell which samples have an image."""
    for number in range(3):
        tar = write_shard(
            tmp_path, number, lambda row: members_of(row)[1:] if row in (1, 2, 3, 4, 25) else members_of(row)
        )
        packed = gzip.compress(tar.read_bytes())
        tar.unlink()
        tar.with_suffix(".tgz").write_bytes(packed)
        rows = list(range(number * SAMPLES, (number + 1) * SAMPLES))
        write_sidecar(tar.with_suffix(".graph.parquet"), tar.with_suffix(".tgz"), rows, places={})
    dataset = graph_webdataset(f"{tmp_path}/*.tgz", batch_size=3, shuffle=0)
    loader = DataLoader(dataset, batch_size=None, num_workers=3, persistent_workers=True)
    whole = [batch["key"] for batch in loader]
    for taken in (1, 5, 7, 8):
        dataset.set_epoch(0, skip_batches=taken)
        assert [batch["key"] for batch in loader] == whole[taken:]


def test_more_batches_to_skip_than_the_epoch_has_are_refused(store: Path) -> None:
    dataset = graph_webdataset(f"{store}/*.tar", batch_size=16)
    dataset.set_epoch(2, skip_batches=5)
    with pytest.raises(InputError, match=r"skip_batches = 5: with 1 worker\(s\) epoch 2 of rank 0 has 4"):
        list(dataset)
    with pytest.raises(ConfigError, match="skip_batches = -1"):
        dataset.set_epoch(0, skip_batches=-1)


def test_a_worker_whose_tars_do_not_fill_a_batch_says_so(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every tar has samples enough for one batch of 8, none for one of 500."""
    assert list(graph_webdataset(f"{store}/*.tar", batch_size=500, partial=False)) == []
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "rank 0, worker 0 of 1: no batch" in record.message
    assert "do not fill one of 500 samples: use fewer workers or a smaller batch_size" in record.message
    caplog.clear()
    assert list(graph_webdataset(f"{store}/*.tar", batch_size=8, partial=False))
    assert "no batch" not in caplog.text
