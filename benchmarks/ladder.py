"""What an index costs as nodes grow: time, CPU seconds, memory and scratch of each stage, at each size.

    python benchmarks/ladder.py run CACHE ladder.jsonl --sizes 300000 1000000 3000000 --k 32 --recall 0.95
    python benchmarks/ladder.py run CACHE ladder.jsonl --sizes 3000000 30000000 --k 15 --recall 0.95 --make-room
    python benchmarks/ladder_report.py ladder.jsonl ladder.png > ladder.md
    python benchmarks/ladder.py job CACHE corpus.parquet --size 12400000

CACHE holds captions.npy, and gets mixed_N.npy of each size (benchmarks/data.py). Each size runs in a process of its
own, `--repeats` times, with `--workers` (0: in that process); its store lies in CACHE while it runs, and takes 5 d
bytes a node and some 12 lists of candidates. A line of ladder.jsonl is one run: of each stage the seconds, the CPU
seconds of all its processes, their peak RSS and PSS and the most scratch (looked at every `--every` seconds), and minor
and major page faults. `--make-room` takes the vectors' file away once they are in the store.

`job` is the whole job of a user instead: a list of captions, each the first four fifths of the words of a real one and
the last fifth of another's, through the commands embed (a static encoder: of each word piece the vector that the
default encoder gives it), index, export and verify, and an epoch of batches of neighbours with their similarities. It
prints a row a command: seconds, CPU seconds, and the peaks of memory over all its processes, with mapped files (PSS)
and without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from data import mixed
from knn import machine
from ladder_report import table


class Watch(threading.Thread):
    """Peak sums of RSS and PSS of a process and its workers since `reset`, in bytes, of PSS also without mapped files;
    the largest of those of one process; their CPU seconds; and the bytes in a folder. Without Ray's own servers."""

    def __init__(self, every: float, process: int | None = None, folder: Path | None = None) -> None:
        super().__init__(daemon=True)
        self.every, self.process, self.folder = every, process, folder
        self.reset()
        self.start()

    def reset(self) -> None:
        self.rss = self.pss = self.own = self.largest = self.bytes = 0
        self.cpu: dict[int, float] = {}

    def look(self) -> None:
        memory = []
        for process in mine(self.process):
            cpu = process.cpu_times()
            self.cpu[process.pid] = cpu.user + cpu.system
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            kilobytes = {name: int(size) for name, size, _ in map(str.split, lines)}
            memory.append([kilobytes[name] * 1024 for name in ("Rss:", "Pss:", "Pss_File:")])
        self.rss = max(self.rss, sum(one[0] for one in memory))
        self.pss = max(self.pss, sum(one[1] for one in memory))
        own = [pss - of_files for _, pss, of_files in memory]
        self.own, self.largest = max(self.own, sum(own)), max([self.largest, *own])
        self.bytes = max(self.bytes, bytes_in(self.folder) if self.folder else 0)

    def run(self) -> None:
        while True:
            try:
                self.look()
            except (psutil.Error, OSError):  # a worker that has just ended
                time.sleep(0.1)
                continue
            time.sleep(self.every)


def mine(process: int | None = None) -> list[psutil.Process]:
    me = psutil.Process(process)
    return [me, *(child for child in me.children(recursive=True) if child.name().startswith("ray::"))]


