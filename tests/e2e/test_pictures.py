"""Pictures as people have them, from one end to the other: each sample shows what was drawn, upright, wherever it is
decoded, or is counted as one without an image."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from graphbuild.job.verbs import run_verb
from graphbuild.look.catalog import Catalog
from graphbuild.recipe import resolve
from graphbuild.runner import partly
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import GraphDataset, graph_webdataset
from tests.e2e.web import serving

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
SIZE = 32


def drawn() -> Image.Image:
    """Above red, below white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste((250, 0, 0), (0, 0, SIZE, SIZE // 2))
    return image


def pictures() -> dict[str, bytes]:
    """The same picture by file name, in each format and in ways that decoders by themselves get wrong."""

    def saved(image: Image.Image, format_: str, **options: object) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format_, **options)
        return stream.getvalue()

    plain = drawn()
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    transparent = plain.copy()
    transparent.putalpha(Image.fromarray(np.repeat(np.uint8([255, 0]), SIZE // 2)[:, None].repeat(SIZE, 1)))
    wide = np.asarray(plain).astype(np.uint16) * 257
    return {
        "plain.jpg": saved(plain, "JPEG", quality=95),
        "turned.jpg": saved(plain.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=lying.tobytes()),
        "transparent.png": saved(transparent, "PNG"),
        "palette.gif": saved(plain.quantize(8), "GIF"),
        "deep.ppm": f"P6\n{SIZE} {SIZE}\n65535\n".encode() + wide.astype(">u2").tobytes(),
        "cmyk.jpeg": saved(plain.convert("CMYK"), "JPEG", quality=95),
        **{f"other.{e}": saved(plain, f) for e, f in (("bmp", "BMP"), ("tif", "TIFF"), ("webp", "WEBP"))},
        **{f"new.{e}": saved(plain, f) for e, f in (("avif", "AVIF"), ("jp2", "JPEG2000"))},
    }


def shows_it(pixels: NDArray[np.uint8]) -> bool:
    """Whether an image [H, W, 3] has red above and white below, but for what compression does."""
    above, below = pixels[2 : SIZE // 2 - 2, 2:-2].astype(int), pixels[SIZE // 2 + 2 : -2, 2:-2].astype(int)
    return bool((np.abs(above.mean((0, 1)) - (250, 0, 0)) < 16).all() and (below.mean((0, 1)) > 239).all())


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    bodies = pictures()
    with serving(lambda path: bodies[path[1:]]) as address:
        yield address


@pytest.mark.parametrize("mode", ["keep_ratio", "no"])
def test_a_download_keeps_every_picture_as_it_is_to_be_seen(mode: str, served: str, cli: Cli, tmp_path: Path) -> None:
    rows = [{"url": f"{served}/{name}", "caption": name} for name in pictures()]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--resize-mode", mode, "--image-size", SIZE, "--allow-private-hosts", "--workers", 0)
    cli("download", tmp_path / "out", tmp_path / "list.jsonl", *options)
    with tarfile.open(tmp_path / "out/shards/00000.tar") as archive:
        stored = [archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    assert len(stored) == len(rows)
    for content, row in zip(stored, rows, strict=True):
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size) == ("JPEG", (SIZE, SIZE))
            if mode == "keep_ratio":
                assert image.getexif().get(ExifTags.Base.Orientation) is None
                assert shows_it(np.asarray(image)), row
    if mode == "no":
        assert {pictures()["plain.jpg"], pictures()["turned.jpg"]} < set(stored), "JPEGs keep their own bytes"


def test_a_download_tells_how_much_of_its_task_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(partly, "add", shares.append)
    store = Store(str(tmp_path / "out"))
    with serving(lambda path: pictures()["plain.jpg"] if path == "/0" else (404, "Not Found")) as address:
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{address}/{i},some\n" for i in range(4)))
        options = {"urls": str(tmp_path / "list.csv"), "allow_private_hosts": True}
        with Runner(workers=0) as runner:
            run_verb("download", resolve(store, "download", options), store, runner)
    assert shares == [0.25] * 4, "of each URL, whether it gave an image or not"


def test_a_download_tells_the_size_that_a_large_photograph_had(cli: Cli, tmp_path: Path) -> None:
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    photograph = io.BytesIO()
    Image.new("RGB", (1_000, 700)).save(photograph, "JPEG", exif=lying.tobytes())
    with serving(lambda path: photograph.getvalue()) as address:
        (tmp_path / "list.csv").write_text(f"url,caption\n{address}/0.jpg,black\n")
        cli(
            "download",
            tmp_path / "out",
            tmp_path / "list.csv",
            "--image-size",
            64,
            "--allow-private-hosts",
            "--workers",
            0,
        )
    (row,) = pq.read_table(tmp_path / "out/shards/00000.parquet").to_pylist()
    sizes = [row[name] for name in ("original_width", "original_height", "width", "height")]
    assert sizes == [700, 1_000, 64, 91]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, cli: Cli, write_tar: WriteTar) -> Path:
    """A finished store over a tar with each picture as a sample's image, and samples without one."""
    folder = tmp_path_factory.mktemp("pictures")
    members = []
    for number, (name, content) in enumerate(pictures().items()):
        key, extension = f"{number:03d}", name.partition(".")[2]
        members += [(f"{key}.depth.png", black()), (f"{key}.{extension}", content)]
        members += [(f"{key}.txt", f"a picture, {name}".encode())]
    members += [("900.heic", b"?"), ("900.txt", b"of a format that is not read"), ("901.txt", b"of no image at all")]
    write_tar(folder / "a.tar", members)
    said = cli("embed", folder / "out", "--shards", folder / "a.tar", "--workers", 0).stdout
    assert "2 samples without an image" in said
    cli("index", folder / "out", "--k", 3, "--workers", 0)
    assert "2 samples without an image" in cli("export", folder / "out", "--workers", 0).stdout
    return folder


def black() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(stream, "PNG")
    return stream.getvalue()


def test_loaders_and_catalog_show_every_picture_alike(store: Path) -> None:
    named = {"sidecars": store / "out/shards", "image_pixels": SIZE}
    (streamed,) = graph_webdataset(store / "a.tar", batch_size=99, shuffle=0, **named)
    by_index = GraphDataset(store / "a.tar", **named)
    keys = [f"{number:03d}" for number in range(len(pictures()))]
    assert streamed["key"] == [by_index[i]["key"] for i in range(len(by_index))] == keys
    catalog = Catalog(Store(str(store / "out")))
    for i, (key, name) in enumerate(zip(keys, pictures(), strict=True)):
        assert shows_it(streamed["image"][i].permute(1, 2, 0).numpy()), name
        assert (streamed["image"][i] == by_index[i]["image"]).all(), name
        shown = catalog.image(catalog.sample(key), SIZE)
        assert shown is not None
        assert shows_it(np.asarray(Image.open(io.BytesIO(shown)))), name
    assert catalog.image(catalog.sample("900"), SIZE) is None


def test_samples_without_an_image_are_in_the_report(store: Path, cli: Cli) -> None:
    cli("report", store / "out")
    funnel = json.loads((store / "out/report/report.json").read_text())["funnel"]
    assert [step["note"] for step in funnel if step["name"] == "samples"] == ["2 have no image"]
    assert "no problems" in cli("verify", store / "out").stdout


def test_another_member_is_the_image_where_it_is_named(store: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = cli("embed", out, "--shards", store / "a.tar", "--image-member", ".Depth.PNG", "--workers", 0).stdout
    assert "2 samples without an image" in said
    cli("index", out, "--k", 3, "--workers", 0)
    for layout, tars in (("sidecars", store / "a.tar"), ("clustered", out / "clustered/00000.tar")):
        cli("export", out, "--layout", layout, "--workers", 0)
        named = {"sidecars": out / "shards"} if layout == "sidecars" else {}
        (batch,) = graph_webdataset(tars, batch_size=99, shuffle=0, image_pixels=SIZE, **named)
        assert len(batch["key"]) == len(pictures())
        assert not batch["image"].any(), layout
        assert not GraphDataset(tars, image_pixels=SIZE, **named)[0]["image"].any(), layout
    assert "no problems" in cli("verify", out).stdout
    cli("embed", out, "--image-member", "jpg", "--force", "--workers", 0)
    cli("index", out, "--workers", 0)
    cli("export", out, "--layout", "sidecars", "--workers", 0)
    (batch,) = graph_webdataset(store / "a.tar", sidecars=out / "shards", batch_size=99, shuffle=0, image_pixels=SIZE)
    assert all(shows_it(image.permute(1, 2, 0).numpy()) for image in batch["image"])
    assert batch["key"] == [f"{n:03d}" for n, name in enumerate(pictures()) if name.endswith(".jpg")]
    cli("embed", out, "--image-member", "depth.png", "--force", "--workers", 0)
    refused = cli("embed", out, "--shards", store / "a.tar", "--image-member", "none", code=2)
    assert "image_member: depth.png -> not set" in refused.stderr
