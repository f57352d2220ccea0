"""The three engines behind one protocol, and which of them a build takes.

An engine's work is `prepare` (one task over all nodes), `describe` (one a shard) and `join`s: independent tasks, each
of which returns candidate lists of some nodes. What follows is the same for all: lists are merged by shard, scored
again exactly, proved or completed (`graphbuild.graph.index`). Heavy imports wait until there is work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graphbuild.errors import ConfigError
from graphbuild.machine.gpus import gpu_here
from graphbuild.recipe import Index
from graphbuild.runner.stage import records
from graphbuild.store.layout import SCRATCH
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json, Writer

if TYPE_CHECKING:
    from graphbuild.knn.codes import Codes
    from graphbuild.knn.inputs import Inputs

FAN = f"{SCRATCH}/fan.npy"
FAISS_INDEX = f"{SCRATCH}/index.faiss"
FAISS_TASK_NODES = 65_536
BASE_BYTES = 1e9  # a worker with torch and numba loaded
LEAST_NODES = 4_096
EXACT_OPERATIONS = 2e14  # what `auto` spends on a CPU: about five minutes of one core with VNNI
EXACT_ON_GPU = 4e17  # and on a GPU: 32 million nodes of d = 384, an hour or two of an H100 as `plan` reckons


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def on_device(self) -> bool: ...

    def settings(self) -> Json:
        """What of the recipe decides its result, beside k."""

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        """Work that needs all nodes at once; returns facts."""

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        """More arrays [n, ...] of a shard's nodes for its joins."""

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[Any]:
        """The arguments (JSON) of its join tasks, each of at most about `at_once` nodes; the result is the same.

        Pairs of nodes below `first_new` are left out: their lists are known (`graphbuild.graph.grow`).
        """

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        """About how many nodes one of so many join tasks holds, and in how many tasks a node has a list."""

    def length(self, k: int, nodes: int) -> int:
        """Candidates a list holds."""

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        """ids int64 [m] ascending, and their candidate lists, keys int64 [m, length] (`graphbuild.knn.kernels`)."""


@dataclass(frozen=True)
class Exact:
    seed: int
    name: str = "exact"
    on_device: bool = True

    def settings(self) -> Json:
        return {}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        from graphbuild.knn.inputs import write_leaders
        from graphbuild.knn.leaders import Leaders, draw_leaders

        write_leaders(Leaders.of(draw_leaders(inputs.vectors, self.seed)[1]), writer)
        return {}

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        from graphbuild.knn.leaders import floor_leader

        return {"floors": inputs.leaders.leaves(codes.codes, 0, floor_leader(k))[1]}

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[Any]:
        from graphbuild.knn import exact

        return exact.joins(nodes, at_once, first_new)

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        from graphbuild.knn import exact

        return exact.spread(nodes, tasks)

    def length(self, k: int, nodes: int) -> int:
        from graphbuild.knn import exact

        return exact.list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        from graphbuild.knn import exact

        groups = [(int(first), int(count)) for first, count in argument]
        if device == "cpu":
            return exact.join(groups, inputs.codes, inputs.scales, inputs.floors, length)
        return exact.join_on_device(groups, inputs.codes, inputs.scales, inputs.floors, length, device)


@dataclass(frozen=True)
class Partition:
    recall: float
    seed: int
    name: str = "partition"
    on_device: bool = False

    def settings(self) -> Json:
        return {"recall": self.recall, "seed": self.seed}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        from graphbuild.knn import partition
        from graphbuild.knn.inputs import LEADER_NODES, write_leaders
        from graphbuild.knn.leaders import Leaders, draw_leaders

        nodes, drawn = draw_leaders(inputs.vectors, self.seed)
        leaders = Leaders.of(drawn)
        fan, promised = partition.calibrate(inputs.vectors, leaders, k, self.recall, self.seed)
        write_leaders(leaders, writer)
        writer.array(LEADER_NODES, nodes, durable=False)
        writer.array(FAN, np.array([fan]), durable=False)
        return {"leaders": len(drawn), "fan": fan, "promised_recall": round(promised, 4)}

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        from graphbuild.knn.leaders import floor_leader

        leaves, floors = inputs.leaders.leaves(codes.codes, int(inputs.store.array(FAN)[0]), floor_leader(k))
        return {"leaves": leaves, "floors": floors}

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[Any]:
        from graphbuild.knn import partition

        return partition.joins(nodes, at_once, first_new)

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        from graphbuild.knn import partition

        return partition.spread(nodes, tasks)

    def length(self, k: int, nodes: int) -> int:
        from graphbuild.knn import partition

        return partition.list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        from graphbuild.knn import partition

        first, end, first_new = map(int, argument)
        return partition.join(
            (first, end, first_new), inputs.of("leaves"), inputs.floors, inputs.codes, inputs.scales, length
        )


