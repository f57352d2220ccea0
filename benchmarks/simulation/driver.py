"""One process of the simulation: the real driver of a job, with or without work to do, and what it took.

    python -m benchmarks.simulation.driver FOLDER OPTIONS.json

It prints JSON on its last line. A process of its own, as its peak memory and the time until its first task are results.
The store is a folder; its requests, were it an object store, are counted (`CountedStore`) and wait in the model's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.simulation import work
from benchmarks.simulation.cluster import Calls, Cluster, Kind
from graphbuild.graph import prepare
from graphbuild.job.plan.case import Case
from graphbuild.job.plan.costs import costs
from graphbuild.job.plan.encoder_facts import MINILM
from graphbuild.job.plan.job import Job
from graphbuild.job.plan.machine import Machine
from graphbuild.job.plan.rates import Rates
from graphbuild.job.steps import steps_of
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Recipe
from graphbuild.runner.progress import Progress
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage
from graphbuild.store.remote import READERS, S3_CONNECTIONS
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)
INPUTS = yaml.safe_load((Path(__file__).parent / "inputs.yaml").read_text())
MEASURED = json.loads((Path(__file__).parent / "measured.json").read_text())
ROWS = 1_000_000_000
VERBS = ("embed", "index", "export")
COUNTS: Counter[str] = Counter()  # of the driver's requests


class CountedStore(Store):
    """The store as the driver has it: every request is counted, with the seconds that it would wait for its answer."""

    @contextlib.contextmanager
    def _asked(self, kind: str, count: int = 1, at_once: int = 1) -> Iterator[None]:
        seconds = INPUTS["object_store"]["put_seconds" if kind == "put" else "get_seconds"]
        COUNTS[kind] += count
        COUNTS["nanoseconds"] += round(1e9 * seconds * math.ceil(count / at_once))
        yield

    def exists(self, name: str) -> bool:
        with self._asked("get"):
            return super().exists(name)

    def listed(self, folder: str) -> dict[str, tuple[int, str | None]]:
        found = super().listed(folder)
        with self._asked("put", 1 + len(found) // work.LISTED):
            return found

    def read_bytes(self, name: str) -> bytes:
        with self._asked("get"):
            return super().read_bytes(name)

    def read_jsons(self, sizes: Mapping[str, int]) -> list[Json | None]:
        with self._asked("get", len(sizes), S3_CONNECTIONS):
            return super().read_jsons(sizes)

    @contextlib.contextmanager
    def staged(self, name: str, *, durable: bool = True) -> Iterator[Path]:
        with self._asked("put"), super().staged(name, durable=durable) as path:
            yield path

    def remove(self, name: str) -> None:
        with self._asked("put"):
            COUNTS["nanoseconds"] -= round(1e9 * INPUTS["object_store"]["put_seconds"] * (1 - 1 / READERS))
            super().remove(name)


class WatchedRunner(Runner):
    """Tells what the cluster was used for by stage, and passes the driver's waiting for the store on to the model."""

    cluster: Cluster | None = None
    told: dict[str, Json]

    def run(self, stage: Stage, recipe: Recipe, store: Store, **told: Any) -> Json:
        cluster = self.cluster
        assert cluster is not None
        waited(cluster)
        before, use, asked = cluster.now, dataclasses.replace(cluster.use), COUNTS.copy()
        try:
            return super().run(stage, recipe, store, **told)
        finally:
            waited(cluster)
            used = {name: getattr(cluster.use, name) - getattr(use, name) for name in vars(use)}
            driver = {f"driver_{name}": COUNTS[name] - asked[name] for name in ("get", "put")}
            self.told[stage.name] = {"seconds": cluster.now - before, **used, **driver}
            print(f"{stage.name:9} {self.told[stage.name]['seconds']:9.0f} s in the model", file=sys.stderr, flush=True)


def waited(cluster: Cluster) -> None:
    """The driver's waiting for answers of the store since the last time passes in the model."""
    seconds, COUNTS["nanoseconds"] = COUNTS["nanoseconds"] / 1e9, 0
    cluster.charge(seconds)


