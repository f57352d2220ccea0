"""Jobs on a Ray cluster whose nodes are lost as machines are, whose driver dies, and on a disk that is full.

Each job must end with the bytes that one process writes without Ray. Kills are seen to hit running tasks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ray_nodes import Nodes, is_busy, ray_nodes
from tests.e2e.test_ray_jobs import free_port
from tests.e2e.test_runs import descendants, digests, done, members, needs_proc, wait_for

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
logger = logging.getLogger(__name__)
pytestmark = needs_proc
TARS, SAMPLES = 12, 10
CLUSTERED = ("--layout", "clustered", "--chunk", 4, "--shard-size", 20)
DIED = re.compile(r"^(\w+) .+: its worker died", re.MULTILINE)


@pytest.fixture(scope="module")
def recipe(pictures: list[Picture], write_tar: WriteTar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    for number in range(TARS):
        some = list(enumerate(pictures))[number * SAMPLES : (number + 1) * SAMPLES]
        write_tar(folder / f"part-{number:04d}.tar", members(some))
    path = folder / "recipe.yaml"
    path.write_text(f"embed:\n  shards: {folder}/part-*.tar\nindex:\n  k: 5\n")
    return path


@pytest.fixture(scope="module")
def built(recipe: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes."""
    store = tmp_path_factory.mktemp("built") / "store"
    cli("run", recipe, store, "--workers", 0)
    return store


@pytest.fixture(scope="module")
def clustered(built: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That, and its tars in neighbour order."""
    store = tmp_path_factory.mktemp("clustered") / "store"
    shutil.copytree(built, store)
    cli("export", store, *CLUSTERED, "--workers", 0)
    return store


@pytest.fixture
def start(program: Path, environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `graphbuild ARGUMENTS` on the nodes, its messages into a file; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(nodes: Nodes, log: Path, *arguments: object) -> subprocess.Popen[str]:
        command = [str(program), *map(str, arguments), "--address", nodes.address]
        with log.open("a") as file:
            env = {**environment, **nodes.environment}
            started.append(subprocess.Popen(command, env=env, stdout=file, stderr=file, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def stages(store: Path) -> set[str]:
    """The stages that the manifest says are finished."""
    try:
        return set(json.loads((store / "manifest.json").read_bytes())["stages"])
    except FileNotFoundError:
        return set()


def freeze(nodes: Nodes, process: subprocess.Popen[str], store: Path, wanted: Callable[[set[str]], bool]) -> int | None:
    """Stop a worker in the middle of a task, once the finished stages are wanted; its pid, or None when the job ended.

    While it stands still its stage cannot end, so the finished stages tell which it is.
    """
    workers: dict[int, int] = {}
    for polls in itertools.count():
        if process.poll() is not None:
            return None
        if polls % 200 == 0:
            workers = nodes.workers()
        for pid in filter(is_busy, workers if wanted(stages(store)) else ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                if is_busy(pid) and wanted(stages(store)):
                    return pid
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.0005)
    return None


@pytest.mark.slow
def test_a_cluster_of_three_nodes_writes_the_bytes_of_one_process(
    recipe: Path, built: Path, start: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    with ray_nodes(environment, [1, 1, 1]) as nodes:
        process = start(nodes, log, "run", recipe, store)
        used: set[int] = set()
        while process.poll() is None:
            used |= {raylet for pid, raylet in nodes.workers().items() if is_busy(pid)}
            time.sleep(0.2)
        assert used == set(nodes.raylets)  # all worked
    assert process.returncode == 0, log.read_text()
    assert digests(store) == digests(built)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_lost_in_any_stage_costs_nothing_but_time(
    recipe: Path,
    clustered: Path,
    start: Callable[..., subprocess.Popen[str]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    hit: set[str] = set()
    ran: set[str] = set()
    for attempt in range(5):  # a stage of milliseconds may be over before a worker is caught in it
        store, log = tmp_path / f"store-{attempt}", tmp_path / f"log-{attempt}"
        with ray_nodes(environment, [1, 1, 1]) as nodes:
            for arguments in (["run", recipe, store], ["export", store, *CLUSTERED]):
                begin = time.monotonic()
                process = start(nodes, log, *arguments)
                seen: list[set[str]] = []
                while pid := freeze(nodes, process, store, lambda finished, seen=seen: finished not in seen):
                    seen.append(stages(store))
                    deaths = len(DIED.findall(log.read_text()))
                    killed = nodes.lose(nodes.workers()[pid])
                    nodes.add()
                    end = time.monotonic() + 60
                    while len(DIED.findall(log.read_text())) == deaths and time.monotonic() < end:
                        time.sleep(0.1)
                    logger.info("killed %d processes of a node: %s", killed, DIED.findall(log.read_text())[deaths:])
                    ran |= stages(store)
                assert process.returncode == 0, log.read_text()
                ran |= stages(store)
                logger.info("%s: %d nodes lost in %.0f s", arguments[0], len(seen), time.monotonic() - begin)
        hit |= set(DIED.findall(log.read_text()))
        assert digests(store) == digests(clustered)
        ran |= hit  # scratch stages, which leave the manifest
        if hit == ran:
            break
    assert {"scan", "number", "assign", "encode", "search", "certify", "export", "cluster"} <= ran
    assert hit == ran


@pytest.mark.slow
@pytest.mark.parametrize(("cpus", "workers"), [([1, 1], None), ([1, 1], 4)])
def test_a_job_goes_on_with_the_nodes_that_are_left(
    cpus: list[int],
    workers: int | None,
    recipe: Path,
    built: Path,
    start: Callable[..., subprocess.Popen[str]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    options = [] if workers is None else ["--workers", workers]
    with ray_nodes(environment, cpus) as nodes:
        process = start(nodes, log, "run", recipe, store, *options)
        pid = freeze(nodes, process, store, lambda finished: "moments" in finished)
        assert pid is not None, log.read_text()
        nodes.lose(nodes.workers()[pid])
        process.wait(timeout=200)
    assert process.returncode == 0, log.read_text()
    assert DIED.findall(log.read_text())
    assert digests(store) == digests(built)


@pytest.mark.slow
def test_a_lost_node_with_many_idle_workers_is_no_reason_to_fail(
    recipe: Path, built: Path, start: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """A stage of one task, while the node's other workers wait for the next stage: all are gone at once."""
    store, log = tmp_path / "store", tmp_path / "log"
    with ray_nodes(environment, [4]) as nodes:
        process = start(nodes, log, "run", recipe, store)
        pid = freeze(
            nodes,
            process,
            store,
            lambda finished: finished == {"scan"} or ("codes" in finished and "moments" not in finished),
        )
        assert pid is not None
        stage = "number" if stages(store) == {"scan"} else "moments"
        assert sum(command.startswith("ray::") for command in descendants(nodes.raylets[0]).values()) >= 4
        nodes.lose(nodes.raylets[0])
        nodes.add(2)
        process.wait(timeout=200)
    assert process.returncode == 0, log.read_text()
    assert stage in DIED.findall(log.read_text())
    assert digests(store) == digests(built)


@pytest.mark.slow
def test_a_ray_job_whose_driver_is_killed_is_finished_by_submitting_it_again(
    recipe: Path, built: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    store, port = tmp_path / "store", free_port()
    ray = Path(sys.executable).with_name("ray")
    path = f"{ray.parent}:{environment['PATH']}"
    with ray_nodes({**environment, "PATH": path}, [1, 1, 1], dashboard_port=port) as nodes:
        address = f"http://127.0.0.1:{port}"
        env = {**environment, **nodes.environment, "PATH": path}
        listing = [ray, "job", "list", "--address", address]
        end = time.monotonic() + 60
        while subprocess.run(listing, env=env, capture_output=True).returncode and time.monotonic() < end:
            time.sleep(1)
        time.sleep(5)  # the job agent comes up after the dashboard
        submit = [ray, "job", "submit", "--address", address, "--", "graphbuild", "run", recipe, store]
        first = subprocess.Popen(submit, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: done(store, "encode") >= 1, first)
        drivers = [
            pid
            for pid, command in descendants(nodes.process.pid).items()
            if "graphbuild run" in command and not command.startswith("ray::")
        ]
        assert drivers
        for pid in drivers:
            os.kill(pid, signal.SIGKILL)
        said, _ = first.communicate(timeout=60)
        assert first.returncode != 0, said
        assert "export" not in stages(store)
        again = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=200)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "done before" in again.stdout
    assert digests(store) == digests(built)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "graphbuild-test", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, bytes_free: int) -> None:
    """Fill a disk but for so many bytes."""
    (disk / "ballast").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    if free > bytes_free:
        (disk / "ballast").write_bytes(bytes(free - bytes_free))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "workers"), [([200_000], 0), (range(20_000, 900_000, 110_000), 2)])
