"""Many runs: one after the other in this process, or several at once in processes that share the device.

Small networks leave most of a GPU idle, which waits for the next kernel: several processes fill it. A process holds
the images of its last data set, and on a GPU about a gigabyte beside its network.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from benchmarks.experiments.plan import Run
from benchmarks.experiments.results import Results
from benchmarks.experiments.runs import claimed, device_name, finish, torch_device
from graphbuild.errors import GraphbuildError


@dataclass(frozen=True)
class Outcome:
    """done: its line is written. shared: it had one. elsewhere: another process is at it. late: there was no time left.

    failed: `told` says why.
    """

    run: Run
    state: Literal["done", "shared", "elsewhere", "late", "failed"]
    seconds: float = 0.0
    told: str = ""


@dataclass(frozen=True)
class Work:
    """Where runs find and leave their things; until: no run begins later (time.time())."""

    folder: Path
    results: Path
    cifar: Path | None
    until: float | None = None
    captions: Path | None = None
    icons: Path | None = None

    def attempt(self, run: Run) -> Outcome:
        """Do the run, unless it is done or another process's."""
        with claimed(run.name, self.folder) as mine:
            if not mine:
                return Outcome(run, "elsewhere")
            found = Results(self.results)
            if found.of(run) is not None:
                return Outcome(run, "shared")
            if self.until is not None and time.time() >= self.until:
                return Outcome(run, "late")
            started, device = time.perf_counter(), torch_device()
            try:
                metrics, seconds = finish(run, self.folder, device, self.cifar, self.captions, self.icons)
            except GraphbuildError as error:
                return Outcome(run, "failed", told=str(error))
            except Exception as error:  # noqa: BLE001 - a fault of one run must not end the others
                traceback.print_exc()
                return Outcome(run, "failed", told=f"{type(error).__name__}: {error}")
            with claimed("results", self.folder, wait=True):
                found.add(run, metrics, seconds, device_name(device))
        main = f"linear {run.data.main_label}"
        told = f"{main} {100 * metrics[main]:.1f}" if main in metrics else ""
        return Outcome(run, "done", time.perf_counter() - started, told)


def outcomes(work: Work, runs: Sequence[Run], processes: int) -> Iterator[Outcome]:
    """Of each run, as they end.

    Runs that time steps come first, with the device to themselves. Several processes write what they print to
    FOLDER/logs/. One that dies takes the runs with it that have not ended: they have failed.
    """
    alone = [run for run in runs if processes == 1 or run.kind == "cost"]
    yield from map(work.attempt, alone)
    together = [run for run in runs if run not in alone]
    if not together:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (psutil.cpu_count() or 1) // processes)))
    logs = work.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_write_to, initargs=(logs,)) as pool:
        begun: dict[Future[Outcome], Run] = {pool.submit(work.attempt, run): run for run in together}
        for future in as_completed(begun):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Outcome(begun[future], "failed", told=f"a process died, see {logs}; was memory short?")


def _write_to(logs: Path) -> None:
    sys.stdout = sys.stderr = (logs / f"{os.getpid()}.log").open("a", buffering=1)
