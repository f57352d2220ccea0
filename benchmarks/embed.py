"""Captions encoded a second: graphbuild against sentence-transformers at its defaults and at its best, in turns.

Every contender encodes the same distinct captions on all cores of this process and has its own untimed warm-up;
loading the weights is not timed. Contenders: `encode` as it comes (float32, batches of 32), `encode` at other batch
sizes and dtypes (its best is the fastest of them), its multi-process pool (float32 and bfloat16), other engines
(benchmarks/embed_peers.py), and graphbuild: one Model a core, a thread each, on slices of the captions, as its workers
run; `int8` where OpenVINO is installed. Rounds are interleaved; medians are shown. On a machine that others use too,
captions a CPU second (of this process and its children) say more than captions a second.
Utilisation is the FLOP of the layers' matrices for the tokens there are, a CPU second, by those of the same matrices
multiplied alone in bfloat16 (float32 where graphbuild's precision is) in the same run. Cosines are to float32 `encode`.

    python benchmarks/embed.py CAPTIONS.parquet [--count 4000] [--rounds 3] [--results FILE.jsonl]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import torch
from embed_peers import peers
from sentence_transformers import SentenceTransformer
from torch.profiler import ProfilerActivity, profile

from graphbuild.nodes.captions import normalize
from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model
from graphbuild.nodes.encoder.tokens import tokenize
from graphbuild.nodes.fidelity import cosine

CALIBRATION = 300  # captions that are not measured, for engines that want some
CORES = len(os.sched_getaffinity(0))
Vectors = np.ndarray[Any, np.dtype[Any]]


def read_captions(path: Path, count: int) -> list[str]:
    """Distinct captions drawn at random from a parquet file's column `caption`, or from the first column of a TSV."""
    if path.suffix == ".parquet":
        column = pl.read_parquet(path, columns=["caption"])["caption"]
    else:
        table = pl.read_csv(path, separator="\t", has_header=False, quote_char=None)
        column = table[table.columns[0]]
    texts = list(dict.fromkeys(normalize(text) for text in column.drop_nulls()))
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    return [texts[at] for at in chosen]


def cpu_seconds() -> float:
    """CPU time so far of this process and of those that it started and that still run."""
    own = psutil.Process()
    times = [process.cpu_times() for process in [own, *own.children(recursive=True)]]
    return sum(found.user + found.system for found in times)


