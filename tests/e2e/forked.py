"""The command line in processes forked from one that has imported what the verbs use: the same code, started sooner.

A verb spends most of a small job's time on imports. Each command still is a process with its own arguments, environment
(but for what libraries read when they are imported), working folder, output and exit code.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTED = (
    "sentence_transformers", "transformers.models.bert.modeling_bert", "ray", "polars", "pyarrow.parquet", "numba",
    "scipy.sparse", "graphbuild.cli", "graphbuild.job.steps", "graphbuild.torch",
)  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))
multiprocessing.util.get_temp_dir()  # its socket lies there: not in a folder that a fixture removes


def run(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(command, environment, out, err)
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess(list(command), code, out.read_text(), err.read_text())


def start(
    command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path
) -> multiprocessing.process.BaseProcess:
    """Begin it as a process whose output goes to these files."""
    process = _context.Process(target=_main, args=(list(command), dict(environment), Path.cwd(), out, err))
    process.start()
    return process


def _main(command: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
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
