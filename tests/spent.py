"""What a command costs: seconds of a core of all its processes, also background jobs and daemons; none outlives it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

EVERY_SECONDS = 0.2


def run(
    command: Sequence[str], environment: Mapping[str, str], timeout: float, folder: Path
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished command, with stderr in its stdout; and its seconds. The last 0.2 of a daemon may be missing.

    Raises:
        subprocess.TimeoutExpired: it ran for `timeout` seconds.
    """
    mark = uuid.uuid4().hex
    spent: dict[psutil.Process, float] = {}
    before = os.times()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command, cwd=folder, env={**environment, "SPENT": mark}, stdout=printed, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < end:
            for one in marked(mark):
                with contextlib.suppress(psutil.Error):
                    spent[one] = sum(one.cpu_times()[:2])
            time.sleep(EVERY_SECONDS)
        over = process.poll() is None
        for one in marked(mark):
            with contextlib.suppress(psutil.Error):
                one.kill()
        code = process.wait()
        printed.seek(0)
        said = printed.read()
    if over:
        raise subprocess.TimeoutExpired(command, timeout, said)
    after = os.times()
    waited_for = after.children_user + after.children_system - before.children_user - before.children_system
    # Sampling misses what ends within 0.2 seconds; the system's count misses what nobody waited for.
    return subprocess.CompletedProcess(command, code, said), max(waited_for, sum(spent.values()))


def marked(mark: str) -> Iterator[psutil.Process]:
    """The processes that inherited the mark, whoever is their parent by now."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SPENT") == mark:
                yield process
