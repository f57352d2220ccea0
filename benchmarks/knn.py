"""All-points k-nearest-neighbour graphs: graphbuild's engines and its peers on the same vectors in the same run.

Every run is a process of its own on THREADS cores. Peers get float32 unit vectors in memory and are timed from there
to their finished lists; graphbuild is timed from embeddings on disk to graph shards on disk (stages prepare to search,
two warm Ray workers), so its time includes all its files. Recall@k of 2,000 sampled nodes by similarity, with a
tolerance of 1e-6, against float32 brute force, for all alike. Memory: the largest sum of the processes' PSS.

    python benchmarks/knn.py run CACHE/captions.npy --k 32 --only exact partition pynndescent --rounds 3
    python benchmarks/knn.py report benchmarks/results/knn.jsonl

faiss gets OPENBLAS_CORETYPE as the CPU has it. Needs: pip install pynndescent hnswlib usearch pipnn matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
SAMPLE = 2_000
RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "exact": [{}],
    "faiss.knn": [{}],
    "partition": [{"recall": recall} for recall in (0.9, 0.95, 0.97, 0.99, 0.995)],
    "pynndescent": [
        {"n_trees": 8, "n_iters": 3, "max_candidates": 20},
        {"n_trees": 8, "n_iters": 4, "max_candidates": 24},
        {},
        {"extra": 12},
        {"extra": 24},
    ],
    "faiss HNSW": [{"M": 16, "ef": 32, "efc": 40}, {"M": 16, "ef": 64, "efc": 80}],
    "faiss IVF": [{"nprobe": 8}, {"nprobe": 32}],
    "faiss NNDescent": [{"K": 48}],
    "hnswlib": [{"M": 16, "efc": 60, "ef": 64}],
    "usearch": [{"M": 16, "efc": 64, "ef": 64}],
    "pipnn": [{}],
}
Lists = np.ndarray


def unit(path: str) -> np.ndarray:
    x = np.load(path).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def faiss_module() -> Any:
    from graphbuild.knn.faiss_index import import_faiss

    faiss = import_faiss()
    faiss.omp_set_num_threads(THREADS)
    return faiss


def faiss_knn(x: np.ndarray, k: int) -> Lists:
    faiss = faiss_module()
    return faiss.knn(x, x, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]


def faiss_hnsw(x: np.ndarray, k: int, M: int, ef: int, efc: int) -> Lists:
    faiss = faiss_module()
    index = faiss.IndexHNSWFlat(x.shape[1], M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = efc, ef
    index.add(x)
    return index.search(x, k + 1)[1]


def faiss_ivf(x: np.ndarray, k: int, nprobe: int) -> Lists:
    faiss = faiss_module()
    index = faiss.index_factory(x.shape[1], f"IVF{int(len(x) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(x[np.random.default_rng(0).choice(len(x), min(len(x), 65_536), replace=False)])
    index.add(x)
    index.nprobe = nprobe
    return index.search(x, k + 1)[1]


def faiss_nndescent(x: np.ndarray, k: int, K: int) -> Lists:
    faiss = faiss_module()
    index = faiss.IndexNNDescentFlat(x.shape[1], K, faiss.METRIC_INNER_PRODUCT)
    index.add(x)
    return faiss.vector_to_array(index.nndescent.final_graph).reshape(len(x), K)


def pynndescent_(x: np.ndarray, k: int, extra: int = 0, **settings: Any) -> Lists:
    import pynndescent

    index = pynndescent.NNDescent(x, metric="dot", n_neighbors=k + 1 + extra, n_jobs=THREADS, **settings)
    return index.neighbor_graph[0]


def hnswlib_(x: np.ndarray, k: int, M: int, efc: int, ef: int) -> Lists:
    import hnswlib

    index = hnswlib.Index("ip", x.shape[1])
    index.init_index(len(x), ef_construction=efc, M=M)
    index.set_num_threads(THREADS)
    index.add_items(x)
    index.set_ef(ef)
    return index.knn_query(x, k + 1)[0]


def usearch_(x: np.ndarray, k: int, M: int, efc: int, ef: int) -> Lists:
    from usearch.index import Index

    index = Index(ndim=x.shape[1], metric="ip", dtype="f16", connectivity=M, expansion_add=efc, expansion_search=ef)
    index.add(np.arange(len(x)), x, threads=THREADS)
    return index.search(x, k + 1, threads=THREADS).keys


def pipnn_(x: np.ndarray, k: int) -> Lists:
    import pipnn

    found = pipnn.self_knn_graph(x, k)
    return np.asarray(found[0] if np.asarray(found[0]).dtype.kind in "iu" else found[1])


PEERS: dict[str, Callable[..., Lists]] = {
    "faiss.knn": faiss_knn,
    "faiss HNSW": faiss_hnsw,
    "faiss IVF": faiss_ivf,
    "faiss NNDescent": faiss_nndescent,
    "pynndescent": pynndescent_,
    "hnswlib": hnswlib_,
    "usearch": usearch_,
    "pipnn": pipnn_,
}


class Memory(threading.Thread):
    """The largest sum of PSS, in bytes, of this process and its children (Ray's own servers left out)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    if process == me or process.name().startswith("ray::"):
                        total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(2)


def run_peer(name: str, path: str, k: int, settings: dict[str, Any]) -> dict[str, Any]:
    x = unit(path)
    if name == "pynndescent":  # compile outside the clock
        pynndescent_(x[:2_000], k)
    memory = Memory()
    begin = time.perf_counter()
    lists = PEERS[name](x, k, **settings)
    seconds = time.perf_counter() - begin
    sample = sampled(len(x))
    own = lists[sample].astype(np.int64)
    kept = np.stack(
        [
            row[row != node][:k] if (row != node).sum() >= k else np.resize(row, k)
            for node, row in zip(sample, own, strict=True)
        ]
    )
    return {"seconds": seconds, "recall": recall(x, sample, kept, k, path), "peak_bytes": memory.peak}


def run_own(name: str, path: str, k: int, settings: dict[str, Any]) -> dict[str, Any]:
    from graphbuild.pipeline import run_verb
    from graphbuild.recipe import resolve
    from graphbuild.runner import Runner
    from graphbuild.sharded import node_array
    from graphbuild.store import Store

    folder = Path(tempfile.mkdtemp(prefix="knn-", dir=Path(path).parent))
    try:
        small, large = Store(str(folder / "small")), Store(str(folder / "large"))
        np.save(folder / "small.npy", np.load(path, mmap_mode="r")[:20_000])
        with Runner(workers=THREADS) as runner:
            for store, vectors in ((small, str(folder / "small.npy")), (large, path)):
                run_verb("embed", resolve(store, "embed", {"vectors": vectors}), store, runner)
            options = {"engine": name, "k": k, "min_recall": 0.0, "recall_sample": 1_000, **settings}
            run_verb("index", resolve(small, "index", options), small, runner)  # starts workers, compiles
            memory = Memory()
            runner.seconds.clear()
            run_verb("index", resolve(large, "index", options), large, runner)
        stages = {stage: round(seconds, 2) for stage, seconds in runner.seconds.items()}
        manifest = large.manifest()
        x = unit(path)
        sample = sampled(len(x))
        lists = node_array(large, manifest, "graph/{}.neighbors.npy").take(sample).astype(np.int64)
        return {
            "seconds": sum(seconds for stage, seconds in stages.items() if stage != "certify"),
            "recall": recall(x, sample, lists, k, path),
            "peak_bytes": memory.peak,
            "stages": stages,
            "graph": manifest["graph"],
        }
    finally:
        shutil.rmtree(folder)


def sampled(rows: int) -> np.ndarray:
    return np.sort(np.random.default_rng(1).choice(rows, min(SAMPLE, rows), replace=False))


def recall(x: np.ndarray, sample: np.ndarray, lists: np.ndarray, k: int, path: str) -> float:
    """Recall@k of lists [n, k] of sampled nodes; the true k-th similarities are cached beside the vectors."""
    cache = Path(f"{path}.{k}.kth.npy")
    if not cache.exists():
        best = np.full((len(sample), k), -np.inf, np.float32)
        for first in range(0, len(x), 8_192):
            tile = x[sample] @ x[first : first + 8_192].T
            inside = np.flatnonzero((sample >= first) & (sample < first + tile.shape[1]))
            tile[inside, sample[inside] - first] = -np.inf
            best = np.partition(np.concatenate([best, tile], axis=1), -k, axis=1)[:, -k:]
        np.save(cache, best.min(axis=1))
    worst = np.load(cache)
    hits = [
        (x[row] @ x[node] >= least - 1e-6) & (row != node)
        for node, row, least in zip(sample, lists, worst, strict=True)
    ]
    distinct = [len(np.unique(row[hit])) for row, hit in zip(lists, hits, strict=True)]
    return float(np.mean(distinct) / k)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.processor()}, {os.cpu_count()} cores"


