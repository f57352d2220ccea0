"""866 odd, broken and malicious images by other people, downloaded and as ready-made tars: what decodes is kept, the
rest is rejected with its reason, no URL is lost, nothing is decoded before its size is known, and memory stays bounded.

Kept: what Pillow decodes (the data's oracle) of the formats of the web; other formats are `not an image`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import struct
import subprocess
import sys
import tarfile
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graphbuild import SampleGraph
from graphbuild.errors import ShardError
from graphbuild.sources.images import FORMATS
from graphbuild.torch import GraphDataset, graph_webdataset
from tests.e2e.web import serving

logger = logging.getLogger(__name__)
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
NO_WHITE = "its pixels are 32-bit numbers, of no known white"
MOST_BYTES = 2_000_000_000  # of memory, of the whole command
ANNOUNCED = "\x1b]0;owned\x07\x1b[2J"  # what a server says in place of `Not Found`


class Oracle(NamedTuple):
    """What Pillow alone makes of an image: whether it decodes, and of which format it is."""

    decodes: bool
    format: str


@pytest.fixture(scope="module")
def images(shared_data: Path) -> dict[str, bytes]:
    with tarfile.open(shared_data / "hostile/pillow_images.tar.xz") as archive:
        files = [member for member in archive if member.isfile()]
        found = {m.name.removeprefix("images/"): archive.extractfile(m).read() for m in files}  # type: ignore[union-attr]
    assert len(found) == 866
    return found


@pytest.fixture(scope="module")
def oracle(shared_data: Path) -> dict[str, Oracle]:
    with (shared_data / "hostile/pillow_decode_oracle.tsv").open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {row["path"]: Oracle(row["status"] == "ok", row["format"]) for row in rows}


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, bytes]], str]]:
    """Serve some bodies by path on loopback; the URL of a path is the returned one and the quoted path."""
    with contextlib.ExitStack() as servers:

        def start(bodies: dict[str, bytes]) -> str:
            found = serving(lambda path: bodies.get(urllib.parse.unquote(path[1:]), (404, ANNOUNCED)))
            return servers.enter_context(found)

        yield start


class Measured(NamedTuple):
    out: str
    err: str
    peak_bytes: int


MEASURE = """import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)"""


@pytest.fixture
def measured(program: Path, environment: dict[str, str], tmp_path: Path) -> Callable[..., Measured]:
    """Run a command in a process of its own, which must exit with 0; what it printed and the memory it took.

    A small process starts it: the kernel counts the size of the one that starts another as the other's own.
    """

    def run(*arguments: object) -> Measured:
        command = [sys.executable, "-c", MEASURE, tmp_path / "peak", program, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done
        return Measured(done.stdout, done.stderr, int((tmp_path / "peak").read_text()) * 1024)

    return run


def fetched(store: Path) -> dict[str, dict[str, Any]]:
    """img2dataset's row of every URL, by the path that it asked for."""
    rows = [row for path in sorted((store / "shards").glob("?????.parquet")) for row in pq.read_table(path).to_pylist()]
    return {urllib.parse.unquote(row["url"].split("/", 3)[3]): row for row in rows}


def in_tars(store: Path) -> dict[str, bytes]:
    found = {}
    for tar in sorted((store / "shards").glob("*.tar")):
        with tarfile.open(tar) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["keep_ratio", "no"])
