"""All-points k-nearest-neighbour graphs: graphbuild's engines and its peers on the same vectors in the same run.

Every run is a process of its own on THREADS cores. Peers get float32 unit vectors in memory and are timed from there
to their finished lists; graphbuild is timed from embeddings on disk to graph shards on disk (stages prepare to search,
two warm Ray workers), so its time includes all its files. Recall@k of 2,000 sampled nodes by similarity, with a
tolerance of 1e-6, against float32 brute force, for all alike. Memory: the largest sum of the processes' PSS.

    python benchmarks/knn.py run CACHE/captions.npy --k 32 --only exact partition pynndescent --rounds 3
    python benchmarks/knn_report.py benchmarks/results/knn.jsonl

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
from pathlib import Path
from typing import Any

import numpy as np
import peers
from peers import THREADS

SAMPLE = 2_000
RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "exact": [{}],
    "partition": [{"recall": recall} for recall in (0.9, 0.95, 0.97, 0.99, 0.995)],
    **peers.SETTINGS,
}


def unit(path: str) -> np.ndarray:
    x = np.load(path).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


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
    peers.PEERS[name](x[:4_000], k, **settings)  # imports and compiles outside the clock
    memory = Memory()
    begin = time.perf_counter()
    lists = peers.PEERS[name](x, k, **settings)
    seconds = time.perf_counter() - begin
    sample = sampled(len(x))
    return {"seconds": seconds, "recall": recall(x, sample, lists[sample], k, path), "peak_bytes": memory.peak}


def run_own(name: str, path: str, k: int, settings: dict[str, Any]) -> dict[str, Any]:
    from graphbuild.job.verbs import run_verb
    from graphbuild.recipe import resolve
    from graphbuild.runner.runner import Runner
    from graphbuild.store.sharded import node_array
    from graphbuild.store.shards import shards_of
    from graphbuild.store.store import Store

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
        lists = node_array(large, shards_of(large, manifest), "graph/{}.neighbors.npy").take(sample).astype(np.int64)
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
    """Recall@k of lists [n, >= k] of sampled nodes: of the first k that are other nodes.

    The true k-th similarities are cached beside the vectors.
    """
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
    found = 0
    for node, row, least in zip(sample, lists.astype(np.int64), worst, strict=True):
        others = np.unique(row[(row != node) & (row >= 0)][:k])
        found += int((x[others] @ x[node] >= least - 1e-6).sum())
    return found / (k * len(sample))


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = {line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")}
    able = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in text.split()]
    return f"{', '.join(sorted(names)) or platform.processor()}, {os.cpu_count()} cores, {' '.join(able[-2:])}"


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
    one = verbs.add_parser("one")
    one.add_argument("job", type=json.loads)
    one.set_defaults(call=lambda o: print(json.dumps((run_peer if o.job["name"] in peers.PEERS else run_own)(**o.job))))
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
