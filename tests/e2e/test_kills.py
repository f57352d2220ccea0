"""Whole jobs under SIGKILL, at random moments of every stage: a worker, or all processes of the run at once.

All at once is what a power failure does to processes; that what is on disk by then stays there is fsync's part, and not
shown here. The seed is printed; GRAPHBUILD_KILL_SEED sets another.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_runs import alive, descendants, digests, workers_of

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
Start = Callable[..., "subprocess.Popen[str]"]
Progress = Callable[[], float]

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
SEED = int(os.environ.get("GRAPHBUILD_KILL_SEED", "20"))
GRAPH = ("prepare", "codes", "moments", "order", "join", "merge", "refine", "search", "certify", "export")
TARS = ("scan", "number", "texts", "encode", "assign", *GRAPH, "cells", "arrange", "scatter", "cluster")
WORKER, EVERYTHING = "worker", "everything"
BUSY = "ray::Worker.attempt"


@dataclass(frozen=True)
class Target:
    """What to kill, and when: so many seconds after a stage has begun, or has got on."""

    stage: str
    what: str
    pause: float


@dataclass(frozen=True)
class Kill:
    """What was killed, and what the store showed at that moment: the stage under way, its tasks done.

    busy: workers in the middle of a task. litter: files that were being written.
    """

    what: str
    stage: str
    done: int
    busy: int
    litter: int


def temporaries(store: Path) -> list[str]:
    return [str(path) for path in store.rglob(".*") if path.is_file()]


def under_way(store: Path, stages: Sequence[str]) -> int:
    """The number of the first stage that is not finished. Scratch stages leave the manifest before later ones do."""
    try:
        finished = json.loads((store / "manifest.json").read_bytes())["stages"]
    except FileNotFoundError:
        return 0
    return max((number + 1 for number, stage in enumerate(stages) if stage in finished), default=0)


def freeze(process: subprocess.Popen[str]) -> set[int]:
    """Stop all processes of a run, also those that it is just starting; returns their numbers."""
    frozen: set[int] = set()
    while new := {process.pid, *descendants(process.pid)} - frozen:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        frozen |= new
    return frozen


def strike(
    process: subprocess.Popen[str], store: Path, stages: Sequence[str], what: str, rng: random.Random
) -> Kill | None:
    """Kill, and tell what the store showed while the victims stood still; None when there is no worker any more."""
    busy = workers_of(process, BUSY)
    if what == EVERYTHING:
        victims = freeze(process)
    else:
        workers = busy or workers_of(process)
        if not workers:
            return None
        victims = {rng.choice(workers)}
        with contextlib.suppress(ProcessLookupError):
            os.kill(min(victims), signal.SIGSTOP)
    stage = min(under_way(store, stages), len(stages) - 1)
    done = len(list((store / "_state" / stages[stage]).glob("*.done.json")))
    kill = Kill(what, stages[stage], done, len(busy), len(temporaries(store)))
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if what == EVERYTHING:
        process.wait()
        while any(alive(pid) for pid in victims):
            time.sleep(0.01)
    return kill


def moment_comes(
    process: subprocess.Popen[str], store: Path, stages: Sequence[str], target: Target, progress: Progress
) -> bool:
    """Wait for a target's moment: a worker's comes when one has a task, or half a second later. False when the command
    ends before.
    """
    due, before = None, progress()
    while process.poll() is None:
        if due is None and under_way(store, stages) >= stages.index(target.stage) and progress() != before:
            due = time.monotonic() + target.pause
        late = time.monotonic() - due if due is not None else -1.0
        if late >= 0 and (target.what == EVERYTHING or workers_of(process, BUSY if late < 0.5 else "ray::Worker")):
            return True
        time.sleep(0.002)
    return False


@pytest.fixture
def start(program: Path, environment: dict[str, str]) -> Iterator[Start]:
    """Start `graphbuild ARGUMENTS` and go on. Ray's folders and other temporary files go to one that is removed."""
    folder = tempfile.mkdtemp(prefix="gb", dir="/tmp")  # short: Ray's sockets lie below
    env = {**environment, "RAY_TMPDIR": folder, "TMPDIR": folder}
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        command = [str(program), *map(str, arguments)]
        nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
        started.append(
            subprocess.Popen(command, env=env, stdout=nowhere, stderr=pipe, text=True, start_new_session=True)
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            for pid in freeze(process):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def finish_under_fire(
    commands: Sequence[Sequence[object]],
    store: Path,
    stages: Sequence[str],
    targets: Iterable[Target],
    rng: random.Random,
    start: Start,
    progress: Progress = time.monotonic,
) -> list[Kill]:
    """Run commands one after the other, each started again until it ends well; returns the kills on the way.

    progress: changes as a stage gets on, however long a loaded machine takes to start its workers.
    """
    waiting, kills = deque(targets), []
    for arguments in commands:
        while True:
            process = start(*arguments)
            expected = {0}
            while waiting and moment_comes(process, store, stages, waiting[0], progress):
                kill = strike(process, store, stages, waiting.popleft().what, rng)
                kills += [kill] if kill else []
                if kill and kill.what == EVERYTHING:
                    expected = {-signal.SIGKILL}
                    break
            _, errors = process.communicate(timeout=300)
            if process.returncode == 0:
                break
            died = process.returncode == 1 and "its worker died 3 times" in errors
            assert died or process.returncode in expected, errors
    return kills


def aim(stages: Sequence[str], whats: Sequence[str], rng: random.Random) -> list[Target]:
    """For each stage one kill of each kind, in random order, up to 0.3 seconds after its begin or resumption.

    Short pauses are as likely as long ones (log-uniform): a stage may take milliseconds or, with imports, seconds.
    """
    kinds = [(stage, what) for stage in stages for what in rng.sample(whats, len(whats))]
    return [Target(stage, what, 10 ** rng.uniform(-3, -0.5)) for stage, what in kinds]


def report(kills: Sequence[Kill]) -> str:
    """A line a stage: how often and what, how far it was."""
    lines = [f"seed {SEED}, {len(kills)} kills, {sum(kill.litter for kill in kills)} files left half written"]
    for stage in dict.fromkeys(kill.stage for kill in kills):
        here = [kill for kill in kills if kill.stage == stage]
        whats = ", ".join(f"{count} x {what}" for what, count in Counter(kill.what for kill in here).items())
        done = ", ".join(str(kill.done) for kill in here)
        lines.append(f"{stage:9} {whats}; tasks done {done}; {sum(kill.busy > 0 for kill in here)} with a task running")
    return "\n".join(lines)


def check_same(store: Path, undisturbed: Path) -> None:
    found = digests(store)
    assert [name for name in found if name.endswith((".tmp", ".failed.json")) or name.startswith("_work")] == []
    assert found == digests(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_job_killed_in_every_stage_ends_with_the_bytes_of_an_undisturbed_one(
    pictures: list[Picture], write_tar: WriteTar, start: Start, cli: Cli, tmp_path: Path
) -> None:
    for number in range(6):
        members = [
            member
            for row in range(number * 350, number * 350 + 350)
            for jpeg, caption in [pictures[row % len(pictures)]]
            for member in ((f"{row}.jpg", jpeg), (f"{row}.txt", f"{caption}, version {row}".encode()))
        ]
        write_tar(tmp_path / "tars" / f"{number}.tar", members)
    index = "{k: 8, engine: partition, memory: 1.003}"  # as little memory as is taken: more join tasks
    (tmp_path / "recipe.yaml").write_text(f"embed: {{shards: {tmp_path}/tars}}\nindex: {index}\n")

    def commands(store: Path) -> list[list[object]]:
        export: list[object] = ["export", store, "--layout", "clustered", "--chunk", 8, "--shard-size", 400]
        return [["run", tmp_path / "recipe.yaml", store, "--workers", 2], [*export, "--workers", 2]]

    for arguments in commands(tmp_path / "undisturbed"):
        cli(*arguments)
    rng = random.Random(SEED)
    targets = aim(TARS, (WORKER, EVERYTHING, rng.choice((WORKER, EVERYTHING))), rng)
    kills = finish_under_fire(commands(tmp_path / "store"), tmp_path / "store", TARS, targets, rng, start)
    sys.stderr.write(f"\n{report(kills)}\n")
    check_same(tmp_path / "store", tmp_path / "undisturbed")
    assert len(kills) >= 30
    assert min(sum(kill.what == what for kill in kills) for what in (WORKER, EVERYTHING)) >= 10
    missed = [stage for stage in TARS if stage not in {kill.stage for kill in kills}]
    assert len(missed) <= 2, f"not hit: {missed}"
    assert sum(kill.busy > 0 for kill in kills) >= 15


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A recipe for 1,600 ready vectors in four shards."""
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((1_600, 24), np.float32))
    embed = f"{{vectors: {tmp_path}/vectors.npy, shard_size: 400}}"
    (tmp_path / "recipe.yaml").write_text(f"embed: {embed}\nindex: {{k: 8, engine: partition, memory: 1.002}}\n")
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_a_job_killed_three_times_ends_with_the_same_bytes(
    vectors: Path, start: Start, cli: Cli, tmp_path: Path
) -> None:
    cli("run", vectors, tmp_path / "undisturbed", "--workers", 0)
    rng = random.Random(SEED)
    whats = [EVERYTHING, WORKER, rng.choice((WORKER, EVERYTHING))]
    stages = ("vectors", *GRAPH)
    chosen = sorted(rng.sample(range(len(stages) - 1), 3))
    targets = [Target(stages[at], what, rng.uniform(0, 0.1)) for at, what in zip(chosen, whats, strict=True)]
    command = ["run", vectors, tmp_path / "store", "--workers", 2]
    kills = finish_under_fire([command], tmp_path / "store", stages, targets, rng, start)
    sys.stderr.write(f"\n{report(kills)}\n")
    check_same(tmp_path / "store", tmp_path / "undisturbed")
    assert len(kills) == 3


WRITE = """
import sys, time
from graphbuild.store.store import Store

with Store(sys.argv[1]).staged(sys.argv[2]) as path:
    path.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read(1)
"""


def test_a_run_removes_what_a_killed_process_was_writing_and_nothing_that_a_living_one_writes(
    vectors: Path, cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    cli("run", vectors, store, "--workers", 0)
    before = digests(store)
    writers = []
    for name in ("manifest.json", "graph/00001.neighbors.npy", "_state/search/00001.done.json", "mined/new.parquet"):
        command = [sys.executable, "-c", WRITE, str(store), name]
        writers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert writers[-1].stdout.readline() == "writing\n"  # type: ignore[union-attr]
    *killed, living = writers
    for process in killed:
        process.kill()
        process.communicate()
    assert len(temporaries(store)) == 4
    cli("export", store, "--workers", 0)
    (kept,) = temporaries(store)
    assert Path(kept).parent.name == "mined"
    living.communicate("x")
    assert living.returncode == 0
    assert (store / "mined/new.parquet").read_bytes() == b"half"
    (store / "mined/new.parquet").unlink()
    assert digests(store) == before


@contextlib.contextmanager
def slow_site(pictures: Sequence[Picture]) -> Iterator[tuple[str, Counter[int]]]:
    """Serves each picture after a tenth of a second; its URL, and how often each was asked for."""
    hits: Counter[int] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = int(self.path.strip("/"))
            hits[number] += 1
            time.sleep(0.1)
            self.send_response(200)
            self.send_header("Content-Length", str(len(pictures[number][0])))
            self.end_headers()
            self.wfile.write(pictures[number][0])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]  clients get killed
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hits
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_download_killed_again_and_again_brings_every_image_once(
    pictures: list[Picture], start: Start, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    rng = random.Random(SEED)
    whats = [WORKER, EVERYTHING, EVERYTHING, WORKER, EVERYTHING, WORKER, EVERYTHING]
    targets = [Target("download", what, rng.uniform(0, 0.5)) for what in whats]  # a shard takes half a second
    with slow_site(pictures) as (url, hits):
        rows = [f"{caption}\t{url}/{number}\n" for number, (_, caption) in enumerate(pictures)]
        (tmp_path / "list.tsv").write_text("".join(rows))
        command = ["download", store, tmp_path / "list.tsv", "--preset", "cc3m", "--shard-size", 20]
        command += ["--resize-mode", "no", "--threads", 4, "--allow-private-hosts", "--workers", 2]
        kills = finish_under_fire([command], store, ("urls", "download"), targets, rng, start, hits.total)
    sys.stderr.write(f"\n{report(kills)}\n{sum(hits.values())} requests for {len(pictures)} URLs\n")
    assert sum(kill.stage == "download" for kill in kills) >= 5
    assert sum(hits.values()) > len(pictures), "no kill met a shard that was being fetched"
    found: dict[str, bytes] = {}
    for path in sorted((store / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        assert not files.keys() & found.keys()
        found |= files
    texts = {name[:-4]: content.decode() for name, content in found.items() if name.endswith(".txt")}
    brought = sorted((found[f"{key}.jpg"], caption) for key, caption in texts.items())
    assert brought == sorted(pictures)
    assert [path for path in store.rglob("*") if path.name.endswith((".tmp", ".failed.json"))] == []