class Pool:
    """graphbuild's workers without Ray: a process a core, a model and a thread each."""

    def __init__(self, precision: str) -> None:
        self.pool = multiprocessing.get_context("spawn").Pool(CORES, _open, (precision,))

    def __call__(self, texts: list[str]) -> Vectors:
        size = -(-len(texts) // CORES)
        slices = [texts[first : first + size] for first in range(0, len(texts), size)]
        results = self.pool.map(_encode, slices, chunksize=1)
        self.tokens = sum(tokens for _, tokens, _ in results)
        self.computed = sum(computed for _, _, computed in results)
        return np.concatenate([vectors for vectors, _, _ in results])


def _open(precision: str) -> None:
    global model
    model = open_model(find_encoder(DEFAULT_ENCODER), "cpu", precision)  # type: ignore[arg-type]
    model.encode(["warm up"])


def _encode(texts: list[str]) -> tuple[Vectors, int, int]:
    found = model.encode(texts)
    return found.vectors, found.tokens, found.computed


def tokenizing_seconds(texts: list[str]) -> float:
    """CPU time of tokenising them as graphbuild does."""
    tokenizer = open_model(find_encoder(DEFAULT_ENCODER), "cpu").whole.tokenizer
    begin = time.thread_time()
    tokenize(tokenizer, texts, 256)
    return time.thread_time() - begin


def peak(precision: str) -> float:
    """FLOP a CPU second of the layers' matrix products alone at that precision, with all cores at it."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        return statistics.mean(pool.map(_peak, [precision] * CORES, chunksize=1))


def _peak(precision: str) -> float:
    torch.set_num_threads(1)
    dtype = getattr(torch, precision)
    shapes = [(384, 1152), (384, 384), (384, 1536), (1536, 384)]
    inputs = [(torch.randn(1024, a).to(dtype), torch.randn(b, a).to(dtype)) for a, b in shapes]
    work = 2 * 1024 * sum(a * b for a, b in shapes)
    rates = []
    for _ in range(40):
        begin = time.thread_time()
        for x, weight in inputs:
            torch.nn.functional.linear(x, weight)
        rates.append(work / (time.thread_time() - begin))
    return statistics.median(rates)


def time_by_operation(texts: list[str]) -> str:
    """The six torch operations on which graphbuild spends most time, and their shares of it."""
    model = open_model(find_encoder(DEFAULT_ENCODER), "cpu")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        model.encode(texts)
    times = {row.key.removeprefix("aten::"): row.self_cpu_time_total for row in record.key_averages()}
    most = sorted(times, key=times.__getitem__, reverse=True)[:6]
    return ", ".join(f"{name} {times[name] / sum(times.values()):.1%}" for name in most)


def contenders() -> dict[str, Callable[[list[str]], Vectors]]:
    folder = str(find_encoder(DEFAULT_ENCODER).folder)
    found: dict[str, Callable[[list[str]], Vectors]] = {}
    models = {
        dtype: SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
        for dtype in ("float32", "bfloat16")
    }
    found["encode, defaults"] = lambda texts: models["float32"].encode(texts, normalize_embeddings=True)
    for dtype, sizes in (("float32", (128,)), ("bfloat16", (32, 64, 128, 256))):
        for size in sizes:
            found[f"encode, {dtype}, batch {size}"] = lambda texts, dtype=dtype, size=size: models[dtype].encode(
                texts, batch_size=size, normalize_embeddings=True
            )
    for dtype in ("float32", "bfloat16"):
        pool = models[dtype].start_multi_process_pool(["cpu"] * CORES)
        found[f"encode, {dtype}, {CORES} processes"] = lambda texts, dtype=dtype, pool=pool: models[dtype].encode(
            texts, pool=pool, batch_size=128, normalize_embeddings=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--count", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--only", help="take just the contenders whose names begin so; `encode, defaults` always")
    options = parser.parse_args()
    texts = read_captions(options.captions, options.count + CALIBRATION)
    texts, calibration = texts[:-CALIBRATION], texts[-CALIBRATION:]
    own = open_model(find_encoder(DEFAULT_ENCODER), "cpu").precision
    pools = {"graphbuild": Pool(own)}
    if find_spec("openvino"):
        pools["graphbuild, int8"] = Pool("int8")
    with tempfile.TemporaryDirectory() as cache:
        runs = contenders() | peers(Path(cache), calibration) | pools
        if options.only:
            runs = {name: run for name, run in runs.items() if name.startswith((options.only, "encode, defaults"))}
        reference = runs["encode, defaults"](texts)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        vectors: dict[str, Vectors] = {}
        for run in runs.values():
            run(texts[: 64 * CORES])
        for _ in range(options.rounds):
            for name, run in runs.items():
                begin, begin_cpu = time.perf_counter(), cpu_seconds()
                vectors[name] = run(texts)
                seconds[name].append(time.perf_counter() - begin)
                cpu[name].append(cpu_seconds() - begin_cpu)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu.items()}
    count, graphbuild = len(texts), pools["graphbuild"]
    print(f"{count:,} captions, {graphbuild.tokens:,} tokens, {CORES} cores, medians of {options.rounds}\n")
    print(
        "| encoder | captions/s | captions/CPU s | tokens/s | cosine to float32: mean, least |\n|---|---|---|---|---|"
    )
    near = {name: cosine(found, reference) for name, found in vectors.items()}
    for name, median in medians.items():
        rates = [count / median, count / cpu_medians[name], graphbuild.tokens / median]
        print(
            f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in rates)} | "
            f"{near[name].mean():.6f}, {near[name].min():.6f} |"
        )
    best = min((name for name in medians if name.startswith("encode, ")), key=medians.__getitem__)
    for name in pools:
        for other in ("encode, defaults", best):
            ratio, cpu_ratio = medians[other] / medians[name], cpu_medians[other] / cpu_medians[name]
            print(f"\n{name} against `{other}`: {ratio:.2f} x; by CPU time {cpu_ratio:.2f} x", end="")
    layers = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # MiniLM's
    products = {precision: peak(precision) for precision in dict.fromkeys((own, "float32"))}
    utilisation = 2 * layers * graphbuild.tokens / cpu_medians["graphbuild"] / products[own]
    padding = 1 - graphbuild.tokens / graphbuild.computed
    tokenizing = tokenizing_seconds(texts) / cpu_medians["graphbuild"]
    print(
        f"\n\ngraphbuild: {own}, {padding:.2%} of the rows computed are empty, {tokenizing:.1%} of the time tokenises;"
    )
    rates = ", ".join(f"{rate / 1e9:.0f} in {precision}" for precision, rate in products.items())
    print(f"{utilisation:.0%} of the rate of the matrix products alone (GFLOP a CPU second: {rates})")
    print(f"by torch operation: {time_by_operation(texts)}")
    if options.results:
        with options.results.open("w") as file:
            for name, values in seconds.items():
                row = {"encoder": name, "captions": count, "tokens": graphbuild.tokens, "cores": CORES}
                row |= {"seconds": [round(value, 3) for value in values]}
                row |= {"cpu_seconds": [round(value, 3) for value in cpu[name]]}
                row |= {"mean_cosine": round(float(near[name].mean()), 6)}
                file.write(json.dumps(row | {"min_cosine": round(float(near[name].min()), 6)}) + "\n")


if __name__ == "__main__":
    main()
