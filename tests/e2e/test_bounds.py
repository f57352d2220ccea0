"""What a job holds at once is bounded: open files, threads, tasks in flight, memory. Seen from outside, in /proc."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
Environment = dict[str, str]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
OPEN_FILES = 80
SHARDS = 120  # so one descriptor a shard is too many


def limited(what: int, most: int) -> Callable[[], None]:
    """What a child does first: take a limit that nothing below it can raise."""
    return functools.partial(resource.setrlimit, what, (most, most))


def save_vectors(path: Path, count: int, width: int) -> Path:
    """Random unit vectors, float32 [count, width]: the hardest for memory, as no list fills early."""
    values = np.random.default_rng(0).standard_normal((count, width), np.float32)
    np.save(path, values / np.linalg.norm(values, axis=1, keepdims=True))
    return path


# ---- open files

READ = """
import sys
from graphbuild import SampleGraph

graph = SampleGraph.open(sys.argv[1])
nodes = range(0, len(graph), 3)
graph.neighbors(nodes), graph.embeddings(nodes), graph.background(nodes), graph.sketches(nodes), graph.edges()
print(len(graph), graph.sample_nodes()[-1])
"""


@pytest.mark.slow
def test_a_job_and_its_graph_of_more_shards_than_a_process_may_open_files(
    program: Path, environment: Environment, tmp_path: Path
) -> None:
    vectors, store = save_vectors(tmp_path / "vectors.npy", 2 * SHARDS, 24), tmp_path / "store"
    (tmp_path / "recipe.yaml").write_text(f"embed: {{vectors: {vectors}, shard_size: 2}}\nindex: {{k: 5}}\n")
    for command in (
        [program, "run", tmp_path / "recipe.yaml", store, "--workers", "0"],
        [program, "verify", store],
        [sys.executable, "-c", READ, store],
    ):
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            preexec_fn=limited(resource.RLIMIT_NOFILE, OPEN_FILES),
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(2 * SHARDS), str(2 * SHARDS - 1)]
    assert json.loads((store / "manifest.json").read_bytes())["stages"]["export"]["tasks"] == SHARDS


# ---- files, threads and tasks of a run on Ray


@dataclass
class Most:
    """The most that was seen at once."""

    driver_files: int = 0
    driver_threads: int = 0
    worker_files: int = 0
    worker_threads: int = 0
    workers: int = 0
    tasks: int = 0
    looks: int = 0

    def look(self, driver: psutil.Process) -> None:
        self.driver_files = max(self.driver_files, driver.num_fds())
        self.driver_threads = max(self.driver_threads, driver.num_threads())
        workers = tasks = 0
        for child in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                title = " ".join(child.cmdline())
                if title.startswith("ray::Worker"):
                    self.worker_files = max(self.worker_files, child.num_fds())
                    self.worker_threads = max(self.worker_threads, child.num_threads())
                    workers += 1
                    tasks += title.startswith("ray::Worker.attempt")
        self.workers, self.tasks, self.looks = max(self.workers, workers), max(self.tasks, tasks), self.looks + 1


def watch(command: list[str], environment: Environment, most: Most) -> None:
    """Run a command to its end, looking at it fifty times a second."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                most.look(driver)
            time.sleep(0.02)
        assert process.returncode == 0, process.communicate()[1]


