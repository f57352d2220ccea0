"""What a worker of the model does: how long a task takes there, and the files and the record that it leaves.

A task's cost is its stage's formula in `graphbuild plan` (graphbuild/job/plan, measured rates of a core), with the
noise and stragglers of inputs.yaml; its requests are those counted in a real job (measure.py). Files have their real
names and sizes, and no content (a hole); records have all that `perform` writes into them. sha256 of files are made up,
and differ from file to file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulation.cluster import Actor
from graphbuild.graph.certify import DRAWN, DRAWN_PARTS
from graphbuild.graph.tasks import PART_NODES, PARTS
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.costs import IMPORTS
from graphbuild.knn.partition import EXPAND
from graphbuild.knn.sample import SAMPLE
from graphbuild.nodes.distinct import GROUP
from graphbuild.nodes.fidelity import SAMPLE as FIDELITY_TEXTS
from graphbuild.runner.stage import Stage, Task, digest, state_path
from graphbuild.store.store import Json, Store, Writer

HEADER = 128  # bytes of a .npy
WHOLE = {"join": 4, "search": 3}  # stages of which a worker opens the files of all shards: how many kinds of files
LISTED = 1_000  # names a request tells
CAUSES = ("cores", "imports", "checksums", "copies", "disk", "requests", "refused", "network")
FIRST_LATENCIES = 32  # requests of a task that wait for each other; more are sent side by side, as many at a time


class Requests:
    """How many requests a task sends: by `measured`, counts by stage of a real job of few shards (measure.py), and by
    the code where a task reads a range of shards, a sample or all of them, which are as many as there are here."""

    def __init__(self, measured: Mapping[str, Mapping[str, Sequence[float]]], case: Case) -> None:
        self.measured, self.case = measured, case
        job = case.job
        self.groups = max(math.ceil(max(job.samples, job.nodes) / GROUP), 1)
        self.ranges = min(math.ceil(job.nodes / PART_NODES), PARTS, job.shards)

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
        elif stage == "fidelity":
            get = 4.0 * FIDELITY_TEXTS
        elif stage == "prepare" and task.name == "all":
            get = 2.0 * SAMPLE * job.k + 6 * self.ranges
        elif stage == "prepare":
            get = 2.0 * SAMPLE + 2 * own
        elif stage == "moments":
            get = 2.0 * shards
        elif stage == "certify" and task.built["shards"] is None:
            begin, end = task.built["nodes"]
            get = 2.0 * (end - begin) * (job.k + 2)
        elif stage == "certify":
            get += known["get"][1] * own
        put = known["put"][0] + (WHOLE.get(stage, 0) * (1 + shards / LISTED) if first else 0.0)
        return get, put


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
        if first:
            spent["checksums"] = whole * rates.hash_byte * node.speed
        read, written = cost.read / cost.tasks, cost.written / cost.tasks
        if whole:  # is read from the node's own copy, which its first task of the stage begins to fetch
            read = 0.0
            if stage.name not in node.kept:
                files = float(WHOLE[stage.name] * self.case.job.shards)
                late = self._late("get", files, now, 0.0)
                node.kept[stage.name] = now + max(whole / self._network, self._waiting("get", files), late)
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
        job, machine = self.case.job, self.case.machine
        reads = EXPAND + self.case.engine.length(job.k, job.nodes) if stage == "search" else 0
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


class Shapes:
    """The files and facts of each stage's tasks, by the formats (docs/format.md)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows = case.job.samples // case.job.shards
        self.folders: set[str] = set()
        self.random = np.random.default_rng(1)

    def perform(self, task: Task, store: Store) -> Json:
        """As runner.stage.perform, without what makes a file safe: temporary names, locks and flushing."""
        made, facts = getattr(self, f"_{task.stage}")(task, store)
        outputs = [{"path": path, "bytes": size, "sha256": _made_up(path)} for path, size in made.items()]
        record = {
            "task": task.name,
            "fingerprint": task.fingerprint,
            "settings": dict(task.settings),
            "inputs": dict(task.inputs),
            "built": dict(task.built),
            "outputs": outputs,
            "facts": facts,
        }
        record |= {"checksum": digest(record), "seconds": 1.234}
        for path, size in made.items():
            if self.holes or not path.startswith("_work"):
                self._write(store.path(path), size)
        self._write(store.path(state_path(task.stage, task.name)), 0, json.dumps(record).encode())
        return record

    holes = True  # of scratch too: nobody lists it, unless a command goes on in the midst of what it serves

    def _write(self, path: str, size: int, content: bytes = b"") -> None:
        folder = path.rpartition("/")[0]
        if folder not in self.folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.folders.add(folder)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        if content:
            os.write(descriptor, content)
        elif os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        os.close(descriptor)

    def _array(self, width: float, rows: int | None = None) -> int:
        return HEADER + round((self.rows if rows is None else rows) * width)

    def _scan(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        tar = {"url": task.hints["url"], "name": Path(task.hints["url"]).name}
        tar |= {"bytes": round(job.tar_bytes / job.shards), "sha256": _made_up(task.hints["url"])}
        counts = {"samples": self.rows, "captions": self.rows, "rejected": 0, "without_image": 0}
        told = {
            "counts": counts,
            "numbers": 0,
            "reasons": {},
            "shards": {task.name: {"samples": self.rows, "tar": tar}},
        }
        return {f"_state/scan/{task.name}.parquet": round(self.rows * (job.characters * 1.2 + 40))}, told

    def _split(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        shards = {Path(path).stem: [self.rows, self.rows] for path in task.hints["scans"]}
        rows, parts = len(shards) * self.rows, task.hints["parts"]
        sizes = [rows // parts + (part < rows % parts) for part in range(parts)]
        folder = "_work_number/split"
        made = {f"{folder}/{task.name}.firsts.npy": 8, f"{folder}/{task.name}.npy": 32}
        return {path: self._array(width, rows) for path, width in made.items()}, {"shards": shards, "sizes": sizes}

    def _unique(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        rows = sum(end - begin for begin, end in task.hints["ranges"])
        return {f"_work_number/unique/{task.name}.npy": self._array(16, rows)}, {}

    def _mark(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        rows = sum(end - begin for begin, end in task.hints["ranges"])
        made = {"firsts": 8.0, "counts": 8.0, "bits": 1 / 8}
        return {f"_work_number/mark/{task.name}.{w}.npy": self._array(size, rows) for w, size in made.items()}, {}

    def _number(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        first, names = task.hints.get("before", [0, 0])[0], [Path(p).stem for p in task.built if p != "groups"]
        rows = len(names) * self.rows
        of = "" if task.name == "all" else f"{task.name}."
        shards = {
            name: {
                "first_row": first + place * self.rows,
                "samples": self.rows,
                "first_node": first + place * self.rows,
                "nodes": self.rows,
                "sha256": _made_up(name),
            }
            for place, name in enumerate(names)
        }
        told = {"counts": {"samples": rows, "nodes": rows}, "shards": shards, "first_text": first, "first_node": first}
        return {f"_state/number/{of}{what}.npy": self._array(8, rows) for what in ("nodes", "counts")}, told

    def _texts(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        return {}, {"counts": {"texts": self.rows}, "texts_sha256": _made_up(f"texts {task.name}")}

    def _encode(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        tokens = round(self.rows * job.tokens)
        counts = {"embeddings": self.rows, "truncated": 0, "tokens": tokens, "computed_tokens": tokens}
        facts = {"counts": counts, "d": job.d, "precision": "float32", "max_tokens": 256, "static": False}
        return {f"nodes/{task.name}.npy": self._array(2 * job.d)}, facts

    def _assign(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        made = {f"samples/{task.name}.parquet": job.characters + 90, f"nodes/{task.name}.parquet": job.characters * 0.6}
        facts = {"counts": {"samples": self.rows, "nodes": self.rows}, "texts_sha256": _made_up(f"texts {task.name}")}
        return {path: round(self.rows * width) for path, width in made.items()}, facts

    def _fidelity(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        return {}, {"texts": 512, "mean_cosine": 0.9999, "min_cosine": 0.999}

    def _prepare(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job, folder = self.case.job, "_work/leaders"
        leaders = -(-job.nodes // 64)
        if task.name == "all":
            groups = -(-leaders // 128)
            made = {f"{folder}/codes.npy": self._array(job.d, leaders), f"{folder}/scales.npy": self._array(8, leaders)}
            made |= {f"{folder}/group_codes.npy": self._array(job.d, groups)}
            made |= {f"{folder}/group_scales.npy": self._array(8, groups), "_work/leader_nodes.npy": 8 * leaders}
            return made | {"_work/fan.npy": HEADER + 8}, {"leaders": leaders, "fan": 10, "promised_recall": 0.951}
        some = round(leaders * (task.built["shards"][1] - task.built["shards"][0]) / job.shards)
        made = {"drawn": self._array(2 * job.d, some), "similarities": self._array(job.k * 4, 400)}
        made["ids"] = self._array(job.k * 8, 400)
        return {f"{folder}/{task.name}.{what}.npy": size for what, size in made.items()}, {}

    def _codes(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        d = self.case.job.d
        made = {"codes": self._array(d), "scales": self._array(8), "leaves": self._array(40), "floors": self._array(4)}
        made["moments"] = HEADER + 8 * d * (d + 1)
        return {f"_work/{what}/{task.name}.npy": size for what, size in made.items()}, {"largest_rest": 0.04}

    def _moments(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        d = self.case.job.d
        return {"_state/moments/moments.npy": HEADER + 8 * d * (d + 1), "graph/basis.npy": HEADER + 256 * d}, {}

    def _join(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job, cost = self.case.job, self.case.engine
        tasks = self.join_tasks
        rows = round(3 * job.nodes / tasks)
        made = {"ids": self._array(8, rows), "keys": self._array(8 * cost.length(job.k, job.nodes), rows)}
        return {f"_work/join/{task.name}.{what}.npy": size for what, size in made.items()}, {}

    join_tasks = 1

    def _merge(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        return {f"_work/merged/{task.name}.npy": self._array(8 * self.case.engine.length(job.k, job.nodes))}, {}

    def _search(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        k = self.case.job.k
        made = {"neighbors": 4 * k, "similarities": 2 * k, "background": 8, "sketch": 64}
        facts = {"counts": {"nodes": self.rows, "edges": self.rows * k}, "searched_again": 0}
        return {f"graph/{task.name}.{what}.npy": self._array(width) for what, width in made.items()}, facts

    def _certify(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        """Of each node drawn a share of the neighbours, as asked for, is missed, in a range at random."""
        job, (begin, end) = self.case.job, task.built["nodes"]
        count = end - begin
        if task.built["shards"] is None:
            scores = -np.sort(-self.random.uniform(0.5, 0.9, (count, job.k)), axis=1)
            widths = dict(zip(DRAWN_PARTS, (8, 2 * job.d, 4 * job.k, 8 * job.k), strict=True))
            writer = Writer(store)
            writer.array(DRAWN.format(task.name, "scores"), scores)
            made = {DRAWN.format(task.name, what): self._array(width, count) for what, width in widths.items()}
            return made, {}
        ranges = min(256, math.ceil(job.nodes / 2**18), job.shards)
        missed = self.random.poisson((1 - self.case.recipe.index.recall) * 0.8 * job.k / ranges, count)
        return {}, {"nearer": [[0.95] * int(number) for number in missed]}

    def _export(self, task: Task, store: Store) -> tuple[dict[str, int], Json]:
        job = self.case.job
        row = job.d + 4 + 6.0 * job.k + 40 + job.characters * 0.8
        name = Path(task.built["tar"]["name"]).stem
        return {f"shards/{name}.graph.parquet": round(self.rows * row)}, {
            "counts": {"samples": self.rows, "without_node": 0}
        }


def tars(folder: Path, count: int, size: int) -> None:
    """Tars of that size without content, for plans to list."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:06d}.tar"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size)


def _made_up(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()