def test_of_866_odd_images_the_decodable_are_kept_and_no_url_is_lost(
    mode: str,
    images: dict[str, bytes],
    oracle: dict[str, Oracle],
    serve: Callable[[dict[str, bytes]], str],
    measured: Callable[..., Measured],
    tmp_path: Path,
) -> None:
    base = serve(images)
    paths = [*images, "gone.jpg"]
    urls = [f"{base}/{urllib.parse.quote(path)}" for path in paths]
    pq.write_table(pa.table({"url": urls, "caption": paths}), tmp_path / "list.parquet")
    store = tmp_path / "store"
    options = ("--resize-mode", mode, "--allow-private-hosts", "--shard-size", 300, "--workers", 0)
    done = measured("download", store, tmp_path / "list.parquet", *options)
    assert all(c == "\n" or c.isprintable() for c in done.out + done.err), "a server's words are printed harmlessly"
    assert "Traceback" not in done.err
    assert done.peak_bytes < MOST_BYTES

    rows = fetched(store)
    assert rows.keys() == set(paths)
    members = in_tars(store)
    kept = {path for path, row in rows.items() if row["status"] == "success"}
    assert {f"{rows[path]['key']}.jpg" for path in kept} == {name for name in members if name.endswith(".jpg")}
    for path in kept:
        with Image.open(io.BytesIO(members[f"{rows[path]['key']}.jpg"])) as image:
            assert image.format in ("JPEG", "MPO")
            image.load()
    reasons = {path: row["error_message"] for path, row in rows.items() if path not in kept}
    assert all(reasons.values())
    web = {path for path in images if oracle[path].format in FORMATS}
    decodable = {path for path in web if oracle[path].decodes}
    assert kept <= decodable
    other = {path for path in images if oracle[path].decodes} - web
    assert {reasons[path] for path in other} == {"not an image"}
    assert reasons["gone.jpg"].startswith("HTTP Error 404")
    assert {reasons[path] for path in decodable - kept} <= {NO_WHITE}
    logger.info("%s: %d of %d kept; peak %.0f MB", mode, len(kept), len(images), done.peak_bytes / 1e6)
    logger.info("rejected: %s", Counter(reason.partition(":")[0] for reason in reasons.values()))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, data: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """`count` zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9, wbits=-15)
    mebibyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(bytes(count % (1 << 20))) + packer.flush()
    checksum = struct.pack(">HH", count % 65_521, 1)  # Adler-32 of so many zeros
    return b"".join([b"\x78\xda", mebibyte * (count >> 20), rest, checksum])


def bombs() -> dict[str, bytes]:
    """Images of some hundred kilobytes that decode to gigabytes, or say so."""
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    at = jpeg.getvalue().index(b"\xff\xc0") + 5
    tall = jpeg.getvalue()[:at] + struct.pack(">HH", 65_500, 65_500) + jpeg.getvalue()[at + 4 :]
    rgba = zeros(8_000 * (1 + 4 * 8_000))
    text = chunk(b"zTXt", b"comment\0\0" + zeros(200_000_000))
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF")
    return {
        "gigapixel.png": png(40_000, 40_000, 1, 0, zeros(40_000 * 5_001)),
        "just over.png": png(10_001, 10_000, 1, 0, zeros(10_000 * 1_252)),
        "64 megapixels with transparency.png": png(8_000, 8_000, 8, 6, rgba),
        "4 gigapixels declared.jpg": tall,
        "4 gigapixels declared.gif": gif.getvalue()[:6] + b"\xff\xff\xff\xff" + gif.getvalue()[10:],
        "200 MB of comment.png": png(8, 8, 8, 0, zlib.compress(bytes(9 * 8)), text),
        "2 gigapixels declared.bmp": b"BM"
        + bytes(12)
        + struct.pack("<IiiHHIIiiII", 40, 46_341, 46_341, 1, 24, *[0] * 6),
    }


def test_decompression_bombs_are_refused_before_they_are_decoded(
    serve: Callable[[dict[str, bytes]], str], measured: Callable[..., Measured], tmp_path: Path
) -> None:
    served = bombs()
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(good, "JPEG")
    served["good.jpg"] = good.getvalue()
    assert max(map(len, served.values())) < 1_000_000
    base = serve(served)
    pq.write_table(
        pa.table({"url": [f"{base}/{urllib.parse.quote(path)}" for path in served], "caption": list(served)}),
        tmp_path / "list.parquet",
    )
    store = tmp_path / "store"
    done = measured("download", store, tmp_path / "list.parquet", "--allow-private-hosts", "--workers", 0)
    reasons = {path: row["error_message"] for path, row in fetched(store).items()}
    logger.info("peak %.0f MB: %s", done.peak_bytes / 1e6, reasons)
    assert reasons.pop("good.jpg") is None
    assert all(reasons.values()), reasons
    assert reasons["just over.png"] == "too large: over 100,000,000 pixels"
    assert reasons["64 megapixels with transparency.png"] == "too large: over 25,000,000 pixels"
    assert done.peak_bytes < 1_000_000_000


@pytest.fixture(scope="module")
def tar_store(images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store over one ready-made tar of all images, as .jpg whatever they are."""
    from graphbuild.job.verbs import run_verb
    from graphbuild.recipe import resolve
    from graphbuild.runner.runner import Runner
    from graphbuild.store.store import Store

    folder = tmp_path_factory.mktemp("images")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, content in enumerate(images.values()):
            for extension, body in (("jpg", content), ("txt", f"picture {number % 40}".encode())):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        for verb, changes in (("embed", {"shards": str(folder / "a.tar")}), ("index", {"k": 5}), ("export", {})):
            run_verb(verb, resolve(store, verb, changes), store, runner)
    return folder


@pytest.mark.parametrize("pixels", [32, None])
def test_a_data_set_decodes_each_odd_image_or_names_it(
    pixels: int | None, images: dict[str, bytes], oracle: dict[str, Oracle], tar_store: Path
) -> None:
    dataset = GraphDataset(
        tar_store / "a.tar",
        sidecars=tar_store / "store/shards",
        graph=SampleGraph.open(str(tar_store / "store")),
        image_pixels=pixels,
    )
    assert len(dataset) == len(images)
    decoded, reasons = set(), Counter[str]()
    for number, path in enumerate(images):
        try:
            image = dataset[number]["image"]
        except ShardError as error:
            place, _, reason = error.cause.partition(": the image cannot be decoded (")
            assert place.endswith(f"sample {number}, key '{number:04d}'")
            reasons[reason.partition(":")[0].removesuffix(")")] += 1
            continue
        assert image.shape[0] == 3
        assert pixels is None or image.shape[1:] == (pixels, pixels)
        decoded.add(path)
    logger.info("%d of %d decoded; %s", len(decoded), len(images), reasons)
    decodable = {path for path in images if oracle[path].decodes and oracle[path].format in FORMATS}
    assert len(decodable - decoded) == reasons[NO_WHITE]
    assert not {path for path in decoded - decodable if oracle[path].format not in FORMATS}


def test_a_stream_names_the_first_image_that_it_cannot_decode(
    images: dict[str, bytes], oracle: dict[str, Oracle], tar_store: Path
) -> None:
    bad = next(n for n, path in enumerate(images) if not oracle[path].decodes)
    taken = []
    stream = graph_webdataset(
        str(tar_store / "a.tar"), batch_size=1, shuffle=0, image_pixels=16, sidecars=tar_store / "store/shards"
    )
    with pytest.raises(ShardError, match=f"key '{bad:04d}': the image cannot be decoded"):
        taken.extend(batch["key"][0] for batch in stream)
    assert taken == [f"{n:04d}" for n in range(bad)]


def test_a_store_of_broken_images_verifies_for_its_bytes_are_whole(tar_store: Path, cli: Cli) -> None:
    assert "no problems" in cli("verify", tar_store / "store").stdout