def case_of(nodes: int, shards: int, rows: int = ROWS) -> Case:
    """The job and its machines for the plan's formulas: every caption another, as the most that there can be."""
    rows, node = rows // shards * shards, INPUTS["node"]
    machine = Machine(nodes, node["cores"], node["memory_gb"] * 1e9, node["network_gbit"] * 1e9 / 8)
    facts = INPUTS["job"]
    job = Job("tars", rows, rows, rows, shards, MINILM, k=facts["k"], tokens=facts["tokens"])
    job = dataclasses.replace(job, characters=facts["characters"], tar_bytes=rows * float(facts["tar_bytes"]))
    recipe = Recipe.model_validate({"embed": {"shards": "*.tar"}, "index": asked(INPUTS)})
    return Case(job, recipe, machine, Rates())


def asked(inputs: Mapping[str, Any]) -> Json:
    return {"k": inputs["job"]["k"], "recall": inputs["job"]["recall"], "engine": "partition"}


def model(case: Case, store: Store, seed: int = 0) -> tuple[Cluster, work.Work]:
    cluster, objects, noise = INPUTS["cluster"], INPUTS["object_store"], INPUTS["noise"]
    found = {cost.name: cost for cost in costs(case, [s for verb in VERBS for s in steps_of(verb, case.recipe)])}
    doing = work.Work(
        case,
        found,
        work.Requests(MEASURED["requests"], case, found),
        store,
        work.ObjectStore(**objects),
        work.Noise(**noise),
    )
    doing.disk_reads_per_second = INPUTS["node"]["disk_reads_per_second"]
    doing.join_tasks = found["join"].tasks
    network = case.machine.network
    kind = Kind(case.machine.nodes, case.machine.cores, network, Calls(**MEASURED["ray"]), **cluster, seed=seed)
    return Cluster(kind, doing), doing


def drive(folder: Path, options: Json) -> Json:
    """Run embed, index and export on the store in a folder, until all is done or the driver is stopped."""
    shards = options["shards"]
    case = case_of(options["nodes"], shards, options.get("rows", ROWS))
    tars = folder / "tars"
    os.fsync = lambda descriptor: None  # workers' flushing is not what is measured
    prepare.check_mappings = lambda files: None  # a limit of this machine's kernel, not of the cluster's nodes
    plain, store = Store(str(folder / "store")), CountedStore(str(folder / "store"))
    cluster, doing = model(case, plain)
    doing.shapes.holes = not options.get("no_scratch", False)
    if options.get("stop"):
        doing.stop_at = options["stop"][0], options["stop"][1]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    begin, cpu = time.perf_counter(), time.process_time()
    first: list[tuple[float, float]] = []
    attempt = cluster.attempt

    def first_attempt(*work: Any) -> Any:
        if not first:
            first.append((time.perf_counter() - begin, time.process_time() - cpu))
        return attempt(*work)

    cluster.attempt = first_attempt  # type: ignore[method-assign]
    stopped = False
    runner = WatchedRunner(workers=case.machine.slots(), progress=Progress("plain"))
    runner.cluster, runner.told = cluster, {}
    recipe = Recipe.model_validate({"embed": {"shards": str(tars / "*.tar")}, "index": asked(INPUTS)})
    with cluster.installed():
        try:
            with runner:
                run_verb("run", recipe, store, runner)
        except KeyboardInterrupt:
            stopped = True
        waited(cluster)
    return {
        "options": options,
        "stopped": stopped,
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "first_task": first[0] if first else None,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_seconds": cluster.now,
        "use": vars(cluster.use),
        "driver": {"get": COUNTS["get"], "put": COUNTS["put"]},
        "stages": {
            name: {**told, **_sums(doing, name), **_planned(doing.costs[name])}
            for name, told in runner.told.items()
            if name in doing.costs and (name in doing.done or not doing.begun)
        },
    }


def _sums(doing: work.Work, stage: str) -> Json:
    done = doing.done.get(stage, work.Done())
    return {"tasks_begun" if name == "tasks" else name: value for name, value in vars(done).items()}


def _planned(cost: work.Cost) -> Json:
    return {"planned_seconds": cost.seconds, "ram": cost.ram, "held": cost.held, "planned_tasks": cost.tasks}


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps(drive(folder, options)))


if __name__ == "__main__":
    main()
