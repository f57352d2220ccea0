"""What a job of this machine really took: its workers' memory, and how much of the processor others left it."""

from __future__ import annotations

import re
import threading
import time
from types import TracebackType

import psutil

EVERY_SECONDS = 0.25


class WorkerMemory:
    """A context manager; `peak_bytes` is then the most that one worker of this process's Ray took, 0 without any.

    By the kernel's proportional set size: a page that several processes share counts as its share in each, so that the
    sum over workers is what they take.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> WorkerMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, *worker_bytes())
            if self._over.wait(EVERY_SECONDS):
                return


class Share:
    """What of the processor other processes left to this one and its children, since it was made."""

    def __init__(self) -> None:
        self._before, self._begin = _busy(), time.monotonic()

    def left(self, wanted: int) -> float:
        """The share to be had of `wanted` cores, in (0, 1]: seconds times it are those of a machine to oneself.

        1 where others do nothing, or leave as many cores as are wanted.
        """
        total, busy, own = (now - before for now, before in zip(_busy(), self._before, strict=True))
        seconds = max(time.monotonic() - self._begin, 1e-3)
        return min(max((total - max(busy - own, 0)) / seconds / wanted, 0.05), 1.0)


def _busy() -> tuple[float, float, float]:
    """Seconds of all cores so far, busy ones of them, and those of this process's tree."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
    idle = times.idle + getattr(times, "iowait", 0)
    own = psutil.Process()
    spent = sum(own.cpu_times()[:4])
    for child in own.children(recursive=True):
        try:
            spent += sum(child.cpu_times()[:2])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total, total - idle, spent


def worker_bytes() -> list[int]:
    """0, and the memory of each worker that this process's Ray runs now."""
    found = [0]
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::"):
                found.append(proportional(process.pid))
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
            continue
    return found


def proportional(pid: int) -> int:
    """Bytes of a process; where the kernel does not tell shares (not Linux), its resident set."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:  # noqa: PTH123 no file of the project
            found = re.search(r"^Pss:\s+(\d+) kB", file.read(), re.M)
    except (PermissionError, FileNotFoundError):
        found = None
    return int(found[1]) * 1024 if found else int(psutil.Process(pid).memory_info().rss)
