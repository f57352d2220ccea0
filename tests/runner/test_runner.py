"""The runner on small stages of its own: resume, diffs, failures and dying workers, in this process and on real Ray."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray
import torch

from graphbuild.errors import ConfigError, InputError, StageError
from graphbuild.recipe import Index, Recipe
from graphbuild.runner import partly
from graphbuild.runner.progress import _Ticker
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.runner.state import require
from graphbuild.store.store import Json, Store, Writer

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test file


def plan(recipe: Recipe, store: Store) -> list[Task]:
    settings = {"k": recipe.index.neighbors(1000)}
    return [Task(stage="search", name=f"{n:05d}", settings=settings, inputs={"x": "same"}) for n in range(4)]


def write(task: Task, store: Store, writer: Writer) -> Json:
    with writer.file(f"graph/{task.name}.txt") as path:
        path.write_text(f"{task.name} {task.settings['k']}")
    return {"counts": {"files": 1}}


def wait_halfway(task: Task, store: Store, writer: Writer) -> Json:
    """All tasks together are done when the file `go` is there; until then each is half done."""
    partly.add(0.25)
    partly.add(0.25)
    while not (Path(store.url) / "go").exists():
        time.sleep(0.05)
    return write(task, store, writer)


def fail_one(task: Task, store: Store, writer: Writer) -> Json:
    if task.name == "00002":
        raise ZeroDivisionError("by zero")
    return write(task, store, writer)


def refuse_one(task: Task, store: Store, writer: Writer) -> Json:
    if task.name == "00002":
        raise InputError("two.tar is no tar", "fetch it again")
    return write(task, store, writer)


def fill_the_gpu(task: Task, store: Store, writer: Writer) -> Json:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def die_once(task: Task, store: Store, writer: Writer) -> Json:
    mark = Path(store.url) / f"died-{task.name}"
    if task.name == "00001" and not mark.exists():
        mark.parent.mkdir(exist_ok=True)
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(task, store, writer)


def die_always(task: Task, store: Store, writer: Writer) -> Json:
    if task.name == "00003":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(task, store, writer)


def stage(run: object) -> Stage:
    return Stage(name="search", title="search", plan=plan, run=run)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def started() -> Iterator[list[Runner]]:
    """The runner of `on_ray`, while its Ray runs."""
    runners: list[Runner] = []
    yield runners
    end(runners)


def end(runners: list[Runner]) -> None:
    while runners:
        runners.pop().__exit__(None, None, None)


@pytest.fixture
def on_ray(started: list[Runner]) -> Runner:
    """Two workers on a Ray that this runner starts; tests follow each other on it as the stages of a job do.

    That Ray counts a GPU, which to it is a number.
    """
    if not started:
        with pytest.MonkeyPatch.context() as patches:
            patches.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # which would refuse that number
            patches.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
            started.append(Runner(workers=2))
            started[0].start_ray()
    return started[0]


@pytest.fixture(params=[0, 2])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """So many workers: none, that is this process, or two on Ray."""
    if request.param:
        yield request.getfixturevalue("on_ray")
    else:
        with Runner(workers=0) as here:
            yield here


def test_what_is_done_is_not_done_again(store: Store, runner: Runner) -> None:
    entry = runner.run(stage(write), Recipe(), store)
    before = {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*") if path.is_file()}
    assert runner.run(stage(fail_one), Recipe(), store) == entry
    assert entry["counts"] == {"files": 4}
    assert {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*") if path.is_file()} == before


def test_what_is_done_of_the_running_tasks_is_told(store: Store, runner: Runner) -> None:
    in_flight = 2 if runner.workers else 1
    Path(store.url).mkdir()
    job = threading.Thread(target=runner.run, args=(stage(wait_halfway), Recipe(), store))
    job.start()
    end = time.monotonic() + 60
    while runner.progress.state.parts() < in_flight / 2 and time.monotonic() < end:
        time.sleep(0.05)
    told = runner.progress.state.parts()
    (Path(store.url) / "go").touch()
    job.join()
    assert told == in_flight / 2
    assert runner.progress.state.parts() == 0
    assert partly.done() == 0
    assert len(records(store, "search")) == 4


def test_one_failure_lets_the_others_go_on_and_is_recorded(store: Store, runner: Runner) -> None:
    with pytest.raises(StageError, match=r"00002 \(same\): ZeroDivisionError: by zero"):
        runner.run(stage(fail_one), Recipe(), store)
    assert set(records(store, "search")) == {"00000", "00001", "00003"}
    failure = records(store, "search", "failed")["00002"]
    assert "ZeroDivisionError" in failure["traceback"]
    with pytest.raises(ConfigError, match="`graphbuild index` is not finished"):
        require(store, "search", "index")
    runner.run(stage(write), Recipe(), store)
    assert not records(store, "search", "failed")
    assert len(require(store, "search", "index")) == 4


def test_a_refused_input_asks_for_exit_code_2(store: Store) -> None:
    with Runner(workers=0) as runner, pytest.raises(InputError, match=r"two\.tar is no tar") as error:
        runner.run(stage(refuse_one), Recipe(), store)
    assert "fetch it again" in str(error.value)


def test_a_full_gpu_says_what_leaves_it_room(store: Store) -> None:
    with Runner(workers=0) as runner, pytest.raises(StageError, match="CUDA out of memory") as error:
        runner.run(stage(fill_the_gpu), Recipe(), store)
    assert "--workers 1" in error.value.fix


def test_a_worker_that_dies_has_its_task_run_again(store: Store, on_ray: Runner) -> None:
    assert on_ray.run(stage(die_once), Recipe(), store)["tasks"] == 4
    assert (Path(store.url) / "died-00001").exists()


def test_a_task_that_kills_every_worker_fails_alone(store: Store, on_ray: Runner) -> None:
    with pytest.raises(StageError, match=r"00003 \(same\): its worker died 3 times"):
        on_ray.run(stage(die_always), Recipe(), store)
    assert set(records(store, "search")) == {"00000", "00001", "00002"}


def say_where(task: Task, store: Store, writer: Writer) -> Json:
    return {**write(task, store, writer), "process": os.getpid(), "threads": task.hints["threads"]}


@pytest.mark.usefixtures("on_ray")
def test_a_ray_that_runs_does_small_stages_too_a_thread_each(store: Store) -> None:
    def small(recipe: Recipe, store: Store) -> list[Task]:
        return [dataclasses.replace(task, inputs={"x": "a.tar, 10 bytes, 1.0"}) for task in plan(recipe, store)]

    with Runner() as runner:
        runner.run(dataclasses.replace(stage(say_where), plan=small), Recipe(), store)
    facts = [record["facts"] for record in records(store, "search").values()]
    assert os.getpid() not in [each["process"] for each in facts]
    assert [each["threads"] for each in facts] == [1] * 4


def on_cuda(recipe: Recipe, store: Store) -> list[Task]:
    return [dataclasses.replace(task, hints={"device": "cuda"}) for task in stage(write).plan(recipe, store)]


def test_a_gpu_that_is_asked_for_and_cannot_be_used_is_an_error_and_no_reason_to_take_the_cpu(
    store: Store, monkeypatch: pytest.MonkeyPatch, runner: Runner
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = dataclasses.replace(stage(write), on_device=True, plan=on_cuda)
    with pytest.raises(ConfigError, match="torch can use no GPU here"):
        runner.run(one, Recipe(), store)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, _Ticker)], "nothing shows it any more"


def say_gpu(task: Task, store: Store, writer: Writer) -> Json:
    return {**write(task, store, writer), "counts": {"gpu": int(os.environ.get("CUDA_VISIBLE_DEVICES") == "0")}}


def test_gpus_of_this_machine_that_ray_counts_and_torch_cannot_use_are_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, on_ray: Runner
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ray.cluster_resources()["GPU"] == 1.0
    entry = on_ray.run(dataclasses.replace(stage(say_gpu), on_device=True), Recipe(), store)
    assert entry["tasks"] == 4
    assert entry["counts"] == {"gpu": 0}


def test_workers_that_a_cluster_has_no_cpu_for_hold_nothing_up(
    store: Store, monkeypatch: pytest.MonkeyPatch, on_ray: Runner
) -> None:
    monkeypatch.setattr(on_ray, "workers", 4)  # the cluster has two CPUs
    on_ray.run(stage(write), Recipe(), store)  # also until Ray is warm
    begin = time.monotonic()
    for k in range(3, 8):
        on_ray.run(stage(write), Recipe(index=Index(k=k)), store, force=True)
    assert time.monotonic() - begin < 20


def meet(task: Task, store: Store, writer: Writer) -> Json:
    """Says whether another task ran at the same time; waits for one while there should be."""
    folder = Path(store.url) / "now"
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / task.name
    mark.write_text("")
    end, met = time.monotonic() + (20 if task.settings["k"] == 2 else 0.2), False
    while not met and time.monotonic() < end:
        met = len(list(folder.iterdir())) > 1
        time.sleep(0.01)
    time.sleep(0.2)  # the other sees this one too
    mark.unlink()
    said = say_gpu(task, store, writer)
    return {**said, "counts": {"met": int(met), **said["counts"]}}


@pytest.mark.usefixtures("on_ray")
def test_two_workers_share_a_gpu_in_one_stage_and_one_has_it_alone_in_the_next(store: Store) -> None:
    with Runner() as runner:  # which takes Ray's word, as it did not start that
        for sharing, met in ((2, 4), (1, 0)):
            one = dataclasses.replace(stage(meet), on_device=True, sharing=sharing)
            entry = runner.run(one, Recipe(index=Index(k=sharing)), store, force=True)
            assert entry["counts"] == {"gpu": 4, "met": met}


def test_other_settings_stop_with_a_diff_and_force_rebuilds(store: Store) -> None:
    changed = Recipe(index=Index(k=7))
    with Runner(workers=0) as runner:
        runner.run(stage(write), Recipe(), store)
        with pytest.raises(ConfigError, match="k: 64 -> 7"):
            runner.run(stage(write), changed, store)
        assert (Path(store.url) / "graph" / "00000.txt").read_text() == "00000 64"
        runner.run(stage(write), changed, store, force=True)
    assert (Path(store.url) / "graph" / "00000.txt").read_text() == "00000 7"


@pytest.mark.parametrize(
    ("now", "differs"),
    [
        ("a.tar, 10 bytes, Sat, 28 Nov 2026 23:20:42 GMT", False),
        ("a.tar, 11 bytes, Sat, 28 Nov 2026 23:20:42 GMT", True),
        ("b.tar, 10 bytes, None", True),
    ],
)
def test_a_date_that_was_not_known_before_is_no_change_of_an_input(now: str, differs: bool) -> None:
    before = {"settings": {}, "inputs": {"tar": "a.tar, 10 bytes, None"}}
    assert bool(Task(stage="scan", name="00000", inputs={"tar": now}).changes(before)) == differs
    assert Task(stage="scan", name="00000", inputs=before["inputs"]).changes({"settings": {}, "inputs": {"tar": now}})


def test_tasks_that_left_the_input_are_removed_by_force_only(store: Store) -> None:
    fewer = Stage(name="search", title="search", plan=lambda recipe, store: plan(recipe, store)[:3], run=write)
    with Runner(workers=0) as runner:
        runner.run(stage(write), Recipe(), store)
        with pytest.raises(ConfigError, match="no longer in the input: 00003"):
            runner.run(fewer, Recipe(), store)
        runner.run(fewer, Recipe(), store, force=True)
    assert not (Path(store.url) / "graph" / "00003.txt").exists()
    assert set(records(store, "search")) == {"00000", "00001", "00002"}


def test_what_an_earlier_stage_built_anew_is_followed_without_force(store: Store) -> None:
    def planned(digest: str) -> Stage:
        tasks = [Task(stage="search", name="00000", settings={"k": 1}, built={"nodes": digest})]
        return Stage(name="search", title="search", plan=lambda recipe, store: tasks, run=write)

    with Runner(workers=0) as runner:
        before = runner.run(planned("old"), Recipe(), store)
        after = runner.run(planned("new"), Recipe(), store)
    assert before["fingerprint"] != after["fingerprint"]


def test_a_damaged_record_counts_as_not_done(store: Store) -> None:
    with Runner(workers=0) as runner:
        before = runner.run(stage(write), Recipe(), store)
        (Path(store.url) / "_state" / "search" / "00002.done.json").write_text("{")
        assert set(records(store, "search")) == {"00000", "00001", "00003"}
        assert runner.run(stage(write), Recipe(), store) == before


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_an_output_that_is_gone_or_cut_is_made_again(store: Store, damage: str) -> None:
    path = Path(store.url) / "graph" / "00001.txt"
    with Runner(workers=0) as runner:
        runner.run(stage(write), Recipe(), store)
        path.unlink() if damage == "lost" else path.write_text("")
        runner.run(stage(write), Recipe(), store)
    assert path.read_text() == "00001 64"


def test_a_stage_that_changes_takes_later_ones_out_of_the_manifest(store: Store) -> None:
    with Runner(workers=0) as runner:
        runner.run(stage(write), Recipe(), store)
        manifest = store.manifest()
        manifest["stages"]["export"] = {"fingerprint": "", "tasks": 0, "counts": {}}
        store.write_json("manifest.json", manifest)
        with pytest.raises(StageError):
            runner.run(stage(fail_one), Recipe(index=Index(k=3)), store, force=True, stale=["export"])
    assert store.manifest()["stages"] == {}


def test_an_address_where_no_cluster_is_names_the_option(store: Store, started: list[Runner]) -> None:
    end(started)  # a process that has a Ray uses that
    with Runner(address="127.0.0.1:1") as runner, pytest.raises(ConfigError, match=r"127\.0\.0\.1:1"):
        runner.run(stage(write), Recipe(), store)


IN_A_PROCESS = """
import os, sys
from graphbuild.recipe import Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.store import Store

