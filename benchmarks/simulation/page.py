"""The page of results (benchmarks/results/simulation.md) from what the processes of the simulation printed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.simulation.driver import INPUTS
from graphbuild.job.plan.show import duration, size

Json = dict[str, Any]
HERE = Path(__file__).parent
PRICES = yaml.safe_load((HERE / "prices.yaml").read_text())
DRIVER_BOUND = 0.6  # of a stage's time, spent by the driver and its calls of Ray
CAUSES = {
    "cores": "cores",
    "imports": "imports of workers",
    "copies": "copying files to each node",
    "disk": "random reads of the disk",
    "requests": "waiting for requests",
    "refused": "requests a second of the store",
    "network": "network",
}
SUMS = ("seconds", "node_seconds", "busy_seconds", "driver_seconds", "ray_seconds", "lost_nodes", "lost_tasks")
SUMS += ("tasks", "driver_get", "driver_put", "get", "put", "refused", "read", "written")


def page(results: Sequence[Json]) -> str:
    """results: of each process, in their order; those of one cluster are parts of one job."""
    every: dict[tuple[int, int], list[Json]] = defaultdict(list)
    for result in results:
        every[result["options"]["shards"], result["options"]["nodes"]].append(result)
    rows, shards = results[0]["options"].get("rows", 1_000_000_000), results[0]["options"]["shards"]
    whole = {key: runs for key, runs in every.items() if key[0] == shards}  # others were only begun
    jobs = {nodes: runs for (_, nodes), runs in whole.items()}
    parts = [
        f"# {rows:,} samples on clusters: a simulation",
        TEXT.format(shards=shards, inputs=_inputs()),
        "## The whole job",
        _table(("cluster", *WHOLE), [(f"{nodes} nodes", *_whole(nodes, runs)) for nodes, runs in sorted(jobs.items())]),
        _priced(),
    ]
    for nodes, runs in sorted(jobs.items()):
        parts += [
            f"## {nodes} nodes, by stage",
            _table(STAGE_HEAD, [_stage(*one, nodes) for one in merged(runs).items()]),
        ]
    parts += [
        "## The driver",
        DRIVER_TEXT,
        _table(DRIVER_HEAD, [_driver(run) for runs in every.values() for run in runs]),
    ]
    parts += ["## Published figures of such jobs", PUBLISHED_TEXT, _table(*_published(jobs))]
    return "\n\n".join(parts) + "\n"


def merged(runs: Iterable[Json]) -> dict[str, Json]:
    """Sums by stage over the parts of a job; what was only found up to date has nothing to add but time."""
    found: dict[str, Json] = {}
    for run in runs:
        for name, told in run["stages"].items():
            one = found.setdefault(name, {**told, "spent": dict.fromkeys(CAUSES, 0.0), **dict.fromkeys(SUMS, 0)})
            for key in SUMS:
                one[key] += told[key]
            for cause, seconds in told["spent"].items():
                one["spent"][cause] += seconds
            one["longest"] = max(one["longest"], told["longest"])
    return {name: one for name, one in found.items() if one["tasks"]}


WHOLE = ("hours", "node-hours", "read", "written", "GET", "PUT", "nodes lost", "tasks again", "cost")


def _whole(nodes: int, runs: Sequence[Json]) -> tuple[str, ...]:
    stages = merged(runs).values()
    hours = sum(run["model_seconds"] for run in runs) / 3600
    node_hours = sum(run["use"]["node_seconds"] for run in runs) / 3600
    get = sum(one["get"] for one in stages) + sum(run["driver"]["get"] for run in runs)
    put = sum(one["put"] for one in stages) + sum(run["driver"]["put"] for run in runs)
    cost = (node_hours + hours) * PRICES["node_hour"]["dollars"] + get / 1e3 * PRICES["get_1000"]["dollars"]
    cost += put / 1e3 * PRICES["put_1000"]["dollars"]
    read, written = (size(sum(one[what] for one in stages)) for what in ("read", "written"))
    lost, again = (sum(run["use"][what] for run in runs) for what in ("lost_nodes", "lost_tasks"))
    return (
        f"{hours:.1f}",
        f"{node_hours:,.0f}",
        read,
        written,
        _millions(get),
        _millions(put),
        str(lost),
        str(again),
        f"${cost:,.0f}",
    )


STAGE_HEAD = ("stage", "tasks", "time", "by the plan", "workers busy", "longest task", "read", "GET", "bottleneck")


def _stage(name: str, one: Json, nodes: int) -> tuple[str, ...]:
    slots = nodes * INPUTS["node"]["cores"]
    busy = one["busy_seconds"] / max(one["seconds"] * slots, 1e-9)
    return (
        name,
        f"{one['tasks']:,}",
        duration(one["seconds"]),
        duration(one["planned_seconds"]),
        f"{busy:.0%}",
        duration(one["longest"]),
        size(one["read"]),
        _millions(one["get"]),
        bottleneck(one, slots),
    )


def bottleneck(one: Json, slots: int) -> str:
    """What the most of a stage's time goes to."""
    own, ray = one["driver_seconds"], one["ray_seconds"]
    if own + ray > DRIVER_BOUND * one["seconds"]:
        return (
            f"the driver: {1e3 * own / one['tasks']:.1f} ms a task, and {1e3 * ray / one['tasks']:.1f} in Ray's calls"
        )
    cause = max(one["spent"], key=lambda name: one["spent"][name])
    share = one["spent"][cause] / max(sum(one["spent"].values()), 1e-9)
    few = f"; {one['tasks']:,} task{'s' * (one['tasks'] > 1)} for {slots:,} workers" if one["tasks"] < slots / 2 else ""
    return f"{CAUSES[cause]} ({share:.0%} of workers' time){few}"