def run(options: argparse.Namespace) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "NUMBA_NUM_THREADS": str(THREADS), "RAY_AUTH_MODE": "token"}
    if Path("/proc/cpuinfo").exists() and "avx512f" in Path("/proc/cpuinfo").read_text():
        env.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")
    for number in range(options.rounds):
        for name in options.only or SETTINGS:
            for settings in [json.loads(options.settings)] if options.settings else SETTINGS[name]:
                job = json.dumps(
                    {"name": name, "path": str(options.vectors.resolve()), "k": options.k, "settings": settings}
                )
                try:
                    done = subprocess.run(
                        [sys.executable, __file__, "one", job],
                        env=env,
                        capture_output=True,
                        text=True,
                        timeout=options.limit,
                    )
                    last = done.stdout.strip().splitlines()[-1:] or [""]
                    result = json.loads(last[0]) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
                except subprocess.TimeoutExpired:
                    result = {"error": f"longer than {options.limit} s"}
                row = {
                    "vectors": options.vectors.name,
                    "k": options.k,
                    "name": name,
                    "settings": settings,
                    "round": number,
                    **result,
                }
                row["machine"] = machine()
                options.results.parent.mkdir(exist_ok=True)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print({key: value for key, value in row.items() if key not in ("graph", "machine")}, flush=True)


