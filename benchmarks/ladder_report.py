"""The page of ladder.jsonl (benchmarks/ladder.py): what an index costs as nodes grow, and what was forecast.

    python benchmarks/ladder_report.py ladder.jsonl [ladder.png] [--peers peers.jsonl] > ladder.md

A table of medians for each k, with the exponent of growth between the sizes, what was forecast from each size for the
next, and what other libraries took for the same vectors (benchmarks/knn.py). The plot has both axes logarithmic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any


def table(lines: list[dict[str, Any]]) -> str:
    """Medians a size: microseconds of CPU a node by stage, and what the whole took; then exponents of growth."""
    runs = defaultdict(list)
    for line in lines:
        runs[line["nodes"]].append(line)
    names = [name for name in lines[0]["stages"] if any(line["stages"][name]["cpu"] >= 0.01 for line in lines)]
    rows = [["nodes", *names, "all", "seconds", "peak RSS GB", "peak PSS GB", "unmapped GB", "scratch GB", "recall"]]
    for nodes, some in sorted(runs.items()):

        def median(of: str, name: str, some: list[dict[str, Any]] = some) -> float:
            return statistics.median(line["stages"][name][of] for line in some)

        each = [median("cpu", name) / nodes * 1e6 for name in names]
        most = [max(median(of, name) for name in names) / 1e9 for of in ("rss", "pss", "own", "scratch")]
        seconds = sum(median("seconds", name) for name in names)
        recall = statistics.median(line["recall"]["recall"] for line in some)
        rows.append([f"{nodes:,}", *(f"{cpu:.1f}" for cpu in [*each, sum(each)]), f"{seconds:.0f}"])
        rows[-1] += [*(f"{value:.2f}" for value in most), f"{recall:.4f}"]
    cells = ["| " + " | ".join(row) + " |" for row in rows]
    told = [f"- {one}." for one in (*growth(runs), *forecast(runs))]
    return "\n".join([cells[0], "|" + "---|" * len(rows[0]), *cells[1:], "", *told])


def growth(runs: dict[int, list[dict[str, Any]]]) -> list[str]:
    """The exponent with which the CPU seconds grew from each size to the next."""
    sizes = sorted(runs)
    total = {
        nodes: statistics.median(sum(stage["cpu"] for stage in line["stages"].values()) for line in runs[nodes])
        for nodes in sizes
    }
    return [
        f"From {a:,} to {b:,} nodes CPU seconds grow by exponent {math.log(total[b] / total[a]) / math.log(b / a):.2f}"
        for a, b in itertools.pairwise(sizes)
    ]


def forecast(runs: dict[int, list[dict[str, Any]]]) -> list[str]:
    """What was forecast from each size for the next, over what it took: a size's seconds and scratch times the plan's
    ratio of both sizes; of the stages with a twentieth of the whole or more."""
    from graphbuild.job.plan.costs import room

    said = []
    for sizes in itertools.pairwise(sorted(runs)):
        before, after = (runs[nodes] for nodes in sizes)
        planned = [plan(lines[0]) for lines in (before, after)]
        scratch = [room([costs[name] for name in costs if name not in ("search", "certify")]) for costs in planned]
        seconds = []  # what those two write is the graph
        for name in before[0]["stages"]:
            took = [statistics.median(line["stages"][name]["seconds"] for line in lines) for lines in (before, after)]
            if name in planned[0]:
                seconds.append((name, took[0] * planned[1][name].seconds / planned[0][name].seconds, took[1]))
        whole = [sum(stage[at] for stage in seconds) for at in (1, 2)]
        shown = [f"{name} {said / took:.2f}" for name, said, took in seconds if took >= 0.05 * whole[1]]
        had = [max(stage["scratch"] for stage in lines[0]["stages"].values()) for lines in (before, after)]
        shown += [f"all {whole[0] / whole[1]:.2f}", f"scratch {had[0] * scratch[1] / scratch[0] / had[1]:.2f}"]
        said.append(f"Forecast from {sizes[0]:,} for {sizes[1]:,} nodes, over what it took: {', '.join(shown)}")
    return said


def plan(line: dict[str, Any]) -> dict[str, Any]:
    """What the plan says of each stage of a line's job, a `Cost`; its workers run already, as in `one`."""
    from dataclasses import fields, replace

    from graphbuild.job.plan.job import Job
    from graphbuild.job.plan.machine import Machine
    from graphbuild.job.plan.rates import Rates
    from graphbuild.job.plan.show import cases
    from graphbuild.recipe import Recipe

    read = Recipe.model_validate({"index": {"k": line["k"], "recall": line["asked"], "engine": line["engine"]}})
    nodes = line["nodes"]
    job = Job("vectors", nodes, nodes, nodes, -(-nodes // read.embed.shard_size), verb="index", k=line["k"])
    here = Machine(1, line["workers"], 24e9, 1e9, workers=line["workers"], own=True)
    begun = {one.name: 0.0 for one in fields(Rates) if one.name == "start" or one.name.startswith("load_")}
    return {cost.name: cost for cost in cases(job, read, replace(Rates(), **begun), [here])[0][1]}


def show(asked: argparse.Namespace) -> None:
    runs = defaultdict(list)
    for text in asked.results.read_text().splitlines():
        line = json.loads(text)
        runs[line["k"]].append(line)
    peers = [json.loads(text) for text in asked.peers.read_text().splitlines()] if asked.peers else []
    first = next(iter(runs.values()))[0]
    print(f"# What an index costs as nodes grow: {first['machine']}\n")
    print(
        f"`python benchmarks/ladder.py`: engine {first['engine']}, recall {first['asked']} asked, "
        f"{first['workers']} workers, vectors of 384 mixed from those of captions. By stage microseconds of CPU a "
        "node. Seconds are those of all stages; RSS and PSS the largest sum over the processes in any stage, unmapped "
        "of PSS what no file holds; scratch the most that lay there at a time."
    )
    for k, lines in runs.items():
        print(f"\n## {k} neighbours\n\n{table(lines)}")
    if peers:
        print(f"\n## Beside others\n\n{peers_table(peers)}")
    if asked.plot is not None:
        plot(asked.plot, runs)


def peers_table(runs: list[dict[str, Any]]) -> str:
    """Runs of benchmarks/knn.py on the same vectors. A peer's seconds are over those of the graphbuild run of that size
    with at least its recall, or else with the highest."""
    rows = [["nodes", "engine", "settings", "seconds", "recall", "peak GB", "its seconds over graphbuild's"]]
    for run in sorted((run for run in runs if "seconds" in run), key=lambda run: (nodes_of(run), run["seconds"])):
        settings = ", ".join(f"{key} {value}" for key, value in run["settings"].items()) or "its own"
        measured = [f"{run['seconds']:.0f}", f"{run['recall']:.3f}", f"{run['peak_bytes'] / 1e9:.1f}"]
        own = [one for one in runs if one["name"] == "partition" and one["vectors"] == run["vectors"]]
        good = [one for one in own if one["recall"] >= run["recall"] - 0.002]
        like = min(good, key=lambda one: one["seconds"]) if good else max(own, key=lambda one: one["recall"])
        ratio = "" if run in own else f"{run['seconds'] / like['seconds']:.1f} (recall {like['recall']:.3f})"
        name = "graphbuild partition" if run in own else run["name"]
        rows.append([f"{nodes_of(run):,}", name, settings, *measured, ratio])
    cells = ["| " + " | ".join(row) + " |" for row in rows]
    told = (
        f"`python benchmarks/knn.py` on the ladder's vectors, {runs[0]['k']} neighbours: peers from vectors in memory "
        "to lists in memory, graphbuild from embeddings on disk to its graph on disk, without the certificate. The "
        "ratio is to graphbuild's quickest run with at least that recall (less 0.002), or else its most exact one."
    )
    return "\n".join([told, "", cells[0], "|" + "---|" * len(rows[0]), *cells[1:]])


def nodes_of(run: dict[str, Any]) -> int:
    return int(Path(run["vectors"]).stem.rpartition("_")[2])


def plot(path: Path, runs: dict[int, list[dict[str, Any]]]) -> None:
    """CPU time a node: by stage for the first k, and the whole for each."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")

    def draw(lines: list[dict[str, Any]], names: list[str], **style: Any) -> None:
        sizes = sorted({line["nodes"] for line in lines})
        by_size = [[line for line in lines if line["nodes"] == nodes] for nodes in sizes]
        each = [
            statistics.median(sum(line["stages"][name]["cpu"] for name in names) for line in some) / nodes * 1e6
            for nodes, some in zip(sizes, by_size, strict=True)
        ]
        if max(each) >= 0.5:
            axes.loglog(sizes, each, marker="o", **style)

    first, lines = next(iter(runs.items()))
    for name in lines[0]["stages"]:
        draw(lines, [name], label=f"{name}, k = {first}")
    for k, some in runs.items():
        style = {"color": "black", "linestyle": "-" if k == first else "--", "label": f"all, k = {k}"}
        draw(some, list(some[0]["stages"]), **style)
    axes.set(xlabel="nodes", ylabel="CPU microseconds a node", title=lines[0]["machine"])
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path, nargs="?")
    parser.add_argument("--peers", type=Path, help="results of benchmarks/knn.py on the same vectors")
    show(parser.parse_args())


if __name__ == "__main__":
    main()
