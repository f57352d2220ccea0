"""The command line in processes forked from one that has done what they all begin with: the same code, started sooner.

A verb spends most of a small job's time on imports, and on the encoder (warm.py). Each command still is a process with
its own arguments, environment (but for what libraries read when they are imported), working folder, output and exit
code.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.e2e.warm"])
multiprocessing.util.get_temp_dir()  # its socket lies there: not in a folder that a fixture removes


class Started:
    """A command that runs; what tests use of `subprocess.Popen(command, env=environment, text=True)`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> None:
        self.args = list(command)
        self._printed = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._printed.name) / name for name in ("out", "err"))
        started = (self.args, dict(environment), folder or Path.cwd(), self._out, self._err)
        _start_server()
        self._process = _context.Process(target=_main, args=started)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """subprocess.TimeoutExpired when it runs for longer."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, *self.printed())
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.printed()

    def printed(self) -> tuple[str, str]:
        """Its output and its errors up to now."""
        out, err = (path.read_text() if path.exists() else "" for path in (self._out, self._err))
        return out, err


def run(
    command: Sequence[str], environment: Mapping[str, str], timeout: float, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout)`."""
    process = Started(command, environment, folder)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def _start_server() -> None:
    """Start the process to fork from, if it does not run; it finds the tests as this one does."""
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root if before is None else os.pathsep.join((root, before))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _main(command: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    os.setpgid(0, 0)
    assert "tests.e2e.warm" in sys.modules, "the process to fork from could not be prepared: import it to see why"
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as loading the encoder, which is loaded, leaves it
    os.chdir(folder)
    tempfile.tempdir = None
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = command
    from graphbuild.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