@dataclass(frozen=True)
class Faiss:
    factory: str
    recall: float
    seed: int
    on_device: bool = True

    @property
    def name(self) -> str:
        return f"faiss:{self.factory}"

    def settings(self) -> Json:
        return {"recall": self.recall, "seed": self.seed}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        from graphbuild.knn import faiss_index

        with writer.file(FAISS_INDEX, durable=False) as path:
            facts = faiss_index.build(inputs.vectors, self.factory, k, self.recall, self.seed, path)
        return facts

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        return {}

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[Any]:
        rows = min(FAISS_TASK_NODES, at_once)
        return [(first, min(rows, nodes - first)) for first in range(0, nodes, rows)]

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        return nodes / tasks, 1

    def length(self, k: int, nodes: int) -> int:
        from graphbuild.knn import partition

        return partition.list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        from graphbuild.knn import faiss_index, lists

        first, count = argument
        record = records(inputs.store, "prepare")["all"]
        index = faiss_index.open_index(
            inputs.store.local_copy(FAISS_INDEX),
            record["fingerprint"],
            record["facts"]["knob"],
            record["facts"]["effort"],
            device,
        )
        ids = np.arange(first, first + count)
        keys = np.empty((count, length), np.int64)
        for start in range(0, count, faiss_index.BLOCK_ROWS):
            rows = ids[start : start + faiss_index.BLOCK_ROWS]
            queries = faiss_index.unit(inputs.vectors.take(rows))
            scores, found = faiss_index.search(index, queries, rows, length)
            keys[start : start + len(rows)] = np.where(found < 0, lists.EMPTY, lists.pack(scores, found))
        keys[:, ::-1].sort(axis=1)
        return ids, keys


def choose(index: Index, nodes: int, width: int) -> tuple[Engine, str]:
    """The engine of a build and why: as asked, or exact where it is affordable, else partition."""
    if index.engine.startswith("faiss:"):
        return Faiss(index.engine.removeprefix("faiss:"), index.recall, index.seed), "asked for"
    if index.engine == "exact":
        return Exact(index.seed), "asked for"
    if index.engine == "partition":
        return Partition(index.recall, index.seed), "asked for"
    operations = float(nodes) ** 2 * width
    on_gpu = index.device == "cuda" or (index.device == "auto" and operations > EXACT_OPERATIONS and gpu_here())
    most, place = (EXACT_ON_GPU, "a GPU") if on_gpu else (EXACT_OPERATIONS, "a CPU")
    sizes = f"{nodes:,} nodes x {width}: {operations:.1g} int8 operations"
    if operations <= most:
        return Exact(index.seed), f"{sizes}, at most {most:.0g} on {place}"
    return Partition(index.recall, index.seed), f"{sizes}, more than {most:.0g} on {place}; recall {index.recall}"


def nodes_at_once(engine: Engine, index: Index, nodes: int, width: int) -> int:
    """How many nodes' codes and lists a join task may hold; ConfigError when --memory is too little for any."""
    one = bytes_a_node(engine, index.k, nodes, width)
    fixed = BASE_BYTES + (nodes * width * 4 if engine.name.startswith("faiss:") else 0)
    at_once = int((index.memory * 1e9 - fixed) / one)
    if at_once < LEAST_NODES:
        needed = math.ceil((fixed + LEAST_NODES * one) / 1e6) / 1e3
        raise ConfigError(
            f"--memory {index.memory:g}: {engine.name} needs at least {needed:g} GB a worker",
            f"pass --memory {needed:g}, or more for fewer tasks",
        )
    return at_once


def bytes_a_node(engine: Engine, k: int, nodes: int, width: int) -> int:
    """Codes, list, and its ids, scale, floor and place while it is joined."""
    return width + 8 * engine.length(k, nodes) + 32


def forecast(index: Index, nodes: int, width: int, first_new: int = 0) -> str:
    """One line before anything runs: the engine, why, and the most memory and scratch it will take."""
    engine, reason = choose(index, nodes, width)
    at_once = nodes_at_once(engine, index, nodes, width)
    held_nodes, lists = engine.spread(nodes, len(engine.joins(nodes, at_once)))
    tasks = engine.joins(nodes, at_once, first_new)
    held = min(held_nodes, nodes) * bytes_a_node(engine, index.k, nodes, width)
    if engine.name.startswith("faiss:"):
        held += nodes * width * 4
    scratch = nodes * (width + 8 * engine.length(index.k, nodes) * (lists + 1))
    kept = f"{nodes - first_new:,} new nodes, the lists of {first_new:,} are kept; " if first_new else ""
    joins = f"{len(tasks)} join task{'s' * (len(tasks) != 1)}"
    return (
        f"{engine.name} ({reason}); {kept}{joins}, up to {(BASE_BYTES + held) / 1e9:.1f} GB a worker "
        f"beside mapped files, {scratch / 1e9:.1f} GB of scratch"
    )