def spent() -> np.ndarray:
    """CPU seconds, minor and major page faults of this process and its workers up to now."""
    total = np.zeros(3)
    for process in mine():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu = process.cpu_times()
        total += [cpu.user + cpu.system, int(fields[7]), int(fields[9])]
    return total


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def one(job: dict[str, Any]) -> dict[str, Any]:
    """An index of a size, measured."""
    from graphbuild.job.steps import STEPS
    from graphbuild.job.verbs import run_step, run_verb
    from graphbuild.recipe import resolve
    from graphbuild.runner.runner import Runner
    from graphbuild.store.store import Store

    cache, nodes = Path(job["cache"]), job["nodes"]
    vectors, folder = mixed(cache, nodes), cache / f"ladder_{nodes}"
    shutil.rmtree(folder, ignore_errors=True)
    store, stages = Store(str(folder)), {}
    options = {"engine": job["engine"], "k": job["k"], "recall": job["recall"], "min_recall": 0.0}
    try:
        with Runner(workers=job["workers"]) as runner:
            run_verb("embed", resolve(store, "embed", {"vectors": str(vectors)}), store, runner)
            if job["make_room"]:
                vectors.unlink()
            recipe, watch = resolve(store, "index", options), Watch(job["every"], folder=folder / "_work")
            for step in STEPS:
                if step.verb != "index":
                    continue
                watch.reset()
                begin, before = time.perf_counter(), spent()
                run_step(step, recipe, store, runner)
                seconds, used = time.perf_counter() - begin, spent() - before
                watch.look()
                stages[step.name] = {
                    "seconds": round(seconds, 3),
                    "cpu": round(used[0], 3),
                    "minor_faults": int(used[1]),
                    "major_faults": int(used[2]),
                    "rss": watch.rss,
                    "pss": watch.pss,
                    "own": watch.own,
                    "scratch": watch.bytes,
                }
        manifest = store.manifest()
        return {"stages": stages, "asked": job["recall"], "recall": manifest["recall"], "graph": manifest["graph"]}
    finally:
        if not job["keep"]:
            shutil.rmtree(folder, ignore_errors=True)


def run(asked: argparse.Namespace) -> None:
    job = {name: getattr(asked, name) for name in ("k", "recall", "engine", "workers", "every", "keep", "make_room")}
    for nodes in asked.sizes:
        mixed(asked.cache, nodes)
        for _ in range(asked.repeats):
            wanted = json.dumps({**job, "cache": str(asked.cache), "nodes": nodes})
            command = [sys.executable, __file__, "one", wanted]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            line = {**job, "nodes": nodes, "machine": machine(), **json.loads(done.stdout.splitlines()[-1])}
            with asked.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(table([line]), flush=True)


def whole_job(asked: argparse.Namespace) -> None:
    """The whole job, a row a command."""
    store = asked.cache / f"job_{asked.size}"
    given = [recombined(asked.cache, asked.captions, asked.size), "--encoder", static_encoder(asked.cache)]
    command = [Path(sys.executable).with_name("graphbuild")]
    workers = ["--workers", asked.workers]
    steps = {
        "embed": [*command, "embed", store, "--captions", *given, *workers],
        "index": [*command, "index", store, "--k", asked.k, "--recall", asked.recall, *workers],
        "export": [*command, "export", store, *workers],
        "verify": [*command, "verify", store],
        "epoch": [sys.executable, __file__, "epoch", store],
    }
    if not asked.keep:
        shutil.rmtree(store, ignore_errors=True)
    rows = ["| command | seconds | CPU seconds | PSS GB | without files GB | largest process GB | store GB |"]
    print("\n".join([*rows, "|" + "---|" * 7]), flush=True)
    said = []
    for name, arguments in steps.items():
        begin = time.perf_counter()
        with subprocess.Popen([str(one) for one in arguments], stdout=subprocess.PIPE, text=True) as process:
            watch = Watch(asked.every, process.pid)
            assert process.stdout is not None
            said += [f"{name}: {line.rstrip()}" for line in process.stdout]
        if process.returncode:
            sys.exit("\n".join([*said, f"{name} failed"]))
        memory = [f"{value / 1e9:.2f}" for value in (watch.pss, watch.own, watch.largest, bytes_in(store))]
        row = [name, f"{time.perf_counter() - begin:.0f}", f"{sum(watch.cpu.values()):.0f}", *memory]
        print("| " + " | ".join(row) + " |", flush=True)
    print("\n".join(["", "```text", *said, "```"]))