@pytest.mark.slow
def test_open_files_threads_and_tasks_in_flight_do_not_grow_with_the_shards(
    pictures: list[Picture], write_tar: WriteTar, program: Path, environment: Environment, tmp_path: Path
) -> None:
    found = {}
    for tars in (10, 40):
        folder, store = tmp_path / f"{tars}", tmp_path / f"store-{tars}"
        for number in range(tars):
            some = [(f"{number}-{i}", *pictures[(3 * number + i) % len(pictures)]) for i in range(3)]
            parts = [((f"{key}.jpg", jpeg), (f"{key}.txt", f"{text} {key}".encode())) for key, jpeg, text in some]
            write_tar(folder / f"{number:02}.tar", [member for pair in parts for member in pair])
        recipe = tmp_path / f"{tars}.yaml"
        recipe.write_text(f"embed: {{shards: {folder}}}\nindex: {{k: 5, engine: partition}}\n")
        most = found[tars] = Most()
        watch([str(program), "run", str(recipe), str(store), "--workers", "2"], environment, most)
        for layout in (["inline"], ["clustered", "--chunk", "2", "--shard-size", "6"]):
            command = [str(program), "export", str(store), "--layout", *layout, "--workers", "2"]
            watch(command, environment, most)
    few, many = found[10], found[40]
    sys.stderr.write(f"\n10 tars: {few}\n40 tars: {many}\n")
    assert many.looks > 200
    assert 1 <= few.tasks <= 2
    assert 1 <= many.tasks <= 2
    assert few.workers <= 2
    assert many.workers <= 2
    for what in ("driver_files", "driver_threads", "worker_files", "worker_threads"):
        assert getattr(many, what) <= getattr(few, what) + 8, what
        assert getattr(many, what) <= 150, what


# ---- memory


def watched_index(
    program: Path, environment: Environment, store: Path, *options: str, limit: int | None = None
) -> tuple[int, str, float, float]:
    """Run `graphbuild index` in one process: exit code, stderr, and the most GB that it held of its own and in all.

    Of its own: anonymous pages, without mapped files. limit: bytes of RLIMIT_DATA, which bounds what it may allocate.
    """
    command = [str(program), "index", str(store), "--workers", "0", *options]
    own = every = 0.0
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited(resource.RLIMIT_DATA, limit) if limit else None,
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            text = status.read_text()
            sizes = {name: int(size) * 1024 / 1e9 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
            own, every = max(own, sizes.get("RssAnon", 0)), max(every, sizes.get("VmHWM", 0))
            time.sleep(0.005)
        return process.returncode, process.communicate()[1], own, every


def planned(said: str) -> float:
    """The GB a worker that a command's plan line named."""
    line = re.search(r"^plan .* up to ([\d.]+) GB a worker", said, re.M)
    assert line, said
    return float(line[1])


def embedded(cli: Cli, tmp_path: Path, count: int, width: int) -> Path:
    vectors = save_vectors(tmp_path / "vectors.npy", count, width)
    cli("embed", tmp_path / "store", "--vectors", vectors, "--workers", 0)
    return tmp_path / "store"


@pytest.mark.slow
def test_an_index_that_may_allocate_no_more_than_its_plan_says_succeeds(
    program: Path, environment: Environment, cli: Cli, tmp_path: Path
) -> None:
    store = embedded(cli, tmp_path, 60_000, 64)
    refused, said, *_ = watched_index(program, environment, store, "--engine", "partition", "--memory", "1")
    assert refused == 2
    assert "--memory 1: partition needs at least 1.00" in said
    options = ("--engine", "partition", "--memory", "1.01", "--min-recall", "0")
    least, _, least_own, _ = watched_index(program, environment, store, *options, limit=100 * 2**20)
    assert least != 0, "the limit does not bite"
    code, said, own, every = watched_index(program, environment, store, *options, limit=int(1.05e9))
    assert code == 0, said
    sys.stderr.write(f"\nplanned {planned(said)} GB, {own:.2f} its own, {every:.2f} with mapped files\n")
    assert planned(said) <= 1.05
    assert least_own < own <= planned(said)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("engine", "memory"), [("exact", 4), ("exact", 1.1), ("partition", 4)])
def test_an_index_stays_under_the_memory_of_its_plan(
    engine: str, memory: float, program: Path, environment: Environment, cli: Cli, tmp_path: Path
) -> None:
    store = embedded(cli, tmp_path, 400_000, 64)
    options = ("--engine", engine, "--memory", str(memory), "--min-recall", "0")
    code, said, own, every = watched_index(program, environment, store, *options)
    assert code == 0, said
    sys.stderr.write(f"\n{said}planned {planned(said)} GB, {own:.2f} its own, {every:.2f} with mapped files\n")
    assert own <= planned(said)
