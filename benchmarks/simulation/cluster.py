"""A model of a Ray cluster that takes Ray's place under the real runner: events in simulated time, no processes.

The runner imports `ray` where it uses it, and takes a Ray that is initialized; `Cluster.installed` puts the model
there, and the model's clock in place of `time` in the runner's modules. So plans, queue, workers, retries, records and
manifest are the project's own code; only what a worker does is modelled (work.py).

Time: what the driver's process computes between two calls of Ray is measured (CPU seconds) and passes in the model
too; a call of Ray takes what one took of a real Ray (`Calls`); all else is events: workers start, tasks end, nodes are
lost and replaced. A lost node ends its workers; its tasks' records are never written, as a record is written when its
task ends.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import pickle
import random
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

HOUR = 3600.0


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class ActorDiedError(RayError):
    pass


EXCEPTIONS = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)


@dataclass(frozen=True)
class Calls:
    """CPU seconds of the driver: of a task (submit, get), of a wait, and of a wait for each ref that it waits for."""

    task: float
    wait: float
    ref: float


@dataclass(frozen=True)
class Kind:
    """The nodes of a cluster, and what happens to them. Seconds, bytes/s."""

    nodes: int
    cores: int
    network: float
    calls: Calls
    worker_seconds: float  # of a worker's start: a process, and the package's import
    workers_per_second: float  # that Ray starts in the whole cluster
    hours_between_losses: float  # of one node
    replaced_seconds: float  # until another node is there
    slow_nodes: float  # the share of nodes that are slower, by slow_factor
    slow_factor: float
    seed: int = 0


@dataclass(eq=False)
class Node:
    number: int
    speed: float  # time of a task there, in units of a good node's
    free: int
    alive: bool = True
    actors: set[Actor] = field(default_factory=set)
    busy: int = 0
    kept: dict[str, float] = field(default_factory=dict)  # stage -> when its mapped files are all copied

    @property
    def name(self) -> str:
        return f"node-{self.number}"


class Ref:
    """The answer of a call: a value, or an error, once it is `done`."""

    __slots__ = ("done", "error", "is_start", "value")

    def __init__(self, *, is_start: bool) -> None:
        self.is_start = is_start
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None


class Actor:
    """A worker. Like an actor of Ray it has methods with `remote`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.node: Node | None = None
        self.dead = False
        self.ref: Ref | None = None  # of what it does now
        self.seen: set[str] = set()  # stages of which it has done a task
        self.imported: set[str] = set()
        self.started = types.SimpleNamespace(remote=lambda: cluster.start(self))
        self.attempt = types.SimpleNamespace(remote=lambda *work: cluster.attempt(self, *work))


@dataclass
class Use:
    """What the cluster was used for since it was last reset."""

    node_seconds: float = 0.0
    busy_seconds: float = 0.0  # of workers
    driver_seconds: float = 0.0  # the runner's own code
    ray_seconds: float = 0.0  # Ray's calls in the driver
    lost_nodes: int = 0
    lost_tasks: int = 0
    tasks: int = 0


