"""How near a batch's targets come to the dense float32 ones, by where the similarities are taken from.

Mean Kullback-Leibler divergence in nats of the X-Sample target (self dropped, the other view at 1, tau_s = 0.1) from
the target of float32 embeddings, and the share of anchors with an in-batch edge, over batches of a store's nodes:
random ones, and neighbour-aware ones, made of random anchors with 7 of their nearest each.

    graphbuild embed STORE --vectors captions.npy && graphbuild index STORE
    python benchmarks/fidelity.py STORE
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from graphbuild import SampleGraph
from graphbuild.export.quantized import quantize_int8, unit_rows

TAU_S = 0.1
WITH = 7


def target(similarities: np.ndarray) -> np.ndarray:
    """Rows of the first views, float64 [B, 2 B - 1]: softmax over the other views, the image's own other view at 1."""
    logits = similarities.astype(np.float64) / TAU_S
    np.fill_diagonal(logits, 1 / TAU_S)
    others = logits.copy()
    np.fill_diagonal(others, -np.inf)
    both = np.exp(np.concatenate([others, logits], axis=1) - 1 / TAU_S)
    return both / both.sum(axis=1, keepdims=True)


def divergence(dense: np.ndarray, other: np.ndarray) -> float:
    seen = dense > 0
    return float((dense[seen] * np.log(dense[seen] / other[seen])).sum() / len(dense))


def batch(graph: SampleGraph, size: int, random: np.random.Generator, neighbor_aware: bool) -> np.ndarray:
    if not neighbor_aware:
        return random.choice(len(graph), size, replace=False)
    chosen: dict[int, None] = {}
    while len(chosen) < size:
        anchor = int(random.integers(len(graph)))
        chosen.update(dict.fromkeys([anchor, *graph.neighbors(anchor)[0][:WITH].tolist()]))
    return np.array(list(chosen)[:size])


def blocks(graph: SampleGraph, nodes: np.ndarray) -> dict[str, tuple[int, np.ndarray]]:
    """By source: bytes a node, and the similarities [B, B]."""
    vectors = graph.embeddings(nodes)
    coded = unit_rows(quantize_int8(vectors)[0])
    edges, known = graph.block(nodes, source="edges", tau_s=TAU_S)
    lists = 6 * graph.k
    return {
        "embeddings, float16": (2 * graph.d, graph.block(nodes)[0]),
        "embeddings, int8": (graph.d + 4, coded @ coded.T),
        "edges + sketch": (lists + 64, graph.block(nodes, source="sketch")[0]),
        "edges + background": (lists + 8, edges),
        "edges, absent = 0": (lists, np.where(known, edges, 0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--batches", type=int, default=3)
    options = parser.parse_args()
    begin = time.perf_counter()
    graph = SampleGraph.open(options.store)
    opened = time.perf_counter() - begin
    print(f"{len(graph):,} nodes, k = {graph.k}, d = {graph.d}, opened in {opened:.3f} s; {options.batches} batches\n")
    random = np.random.default_rng(0)
    table: dict[str, list[str]] = {}
    shares = []
    for neighbor_aware in (False, True):
        for size in (1_024, 4_096):
            found: dict[str, list[float]] = {}
            edges = []
            for _ in range(options.batches):
                nodes = batch(graph, size, random, neighbor_aware)
                vectors = graph.embeddings(nodes).astype(np.float32)
                dense = target(vectors @ vectors.T)
                known = graph.block(nodes, source="edges")[1]
                edges.append(float((known.sum(axis=1) > 1).mean()))
                for name, (held, values) in blocks(graph, nodes).items():
                    found.setdefault(f"{name} | {held}", []).append(divergence(dense, target(values)))
            shares.append(f"{np.mean(edges):.1%}")
            for name, values in found.items():
                table.setdefault(name, []).append(f"{np.mean(values):.2g}")
    kinds = [f"{kind}, B = {size:,}" for kind in ("random", "neighbour-aware") for size in (1_024, 4_096)]
    print(f"| similarities from | bytes a node | {' | '.join(kinds)} |\n|---|---|{'---|' * 4}")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| *anchors with an in-batch edge* | | {' | '.join(shares)} |\n")
    nodes = batch(graph, 4_096, random, False)
    for source in ("edges", "sketch", "embeddings"):
        graph.block(nodes, source=source)  # type: ignore[arg-type]
        runs = []
        for _ in range(9):
            begin = time.perf_counter()
            graph.block(nodes, source=source)  # type: ignore[arg-type]
            runs.append(time.perf_counter() - begin)
        print(f"block of 4,096 nodes from {source}: {1e3 * np.median(runs):.0f} ms")


if __name__ == "__main__":
    main()
