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
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphbuild.errors import ConfigError, GraphbuildError, InputError, StageError
from graphbuild.machine.gpus import cores_here, gpu_here
from graphbuild.recipe import Recipe
from graphbuild.runner.child import Child
from graphbuild.runner.connection import connect
from graphbuild.runner.partly import Place, Told
from graphbuild.runner.progress import Metrics, Progress
from graphbuild.runner.small import is_small
from graphbuild.runner.stage import Stage, Task, digest, records, state_path, write_manifest, write_together
from graphbuild.runner.state import invalidate, pending, write_recipe
from graphbuild.runner.workers import ATTEMPTS, Failure, Pool, attempt, died, is_to_blame, record_failure
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)
LOOK_SECONDS = 5.0  # between looks at which nodes the cluster has
AT_ONCE = 64  # answers taken


class Runner:
    """Executes stages on a pool of workers; a context manager that starts Ray only when there is work to do.

    workers: processes, at most; 0 runs in this one, None takes a worker a CPU (or a GPU, for stages on a device), and
    none for what is small (small.py), unless a Ray runs. address: a Ray cluster's, default that of the environment
    (RAY_ADDRESS), else a Ray of its own on this machine.
    """

    def __init__(
        self, *, workers: int | None = None, address: str | None = None, progress: Progress | None = None
    ) -> None:
        self.workers = workers
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.progress = progress or Progress()
        self.seconds: dict[str, float] = {}  # by stage, wall time of the last run
        self.ran: set[str] = set()  # stages that had something to do
        self._started_ray = self._in_ray = self._said_small = False
        self._metrics: Metrics | None = None
        self._pools: dict[float, Pool] = {}  # by a worker's share of a GPU

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.close()
        if kind is KeyboardInterrupt:
            logger.info("%-9s the same command goes on from here", "stopped")
        if self._started_ray:
            import ray

            ray.shutdown()

    def run(
        self,
        stage: Stage,
        recipe: Recipe,
        store: Store,
        *,
        force: bool = False,
        stale: Sequence[str] = (),
        unread: Sequence[str] = (),
    ) -> Json:
        """Bring a stage up to date; returns its manifest entry.

        stale: names of the stages that build on this one, which leave the manifest before its first task runs. unread:
        as of `pending`.

        Raises ConfigError when what is there was built with other settings or inputs and force is not given,
        InputError or StageError when tasks failed.
        """
        try:
            return self._run(stage, recipe, store, force=force, stale=stale, unread=unread)
        finally:
            self.progress.close()

    def _run(
        self, stage: Stage, recipe: Recipe, store: Store, *, force: bool, stale: Sequence[str], unread: Sequence[str]
    ) -> Json:
        begin = time.monotonic()
        tasks = stage.plan(recipe, store)
        done = records(store, stage.name)
        if not tasks and not done:
            return {}
        todo = pending(stage, tasks, done, store, force=force, unread=unread)
        done = {task.name: done[task.name] for task in tasks if task.name in done}  # others have been taken away
        if todo and stage.note:
            logger.info("%-9s %s", "plan", stage.note(recipe, store))
        self.progress.begin(stage.title, total=len(tasks), done=len(tasks) - len(todo))
        if todo:
            self.ran.add(stage.name)
            invalidate(store, (stage.name, *stale))
            failures: dict[str, Failure] = {}
            accepted = False
            readers = Counter(folder for task in todo for folder in task.frees)
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
                        readers.subtract(task.frees)
                        for folder in (folder for folder in task.frees if not readers[folder]):
                            store.remove_folder(folder)
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
        if stage.name in self.ran:
            write_together(store, stage.name, done)
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
        with Told() as told:
            self.progress.state.parts = told.done
            yield from (self._here if self._is_here(stage, tasks, store) else self._on_ray)(stage, tasks, store, told)

    def _here(
        self, stage: Stage, tasks: Sequence[Task], store: Store, told: Told
    ) -> Iterator[tuple[Task, Json | Failure]]:
        gpu = self._on_gpus(stage, tasks[0])
        self.progress.running(1)
        beside = self.workers is None and any(map(stage.may_crash, tasks))
        with Child() if beside else contextlib.nullcontext() as child:
            do = child.attempt if child else attempt
            for task in tasks:
                result = do(stage, _placed(task, told.begin(task.name), gpu=gpu, threads=cores_here()), store)
                told.end(task.name)
                yield task, result
                if isinstance(result, Failure) and result.storage:
                    return

    def _is_here(self, stage: Stage, tasks: Sequence[Task], store: Store) -> bool:
        """Whether these tasks run in this process: as asked, or as they are small and no Ray is there."""
        if self.workers is not None or self.address:
            return self.workers == 0
        ray = sys.modules.get("ray")
        here = not (ray and ray.is_initialized()) and is_small(stage, tasks, store)
        if here and not self._said_small:
            self._said_small = True
            logger.info("%-9s none: so small a job runs in this process, unless --workers asks for others", "workers")
        return here

    def _on_ray(
        self, stage: Stage, tasks: Sequence[Task], store: Store, told: Told
    ) -> Iterator[tuple[Task, Json | Failure]]:
        ray = self.start_ray()
        resources = ray.cluster_resources()
        gpu = self._on_gpus(stage, tasks[0], resources)
        pool = self._pool(1 / stage.sharing if gpu else 0)
        queue: list[tuple[Task, tuple[str, ...]]] = [(task, ()) for task in reversed(tasks)]
        running: dict[Any, tuple[Task, tuple[str, ...], Any, str]] = {}
        looked = time.monotonic()
        while queue or running:
            while queue and pool.idle:
                (task, deaths), (worker, node) = queue.pop(), pool.idle.pop()
                answer = worker.attempt.remote(stage, _placed(task, told.begin(task.name), gpu=gpu), store)
                running[answer] = (task, deaths, worker, node)
            if time.monotonic() >= looked + LOOK_SECONDS:  # nodes come and go
                resources, looked = ray.cluster_resources(), time.monotonic()
            pool.start(min(self._slots(resources, stage.sharing if gpu else 0) - len(running), len(queue)))
            self.progress.running(len(running))
            self._show(store)
            waiting = [*running, *(pool.starting if queue else ())]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=LOOK_SECONDS if queue else None)
            if ready:  # of thousands of workers others are ready too, and a wait takes longer than what follows
                ready, _ = ray.wait(waiting, num_returns=min(len(waiting), AT_ONCE), timeout=0)
            for answer in ready:
                if answer not in running:
                    pool.arrived(answer)
                    continue
                task, deaths, worker, node = running.pop(answer)
                told.end(task.name)
                try:
                    result = ray.get(answer)
                except (
                    ray.exceptions.RayTaskError
                ) as error:  # `attempt` raises nothing: the worker cannot load the task
                    last = str(error).strip().splitlines()[-1]
                    result = Failure(last, "install the same graphbuild on every node of the cluster", str(error), 1)
                    record_failure(store, task, result)
                except ray.exceptions.RayError as error:
                    pool.dismiss()  # with a node, more than one is gone
                    deaths, name = (*deaths, node), type(error).__name__
                    alone = self._started_ray and not self.address  # on a Ray of one node
                    if len(deaths) < ATTEMPTS or not (alone or is_to_blame(deaths)):
                        logger.warning("%s %s: its worker died (%s); trying again", stage.name, task.title, name)
                        queue.append((task, deaths))
                        self.progress.again()
                        continue
                    result = died(len(deaths), f"{name}: {str(error).splitlines()[0]}", str(error))
                    record_failure(store, task, result)
                else:
                    pool.idle.append((worker, node))
                    if isinstance(result, Failure) and result.storage:
                        queue.clear()
                yield task, result

    def _slots(self, resources: Mapping[str, float], to_gpu: int) -> int:
        """Tasks at a time, where the cluster has these resources now; one even where it has none yet, as none asks for
        more then. Without GPUs as many as `workers` says: those that wait for a CPU make an autoscaler add nodes."""
        there = int(resources.get("GPU", 0)) * to_gpu if to_gpu else int(resources.get("CPU", 0))
        if self.workers is not None:
            there = min(self.workers, there) if to_gpu else self.workers
        return max(there, 1)

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
        ray, is_new = connect(self.address, self.workers)
        self._started_ray |= is_new
        return ray


def failed(stage: Stage, failures: Mapping[str, Failure], store: Store) -> GraphbuildError:
    """One error for the failed tasks of a stage: an InputError when the input is to blame for all of them."""
    lines = [f"{name}: {failure.cause}" for name, failure in list(failures.items())[:10]]
    if len(failures) > 10:
        lines.append(f"... and {len(failures) - 10} more")
    cause = f"{stage.title}: {len(failures)} task{'s' * (len(failures) > 1)} failed\n    " + "\n    ".join(lines)
    fixes = list(dict.fromkeys(failure.fix for failure in failures.values()))
    kind = InputError if all(failure.exit_code == 2 for failure in failures.values()) else StageError
    return kind(cause, "; ".join(fixes[:3]) + f" (details: {store.display(state_path(stage.name, '*', 'failed'))})")


def _placed(task: Task, told: Place | None, *, gpu: bool, threads: int = 1) -> Task:
    device = "cuda" if gpu and task.hints.get("device") != "cpu" else "cpu"
    return dataclasses.replace(task, hints={**task.hints, "device": device, "threads": threads, "told": told})