def test_a_full_disk_stops_the_job_and_room_lets_it_finish(
    steps: Iterable[int], workers: int, recipe: Path, built: Path, small_disk: Path, cli: Cli
) -> None:
    store = small_disk / "store"
    failures = []
    for bytes_free in steps:
        leave(small_disk, bytes_free)
        stopped = cli("run", recipe, store, "--workers", workers, code=None)
        assert stopped.returncode == 1, (bytes_free, stopped.stderr)
        assert "Traceback" not in stopped.stderr
        found = re.search(rf"({store}/\S+): no space is left in (\S+)", stopped.stderr)
        assert found, stopped.stderr
        assert "make room there, then run the same command again" in stopped.stderr
        failures.append(found[1].removeprefix(f"{store}/"))
        whole(store)
    logger.info("the disk was full at %s", failures)
    (small_disk / "ballast").unlink()
    cli("run", recipe, store, "--workers", workers)
    assert digests(store) == digests(built)


def whole(store: Path) -> None:
    """Fail unless what is marked as done is there, as it was written, and no temporary file is left."""
    files: dict[str, Any] = {str(path.relative_to(store)): path for path in store.rglob("*") if path.is_file()}
    assert [name for name in files if name.endswith(".tmp")] == []
    found = digests(store)
    for name in [name for name in files if name.endswith(".done.json")]:
        for output in json.loads(files[name].read_bytes())["outputs"]:
            if output["sha256"]:
                assert found[output["path"]] == output["sha256"]