def plan(recipe, store):
    return [Task(stage="search", name="00000", settings={"k": recipe.index.k})]

def write(task, store, writer):
    writer.file("graph/x.txt").__enter__().write_text("x")
    return {}

def runs(k):
    stage = Stage(name="search", title="search", plan=plan, run=write)
    with Runner(workers=1) as runner:
        runner.run(stage, Recipe(index=Index(k=k)), Store(sys.argv[1]), force=True)

assert "ray" not in sys.modules
for k in (5, 6):
    runs(k)
    assert not {"RAY_AUTH_MODE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"} & os.environ.keys()
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False)
assert ray.get(ray.remote(lambda: 7).remote()) == 7
"""


def run_alone(store: Store, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in an interpreter of its own, where Ray is not imported yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", program, store.url]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_who_uses_the_library_keeps_its_environment_and_can_start_a_ray_of_its_own(store: Store) -> None:
    done = run_alone(store, IN_A_PROCESS)
    assert done.returncode == 0, done.stderr


def test_a_temporary_folder_that_ray_cannot_use_is_no_problem_of_a_token(store: Store, tmp_path: Path) -> None:
    (tmp_path / "no-folder").touch()
    done = run_alone(store, IN_A_PROCESS, RAY_TMPDIR=str(tmp_path / "no-folder"))
    assert "ConfigError: cannot start Ray on this machine" in done.stderr
    assert "has room and can be written to" in done.stderr
    assert "token" not in done.stderr.partition("ConfigError")[2]


def test_a_task_is_told_by_the_file_that_it_reads(store: Store) -> None:
    def of(files: Sequence[str]) -> Stage:
        tasks = [
            Task(stage="search", name=f"{number:05d}", settings={"k": 1}, inputs={"tar": f"{file}, 10 bytes, 1.5"})
            for number, file in enumerate(files)
        ]
        return Stage(name="search", title="search", plan=lambda recipe, store: tasks, run=write)

    with Runner(workers=0) as runner:
        runner.run(of(["a.tar", "b, c.tar"]), Recipe(), store)
        with pytest.raises(ConfigError, match=r"no longer in the input: 00001 \(b, c.tar\)"):
            runner.run(of(["a.tar"]), Recipe(), store)
