"""What one process measures of the calibration: tokenising, lists, products, random reads, images, the disk."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from graphbuild.plan.calibration import CALIBRATED
from graphbuild.recipe import Download, Embed, Recipe
from graphbuild.store import Json, Store

LIST_ROWS, WIDTH, K, VECTORS = CALIBRATED.list_rows, CALIBRATED.d, CALIBRATED.k, CALIBRATED.nodes
FAR_VECTORS, FAR_NODES = 250_000, 400
LATENT = 10
IMAGE_PIXELS = (1_600, 1_200)
LOADED = """
import os
import graphbuild.download
from graphbuild.plan.watch import proportional
before = proportional(os.getpid())
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
print(proportional(os.getpid()) - before)
"""


def alone(root: Path, texts: list[str]) -> Json:
    """Rates of one process: tokenising, lists, numbering, float32 products, random reads, images, the disk."""
    import polars as pl

    from graphbuild.encoder import DEFAULT_ENCODER, find_encoder, open_model
    from graphbuild.encoder.tokens import tokenize
    from graphbuild.number import number_nodes
    from graphbuild.threads import torch_threads

    found: Json = {}
    model = open_model(find_encoder(DEFAULT_ENCODER), "cpu")
    with torch_threads(1):
        found["text"] = _best(lambda: tokenize(model.whole.tokenizer, texts, 256)) / len(texts)
    found["list_row"] = _list_seconds(root, texts) / LIST_ROWS
    hashes = np.random.default_rng(0).integers(1, 1 << 62, (200_000, 2), dtype=np.uint64)
    frame = pl.DataFrame({"hash_high": hashes[:, 0], "hash_low": hashes[:, 1]})
    found["number_row"] = _best(lambda: number_nodes(frame)) / len(hashes)
    found["float32_flop"] = _float32()
    found["far"] = _far_over_near()
    block = bytes(1 << 24)
    found["hash_byte"] = _best(lambda: hashlib.sha256(block)) / len(block)
    found["leader"] = _leader()
    has_downloader = importlib.util.find_spec("img2dataset") is not None
    found["image"] = _image() if has_downloader else 0.0
    found["image_memory"] = _image_memory() if has_downloader else 0.0
    found["disk"] = _disk(root)
    return found


def mixture(count: int) -> np.ndarray[Any, Any]:
    """Vectors float16 [count, WIDTH] of LATENT dimensions and a little noise: like captions', whose neighbours differ
    in similarity. (Vectors of clusters smaller than k are alike to all others: no list of those can be proved.)"""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((count, LATENT), np.float32)
    vectors = latent @ rng.standard_normal((LATENT, WIDTH), np.float32) / LATENT**0.5
    noise = 0.2 * rng.standard_normal((count, WIDTH), np.float32)
    mixed: np.ndarray[Any, Any] = (vectors + noise).astype(np.float16)
    return mixed


def _list_seconds(root: Path, texts: list[str]) -> float:
    from graphbuild import scan
    from graphbuild.stage import perform

    path = root / "list.tsv"
    path.write_text("caption\n" + "\n".join(texts[at % len(texts)] for at in range(LIST_ROWS)) + "\n")
    recipe, store = Recipe(embed=Embed(captions=str(path))), Store(str(root / "list"))
    seconds: float = perform(scan.STAGE, scan.plan(recipe, store)[0], store)["seconds"]
    return seconds


def _float32() -> float:
    """Seconds of a core for one FLOP of the float32 products by which leaders and samples are searched."""
    import torch

    from graphbuild.threads import torch_threads

    a, b = torch.randn(400, WIDTH), torch.randn(8_192, WIDTH)
    with torch_threads(1):
        return _best(lambda: a @ b.T) / (2 * 400 * 8_192 * WIDTH)


def _leader() -> float:
    from graphbuild.knn.leaders import Leaders

    some = mixture(8_192)
    return _best(lambda: Leaders.of(some)) / len(some)


def cache_bytes() -> float:
    """The last level of cache, as Linux tells it; 32 MB elsewhere."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(found[1]) * units[found[2]] for text in sizes if (found := re.match(r"(\d+)([KM])", text))]
    return float(max(known, default=32 << 20))


def _far_over_near() -> float:
    """How many times slower a candidate is scored among vectors that no cache holds, than among the calibration's."""
    from graphbuild.knn import kernels, lists

    rng = np.random.default_rng(0)
    vectors = np.tile(rng.standard_normal((1_000, WIDTH)).astype(np.float16), (FAR_VECTORS // 1_000, 1))
    nothing = np.full(FAR_NODES, np.inf)
    seconds = {}
    for among in (VECTORS, FAR_VECTORS):
        tried = []
        for _ in range(6):
            near = np.sort(rng.integers(FAR_NODES, among, (FAR_NODES, CALIBRATED.exact_length)), axis=1)
            keys = lists.pack(np.zeros(near.shape, np.float32), near)
            starts = np.array([0, len(vectors)])
            guess = np.zeros(-(-len(vectors) // 256), np.int32)
            table = (np.array([vectors.ctypes.data]), starts, guess, WIDTH * 2)
            begin = time.perf_counter()
            kernels.exact_similarities(0, keys, K, nothing, nothing, table, WIDTH)
            tried.append(time.perf_counter() - begin)
        seconds[among] = min(tried[1:])
    return max(seconds[FAR_VECTORS] / seconds[VECTORS], 1.0)


def _image() -> float:
    """Seconds of a core for a web photograph of IMAGE_PIXELS to be checked, decoded, scaled and written again."""
    from PIL import Image

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.resizer import Resizer

    from graphbuild.download import CheckedResizer

    defaults = Download()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (75, 100, 3), dtype=np.uint8)).resize(IMAGE_PIXELS)
    stream = io.BytesIO()
    coarse.save(stream, "JPEG", quality=85)
    resizer = Resizer(
        image_size=defaults.image_size,
        resize_mode=defaults.resize_mode,
        resize_only_if_bigger=True,
        encode_quality=defaults.encode_quality,
    )
    checked = CheckedResizer(resizer, defaults.max_pixels)
    return _best(lambda: checked(io.BytesIO(stream.getvalue())))


def _image_memory() -> float:
    """Bytes that img2dataset takes in a worker, loaded in a fresh process."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _disk(root: Path) -> float:
    """Bytes a second, written and flushed."""
    block = os.urandom(1 << 20)
    begin = time.perf_counter()
    with (root / "block").open("wb") as file:
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return 64 * len(block) / (time.perf_counter() - begin)


def _best(call: Any) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