class Cluster:
    """The module `ray`, as far as the runner uses it.

    do(stage, task, store, actor, now) -> (seconds, finish): how long a task takes on that worker from now on, and what
    gives its record, called when it ends.
    """

    exceptions = EXCEPTIONS

    def __init__(self, kind: Kind, do: Callable[..., tuple[float, Callable[[], Any]]]) -> None:
        self.kind, self._do = kind, do
        self.random = random.Random(kind.seed)
        self.now = 0.0
        self.use = Use()
        self._left = time.process_time()  # when the driver's code went on last
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._done: dict[bool, dict[Ref, None]] = {True: {}, False: {}}  # answers that nobody got yet: starts, tasks
        self._waiting: deque[Actor] = deque()  # for a CPU
        self._next_start = 0.0
        self._counted = 0.0  # until when node_seconds are
        self.nodes_alive: dict[int, Node] = {}
        for _ in range(kind.nodes):
            self._join()

    # -- what the runner calls

    def is_initialized(self) -> bool:
        return True

    def shutdown(self) -> None:
        pass

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(sum(self.kind.cores for _ in self.nodes_alive))}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node.name, "Alive": True} for node in self.nodes_alive.values()]

    def remote(self, **resources: Any) -> Callable[[type], Any]:
        return lambda worker: types.SimpleNamespace(remote=lambda: Actor(self))

    def start(self, actor: Actor) -> Ref:
        with self._called(self.kind.calls.task):
            actor.ref = Ref(is_start=True)
            self._waiting.append(actor)
            self._place()
            return actor.ref

    def attempt(self, actor: Actor, stage: Any, task: Any, store: Any) -> Ref:
        with self._called(self.kind.calls.task):
            ref = actor.ref = Ref(is_start=False)
            if actor.dead or actor.node is None:
                self._fail(actor)
                return ref
            node = actor.node
            node.busy += 1
            begin = self.now
            seconds, finish = self._do(stage, task, store, actor, begin)
            actor.seen.add(stage.name)

            def end() -> None:
                if actor.dead:
                    return
                node.busy -= 1
                self.use.busy_seconds += self.now - begin
                self.use.tasks += 1
                ref.value = pickle.loads(pickle.dumps(finish()))  # as Ray passes it to another process
                self._answer(ref)

            self._at(begin + seconds, end)
            return ref

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
        """Those of `refs` that have an answer, num_returns at most. All tasks are waited for, and all starts or none,
        so the refs need not be looked up one by one."""
        calls = self.kind.calls
        with self._called(calls.wait + calls.ref * len(refs)):
            until = self.now + (timeout if timeout is not None else 1e12)
            kinds = {ref.is_start for ref in (refs[0], refs[-1])}  # the runner names tasks first, then starts
            while not any(self._done[kind] for kind in kinds):
                if not self._events or self._events[0][0] > until:
                    self._pass(until)
                    return [], refs
                self._next()
            found = itertools.chain(*(self._done[kind] for kind in sorted(kinds)))
            return list(itertools.islice(found, num_returns)), refs

    def get(self, ref: Ref) -> Any:
        with self._called(0.0):
            self._done[ref.is_start].pop(ref, None)
            if ref.error is not None:
                raise ref.error
            return ref.value

    def kill(self, actor: Actor) -> None:
        with self._called(0.0):
            self._end(actor)
            self._place()

    # -- the clock of the runner's modules

    def monotonic(self) -> float:
        return self.now + time.process_time() - self._left

    def sleep(self, seconds: float) -> None:
        with self._called(0.0):
            self._pass(self.now + seconds)

    def charge(self, seconds: float) -> None:
        """Time passes in which the driver waits for something else, as for answers of an object store."""
        with self._called(0.0):
            self._pass(self.now + seconds)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Cluster]:
        """The model in place of Ray, and its clock in place of `time` in the runner's modules."""
        from graphbuild.runner import runner, workers

        clock = types.SimpleNamespace(monotonic=self.monotonic, sleep=self.sleep)
        gauges = types.SimpleNamespace(Gauge=_Gauge)
        util = types.SimpleNamespace(metrics=gauges)
        self.util = util
        before = {name: sys.modules.get(name) for name in ("ray", "ray.util", "ray.util.metrics")}
        sys.modules.update({"ray": self, "ray.util": util, "ray.util.metrics": gauges})  # type: ignore[dict-item]
        runner.time = workers.time = clock  # type: ignore[assignment]
        try:
            yield self
        finally:
            runner.time = workers.time = time  # type: ignore[assignment]
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module

    # -- events

    @contextlib.contextmanager
    def _called(self, seconds: float) -> Iterator[None]:
        """A call of Ray: what the driver computed since the last one, and the call itself, take their time."""
        own = time.process_time() - self._left
        self.use.driver_seconds += own
        self.use.ray_seconds += seconds
        self._pass(self.now + own + seconds)
        try:
            yield
        finally:
            self._left = time.process_time()

    def _pass(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self._next()
        self._tell(until)

    def _next(self) -> None:
        when, _, what = heapq.heappop(self._events)
        self._tell(max(when, self.now))
        what()

    def _tell(self, now: float) -> None:
        self.use.node_seconds += (now - self.now) * len(self.nodes_alive)
        self.now = now

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _answer(self, ref: Ref) -> None:
        ref.done = True
        self._done[ref.is_start][ref] = None

    def _fail(self, actor: Actor) -> None:
        ref = actor.ref
        if ref is not None and not ref.done:
            ref.error = ActorDiedError("the node of its worker was lost")
            self._answer(ref)

    def _join(self) -> None:
        slow = self.random.random() < self.kind.slow_nodes
        node = Node(next(self._numbers), self.kind.slow_factor if slow else 1.0, self.kind.cores)
        self.nodes_alive[node.number] = node
        if self.kind.hours_between_losses:
            self._at(
                self.now + self.random.expovariate(1 / (self.kind.hours_between_losses * HOUR)),
                lambda: self._lose(node),
            )
        self._place()

    def _lose(self, node: Node) -> None:
        del self.nodes_alive[node.number]
        node.alive = False
        self.use.lost_nodes += 1
        for actor in list(node.actors):
            self.use.lost_tasks += actor.ref is not None and not actor.ref.done and not actor.ref.is_start
            self._fail(actor)
            self._end(actor)
        self._at(self.now + self.kind.replaced_seconds, self._join)

    def _end(self, actor: Actor) -> None:
        actor.dead = True
        node, actor.node = actor.node, None
        if node is not None:
            node.actors.discard(actor)
            node.free += 1

    def _place(self) -> None:
        """Workers that wait for a CPU get one of the node with most free ones."""
        free = [(-node.free, node.number) for node in self.nodes_alive.values() if node.free]
        heapq.heapify(free)
        while self._waiting and free:
            actor = self._waiting.popleft()
            if actor.dead:
                continue
            left, number = heapq.heappop(free)
            node = self.nodes_alive[number]
            node.free -= 1
            node.actors.add(actor)
            actor.node = node
            if left < -1:
                heapq.heappush(free, (left + 1, number))
            self._next_start = max(self._next_start, self.now) + 1 / self.kind.workers_per_second
            self._at(self._next_start + self.kind.worker_seconds * node.speed, lambda actor=actor: self._started(actor))

    def _started(self, actor: Actor) -> None:
        if not actor.dead and actor.ref is not None and actor.node is not None:
            actor.ref.value = actor.node.name
            self._answer(actor.ref)


class _Gauge:
    """Takes what a gauge of Ray takes; that time is in `Calls.task`."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        pass

    def set(self, value: float, labels: dict[str, str]) -> None:
        pass
