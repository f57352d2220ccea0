"""Data-efficient subsets: seconds, of the CPU too, and peak memory of each method, each in a process of its own.

    python benchmarks/subsets.py 1200000 [--share 0.3] [--method sas ...]      a graph of that many nodes, k = 32

The graph is made in memory and has the access pattern and reciprocity of a real one: nodes lie on a circle, a list is
32 of the 64 nearest, and ids are scattered over the circle, so that neighbours lie on other pages; d = 384. A tenth of
the nodes have two rows. Peak memory is what the method adds to the graph's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator

import numpy as np

from graphbuild import SampleGraph
from graphbuild.graph.edges import Edges
from graphbuild.graph.select.subsets import METHODS, choose

K, D = 32, 384
REACH = 32
PATTERNS = 4_096
SHARD = 100_000


class Made:
    """What `choose` asks of a SampleGraph."""

    k, d = K, D

    def __init__(self, nodes: int) -> None:
        draw = np.random.default_rng(0)
        self._nodes = nodes
        step = int(nodes * 0.618) | 1
        while np.gcd(step, nodes) > 1:
            step += 2
        places = np.empty(nodes, np.int64)
        places[np.arange(nodes) * step % nodes] = np.arange(nodes)
        around = np.concatenate([np.arange(-REACH, 0), np.arange(1, REACH + 1)])
        patterns = np.array([np.sort(draw.permutation(around)[:K]) for _ in range(PATTERNS)])
        noise = draw.random(65_536) * 0.2
        self._blocks = []
        for first in range(0, nodes, SHARD):
            place = places[first : first + SHARD, None]
            offset = patterns[draw.integers(0, PATTERNS, len(place))]
            similarity = 0.9 - 0.4 * np.abs(offset) / REACH - noise[(2 * place + offset) % len(noise)]  # of the pair
            order = np.argsort(-similarity, axis=1)
            offset, similarity = np.take_along_axis(offset, order, 1), np.take_along_axis(similarity, order, 1)
            lists = ((place + offset) % nodes * step % nodes).astype(np.uint32)
            self._blocks.append((first, lists, similarity.astype(np.float16)))
        self._rows = np.sort(np.concatenate([np.arange(nodes), np.arange(0, nodes, 10)]))
        self._vectors = draw.standard_normal((65_521, D)).astype(np.float16)

    def __len__(self) -> int:
        return self._nodes

    def edge_blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        yield from self._blocks

    def symmetrized(self) -> Edges:
        return SampleGraph.edges(self).symmetrized()  # type: ignore[arg-type]

    def sample_nodes(self) -> np.ndarray:
        return self._rows

    def embeddings(self, nodes: np.ndarray) -> np.ndarray:
        """Unit vectors made as the store's are read: gathered, widened and normalised."""
        vectors = self._vectors[nodes % len(self._vectors)].astype(np.float32)
        vectors += self._vectors[nodes // 4_096 % 97] * 2
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measured(nodes: int, share: float, method: str) -> None:
    tiny = Made(1_000)
    given = {"scores": np.random.default_rng(1).random(len(tiny.sample_nodes()))} if method == "sensitivity" else {}
    choose(tiny, 100, method, seed=0, **given)  # type: ignore[arg-type]  # loops are compiled now, or read from disk
    graph = Made(nodes)
    rows = len(graph.sample_nodes())
    given = {"scores": np.random.default_rng(1).random(rows)} if method == "sensitivity" else {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    chosen = choose(graph, int(share * rows), method, seed=0, **given)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{method:12}{nodes:12,} nodes{len(chosen):12,} rows{seconds:9.1f} s, of the CPU{cpu:7.1f} s"
        f"{added / 1e9:8.2f} GB{added / nodes:8.0f} B a node",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--method", choices=list(METHODS), nargs="*", default=list(METHODS))
    options = parser.parse_args()
    for method in options.method:
        process = multiprocessing.get_context("spawn").Process(
            target=measured, args=(options.nodes, options.share, method)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
