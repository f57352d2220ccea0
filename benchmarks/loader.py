"""What the graph's fields cost a data loader, and what random access costs: images decoded a second.

plain webdataset: its own pipeline (tarfile_to_samples, shuffle, batched) on the same tars, decoding and collating as
graphbuild's loaders do, for images, captions and keys alone. streaming: `graph_webdataset`. random access:
`GraphDataset`, in order and shuffled, with its fields from the sidecars or from the store. Tars (JPEGs with the 1/f
spectrum of photographs, 340 x 256, quality 90) and their store are made once, in FOLDER. Each loader has workers of
its own that live on; the first epoch of each warms the page cache; then epochs are interleaved. CPU seconds are those
of the process and its workers.

    python benchmarks/loader.py FOLDER --workers 0 1
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from graphbuild import SampleGraph
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import make_scenes
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import GraphDataset, graph_webdataset
from graphbuild.torch.images import ImageDecoder

TARS = 8
SHUFFLE = 1_000
Loader = Iterable[dict[str, Any]]


def photograph(random: np.random.Generator, size: tuple[int, int] = (340, 256)) -> bytes:
    """A JPEG whose amplitudes fall as 1/f, as those of photographs do (Field, 1987)."""
    width, height = size
    layers = np.zeros((height, width, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        grid = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        layers += (np.asarray(grid.resize(size, Image.Resampling.BICUBIC), np.float32) - 128) * (4 / cells)
    stream = io.BytesIO()
    Image.fromarray(np.clip(128 + layers / 2, 0, 255).astype(np.uint8)).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def make_store(folder: Path, samples: int) -> Path:
    """Tars of jpg, txt and json members as img2dataset writes them, and a store with sidecars beside them."""
    store = folder / f"store_{samples}"
    if (store / "manifest.json").exists():
        return store
    random, scenes = np.random.default_rng(0), make_scenes(samples)
    tars = folder / f"tars_{samples}"
    tars.mkdir(parents=True, exist_ok=True)
    for shard, rows in enumerate(np.array_split(np.arange(samples), TARS)):
        with tarfile.open(tars / f"{shard:05d}.tar", "w") as archive:
            for row in rows.tolist():
                text = f"{caption(scenes[row])}, picture {row}"
                label = json.dumps({"caption": text, "key": f"{row:09d}", "status": "success", "width": 340}).encode()
                for extension, content in (("jpg", photograph(random)), ("txt", text.encode()), ("json", label)):
                    info = tarfile.TarInfo(f"{row:09d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    target = Store(str(store))
    with Runner(workers=0) as runner:
        run_verb("embed", resolve(target, "embed", {"shards": f"{tars}/*.tar"}), target, runner)
        run_verb("index", resolve(target, "index", {"k": 64}), target, runner)
        run_verb("export", resolve(target, "export", {}), target, runner)
    return store


def plain_webdataset(tars: list[str], batch_size: int, decoder: ImageDecoder) -> wds.DataPipeline:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        keys = [sample["__key__"] for sample in samples]
        return {
            "image": decoder.collate(decoder.decode([sample["jpg"] for sample in samples], keys)[0]),
            "caption": [sample["txt"].decode() for sample in samples],
            "key": keys,
        }

    return wds.DataPipeline(
        wds.SimpleShardList(tars),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLE, initial=SHUFFLE),
        wds.batched(batch_size, collation_fn=collate),
    )


def loaders(store: Path, tars: str, batch_size: int, pixels: int, workers: int) -> dict[str, Loader]:
    """The contenders; the first is what the others are compared with."""
    common = {"num_workers": workers, "persistent_workers": workers > 0}
    sidecars = str(store / "shards")
    names = [str(path) for path in sorted(Path(tars).glob("*.tar"))]
    plain = plain_webdataset(names, batch_size, ImageDecoder(pixels, None))
    stream = graph_webdataset(names, sidecars=sidecars, batch_size=batch_size, shuffle=SHUFFLE, image_pixels=pixels)
    held = GraphDataset(names, sidecars=sidecars, image_pixels=pixels)
    mapped = GraphDataset(names, sidecars=sidecars, image_pixels=pixels, graph=SampleGraph.open(str(store)))

    def random_access(dataset: GraphDataset, sampler: Callable[..., Any]) -> Loader:
        return DataLoader(
            dataset, batch_size=batch_size, sampler=sampler(dataset), collate_fn=dataset.collate, **common
        )

    return {
        "plain webdataset": DataLoader(plain, batch_size=None, **common),
        "streaming": DataLoader(stream, batch_size=None, **common),
        "random access, in order": random_access(held, SequentialSampler),
        "random access, shuffled": random_access(held, RandomSampler),
        "random access, shuffled, fields from the store": random_access(mapped, RandomSampler),
    }


def cpu_seconds() -> float:
    me = psutil.Process()
    times = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def epoch(loader: Loader) -> tuple[int, float, float]:
    """Images, seconds and CPU seconds of one epoch."""
    cpu, started = cpu_seconds(), time.perf_counter()
    images = sum(len(batch["image"]) for batch in loader)
    return images, time.perf_counter() - started, cpu_seconds() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=4_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = make_store(options.folder, options.samples)
    tars = options.folder / f"tars_{options.samples}"
    size = sum(path.stat().st_size for path in tars.glob("*.tar")) / options.samples
    print(f"{options.samples:,} samples, {TARS} tars, {size / 1e3:.1f} kB a sample, {options.pixels} pixels,")
    print(f"batches of {options.batch_size}, medians of {options.rounds} interleaved epochs\n")
    print("| workers | loader | images/s | x plain | images / CPU s | x plain |\n|---|---|---|---|---|---|")
    for workers in options.workers:
        contenders = loaders(store, str(tars), options.batch_size, options.pixels, workers)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for turn in range(options.rounds + 1):
            first = turn % len(contenders)
            for name in [*list(contenders)[first:], *list(contenders)[:first]]:  # none always follows the same other
                images, seconds, cpu = epoch(contenders[name])
                if images != options.samples:
                    raise SystemExit(f"{name} gave {images} images of {options.samples}")
                if turn:
                    runs[name].append((images / seconds, images / cpu))
        medians = {
            name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in runs.items()
        }
        base = medians["plain webdataset"]
        for name, (wall, cpu) in medians.items():
            print(f"| {workers} | {name} | {wall:,.0f} | {wall / base[0]:.3f} | {cpu:,.0f} | {cpu / base[1]:.3f} |")


if __name__ == "__main__":
    main()
