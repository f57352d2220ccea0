"""Images that cannot be decoded, in both loaders: refused by name, or replaced by a whole sample of their batch."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import GraphDataset, graph_webdataset
from tests.torch.test_loader import SAMPLES, Member, members_of, write_shard

BAD = (2, 5, 6, 11, 19)
BATCHES = [range(4), range(4, 8), range(8, 12), range(12, 16), range(16, 20)]
SHOWN = [[0, 1, 3, 3], [4, 7, 7, 7], [8, 9, 10, 8], [12, 13, 14, 15], [16, 17, 18, 16]]


def damaged(rows: Any) -> Any:
    def members(row: int) -> list[Member]:
        (name, picture), *others = members_of(row)
        return [(name, picture[:40] if row in rows else picture), *others]

    return members


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for number in range(2):
        write_shard(tmp_path, number, damaged(BAD))
    return tmp_path


def red_of(image: Any) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0))[0])


def read(store: Path, loader: str, workers: int = 0, skip: int = 0, **options: Any) -> list[dict[str, Any]]:
    """The batches of 4, in order, by the stream or by index."""
    tars = f"{store}/*.tar"
    if loader == "stream":
        stream = graph_webdataset(tars, batch_size=4, shuffle=0, bad_images="replace", extra=["json"], **options)
        stream.set_epoch(0, skip_batches=skip)
        return list(DataLoader(stream, batch_size=None, num_workers=workers))
    dataset = GraphDataset(tars, bad_images="replace", **options)
    batches = [list(batch) for batch in BATCHES[skip:]]
    return list(DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate, num_workers=workers))


@pytest.mark.parametrize("loader", ["stream", "index"])
@pytest.mark.parametrize("options", [{"image_pixels": 8}, {"transform": red_of}, {}])
def test_the_next_good_sample_of_the_batch_stands_in_whole(store: Path, loader: str, options: dict[str, Any]) -> None:
    found = read(store, loader, **options)
    assert [batch["row"].tolist() for batch in found] == SHOWN
    single = GraphDataset(f"{store}/*.tar", image_pixels=8)
    for batch, rows in zip(found, SHOWN, strict=True):
        red = [image if image.ndim == 0 else image[0, 4, 4] for image in batch["image"]]
        assert [int(value) for value in red] == rows
        assert batch["key"] == [f"{row:06d}" for row in rows]
        assert batch["caption"] == [f"caption {row}" for row in rows]
        for name in ("node", "neighbors", "similarities", "background", "embedding"):
            assert torch.equal(batch[name], torch.stack([single[row][name] for row in rows])), name
        if loader == "stream":
            assert batch["json"] == [{"row": row} for row in rows]


@pytest.mark.parametrize("loader", ["stream", "index"])
def test_an_epoch_with_replaced_images_resumes_as_it_went_on(store: Path, loader: str) -> None:
    assert [batch["key"] for batch in read(store, loader, skip=1)] == [
        [f"{row:06d}" for row in rows] for rows in SHOWN[1:]
    ]
    whole = read(store, loader, workers=2)
    assert sum(len(batch["key"]) for batch in whole) == 2 * SAMPLES
    for skip in range(1, len(whole)):
        assert [batch["key"] for batch in read(store, loader, workers=2, skip=skip)] == [
            batch["key"] for batch in whole[skip:]
        ]


@pytest.mark.parametrize("loader", ["stream", "index"])
def test_each_is_named_and_counted(store: Path, loader: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graphbuild"):
        read(store, loader, image_pixels=8)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(BAD)
    for count, (row, instead, line) in enumerate(zip(BAD, [3, 7, 7, 8, 16], said, strict=True), 1):
        name, other = (f"{store}/{r // 10:05d}.tar: sample {r % 10}, key '{r:06d}'" for r in (row, instead))
        assert line.startswith(f"{name}: the image cannot be decoded (")
        assert line.endswith(f"; {other} takes its place in the batch ({count} replaced by this worker so far)")


@pytest.mark.parametrize("loader", ["stream", "index"])
@pytest.mark.parametrize("options", [{"image_pixels": 8}, {}])
def test_a_batch_without_a_good_image_is_refused(tmp_path: Path, loader: str, options: dict[str, Any]) -> None:
    for number in range(2):
        write_shard(tmp_path, number, damaged(range(4, 8)))
    with pytest.raises(InputError, match=r"sample 4, key '000004': .* cannot be decoded .*, nor any other of .* of 4"):
        read(tmp_path, loader, **options)


def test_without_the_option_the_error_names_it(store: Path) -> None:
    tars = f"{store}/*.tar"
    for read_all in (lambda: list(graph_webdataset(tars, batch_size=4)), lambda: list(GraphDataset(tars))):
        with pytest.raises(InputError, match=r'cannot be decoded [\s\S]*rewrite the tar.*bad_images="replace"'):
            read_all()
    for make in (
        lambda word: graph_webdataset(tars, batch_size=4, bad_images=word),
        lambda word: GraphDataset(tars, bad_images=word),
    ):
        with pytest.raises(ConfigError, match="bad_images = 'skip'"):
            make("skip")
