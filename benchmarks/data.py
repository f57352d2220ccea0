"""Vectors for benchmarks, made once into a cache folder: real caption embeddings, and larger sets mixed from them.

captions: the distinct captions of a parquet file (column `caption`), encoded by all-MiniLM-L6-v2, float16 [n, 384].
mixed N: N vectors, each at random between a random caption's and that of one of its 5 nearest, scaled to unit norm.
That keeps the local dimension: --check prints Levina and Bickel's estimate (NIPS 2004) by the 10 to 30 nearest of
sampled nodes, each set thinned to the number of captions (5, for with 15 nearest it rises from 3.8 to 4.8).

    python benchmarks/data.py CACHE --captions corpus.parquet [--mixed 3000000] [--check]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

BLOCK = 65_536
NEAREST = 5


def captions(cache: Path, corpus: Path) -> Path:
    path = cache / "captions.npy"
    if not path.exists():
        import pyarrow.parquet as pq

        from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model

        texts = pq.read_table(corpus, columns=["caption"])["caption"].to_pylist()
        np.save(path, open_model(find_encoder(DEFAULT_ENCODER), "cpu").encode(texts).vectors)
    return path


def mixed(cache: Path, rows: int, seed: int = 0) -> Path:
    path = cache / f"mixed_{rows}.npy"
    if not path.exists():
        base = np.load(cache / "captions.npy")
        near = graph(cache / "captions.npy", NEAREST)
        random = np.random.default_rng(seed)
        out = np.lib.format.open_memmap(path, "w+", np.float16, (rows, base.shape[1]))
        for first in range(0, rows, BLOCK):
            count = min(BLOCK, rows - first)
            own = random.integers(0, len(base), count)
            a, b = (base[ids].astype(np.float32) for ids in (own, near[own, random.integers(0, NEAREST, count)]))
            moved = a + random.random((count, 1), np.float32) * (b - a)
            out[first : first + count] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return path


def graph(path: Path, k: int) -> np.ndarray:
    """Near neighbours [n, k] of all vectors of a file, by graphbuild itself at recall 0.95."""
    from graphbuild.job.verbs import run_verb
    from graphbuild.recipe import resolve
    from graphbuild.runner.runner import Runner
    from graphbuild.store.sharded import node_array
    from graphbuild.store.shards import shards_of
    from graphbuild.store.store import Store

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, Runner(workers=2) as runner:
        store = Store(f"{folder}/store")
        run_verb("embed", resolve(store, "embed", {"vectors": str(path)}), store, runner)
        run_verb("index", resolve(store, "index", {"k": k, "engine": "partition", "recall": 0.95}), store, runner)
        manifest = store.manifest()
        nodes = manifest["stages"]["search"]["counts"]["nodes"]
        return node_array(store, shards_of(store, manifest), "graph/{}.neighbors.npy").span(0, nodes).astype(np.int64)


def neighbors(vectors: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """The k nearest of these nodes, ids [n, k], by float32 products."""
    x = torch.from_numpy(vectors).float()
    found = []
    for at in range(0, len(ids), 1_024):
        tile = x[ids[at : at + 1_024]] @ x.T
        found.append(tile.topk(k + 1, dim=1).indices[:, 1:])
    return torch.cat(found).numpy()


def dimension(vectors: np.ndarray, sample: int = 500, seed: int = 0) -> float:
    """Levina and Bickel's local dimension, averaged over k = 10..30 (their equation 9) and sampled nodes."""
    ids = np.sort(np.random.default_rng(seed).choice(len(vectors), sample, replace=False))
    near = neighbors(vectors, ids, 30)
    x = vectors.astype(np.float32)
    distances = np.log(np.maximum(np.linalg.norm(x[near] - x[ids][:, None], axis=2), 1e-6)).astype(np.float64)
    return float(
        np.mean([(k - 1) / (distances[:, k - 1 : k] - distances[:, : k - 1]).sum(axis=1).mean() for k in range(10, 31)])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--captions", type=Path, help="parquet with a column `caption`")
    parser.add_argument("--mixed", type=int, nargs="*", default=[])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    made = [captions(options.cache, options.captions)] + [mixed(options.cache, rows) for rows in options.mixed]
    if options.check:
        real = np.load(made[0])
        for path in made:
            vectors = np.load(path, mmap_mode="r")
            count = min(len(real), len(vectors))
            same = vectors[np.sort(np.random.default_rng(1).choice(len(vectors), count, replace=False))]
            found = dimension(np.asarray(same))
            print(f"{path.name}: {len(vectors):,} vectors, local dimension {found:.1f} at {count:,}")


if __name__ == "__main__":
    main()
