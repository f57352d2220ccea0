"""The model of a cluster under the real runner: what it takes is what can be reckoned by hand, and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulation.cluster import Calls, Cluster, Kind
from graphbuild.recipe import Recipe
from graphbuild.runner.progress import Progress
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, perform, records
from graphbuild.store.store import Store

TASKS, SECONDS = 60, 10.0
KIND = Kind(
    nodes=3,
    cores=2,
    network=1e9,
    calls=Calls(0.0, 0.0, 0.0),
    worker_seconds=5.0,
    workers_per_second=1e6,
    hours_between_losses=0.0,
    replaced_seconds=30.0,
    slow_nodes=0.0,
    slow_factor=1.0,
)
STAGE = Stage(
    name="copying",
    title="copying",
    plan=lambda recipe, store: [Task(stage="copying", name=f"{number:05d}") for number in range(TASKS)],
    run=lambda task, store, writer: {"counts": {"samples": 1}},
)


def simulated(folder: Path, kind: Kind) -> tuple[Cluster, float]:
    """The cluster, and what a stage took there by the runner's own clock."""
    store = Store(str(folder))

    def do(stage: Stage, task: Task, given: Store, actor: Any, now: float) -> Any:
        return SECONDS, lambda: perform(stage, task, store)

    cluster = Cluster(kind, do)
    with cluster.installed(), Runner(workers=kind.nodes * kind.cores, progress=Progress("plain")) as runner:
        runner.run(STAGE, Recipe(), store)
    return cluster, runner.seconds["copying"]


def test_a_stage_takes_its_rounds_and_the_start_of_its_workers(tmp_path: Path) -> None:
    cluster, seconds = simulated(tmp_path, KIND)
    expected = TASKS / 6 * SECONDS + KIND.worker_seconds
    assert expected <= seconds <= expected + 30  # the driver's own CPU seconds pass too
    assert cluster.use.busy_seconds == pytest.approx(TASKS * SECONDS)
    assert cluster.use.node_seconds == pytest.approx(3 * cluster.now)
    assert "ray" not in sys.modules or sys.modules["ray"] is not cluster


def test_tasks_of_lost_nodes_are_done_by_others_and_every_record_is_there_once(tmp_path: Path) -> None:
    from dataclasses import replace

    cluster, seconds = simulated(tmp_path, replace(KIND, hours_between_losses=0.02, seed=3))
    assert cluster.use.lost_nodes >= 2
    assert cluster.use.lost_tasks >= 1
    assert cluster.use.tasks == TASKS
    assert list(records(Store(str(tmp_path)), "copying")) == [f"{number:05d}" for number in range(TASKS)]
    assert seconds > TASKS / 6 * SECONDS + KIND.worker_seconds


def test_calls_of_ray_and_slow_nodes_take_their_time(tmp_path: Path) -> None:
    from dataclasses import replace

    cluster, seconds = simulated(tmp_path, replace(KIND, calls=Calls(20.0, 0.0, 0.0)))
    assert seconds >= TASKS * 20.0, "the driver calls for one task after the other"
    assert cluster.use.ray_seconds >= TASKS * 20.0


def test_an_object_store_answers_so_many_requests_a_second_and_more_after_a_while() -> None:
    from benchmarks.simulation.work import ObjectStore, Work

    objects = ObjectStore(0.03, 0.06, 100.0, 50.0, 1.0, doubles_seconds=60.0, most_partitions=4)
    work = Work.__new__(Work)
    work.objects = objects
    for count in (0, 10, 6_000, 6_001, 18_000, 50_000):
        left, seconds, rate = float(count), 0, 100.0
        while left > rate:  # second by second
            left, seconds = left - rate, seconds + 1
            rate = 100.0 * min(2 ** (seconds // 60), 4)
        assert work._taken("get", count) == pytest.approx(seconds + left / rate, abs=1)
