"""Small tasks that may crash: their process dies, the command does not; and the command's end is theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from graphbuild.errors import InputError, StageError
from graphbuild.recipe import Recipe
from graphbuild.runner import partly
from graphbuild.runner.child import Child
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.store import Json, Store, Writer


def work(task: Task, store: Store, writer: Writer) -> Json:
    """What a task is named after."""
    folder = Path(store.url)
    with (folder / "times").open("a") as times:
        times.write(f"{task.name}\n")
    match task.name:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash once":
            if (folder / "times").read_text().count(task.name) == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
        case "refuse":
            raise InputError("a bad file", "mend it")
        case "print":
            sys.stdout.write("not an answer")
            os.write(1, b"and not this")
        case "half":
            partly.add(0.5)
            while not (folder / "go").exists():
                time.sleep(0.05)
        case "wait":
            (folder / "process").write_text(str(os.getpid()))
            time.sleep(100)
    return {"process": os.getpid(), "counts": {"tasks": 1}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(str(tmp_path / "store"))


def stage(*names: str) -> Stage:
    tasks = [Task(stage="work", name=name) for name in names]
    return Stage(name="work", title="work", plan=lambda recipe, store: tasks, run=work, may_crash=lambda task: True)


def record(store: Store, name: str, state: str = "done") -> Json:
    read: Json = json.loads(Path(store.url, f"_state/work/{name}.{state}.json").read_text())
    return read


def test_it_tells_how_much_of_its_task_is_done(store: Store) -> None:
    with partly.Told() as told, Child() as child:
        task = Task(stage="work", name="half", hints={"told": told.begin("half")})
        job = threading.Thread(target=child.attempt, args=(stage("half"), task, store))
        job.start()
        end = time.monotonic() + 60
        while told.done() == 0 and time.monotonic() < end:
            time.sleep(0.05)
        found = told.done()
        Path(store.url, "go").touch()
        job.join()
        told.end("half")
        assert (found, told.done()) == (0.5, 0)
    assert told.done() == 0


def test_a_task_that_crashes_three_times_is_named_with_where_and_the_others_are_done(store: Store) -> None:
    with (
        Runner() as runner,
        pytest.raises(StageError, match=r"work: 1 task failed\s+crash: .* died 3 times \(SIGSEGV\)"),
    ):
        runner.run(stage("first", "crash", "last"), Recipe(), store)
    failed = record(store, "crash", "failed")
    assert "a library crashed on what it read" in failed["fix"]
    assert "Segmentation fault" in failed["traceback"]
    assert "test_child.py" in failed["traceback"], "the line where it crashed"
    assert "\0" not in failed["traceback"]
    assert Path(store.url, "times").read_text().split() == ["first", "crash", "crash", "crash", "last"]
    assert record(store, "first")["facts"]["process"] != record(store, "last")["facts"]["process"]


def test_one_crash_is_said_and_tried_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with Runner() as runner:
        assert runner.run(stage("crash once", "last"), Recipe(), store)["counts"] == {"tasks": 2}
    assert "work crash once: its process died (SIGSEGV); trying again" in caplog.text


def test_of_a_task_that_is_killed_memory_is_thought_of_first(store: Store) -> None:
    with Runner() as runner, pytest.raises(StageError, match=r"died 3 times \(SIGKILL\)"):
        runner.run(stage("killed"), Recipe(), store)
    fix = record(store, "killed", "failed")["fix"]
    assert "memory ran out: use a smaller shard_size" in fix
    assert "--workers" not in fix, "it had no workers"


def test_a_process_that_ends_between_tasks_is_replaced(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    work = stage("first", "last")
    first, last = work.plan(Recipe(), store)
    with Child() as child:
        done = child.attempt(work, first, store)
        process = psutil.Process(done["facts"]["process"])  # type: ignore[index]
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert child.attempt(work, last, store)["facts"]["process"] != process.pid  # type: ignore[index]
    assert "work last: its process died (SIGKILL); trying again" in caplog.text


def test_what_a_task_raises_or_prints_comes_back_as_from_this_process(store: Store) -> None:
    with Runner() as runner, pytest.raises(InputError, match=r"refuse: a bad file"):
        runner.run(stage("print", "refuse", "last"), Recipe(), store)
    processes = {record(store, name)["facts"]["process"] for name in ("print", "last")}
    assert len(processes) == 1
    assert os.getpid() not in processes


def test_without_workers_by_word_tasks_are_done_here(store: Store) -> None:
    with Runner(workers=0) as runner:
        runner.run(stage("first"), Recipe(), store)
    assert record(store, "first")["facts"]["process"] == os.getpid()


COMMAND = """
import sys
from graphbuild.recipe import Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.runner.test_child import stage

with Runner() as runner:
    runner.run(stage("wait"), Recipe(), Store(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_with_the_command(store: Store, number: signal.Signals) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, store.url], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
    )
    beside = Path(store.url, "process")
    end = time.monotonic() + 60
    while not (beside.exists() and beside.read_text()):
        assert time.monotonic() < end
        assert command.poll() is None
        time.sleep(0.02)
    process = psutil.Process(int(beside.read_text()))
    command.send_signal(number)
    assert command.wait(20) != 0
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert not list(Path(store.url).glob("_state/work/*"))
