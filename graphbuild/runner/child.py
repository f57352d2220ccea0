"""A process beside the command's, for the tasks of a small job that may crash: what they decode comes from anywhere.

It takes tasks pickled from its standard input, one after the other, and answers what `attempt` gives. It ends with the
command, however that ends, and a task whose process died is tried again in a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from typing import Any, Self

from graphbuild.errors import public
from graphbuild.runner.stage import Stage, Task
from graphbuild.runner.workers import ATTEMPTS, Failure, attempt, died, record_failure
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)

KILLED = "most often memory ran out: use a smaller shard_size, or a machine with more memory, then rerun"
CRASHED = "a library crashed on what it read: its .failed.json says where; leave that file or row out, then rerun"


class Child:
    """A context manager, whose process starts with its first task. It costs one more import of what the task uses."""

    def __init__(self) -> None:
        self._process: Any = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 what the process prints, and where it crashed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()  # it has nothing to do, or nobody waits for it
            self._end()
        self._said.close()

    def attempt(self, stage: Stage, task: Task, store: Store) -> Json | Failure:
        """Perform a task there; what it raises, or that its process died ATTEMPTS times, becomes a recorded Failure.

        stage.run is a function that can be pickled: one of a module.
        """
        for times in range(1, ATTEMPTS + 1):
            self._process = self._process or self._started()
            try:
                pickle.dump((stage.name, stage.run, stage.scratch, task, store), self._process.stdin)
                self._process.stdin.flush()
                answer: Json | Failure = pickle.load(self._process.stdout)
                return answer
            except (BrokenPipeError, EOFError, pickle.UnpicklingError):
                code = self._end()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            if times < ATTEMPTS:
                logger.warning("%s %s: its process died (%s); trying again", stage.name, task.title, name)
        self._said.seek(0)
        fix = KILLED if name == "SIGKILL" else CRASHED
        failure = died(ATTEMPTS, name, public(self._said.read().decode(errors="replace")), fix)
        record_failure(store, task, failure)
        return failure

    def _started(self) -> subprocess.Popen[bytes]:
        self._said.seek(0)
        self._said.truncate()
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from graphbuild.runner.child import serve; serve()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    def _end(self) -> int:
        """The exit code of the process, which has ended or is about to."""
        process, self._process = self._process, None
        with contextlib.suppress(BrokenPipeError), process:  # closes the pipes; a task may not have been sent
            pass
        return int(process.returncode)


def serve() -> None:
    """Perform the tasks that come, until the command closes standard input or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command answers it
    faulthandler.enable()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    tasks: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                tasks.put(pickle.load(sys.stdin.buffer))
        except EOFError:  # perhaps in the middle of a task
            os._exit(0)
        except Exception:  # noqa: BLE001 what a task is made of cannot be loaded here
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        name, run, scratch, task, store = tasks.get()
        stage = Stage(name=name, title=name, plan=lambda recipe, store: [], run=run, scratch=scratch)
        pickle.dump(attempt(stage, task, store), answers)
        answers.flush()
