"""What it costs to add to a graph, and what recall is left after many additions, beside a build from nothing.

    python benchmarks/additions.py FOLDER VECTORS [--share 0.01] [--times 20] [--k 32] [--recall 0.95]

VECTORS: .npy [N, d], mixed. The first N / (1 + share x times) of them are indexed, then a share of that is added so
often, each time as a user does it (`embed`, `index`, in one process); then all are indexed from nothing. Printed are
the CPU seconds of each `index`, by stage, and what share of the build from nothing's an addition took.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

STAGES = ("old lists", "prepare", "codes", "moments", "join", "merge", "search", "recall")


def graphbuild(*words: object) -> tuple[float, str]:
    """CPU seconds and output of a command."""
    command = [sys.executable, "-c", "from graphbuild.cli import main; main()", *map(str, words), "--workers", "0"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr + done.stdout


def by_stage(said: str) -> Counter[str]:
    """Seconds of each stage, by its last line."""
    found = re.findall(r"^(\w[\w ]*?) +\d+ tasks?(?: in ([\d.]+) s)", said, re.MULTILINE)
    return Counter({name: float(seconds) for name, seconds in found if name in STAGES})


def index(store: Path, *options: object) -> tuple[float, Counter[str], float]:
    """CPU seconds, seconds by stage and recall of an index."""
    seconds, said = graphbuild("index", store, *options)
    return seconds, by_stage(said), json.loads((store / "manifest.json").read_text())["recall"]["recall"]


def shown(name: str, cpu: float, stages: Counter[str], recall: float, whole: float) -> str:
    parts = " | ".join(f"{stages[stage]:.1f}" for stage in STAGES)
    return f"| {name} | {cpu:.1f} | {cpu / whole:.2f} | {parts} | {recall:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--recall", type=float, default=0.95)
    asked = parser.parse_args()
    vectors = np.load(asked.vectors, mmap_mode="r")
    first = int(len(vectors) / (1 + asked.share * asked.times))
    options = ("--k", asked.k, "--engine", "partition", "--recall", asked.recall)
    parts, store, fresh = asked.folder / "parts", asked.folder / "grown", asked.folder / "fresh"
    parts.mkdir(parents=True)
    np.save(parts / "000.npy", vectors[:first])
    graphbuild("embed", store, "--vectors", parts)
    lines = [("first", *index(store, *options))]
    for time in range(1, asked.times + 1):
        begin = first + round((time - 1) * asked.share * first)
        np.save(parts / f"{time:03}.npy", vectors[begin : first + round(time * asked.share * first)])
        graphbuild("embed", store)
        lines.append((f"addition {time}", *index(store)))
    graphbuild("embed", fresh, "--vectors", parts)
    lines.append(("all, from nothing", *index(fresh, *options)))
    print(f"{first:,} vectors, {asked.times} x {asked.share:.0%} added, k = {asked.k}, recall asked {asked.recall}\n")
    print(f"| index of | CPU s | of from nothing | {' | '.join(STAGES)} | recall |")
    print("|" + "---|" * (len(STAGES) + 4))
    for line in lines:
        print(shown(*line, whole=lines[-1][1]))


if __name__ == "__main__":
    main()
