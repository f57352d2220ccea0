"""What three captions an image cost beside one: embedding, sidecars, and a loader that draws.

Images in a tar with a CSV of image, caption (several rows an image), as Flickr8k is given. Both stores hold the same
images; runs are interleaved, each figure is the best of --rounds, and a ratio is of three captions to one.

    python benchmarks/plural.py flickr8k.tar flickr8k_captions.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tarfile
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq

from graphbuild.job.verbs import run_verb
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.sources.tars import open_tar
from graphbuild.store.store import Store
from graphbuild.torch import graph_webdataset

D = 384  # of the default encoder


def write_tar(images: Path, captions: dict[str, list[str]], target: Path, count: int) -> int:
    """The images with that many captions or more, each with its first `count` ones; returns how many."""
    import io

    written = 0
    with open_tar(str(images)) as tar, tarfile.open(target, "w") as archive:
        for sample in tar.samples():
            image = sample.image(None)
            own = captions.get(f"{Path(sample.key).name}.{image.extension}" if image else "", [])
            if image is None or len(own) < 3:
                continue
            fields = json.dumps({"captions": own[:count]}).encode()
            for extension, content in ((image.extension, tar.read(image)), ("json", fields)):
                member = tarfile.TarInfo(f"{written:06}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            written += 1
    return written


def build(folder: Path, tar: Path, k: int) -> float:
    """A store in a new folder; returns the seconds of stage encode."""
    store = Store(str(folder))
    changes = {"embed": {"shards": str(tar), "caption_member": "json:captions"}, "index": {"k": k, "engine": "exact"}}
    with Runner(workers=0) as runner:
        for verb in ("embed", "index", "export"):
            run_verb(verb, resolve(store, verb, changes.get(verb, {})), store, runner)
    records = (folder / "_state/encode").glob("*.done.json")
    return float(sum(json.loads(path.read_text())["seconds"] for path in records))


def rate(tar: Path, store: Path, captions: str) -> float:
    """Images a second of one pass."""
    dataset = graph_webdataset(
        str(tar),
        sidecars=store / "shards",
        batch_size=64,
        image_pixels=224,
        captions=captions,  # type: ignore[arg-type]
    )
    begin = time.perf_counter()
    images = sum(len(batch["image"]) for batch in dataset)
    return images / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-k", type=int, default=64)
    options = parser.parse_args()
    captions: dict[str, list[str]] = defaultdict(list)
    with options.captions.open(newline="") as file:
        for row in csv.DictReader(file):
            captions[row["image"]].append(row["caption"])
    with tempfile.TemporaryDirectory() as folder:
        tars = {count: Path(folder) / f"{count}.tar" for count in (1, 3)}
        for count, tar in tars.items():
            images = write_tar(options.images, captions, tar, count)
        seconds: dict[int, list[float]] = {1: [], 3: []}
        for turn in range(options.rounds):
            for count, tar in tars.items():
                seconds[count].append(build(Path(folder) / f"{count}_{turn}", tar, options.k))
        stores = {count: Path(folder) / f"{count}_0" for count in tars}
        nodes = {c: sum(pq.read_metadata(p).num_rows for p in s.glob("nodes/*.parquet")) for c, s in stores.items()}
        sidecars = {c: sum(p.stat().st_size for p in s.glob("shards/*.graph.parquet")) for c, s in stores.items()}
        rates: dict[int, list[float]] = {1: [], 3: []}
        for _ in range(options.rounds + 1):
            rates[1].append(rate(tars[1], stores[1], "first"))
            rates[3].append(rate(tars[3], stores[3], "draw"))
    print(f"{images:,} images, {nodes[1]:,} and {nodes[3]:,} nodes, k = {options.k}, {os.cpu_count()} cores")
    one, three = min(seconds[1]), min(seconds[3])
    print(
        f"encoding  {one:7.1f} s  {three:7.1f} s  ratio {three / one:.2f}, of {nodes[3] / nodes[1]:.2f} times the nodes"
    )
    beside = sidecars[3] / (sidecars[1] + (nodes[3] - nodes[1]) * (D + 4))  # int8 embeddings and their scales
    print(f"sidecar   {sidecars[1]:7,} B  {sidecars[3]:7,} B  ratio {sidecars[3] / sidecars[1]:.2f},", end=" ")
    print(f"{beside:.2f} of the first with the further captions' embeddings")
    print(f"loader    {max(rates[1]):7.0f}/s  {max(rates[3]):7.0f}/s  ratio {max(rates[3]) / max(rates[1]):.3f}")


if __name__ == "__main__":
    main()
