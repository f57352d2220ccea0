"""How much memory Ray's workers take: sampled while a block runs, by the kernel's own count (proportional set size).

A page that several processes share counts as its share in each, so that the sum over workers is what they take.
"""

from __future__ import annotations

import re
import threading
from types import TracebackType

import psutil

EVERY_SECONDS = 0.1


class WorkerMemory:
    """A context manager; `peak_bytes` is then the most that one worker of this process's Ray took, 0 without any."""

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
            self.peak_bytes = max(self.peak_bytes, *worker_bytes(), 0)
            if self._over.wait(EVERY_SECONDS):
                return


def worker_bytes() -> list[int]:
    """The memory of each worker that this process's Ray runs now."""
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
    except PermissionError:
        found = None
    return int(found[1]) * 1024 if found else int(psutil.Process(pid).memory_info().rss)