DRIVER_HEAD = (
    "process",
    "shards",
    "tasks done",
    "CPU seconds",
    "of them until its first task, or all",
    "peak memory",
    "GET of an object store",
)


def _driver(run: Json) -> tuple[str, ...]:
    tasks, first = run["use"]["tasks"], run["first_task"]
    what = f"{run['options']['nodes']} nodes, " + (
        "from nothing" if run["options"].get("fresh") else "the same command again"
    )
    return (
        what + (", until it was killed" if run["stopped"] else ""),
        f"{run['options']['shards']:,}",
        f"{tasks:,}",
        f"{run['cpu']:.0f}",
        f"{first[1] if first else run['cpu']:.0f}",
        size(run["peak_bytes"]),
        f"{run['driver']['get']:,}" if "get" in run["driver"] else "-",
    )


def _published(jobs: dict[int, list[Json]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [
        (one["job"], one["size"], one["took"], one["millions"], one["source"])
        for one in yaml.safe_load((HERE / "published.yaml").read_text())
    ]
    for nodes, runs in sorted(jobs.items()):
        samples = runs[0]["options"].get("rows", 1_000_000_000) / 1e6
        hours = sum(run["use"]["node_seconds"] for run in runs) / 3600
        index = sum(one["node_seconds"] for name, one in merged(runs).items() if name in INDEX) / 3600
        cores = INPUTS["node"]["cores"]
        rows.append(
            (
                "graphbuild, this simulation: captions to sidecars",
                f"{samples:,.0f} million",
                f"{sum(run['model_seconds'] for run in runs) / 3600:.1f} h on {nodes} nodes of {cores} cores, no GPU",
                f"{hours * cores / samples:.1f} core-h; {index * cores / samples:.1f} without embedding and export",
                "this page",
            )
        )
    return ("job", "size", "took", "a million", "source"), rows


INDEX = ("prepare", "codes", "moments", "join", "merge", "refine", "search", "certify")


def _priced() -> str:
    lines = [f"{one['what']}: ${one['dollars']:g} ({one['source']}, {one['date']})" for one in PRICES.values()]
    return "Cost is that of nodes, of one more for the driver, and of requests. Prices: " + "; ".join(lines) + "."


def _inputs() -> str:
    node, store, cluster = INPUTS["node"], INPUTS["object_store"], INPUTS["cluster"]
    return (
        f"A node has {node['cores']} cores, {node['memory_gb']} GB and {node['network_gbit']} Gbit/s. Each is lost "
        f"after {cluster['hours_between_losses']:g} hours on average and replaced after "
        f"{cluster['replaced_seconds']:g} s; {cluster['slow_nodes']:.0%} of them take {cluster['slow_factor']:g} times "
        f"as long, and {INPUTS['noise']['stragglers']:.1%} of tasks up to {INPUTS['noise']['most']:g} times. The "
        f"object store answers in {1e3 * store['get_seconds']:g} ms (GET) and {1e3 * store['put_seconds']:g} ms (PUT), "
        f"takes {store['gets_per_second']:,} GET and {store['puts_per_second']:,} PUT a second, and twice as many "
        f"after each {store['doubles_seconds'] / 60:g} minutes of more, {store['most_partitions']} times at most."
    )


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """\
Written by `python -m benchmarks.simulation`. The job: captions of {shards:,} tars, every one another, to embeddings by
MiniLM on CPUs, to the graph (partition, k = 32, recall 0.95, d = 384), to sidecars.

Real are the driver's own code and memory: plans, queue, retries, records, which are written and read as files, and
manifest. Its CPU seconds pass in the model's time. Modelled are Ray and the workers: a task takes what the formulas
of `graphbuild plan` say (measured rates of a core), and its requests, counted in a real job; Ray's calls take what was
measured of a real Ray (measured.json). {inputs} What is assumed stands in benchmarks/simulation/inputs.yaml.

What it leaves out: a node that copies files of all shards does so anew for each stage; the store's own errors;
captions that repeat, with which export reads other shards' files."""
DRIVER_TEXT = """\
CPU seconds of this machine, which others use too. The same command again reads all records, plans all stages, and
lists all files. Memory holds that of the model too, and so do the CPU seconds of processes that did tasks. The last
column is what it would ask an object store for, for which it waits in the model. What a process took that was killed
outright, /proc told."""
PUBLISHED_TEXT = """\
They differ in what they do (images embedded or not, clusters or lists of neighbours, with a certificate or without) and
in their hardware, so only the order of magnitude compares."""
