"""Worker processes: Ray actors that perform one task at a time and keep their imports and encoder for the next.

A task that raises comes back as a Failure, also recorded in `_state/<stage>/<task>.failed.json`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphbuild.errors import GraphbuildError, StageError, StorageError, public
from graphbuild.runner.stage import Stage, Task, perform, sealed, state_path
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)
ATTEMPTS = 3  # of a task whose worker dies
MOST_DEATHS = 20  # of its workers, with their nodes too
NOTICE_SECONDS = 10  # in which Ray sees that a node is gone, after the end of its workers
STARTS_IN_VAIN = 10  # one after the other, before none is tried any more
OUT_OF_MEMORY = "most often memory ran out: use fewer --workers or a smaller shard_size, then rerun"
UNKNOWN = "rerun the same command; if it fails again, its traceback lies in the failed.json named above"
GPU_IS_FULL = "use --workers 1, so that no two tasks share the GPU, one with more memory, or --device cpu; then rerun"


@dataclass(frozen=True)
class Failure:
    """Why a task failed, as it travels from a worker: plain strings and the exit code it asks for.

    storage: for no fault of its own, but because the store cannot be reached or is full: others would fail too.
    """

    cause: str
    fix: str
    traceback: str
    exit_code: int
    storage: bool = False


def attempt(stage: Stage, task: Task, store: Store) -> Json | Failure:
    """Perform a task where the worker is; an exception becomes a recorded Failure."""
    try:
        return perform(stage, task, store)
    except GraphbuildError as error:
        failure = Failure(error.cause, error.fix, "", error.exit_code, isinstance(error, StorageError))
    except Exception as error:  # noqa: BLE001 the one place where a task's unknown fault must not stop the others
        name = type(error).__name__
        fix = GPU_IS_FULL if name == "OutOfMemoryError" else UNKNOWN  # torch's, which is not imported for it
        failure = Failure(public(f"{name}: {error}"), fix, public(traceback.format_exc()), 1)
    record_failure(store, task, failure)
    return failure


def record_failure(store: Store, task: Task, failure: Failure) -> None:
    record = sealed({"task": task.name, "fingerprint": task.fingerprint, **dataclasses.asdict(failure)})
    try:
        store.write_json(state_path(task.stage, task.name, "failed"), record)
    except (StorageError, OSError) as error:  # most often for the same reason, which is what the user must see
        logger.warning("%s %s: its failure cannot be recorded (%s)", task.stage, task.name, error)


def died(times: int, how: str, trace: str, fix: str = OUT_OF_MEMORY) -> Failure:
    """Of a task that ended its worker so many times."""
    return Failure(f"its worker died {times} times ({how})", fix, trace, 1)


def is_to_blame(deaths: Sequence[str]) -> bool:
    """Whether a task may be what ended its workers, ATTEMPTS or more, each given by its node's id.

    Those count whose node is still there: a lost one (a spot instance, a broken machine) is no fault of a task's,
    unless that happens again and again. It may be gone a while before Ray knows it.
    """
    import ray

    end = time.monotonic() + NOTICE_SECONDS
    while len(deaths) < MOST_DEATHS:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if sum(node in alive for node in deaths) < ATTEMPTS:
            return False
        if time.monotonic() >= end:
            break
        time.sleep(0.5)
    return True


class Worker:
    """What runs in a worker's process."""

    def started(self) -> str:
        """Answers once the process is up, with the id of its node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def attempt(self, stage: Stage, task: Task, store: Store) -> Json | Failure:
        return attempt(stage, task, store)


class Pool:
    """Workers of one kind, with that share of a GPU each (0: on a CPU), that have no task: `idle`, or still `starting`.

    Only a worker that is up gets a task, so none waits for a CPU that the cluster lost or never had: those that can
    start do all the work. An idle worker comes with its node's id.
    """

    def __init__(self, gpu: float) -> None:
        self._gpu = gpu
        self._in_vain = 0  # times that starts failed since one succeeded
        self._time = 0  # of starting some
        self._failed = -1  # that time when one failed last
        self.idle: list[tuple[Any, str]] = []
        self.starting: dict[Any, tuple[Any, int]] = {}  # by the answer to `started`: a worker, and when it was started

    def start(self, count: int) -> None:
        """Start workers until so many are idle or starting."""
        import ray

        kind: Any = ray.remote(num_cpus=0 if self._gpu else 1, num_gpus=self._gpu)(Worker)
        self._time += 1
        while len(self.idle) + len(self.starting) < count:
            worker = kind.remote()
            self.starting[worker.started.remote()] = worker, self._time

    def arrived(self, answer: Any) -> None:
        """A worker has started, or could not; StageError when none can, however often it is tried."""
        import ray

        worker, when = self.starting.pop(answer)
        try:
            node = ray.get(answer)
        except ray.exceptions.RayError as error:
            self._in_vain += when > self._failed  # a lost node ends many that started with each other
            self._failed = self._time
            if self._in_vain >= STARTS_IN_VAIN:
                last = str(error).strip().splitlines()[-1]
                raise StageError(
                    f"no worker can be started ({type(error).__name__}: {last})",
                    "install the same graphbuild on every node of the cluster, and see `ray status`",
                ) from error
        else:
            self._in_vain = 0
            self.idle.append((worker, node))

    def dismiss(self) -> None:
        """End the idle workers; some may be gone already."""
        import ray

        while self.idle:
            ray.kill(self.idle.pop()[0])

    def close(self) -> None:
        """End all of them, so that what they hold of GPUs is free for others."""
        self.idle += ((worker, "") for worker, _ in self.starting.values())
        self.starting.clear()
        self.dismiss()
