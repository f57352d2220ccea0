"""Neighbour-aware batches: in-batch edges and planning time, beside random batches.

    python benchmarks/batches.py STORE                              a store with a graph: one row a way, and one of
                                                                    tars in neighbour order, streamed
    python benchmarks/batches.py FOLDER --synthetic 12000000        a graph of that many nodes, k = 64, made in FOLDER

The synthetic graph has the memory behaviour and reciprocity of a real one: nodes lie on a circle, a list is 64 of the
128 nearest, and ids are scattered over the circle, so that neighbours lie on other pages. Before its first epoch the
files leave the page cache. Peak memory, of the process so far, counts the mapped pages too.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graphbuild import SampleGraph
from graphbuild.export.cells import GROUP
from graphbuild.graph.batches.batches import edges_in_batches
from graphbuild.graph.batches.groups import NeighborLists, StoredGraph
from graphbuild.graph.batches.order import WAYS
from graphbuild.torch import NeighborBatchSampler

SHARD = 250_000
K = 64
REACH = 64
PATTERNS = 4_096
CHUNK = 32


class FolderGraph:
    """Neighbour lists in a folder's .npy files, memory-mapped; one sample a node."""

    def __init__(self, folder: Path) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.neighbors.npy"))]
        self.k = self._shards[0].shape[1]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    def edge_blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        first = 0
        for shard in self._shards:
            yield first, shard, np.broadcast_to(np.float16(1), shard.shape)
            first += len(shard)

    def sample_nodes(self) -> np.ndarray:
        return np.arange(len(self))


def write_synthetic(folder: Path, nodes: int) -> None:
    """Lists of `nodes` nodes: node a x p mod nodes is at place p of the circle."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    step = int(nodes * 0.6180339887)
    while np.gcd(step, nodes) != 1:
        step += 1
    back = pow(step, -1, nodes)
    offsets = np.array([distance for distance in range(-REACH, REACH + 1) if distance])
    patterns = np.stack([rng.permutation(offsets)[:K] for _ in range(PATTERNS)])
    patterns = np.take_along_axis(patterns, np.abs(patterns).argsort(axis=1, kind="stable"), axis=1)
    for shard, first in enumerate(range(0, nodes, SHARD)):
        ids = np.arange(first, min(first + SHARD, nodes))
        places = ids * back % nodes
        near = (places[:, None] + patterns[rng.integers(0, PATTERNS, len(ids))]) % nodes
        with (folder / f"{shard:05}.neighbors.npy").open("wb") as file:
            np.save(file, (near * step % nodes).astype(np.uint32))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(graph: SampleGraph | FolderGraph, batch_size: int, group: int, epochs: int) -> None:
    """A Markdown table: random batches, then each way, of the last of the epochs; and the seconds of each plan.

    The first epoch's seconds include compiling, where numba has not yet cached it on this machine.
    """
    print(f"{len(graph):,} nodes, k = {graph.k}, B = {batch_size:,}, group = {group}, one core\n")
    print("| batches | edges per anchor | anchors with an edge | groups cut | plan seconds (CPU) by epoch | peak GB |")
    print("|---|---|---|---|---|---|")
    for way in WAYS:
        sampler = NeighborBatchSampler(
            graph, batch_size, nodes=graph.sample_nodes(), neighbors=way, group=group, rank=0, ranks=1
        )
        seconds = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            start, start_cpu = time.perf_counter(), time.process_time()
            next(iter(sampler))
            seconds.append(f"{time.perf_counter() - start:.1f} ({time.process_time() - start_cpu:.1f})")
        found = sampler.report()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if way == WAYS[0]:
            rates = f"{found['random_edges_per_anchor']:.3f} | {found['random_anchors_with_edge']:.2%}"
            print(f"| random | {rates} | | | |")
        print(
            f"| {way} | {found['edges_per_anchor']:.2f} | {found['anchors_with_edge']:.2%}"
            f" | {found['groups_cut']:,} of {found['groups']:,}"
            f" | {', '.join(seconds)} | {peak:.2f} |",
            flush=True,
        )
    per_anchor, share = clustered(graph, batch_size)
    print(f"| clustered tars, chunks of {CHUNK} | {per_anchor:.2f} | {share:.2%} | | | |", flush=True)


def clustered(graph: SampleGraph | FolderGraph, batch_size: int) -> tuple[float, float]:
    """Edges per anchor, and the share with one, in batches of random chunks of `export --layout clustered`."""
    sample_nodes = graph.sample_nodes()
    order = NeighborBatchSampler(graph, CHUNK, nodes=sample_nodes, group=GROUP, rank=0, ranks=1).epoch_order()
    whole = order[: len(order) // CHUNK * CHUNK].reshape(-1, CHUNK)
    nodes = sample_nodes[np.random.default_rng(0).permutation(whole).ravel()].astype(np.uint32)
    ends = np.arange(batch_size, len(nodes) + 1, batch_size)
    lists = NeighborLists(graph)
    edges, covered = edges_in_batches(nodes, ends - batch_size, ends, lists.window(0, graph.k), lists.nodes)
    return edges / ends[-1], covered / ends[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a store, or the folder of the synthetic graph")
    parser.add_argument("--synthetic", type=int, help="nodes of a synthetic graph")
    parser.add_argument("--batch-size", type=int, default=1_024)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    if options.synthetic:
        write_synthetic(Path(options.store), options.synthetic)
    graph: StoredGraph = FolderGraph(Path(options.store)) if options.synthetic else SampleGraph.open(options.store)
    compare(graph, options.batch_size, options.group, options.epochs)


if __name__ == "__main__":
    main()
