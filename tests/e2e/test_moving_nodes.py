"""A stage on a Ray cluster whose nodes come and go while it runs, as those of an autoscaler and spot instances do.

A task of the stage notes in which process and on which node it runs, and waits until the test lets it go.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graphbuild.runner.runner import LOOK_SECONDS
from tests.e2e.ray_nodes import Nodes, ray_nodes
from tests.e2e.test_runs import needs_proc

pytestmark = [needs_proc, pytest.mark.slow]
STAGE = """
import json, logging, os, sys, time
from pathlib import Path
from graphbuild.recipe import Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.store import Store

address, url, tasks, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
logging.basicConfig(level=logging.INFO, format="%(message)s")

def plan(recipe, store):
    return [Task(stage="search", name=f"{number:05d}") for number in range(tasks)]

def run(task, store, writer):
    notes = Path(url).parent / "notes"
    note = notes / f"{task.name}-{len(list(notes.glob(task.name + '-*')))}"
    note.write_text(json.dumps({"pid": os.getpid(), "raylet": os.getppid(), "begin": time.time()}))
    while not (notes / "go").exists():
        time.sleep(0.05)
    time.sleep(float((notes / "seconds").read_text()))
    note.with_suffix(".end").write_text(str(time.time()))
    with writer.file(f"graph/{task.name}.txt") as path:
        path.write_text(task.name)
    return {"counts": {"files": 1}}

stage = Stage(name="search", title="search", plan=plan, run=run)
with Runner(address=address, workers=None if workers == "None" else int(workers)) as runner:
    print(runner.run(stage, Recipe(), Store(url))["counts"], flush=True)
"""
Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "seconds").write_text("0")
    return folder


@pytest.fixture
def begin(environment: dict[str, str], tmp_path: Path) -> Iterator[Begin]:
    """Run the stage on the nodes; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(nodes: Nodes, tasks: int, workers: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", STAGE, nodes.address, str(tmp_path / "store"), str(tasks), str(workers)]
        env = {**environment, **nodes.environment}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def noted(notes: Path, name: str, count: int, process: subprocess.Popen[str]) -> dict[str, int]:
    """What a task's run of that number, from 0, has noted, once it does."""
    path, end = notes / f"{name}-{count}", time.monotonic() + 90
    while not path.exists() or not path.read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"{path.name} never began: {process.communicate()[0]}")
        time.sleep(0.05)
    found: dict[str, int] = json.loads(path.read_text())
    return found


def at_once(notes: Path) -> int:
    """The most tasks that ran at the same time."""
    begins = [json.loads(path.read_text())["begin"] for path in notes.glob("*-*") if path.suffix != ".end"]
    ends = [float(path.read_text()) for path in notes.glob("*.end")]
    events = sorted([(moment, 1) for moment in begins] + [(moment, -1) for moment in ends])
    running = [0]
    for _, step in events:
        running.append(running[-1] + step)
    return max(running)


def test_a_lost_node_is_no_fault_of_its_task_however_often(
    environment: dict[str, str], begin: Begin, notes: Path
) -> None:
    with ray_nodes(environment, [1]) as nodes:
        process = begin(nodes, 1)
        for lost in range(4):  # more than the deaths that a task has
            noted(notes, "00000", lost, process)
            nodes.add()
            nodes.lose(nodes.raylets[0])
        noted(notes, "00000", 4, process)
        (notes / "go").touch()
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert said.count("trying again") == 4
    assert "{'files': 1}" in said


def test_a_task_whose_worker_dies_three_times_on_nodes_that_live_fails_whatever_nodes_were_lost_before(
    environment: dict[str, str], begin: Begin, notes: Path
) -> None:
    with ray_nodes(environment, [1]) as nodes:
        process = begin(nodes, 1)
        noted(notes, "00000", 0, process)
        nodes.add()
        nodes.lose(nodes.raylets[0])
        for death in (1, 2, 3):
            os.kill(noted(notes, "00000", death, process)["pid"], signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    assert said.count("trying again") == 3
    assert "its worker died 4 times" in said


@pytest.mark.parametrize(("workers", "most"), [(None, 3), (2, 2)])
def test_nodes_that_join_while_a_stage_runs_get_tasks_up_to_the_workers_asked_for(
    workers: int | None, most: int, environment: dict[str, str], begin: Begin, notes: Path
) -> None:
    (notes / "seconds").write_text("2.5")
    (notes / "go").touch()
    with ray_nodes(environment, [1]) as nodes:
        process = begin(nodes, 20, workers)
        first = noted(notes, "00000", 0, process)
        assert at_once(notes) == 1
        nodes.add()
        nodes.add()
        end = time.monotonic() + 60
        while at_once(notes) < most and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(LOOK_SECONDS + 1)
        assert at_once(notes) == most
        nodes.lose(first["raylet"])  # fewer are tolerated
        said = process.communicate(timeout=150)[0]
    assert process.returncode == 0, said
    assert "{'files': 20}" in said
