"""What a worker of the model does: how long a task takes there, and what it leaves (files.py).

A task's cost is its stage's formula in `graphbuild plan` (graphbuild/job/plan, measured rates of a core), with the
noise and stragglers of inputs.yaml; its requests are those counted in a real job (measure.py).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.simulation.cluster import Actor
from benchmarks.simulation.files import Shapes
from graphbuild.graph.tasks import PART_NODES, PARTS
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.costs import IMPORTS
from graphbuild.knn.leaders import blocks_of, ranges_of_leaders
from graphbuild.knn.sample import SAMPLE
from graphbuild.nodes.distinct import GROUP
from graphbuild.nodes.fidelity import SAMPLE as FIDELITY_TEXTS
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.store import Store

# Stages of which a worker reads files of all nodes: of how many kinds by range of leaders, and by block of lists.
WHOLE = {"join": (4, 0), "refine": (4, 1), "search": (0, 1)}
LISTED = 1_000  # names a request tells
CAUSES = ("cores", "imports", "copies", "disk", "requests", "refused", "network")
FIRST_LATENCIES = 32  # requests of a task that wait for each other; more are sent side by side, as many at a time


class Requests:
    """How many requests a task sends: by `measured`, counts by stage of a real job of few shards (measure.py), and by
    the code where a task reads a range of shards, a sample or all of them, which are as many as there are here."""

    def __init__(
        self, measured: Mapping[str, Mapping[str, Sequence[float]]], case: Case, costs: Mapping[str, Cost]
    ) -> None:
        self.measured, self.case, self.costs = measured, case, costs
        job = case.job
        self.groups = max(math.ceil(max(job.samples, job.nodes) / GROUP), 1)
        self.ranges = min(math.ceil(job.nodes / PART_NODES), PARTS, job.shards)
        self.by_leader = len(ranges_of_leaders(job.nodes)) - 1, len(blocks_of(job.nodes, job.first_new)) - 1

    def of(self, stage: str, task: Task, *, first: bool) -> tuple[float, float]:
        """GET (HEAD too) and PUT (DELETE and LIST too). A single row of an array takes two, for its header and itself.
        Of the files of all shards a worker lists the folders; each is fetched once by each node."""
        job, shards = self.case.job, self.case.job.shards
        own = shards / self.ranges
        known = self.measured.get(stage, {"get": [4.0, 0.0], "put": [6.0, 0.0], "first_get": [0.0, 0.0]})
        get = known["get"][0] + (known["first_get"][0] if first else 0.0)
        if stage in ("split", "number"):
            get = 2 * shards / self.groups * (stage == "split") + 2 * self.groups
        elif stage in ("unique", "mark"):
            get = 2.0 * self.groups
        elif stage == "order":
            get = float(len(task.hints.get("files", ())))  # rows of each task of codes
        elif stage == "fidelity":
            get = 4.0 * FIDELITY_TEXTS
        elif stage == "prepare" and task.name == "all":
            get = 2.0 * SAMPLE * job.k + 6 * self.ranges
        elif stage == "prepare":
            get = 2.0 * SAMPLE + 2 * own
        elif stage == "moments":
            get = 2.0 * self.costs["codes"].tasks
        elif stage == "certify" and task.built["shards"] is None:
            begin, end = task.built["nodes"]
            get = 2.0 * (end - begin) * (job.k + 2)
        elif stage == "certify":
            get += known["get"][1] * own
        put = known["put"][0] + (sum(WHOLE[stage]) + self.whole(stage) / LISTED if first and stage in WHOLE else 0.0)
        return get, put

    def whole(self, stage: str) -> float:
        """How many files a node copies for a stage that reads those of all nodes."""
        return float(sum(map(math.prod, zip(WHOLE[stage], self.by_leader, strict=True))))


@dataclass(frozen=True)
class ObjectStore:
    """Seconds a request, requests a second of a partition, and seconds until one that was refused is sent again."""

    get_seconds: float
    put_seconds: float
    gets_per_second: float
    puts_per_second: float
    again_seconds: float
    doubles_seconds: float
    most_partitions: int


@dataclass(frozen=True)
class Noise:
    """deviation: of the logarithm of a task's time. A share of tasks are stragglers, 1 to `most` times as long."""

    deviation: float
    stragglers: float
    most: float


@dataclass
class Done:
    """What the tasks of a stage took, in sums."""

    tasks: int = 0
    spent: Counter[str] = field(default_factory=Counter)  # seconds, by what they went to
    get: float = 0.0
    put: float = 0.0
    refused: float = 0.0
    read: float = 0.0
    written: float = 0.0
    longest: float = 0.0