def recombined(cache: Path, corpus: Path, count: int, seed: int = 0) -> Path:
    """A parquet file of so many captions: the first four fifths of the words of one, and the last fifth of another's.

    With halves of captions the index of 12.4 million could promise a recall of 0.90 at most.
    """
    import polars as pl

    path = cache / f"recombined_{count}.parquet"
    if not path.exists():
        words = [text.split() for text in pl.read_parquet(corpus, columns=["caption"])["caption"]]
        parts = [pl.Series([" ".join(part) for part in some]) for some in zip(*map(divided, words), strict=True)]
        random = np.random.default_rng(seed)
        first, last = (part.gather(random.integers(0, len(words), count)) for part in parts)
        pl.select(pl.concat_str([first, last], separator=" ").alias("caption")).write_parquet(path)
    return path


def divided(words: list[str]) -> tuple[list[str], list[str]]:
    first = round(0.8 * len(words))
    return words[:first], words[first:]


def static_encoder(cache: Path) -> Path:
    """A folder with a static encoder: of each word piece of the default encoder the vector that it has as a text."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model

    folder = cache / "static"
    if not folder.exists():
        encoder = find_encoder(DEFAULT_ENCODER)
        tokenizer = Tokenizer.from_file(f"{encoder.folder}/tokenizer.json")
        pieces = [tokenizer.id_to_token(number).removeprefix("##") for number in range(tokenizer.get_vocab_size())]
        vectors = open_model(encoder, "cpu").encode(pieces).vectors.astype(np.float32)
        static = StaticEmbedding(tokenizer, embedding_weights=vectors)
        SentenceTransformer(modules=[static, Normalize()], device="cpu").save(str(folder))
    return folder


def epoch(asked: argparse.Namespace) -> None:
    """An epoch of a trainer on captions alone: batches of neighbours, and of each batch all similarities."""
    from graphbuild import SampleGraph
    from graphbuild.torch import NeighborBatchSampler

    graph = SampleGraph.open(str(asked.store))
    nodes = graph.sample_nodes()
    batches = samples = 0
    alike = 0.0
    for batch in NeighborBatchSampler(graph, asked.batch_size, nodes=nodes):
        similarities, _ = graph.block(nodes[batch])
        alike += float((similarities >= asked.alike).sum()) - len(batch)
        batches, samples = batches + 1, samples + len(batch)
    print(f"{samples:,} samples in {batches:,} batches; {alike / samples:.2f} others of its batch at {asked.alike}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("cache", type=Path)
    runner.add_argument("results", type=Path)
    runner.add_argument("--sizes", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000])
    runner.add_argument("--k", type=int, default=32)
    runner.add_argument("--recall", type=float, default=0.95)
    runner.add_argument("--engine", default="partition")
    runner.add_argument("--workers", type=int, default=2)
    runner.add_argument("--repeats", type=int, default=1)
    runner.add_argument("--every", type=float, default=2.0, help="seconds between looks at memory")
    runner.add_argument("--keep", action="store_true", help="leave the last store of each size in CACHE")
    runner.add_argument("--make-room", action="store_true", help="remove the vectors' file once they are in the store")
    runner.set_defaults(call=run)
    whole = verbs.add_parser("job")
    whole.add_argument("cache", type=Path)
    whole.add_argument("captions", type=Path, help="parquet with a column `caption`")
    whole.add_argument("--size", type=int, default=12_400_000)
    whole.add_argument("--k", type=int, default=32)
    whole.add_argument("--recall", type=float, default=0.95)
    whole.add_argument("--workers", type=int, default=2)
    whole.add_argument("--every", type=float, default=2.0)
    whole.add_argument("--keep", action="store_true", help="go on with the store that is there")
    whole.set_defaults(call=whole_job)
    batches = verbs.add_parser("epoch")
    batches.add_argument("store", type=Path)
    batches.add_argument("--batch-size", type=int, default=1_024)
    batches.add_argument("--alike", type=float, default=0.7)
    batches.set_defaults(call=epoch)
    single = verbs.add_parser("one")
    single.add_argument("job", type=json.loads)
    single.set_defaults(call=lambda asked: print(json.dumps(one(asked.job))))
    asked = parser.parse_args()
    asked.call(asked)


if __name__ == "__main__":
    main()
