"""The one runner: executes the tasks of a stage in this process, on local Ray or on a Ray cluster.

Only this module knows parallelism, retries, the limit of tasks in flight (one a worker) and failures. Tasks exchange
file names, so Ray's object store stays empty. What is done is skipped; a worker that dies has its task run again by
another; a task that raises is recorded and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from graphbuild.errors import ConfigError, GraphbuildError, InputError, StageError
from graphbuild.machine.gpus import gpu_here
from graphbuild.recipe import Recipe
from graphbuild.runner.progress import Metrics, Progress
from graphbuild.runner.stage import Stage, Task, digest, records, state_path, write_manifest
from graphbuild.runner.state import invalidate, pending, write_recipe
from graphbuild.runner.workers import ATTEMPTS, Failure, Pool, attempt, record_failure
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)


class Runner:
    """Executes stages on a pool of workers; a context manager that starts Ray only when there is work to do.

    workers: processes; 0 runs in this one, None takes a worker a CPU (or a GPU, for stages on a device). address: a
    Ray cluster's, default that of the environment (RAY_ADDRESS), else a Ray of its own on this machine.
    """

    def __init__(
        self, *, workers: int | None = None, address: str | None = None, progress: Progress | None = None
    ) -> None:
        self.workers = workers
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.progress = progress or Progress()
        self.seconds: dict[str, float] = {}  # by stage, wall time of the last run
        self._started_ray = self._in_ray = False
        self._metrics: Metrics | None = None
        self._pools: dict[float, Pool] = {}  # by a worker's share of a GPU

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        if kind is KeyboardInterrupt:
            logger.info("%-9s the same command goes on from here", "stopped")
        if self._started_ray:
            import ray

            ray.shutdown()

    def run(
        self, stage: Stage, recipe: Recipe, store: Store, *, force: bool = False, stale: Sequence[str] = ()
    ) -> Json:
        """Bring a stage up to date; returns its manifest entry.

        stale: names of the stages that build on this one, which leave the manifest before its first task runs.

        Raises ConfigError when what is there was built with other settings or inputs and force is not given,
        InputError or StageError when tasks failed.
        """
        try:
            return self._run(stage, recipe, store, force=force, stale=stale)
        finally:
            self.progress.close()

    def _run(self, stage: Stage, recipe: Recipe, store: Store, *, force: bool, stale: Sequence[str]) -> Json:
        begin = time.monotonic()
        tasks = stage.plan(recipe, store)
        done = records(store, stage.name)
        if not tasks and not done:
            return {}
        todo = pending(stage, tasks, done, store, force=force)
        if todo and stage.note:
            logger.info("%-9s %s", "plan", stage.note(recipe, store))
        self.progress.begin(stage.title, total=len(tasks), done=len(tasks) - len(todo))
        if todo:
            invalidate(store, (stage.name, *stale))
            failures: dict[str, Failure] = {}
            accepted = False
            while todo:
                for task, result in self._results(stage, todo, store):
                    if isinstance(result, Failure):
                        failures[task.title] = result
                        self.progress.advance({}, {}, failed=True)
                    else:
                        if not accepted:  # settings that every task refuses are not remembered
                            write_recipe(recipe, store)
                            accepted = True
                        done[task.name] = result
                        facts = result["facts"]
                        self.progress.advance(facts.get("counts", {}), facts.get("reasons", {}))
                    self._show(store)
                if failures:
                    self.progress.end()
                    raise failed(stage, failures, store)
                if not stage.grows:
                    break
                tasks = stage.plan(recipe, store)
                todo = [task for task in tasks if done.get(task.name, {}).get("fingerprint") != task.fingerprint]
                self.progress.state.total = len(tasks)
        if not tasks:  # finished ones have been taken away
            invalidate(store, (stage.name, *stale), stage.entries)
            self.progress.end()
            return {}
        entry = self._finish(stage, recipe, store, [done[task.name] for task in tasks])
        self.progress.end(entry["counts"])
        self.seconds[stage.name] = time.monotonic() - begin
        return entry

    def _finish(self, stage: Stage, recipe: Recipe, store: Store, done: list[Json]) -> Json:
        manifest = store.manifest()
        entry = {
            "fingerprint": digest([[record["task"], record["fingerprint"]] for record in done]),
            "tasks": len(done),
            "counts": stage.counts(store, done),
        }
        before = manifest["stages"].get(stage.name, {})
        if any(before.get(key) != value for key, value in entry.items()) or not stage.whole(store, manifest):
            only = {"task": done[0]["task"]} if len(done) == 1 else {}  # a lost record has nobody else to name it
            manifest["stages"][stage.name] = entry | only
            manifest.update(stage.finish(recipe, store, done))
            write_manifest(store, manifest)
        return entry

    def _results(self, stage: Stage, tasks: Sequence[Task], store: Store) -> Iterator[tuple[Task, Json | Failure]]:
        if self.workers == 0:
            gpu = self._on_gpus(stage, tasks[0])
            self.progress.running(1)
            for task in tasks:
                result = attempt(stage, _placed(task, gpu=gpu), store)
                yield task, result
                if isinstance(result, Failure) and result.storage:
                    return
        else:
            yield from self._ray_results(stage, tasks, store)

    def _ray_results(self, stage: Stage, tasks: Sequence[Task], store: Store) -> Iterator[tuple[Task, Json | Failure]]:
        ray = self.start_ray()
        resources = ray.cluster_resources()
        gpu = self._on_gpus(stage, tasks[0], resources)
        slots = int(resources["GPU"]) * stage.sharing if gpu else int(resources.get("CPU", 1))
        count = slots if self.workers is None else min(self.workers, slots) if gpu else self.workers
        pool = self._pool(1 / stage.sharing if gpu else 0)
        queue = [(task, 1) for task in reversed(tasks)]
        running: dict[Any, tuple[Task, int, Any]] = {}
        while queue or running:
            while queue and pool.idle:
                (task, tries), worker = queue.pop(), pool.idle.pop()
                running[worker.attempt.remote(stage, _placed(task, gpu=gpu), store)] = (task, tries, worker)
            pool.start(min(count - len(running), len(queue)))
            self.progress.running(len(running))
            self._show(store)
            ready, _ = ray.wait([*running, *(pool.starting if queue else ())], num_returns=1)
            if ready[0] not in running:
                pool.arrived(ready[0])
                continue
            task, tries, worker = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:  # `attempt` raises nothing: the worker cannot load the task
                last = str(error).strip().splitlines()[-1]
                result = Failure(last, "install the same graphbuild on every node of the cluster", str(error), 1)
                record_failure(store, task, result)
            except ray.exceptions.RayError as error:
                pool.dismiss()  # with a node, more than one is gone
                if tries < ATTEMPTS:
                    logger.warning(
                        "%s %s: its worker died (%s); trying again",
                        stage.name,
                        task.title,
                        type(error).__name__,
                    )
                    queue.append((task, tries + 1))
                    self.progress.again()
                    continue
                result = Failure(
                    f"its worker died {ATTEMPTS} times ({type(error).__name__}: {str(error).splitlines()[0]})",
                    "most often memory ran out: use fewer --workers or a smaller shard_size, then rerun",
                    str(error),
                    1,
                )
                record_failure(store, task, result)
            else:
                pool.idle.append(worker)
                if isinstance(result, Failure) and result.storage:
                    queue.clear()
            yield task, result

    def _on_gpus(self, stage: Stage, task: Task, resources: Mapping[str, float] | None = None) -> bool:
        """Whether a stage's tasks run on GPUs, where Ray has these resources; ConfigError where they cannot but must.

        On this machine torch has to be able to use them: Ray counts GPUs by their driver alone.
        """
        device = task.hints.get("device", "auto") if stage.on_device else "cpu"
        if device == "cpu":
            return False
        here = resources is None or (self._started_ray and not self.address)
        found = (resources is None or resources.get("GPU", 0) >= 1) and (not here or gpu_here())
        if device == "cuda" and not found:
            if here:
                raise ConfigError("torch can use no GPU here", "use --device cpu, or see `graphbuild doctor`")
            raise ConfigError("no GPU in the Ray cluster", "use --device cpu, or an --address whose nodes have GPUs")
        return found

    def _pool(self, share: float) -> Pool:
        """The workers with that share of a GPU. Those with another one must not keep it from them."""
        if share:
            for other in self._pools.keys() - {0, share}:
                self._pools.pop(other).close()
        return self._pools.setdefault(share, Pool(share))

    def _show(self, store: Store) -> None:
        """The state as metrics of the Ray session, if there is one."""
        if not self._in_ray:
            return
        self._metrics = self._metrics or Metrics(store.url)
        self._metrics.show(self.progress.state)

    def start_ray(self) -> Any:
        """The module ray, connected to the cluster at `address`, or to one of its own that ends with this runner."""
        self._in_ray = True
        with _ray_environment(starts=not self.address):
            import ray

            if not ray.is_initialized():
                self._init(ray)
        return ray

    def _init(self, ray: Any) -> None:
        if self.address:
            check_address(self.address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address:
            options["address"] = self.address
        else:  # tasks exchange file names: Ray's object store may be small
            options.update(
                address="local",
                include_dashboard=False,
                object_store_memory=200 * 2**20,
                num_cpus=self.workers,
            )
        try:
            ray.init(**options)
        except (OSError, ValueError, RuntimeError) as error:
            if self.address:
                cause = f"cannot reach Ray at {self.address} ({error})"
                fix = "check --address and the cluster's token (`ray status`)"
            else:
                cause = f"cannot start Ray on this machine ({error})"
                fix = f"see that {tempfile.gettempdir()} has room and can be written to, or set TMPDIR to a short path"
            raise ConfigError(cause, f"{fix}, or use --workers 0 to run in this process") from error
        self._started_ray = True


@contextlib.contextmanager
def _ray_environment(*, starts: bool) -> Iterator[None]:
    """What Ray, its workers too, read from the environment when it is imported and started, for this while alone.

    starts: a cluster of its own, which asks for a token. Ray sets that itself where it was imported before.
    """
    wanted = {"RAY_AUTH_MODE": "token", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    if starts and "ray" not in sys.modules:
        os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_address(address: str) -> None:
    """Raise ConfigError within seconds when nothing listens at HOST:PORT or ray://HOST:PORT; Ray waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto` and other forms are Ray's to resolve
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"--address {address}: nothing answers there ({error})",
            "check it with `ray status` on the cluster's head node",
        ) from None


def failed(stage: Stage, failures: Mapping[str, Failure], store: Store) -> GraphbuildError:
    """One error for the failed tasks of a stage: an InputError when the input is to blame for all of them."""
    lines = [f"{name}: {failure.cause}" for name, failure in list(failures.items())[:10]]
    if len(failures) > 10:
        lines.append(f"... and {len(failures) - 10} more")
    cause = f"{stage.title}: {len(failures)} task{'s' * (len(failures) > 1)} failed\n    " + "\n    ".join(lines)
    fixes = list(dict.fromkeys(failure.fix for failure in failures.values()))
    kind = InputError if all(failure.exit_code == 2 for failure in failures.values()) else StageError
    return kind(cause, "; ".join(fixes[:3]) + f" (details: {store.display(state_path(stage.name, '*', 'failed'))})")


def _placed(task: Task, *, gpu: bool) -> Task:
    device = "cuda" if gpu and task.hints.get("device") != "cpu" else "cpu"
    return dataclasses.replace(task, hints={**task.hints, "device": device})