class Work:
    """`Cluster`'s `do`, and the sums by stage. store: where records and files really are."""

    def __init__(
        self,
        case: Case,
        costs: dict[str, Cost],
        requests: Requests,
        store: Store,
        objects: ObjectStore,
        noise: Noise,
    ) -> None:
        self.case, self.costs, self.requests, self.store = case, costs, requests, store
        self.objects, self.noise = objects, noise
        self.random = random.Random(0)
        self.done: dict[str, Done] = {}
        self.begun = 0  # tasks, of this process
        self.stop_at: tuple[str, int] | None = None  # a stage, and after how many of its tasks the driver dies
        self._burst = {"get": (0.0, 0.0), "put": (0.0, 0.0)}  # since when the object store is busy, with how many
        self.shapes = Shapes(case)

    def __call__(
        self, stage: Stage, task: Task, store: Store, actor: Actor, now: float
    ) -> tuple[float, Callable[[], Any]]:
        sums = self.done.setdefault(stage.name, Done())
        if self.stop_at == (stage.name, sums.tasks):
            raise KeyboardInterrupt
        seconds = self._seconds(stage, task, actor, now, sums)
        sums.tasks += 1
        self.begun += 1
        return seconds, lambda: self.shapes.perform(task, self.store)

    def _seconds(self, stage: Stage, task: Task, actor: Actor, now: float, sums: Done) -> float:
        cost, node, rates = self.costs[stage.name], actor.node, self.case.rates
        assert node is not None
        first = stage.name not in actor.seen
        spent = dict.fromkeys(CAUSES, 0.0)
        spent["cores"] = node.speed * self._computing(cost, task)
        spent["imports"] = node.speed * self._imports(stage.name, actor)
        get, put = self.requests.of(stage.name, task, first=first)
        whole = cost.mapped if stage.name in WHOLE else 0.0
        if stage.name == "refine":  # reads what is near its nodes, but an object store's files are copied whole
            whole = cost.read
        read, written = cost.read / cost.tasks, cost.written / cost.tasks
        if whole:  # is read from the node's own copy, which its first task of the stage begins to fetch
            read = 0.0
            if stage.name not in node.kept:
                files = self.requests.whole(stage.name)
                late = self._late("get", files, now, 0.0)
                hashing = whole * rates.hash_byte * node.speed / self.case.machine.cores  # of each by who fetches it
                node.kept[stage.name] = now + max(whole / self._network, self._waiting("get", files), late, hashing)
                sums.read, sums.get = sums.read + whole, sums.get + files
                sums.refused += files if late else 0
            spent["copies"] = max(node.kept[stage.name] - now, 0.0)
            spent["disk"] = self._disk(stage.name, whole)
        spent["requests"] = self._waiting("get", get) + self._waiting("put", put)
        counts = {"get": get, "put": put}
        for kind, count in counts.items():
            late = self._late(kind, count, now, spent["requests"])
            spent["refused"] += late
            sums.refused += count if late else 0
        spent["network"] = (read + written) * node.busy / self._network
        seconds = sum(spent.values())
        for cause, one in spent.items():
            sums.spent[cause] += one
        sums.get, sums.put = sums.get + get, sums.put + put
        sums.read, sums.written = sums.read + read, sums.written + written
        sums.longest = max(sums.longest, seconds)
        return seconds

    @property
    def _network(self) -> float:
        return self.case.machine.network

    def _disk(self, stage: str, whole: float) -> float:
        """Seconds of random reads of the node's disk, of what its memory does not hold of its copies."""
        machine = self.case.machine
        reads = 1 if stage == "search" else 0  # the others read near rows for near nodes
        absent = max(1 - 0.8 * machine.memory_bytes / whole, 0.0)
        return self.case.shard_nodes * reads * absent * machine.cores / self.disk_reads_per_second

    disk_reads_per_second = 8e5

    def _computing(self, cost: Cost, task: Task) -> float:
        if cost.name == "prepare" and task.name == "all":
            own = cost.least_seconds
        elif task.built.get("draw") == task.name:  # of the certificate: one that draws, and looks at its own nodes
            own = 0.0
        else:
            own = cost.core_seconds
        late = self.random.random() < self.noise.stragglers
        slower = 1 + self.random.random() * (self.noise.most - 1) if late else 1.0
        return float(own * slower * math.exp(self.random.gauss(0, self.noise.deviation)))

    def _imports(self, stage: str, actor: Actor) -> float:
        new = set(IMPORTS.get(stage, "").split()) - actor.imported
        actor.imported |= new
        return float(sum(getattr(self.case.rates, f"load_{part}", 0.0) for part in new))

    def _waiting(self, kind: str, count: float) -> float:
        in_turn = min(count, FIRST_LATENCIES) + max(count - FIRST_LATENCIES, 0) / FIRST_LATENCIES
        return in_turn * (self.objects.get_seconds if kind == "get" else self.objects.put_seconds)

    def _late(self, kind: str, count: float, now: float, spread: float) -> float:
        """Seconds that requests wait beside, where the store takes no more of them."""
        begin, total = self._burst[kind]
        if now > begin + self._taken(kind, total):
            begin, total = now, 0.0
        self._burst[kind] = begin, total + count
        late = begin + self._taken(kind, total + count) - now - spread
        return late if late > self.objects.again_seconds else 0.0

    def _taken(self, kind: str, count: float) -> float:
        """Seconds in which the store answers so many requests that are there at once: it cuts itself into twice as many
        partitions after each `doubles_seconds` of them."""
        rate = self.objects.gets_per_second if kind == "get" else self.objects.puts_per_second
        seconds, partitions, step = 0.0, 1, self.objects.doubles_seconds
        while count > rate * partitions * step and partitions < self.objects.most_partitions:
            count -= rate * partitions * step
            seconds, partitions = seconds + step, partitions * 2
        return seconds + count / (rate * partitions)
