"""What the explorer's map costs by the number of nodes, and what it is worth beside umap-learn's.

    python benchmarks/layout.py cost 20000 100000 1000000    # nodes about random centres in four dimensions
    python benchmarks/layout.py quality VECTORS.npy          # 20,000 of them; umap-learn's too where it is installed

Cost: CPU seconds and memory of `lay_out` in a process of its own, after its loops are compiled. Quality: of a node's 15
nearest the share that is among its 15 nearest in the plane, and trustworthiness (Venna and Kaski, 2001) of 2,000 nodes,
whose ranks are taken among all; `tests/look/pages/test_map.py` compares both measures with scikit-learn.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import resource
import sys
import time
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from graphbuild.look.explore.layout import NEAR, lay_out
from graphbuild.look.explore.map import kept

Array = np.ndarray[Any, np.dtype[Any]]


def synthetic(nodes: int) -> Array:
    rng = np.random.default_rng(0)
    centres = 4 * rng.standard_normal((max(nodes // 500, 1), 4))
    points = centres[rng.integers(0, len(centres), nodes)] + 0.6 * rng.standard_normal((nodes, 4))
    return np.asarray(cKDTree(points).query(points, NEAR + 1)[1][:, 1:], np.int32)


def cost(nodes: int) -> None:
    lists = synthetic(nodes)
    lay_out(lists[:100] % 100)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    places, _ = lay_out(lists)
    seconds = time.process_time() - begin
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) + lists.nbytes
    print(
        f"| {nodes:,} | {seconds:.1f} | {1e6 * seconds / nodes:.0f} | {grown / 1e6:,.0f} | {kept(places, lists):.3f} |",
        flush=True,
    )


def trusted(vectors: Array, places: Array, some: Array) -> float:
    """Trustworthiness, of some nodes."""
    n, lost = len(vectors), 0
    found = cKDTree(places).query(places[some], NEAR + 1)[1]
    for begin in range(0, len(some), 500):
        nodes = some[begin : begin + 500]
        for node, near, scores in zip(nodes, found[begin : begin + 500], vectors[nodes] @ vectors.T, strict=True):
            scores[node] = 9
            near = near[near != node][:NEAR]
            ranks = (scores > scores[near][:, None]).sum(axis=1)
            lost += int(np.maximum(ranks - NEAR, 0).sum())
    return 1 - 2 * lost / (len(some) * NEAR * (2 * n - 3 * NEAR - 1))


def quality(path: str) -> None:
    rng = np.random.default_rng(0)
    vectors = np.load(path, mmap_mode="r")
    vectors = vectors[np.sort(rng.permutation(len(vectors))[:20_000])].astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists = np.empty((len(vectors), NEAR), np.int32)
    distances = np.empty((len(vectors), NEAR), np.float32)
    for begin in range(0, len(vectors), 500):
        scores = vectors[begin : begin + 500] @ vectors.T
        scores[np.arange(len(scores)), begin + np.arange(len(scores))] = -9
        near = np.argsort(-scores, axis=1)[:, :NEAR]
        lists[begin : begin + 500] = near
        distances[begin : begin + 500] = np.maximum(1 - np.take_along_axis(scores, near, axis=1), 0)
    some = rng.permutation(len(vectors))[:2_000]
    print(f"{len(vectors):,} nodes\n\n| layout | CPU s | neighbours kept | trustworthiness |\n|---|---|---|---|")
    for name in ("graphbuild", "umap-learn"):
        lay_out(lists[:100] % 100)
        if name == "umap-learn" and importlib.util.find_spec("umap") is None:
            print("umap-learn is not installed")
            continue
        if name == "umap-learn":
            import umap

            itself = np.arange(len(lists))[:, None]
            knn = np.hstack([itself, lists]), np.hstack([0 * itself, distances]).astype(np.float32), None
            mapper = umap.UMAP(n_neighbors=NEAR + 1, metric="cosine", precomputed_knn=knn, random_state=0)
        begin = time.process_time()
        places = lay_out(lists)[0] if name == "graphbuild" else mapper.fit_transform(vectors)
        seconds = time.process_time() - begin
        row = f"{kept(places, lists):.3f} | {trusted(vectors, places, some):.3f}"
        print(f"| {name} | {seconds:.1f} | {row} |", flush=True)


def main() -> None:
    if sys.argv[1] == "quality":
        quality(sys.argv[2])
        return
    print("| nodes | CPU s | microseconds a node | MB, with the lists | neighbours kept |\n|---|---|---|---|---|")
    for nodes in map(int, sys.argv[2:]):
        process = multiprocessing.get_context("spawn").Process(target=cost, args=(nodes,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
