"""Peak memory of `graphbuild embed` by the number of captions: of its workers, and of the process that leads them.

The job is the real one, `graphbuild embed` with two workers on a Ray of its own. Captions are distinct: a list's, each
with a number behind. The encoder is a static one of random weights (the default one would take half an hour for a
million); `--default-encoder` takes all-MiniLM-L6-v2 itself. Peaks are the kernel's own (VmHWM): none falls between two
looks.

    python benchmarks/embed_memory.py CAPTIONS.parquet FOLDER [--counts 100000 300000 1000000] [--default-encoder]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
from embed import read_captions
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, StaticEmbedding
from transformers import AutoTokenizer

from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder

LOOK_SECONDS = 0.2


def make_captions(path: Path, source: Path, count: int) -> None:
    texts = read_captions(source, count)
    numbered = [f"{texts[at % len(texts)]} {at // len(texts)}" for at in range(count)]
    pl.DataFrame({"caption": numbered}).write_parquet(path)


def make_encoder(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(find_encoder(DEFAULT_ENCODER).folder).backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=384), Normalize()]).save(str(folder))
    return folder


def peaks(command: list[str]) -> tuple[float, float, float]:
    """Peak resident megabytes of the largest worker and of the leading process, and seconds, of a command."""
    begin = time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    worker = leader = 0.0
    while job.poll() is None:
        time.sleep(LOOK_SECONDS)
        try:
            leader = max(leader, high_water(job.pid))
            for child in psutil.Process(job.pid).children(recursive=True):
                if child.name().startswith("ray::Worker"):
                    worker = max(worker, high_water(child.pid))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # it ended between two lines
    if job.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return worker, leader, time.perf_counter() - begin


def high_water(process: int) -> float:
    """Peak resident megabytes of a process so far; 0 of one that has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1000 * 1.024 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--default-encoder", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    encoder = DEFAULT_ENCODER if options.default_encoder else str(make_encoder(options.folder / "encoder"))
    print("| distinct captions | largest worker, MB | leading process, MB | seconds |\n|---|---|---|---|", flush=True)
    for count in options.counts:
        captions, store = options.folder / f"captions_{count}.parquet", options.folder / "store"
        if not captions.exists():
            make_captions(captions, options.captions, count)
        shutil.rmtree(store, ignore_errors=True)
        command = [str(Path(sys.executable).with_name("graphbuild")), "embed", str(store), "--captions", str(captions)]
        worker, leader, seconds = peaks([*command, "--encoder", encoder, "--workers", "2"])
        print(f"| {count:,} | {worker:,.0f} | {leader:,.0f} | {seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
