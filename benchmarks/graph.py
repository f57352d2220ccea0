"""What a trainer pays to open a graph and to get a batch's similarities from it.

Two stores are made in FOLDER, of random lists (k = 64, d = 384, 10,000 nodes a shard): one with the published CC12M's
12.4 million nodes, whose vectors are files of their true size without content, and one of 160,000 nodes, which has 10
million edges. The first is opened in fresh processes, after its files left the page cache and again. Blocks are
timed on the second, one core, over batches of random nodes: the median, and in brackets the least.

    python benchmarks/graph.py FOLDER
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from graphbuild import SampleGraph
from graphbuild.graph.sample_graph import Source
from graphbuild.graph.sketch import BYTES, DIMENSIONS
from graphbuild.store.layout import BASIS, shard_name
from graphbuild.store.shards import Shard, write_shards
from graphbuild.store.store import Store

K, D, SHARD = 64, 384, 10_000
LARGE, SMALL = 12_400_000, 160_000
BATCHES = (1_024, 4_096)
ROUNDS = 15
OPEN = """
import sys, time
from graphbuild import SampleGraph
begin = time.perf_counter()
graph = SampleGraph.open(sys.argv[1])
opened = time.perf_counter()
graph.neighbors([0, len(graph) // 2, len(graph) - 1])
print(opened - begin, time.perf_counter() - opened)
"""


def make_store(folder: Path, nodes: int, *, content: bool) -> Store:
    """A store as `index` leaves it, as far as SampleGraph reads it; without `content`, its vectors are holes."""
    store = Store(str(folder))
    if store.exists("manifest.json"):
        return store
    rng, shards = np.random.default_rng(0), []
    for name in ("nodes", "graph"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, nodes, SHARD)):
        count = min(SHARD, nodes - first)
        shards.append(Shard(shard_name(number), first, count, first, count, None))
        stem = folder / "graph" / f"{number:05}"
        # One of the 64 equal spans of ids each: no list has a neighbour twice.
        steps = rng.integers(0, nodes // K, (count, K)) + np.arange(K) * (nodes // K)
        np.save(f"{stem}.neighbors.npy", steps.astype(np.uint32))
        np.save(f"{stem}.similarities.npy", np.sort(rng.random((count, K), np.float32))[:, ::-1].astype(np.float16))
        np.save(f"{stem}.background.npy", rng.random((count, 2), np.float32) / 10)
        np.save(f"{stem}.sketch.npy", rng.integers(0, 256, (count, BYTES), np.uint8))
        vectors = np.lib.format.open_memmap(
            folder / "nodes" / f"{number:05}.npy", mode="w+", dtype=np.float16, shape=(count, D)
        )
        if content:
            vectors[:] = rng.standard_normal((count, D), np.float32)
    np.save(folder / BASIS, rng.standard_normal((DIMENSIONS, D), np.float32))
    store.write_json(
        "manifest.json",
        store.manifest()
        | {
            "stages": {"certify": {}},
            "graph": {"k": K, "fingerprint": "random"},
            "embeddings": {"d": D, "encoder": "random"},
            "recall": {},
            **write_shards(store, shards),
        },
    )
    return store


def empty_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_seconds(store: Store, *, cached: bool) -> tuple[float, float]:
    """Seconds to open the graph in a new process, without imports, and then to read three nodes' lists."""
    if not cached:
        empty_page_cache(Path(store.root))
    answer = subprocess.run([sys.executable, "-c", OPEN, store.url], check=True, capture_output=True, text=True)
    opened, read = answer.stdout.split()
    return float(opened), float(read)


def block_milliseconds(graph: SampleGraph, source: Source, batch_size: int) -> list[float]:
    rng, found = np.random.default_rng(0), []
    for _ in range(ROUNDS):
        nodes = rng.permutation(len(graph))[:batch_size]
        begin = time.perf_counter()
        graph.block(nodes, source=source)
        found.append(1_000 * (time.perf_counter() - begin))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    large = make_store(options.folder / "large", LARGE, content=False)
    small = make_store(options.folder / "small", SMALL, content=True)

    print(f"{LARGE:,} nodes, k = {K}, {LARGE // SHARD:,} shards\n")
    print("| page cache | open, seconds | then three nodes' lists, seconds |\n|---|---|---|")
    for name, cached in (("empty", False), ("warm", True)):
        opened, read = (
            statistics.median(part)
            for part in zip(*(open_seconds(large, cached=cached) for _ in range(5)), strict=True)
        )
        print(f"| {name} | {opened:.3f} | {read:.3f} |", flush=True)

    graph = SampleGraph.open(small.url)
    print(f"\nblock of a graph with {SMALL * K:,} edges, one core, {ROUNDS} batches, milliseconds\n")
    print("| source | " + " | ".join(f"B = {size:,}" for size in BATCHES) + " |\n|---|" + "---|" * len(BATCHES))
    for source in get_args(Source):
        times = [block_milliseconds(graph, source, size) for size in BATCHES]
        cells = " | ".join(f"{statistics.median(found):.1f} ({min(found):.1f})" for found in times)
        print(f"| {source} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