def report(options: argparse.Namespace) -> None:
    """For each set of vectors a Markdown table of medians, and a plot of recall against time, a curve an engine."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    for vectors, k in sorted({(row["vectors"], row["k"]) for row in rows}):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if (row["vectors"], row["k"]) == (vectors, k) and "seconds" in row:
                groups.setdefault((row["name"], json.dumps(row["settings"])), []).append(row)
        points = [
            (
                name,
                settings,
                *(float(np.median([row[key] for row in runs])) for key in ("seconds", "recall", "peak_bytes")),
                len(runs),
            )
            for (name, settings), runs in groups.items()
        ]
        text = [f"# {vectors}, k = {k}", "", f"{rows[-1]['machine']}; medians of the runs.", ""]
        text += ["| engine | settings | seconds | recall | peak GB | runs |", "|---|---|---|---|---|---|"]
        for name, settings, seconds, found, peak, runs in sorted(points, key=lambda point: (point[0], point[2])):
            text.append(
                f"| {name} | {settings.strip('{}')} | {seconds:.1f} | {found:.4f} | {peak / 1e9:.1f} | {runs} |"
            )
        text += ["", *ratios(points)]
        base = options.results.with_name(f"{options.results.stem}_{Path(vectors).stem}_k{k}")
        base.with_suffix(".md").write_text("\n".join(text) + "\n")
        print("\n".join(text))
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for name in sorted({point[0] for point in points}):
            mine = sorted((point[3], point[2]) for point in points if point[0] == name)
            own = name in ("exact", "partition")
            axes.plot(
                *zip(*mine, strict=True),
                marker="o",
                linewidth=2.5 if own else 1,
                label=f"graphbuild {name}" if own else name,
            )
        axes.set(xlabel=f"recall@{k}", ylabel="seconds (log)", yscale="log", title=f"{vectors}, {THREADS} cores")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(base.with_suffix(".png"), dpi=120)


def ratios(points: list[tuple[str, str, float, float, float, int]]) -> list[str]:
    """graphbuild's quickest setting at a recall against the quickest peer's."""
    lines = []
    for wanted in (0.8, 0.95, 0.99, 0.9999):
        best = {}
        for name, _, seconds, found, _, _ in points:
            side = "own" if name in ("exact", "partition") else "peer"
            if found >= wanted and seconds < best.get(side, ("", np.inf))[1]:
                best[side] = (name, seconds)
        if len(best) == 2:
            (own, mine), (peer, theirs) = best["own"], best["peer"]
            lines.append(
                f"recall >= {wanted}: {own} {mine:.1f} s, best peer {peer} {theirs:.1f} s: {theirs / mine:.1f} x"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("vectors", type=Path)
    runner.add_argument("--k", type=int, default=32)
    runner.add_argument("--only", nargs="*", choices=list(SETTINGS))
    runner.add_argument("--settings", help="JSON, instead of the built-in ones")
    runner.add_argument("--rounds", type=int, default=1)
    runner.add_argument("--limit", type=int, default=1_800, help="seconds a run may take")
    runner.add_argument("--results", type=Path, default=RESULTS / "knn.jsonl")
    runner.set_defaults(call=run)
    reporter = verbs.add_parser("report")
    reporter.add_argument("results", type=Path, nargs="?", default=RESULTS / "knn.jsonl")
    reporter.set_defaults(call=report)
    one = verbs.add_parser("one")
    one.add_argument("job", type=json.loads)
    one.set_defaults(call=lambda o: print(json.dumps((run_peer if o.job["name"] in PEERS else run_own)(**o.job))))
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
