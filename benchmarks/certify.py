"""Time and memory of `graphbuild certify` on a made graph: clusters of k + 1 vectors, each the others' neighbours.

A node's list is its cluster, sorted by cosine, so nearly exact. Files lie in the page cache when the command starts;
its time holds the start of Python.

    python benchmarks/certify.py FOLDER --nodes 3000000 --dtype float16
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

BLOCK = 4_096  # clusters


def make(folder: Path, clusters: int, width: int, k: int, dtype: str) -> None:
    """vectors.npy, neighbors.npy (int32) and similarities.npy (float32): member j of cluster c is node j C + c."""
    draw = np.random.default_rng(0)
    nodes = clusters * (k + 1)
    vectors = open_memmap(folder / "vectors.npy", "w+", dtype, (nodes, width))
    neighbors = open_memmap(folder / "neighbors.npy", "w+", np.int32, (nodes, k))
    similarities = open_memmap(folder / "similarities.npy", "w+", np.float32, (nodes, k))
    for first in range(0, clusters, BLOCK):
        count = min(BLOCK, clusters - first)
        centres = draw.standard_normal((count, 1, width), np.float32)
        members = (centres + 0.7 * draw.standard_normal((count, k + 1, width), np.float32)).astype(dtype)
        unit = members.astype(np.float32)
        unit /= np.linalg.norm(unit, axis=2, keepdims=True)
        products = unit @ unit.transpose(0, 2, 1)
        order = np.argsort(-products, axis=2)[:, :, 1:]  # the first is the member itself
        sorted_ = np.take_along_axis(products, order, axis=2)
        for member in range(k + 1):
            rows = slice(member * clusters + first, member * clusters + first + count)
            vectors[rows] = members[:, member]
            neighbors[rows] = order[:, member] * clusters + np.arange(first, first + count)[:, None]
            similarities[rows] = sorted_[:, member]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--sample", type=int, default=500)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    files = [str(given.folder / name) for name in ("vectors.npy", "neighbors.npy", "similarities.npy")]
    if not Path(files[2]).exists():
        make(given.folder, given.nodes // (given.k + 1), given.width, given.k, given.dtype)
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    code = "from graphbuild.cli import main; main()"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, "certify", *files, "--sample", str(given.sample)], check=True)
    seconds, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
    print(f"{seconds:.1f} s; {cpu:.1f} s of CPU; {memory:.1f} GB of memory at most, mapped files among it")


if __name__ == "__main__":
    main()
