"""The three engines behind one protocol, and which of them a build takes.

An engine's work is `prepare` (one task over all nodes), `describe` (one a shard) and `join`s: independent tasks, each of
which returns candidate lists of some nodes. What follows is the same for all: lists are merged by shard, scored again
exactly, proved or completed (`graphbuild.index`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from graphbuild.errors import StageError
from graphbuild.index import SCRATCH, VECTORS
from graphbuild.knn import exact, faiss_index, kernels, partition
from graphbuild.knn.codes import Codes
from graphbuild.recipe import Index
from graphbuild.sharded import Array, ShardedArray, node_array
from graphbuild.store import Json, Store, Writer

EXACT_OPERATIONS = 2e14  # what `auto` spends on a CPU: about five minutes of one core with VNNI


class Inputs:
    """What a task reads: the node's vectors, and what earlier stages of the build left in scratch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest = store.manifest()

    def of(self, what: str) -> ShardedArray:
        return node_array(self.store, self.manifest, f"{SCRATCH}/{what}/{{}}.npy")

    @cached_property
    def vectors(self) -> ShardedArray:
        return node_array(self.store, self.manifest, VECTORS)

    @cached_property
    def codes(self) -> ShardedArray:
        return self.of("codes")

    @cached_property
    def scales(self) -> ShardedArray:
        return self.of("scales")


class Engine(Protocol):
    name: str
    on_device: bool
    prepares: bool

    def settings(self) -> Json:
        """What of the recipe decides its result, beside k."""

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        """Work that needs all nodes at once, where `prepares`; returns facts."""

    def describe(self, inputs: Inputs, codes: Codes) -> dict[str, Array]:
        """More arrays [n, ...] of a shard's nodes for its joins."""

    def joins(self, nodes: int) -> list[Any]:
        """The arguments (JSON) of its join tasks, independent of workers and memory."""

    def length(self, k: int, nodes: int) -> int:
        """Candidates a list holds."""

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        """ids int64 [m] ascending, and their candidate lists, keys int64 [m, length] (`graphbuild.knn.kernels`)."""


@dataclass(frozen=True)
class Exact:
    name: str = "exact"
    on_device: bool = True
    prepares: bool = False

    def settings(self) -> Json:
        return {}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        return {}

    def describe(self, inputs: Inputs, codes: Codes) -> dict[str, Array]:
        return {}

    def joins(self, nodes: int) -> list[Any]:
        return exact.joins(nodes)

    def length(self, k: int, nodes: int) -> int:
        return exact.list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        groups = [(int(first), int(count)) for first, count in argument]
        if device == "cpu":
            return exact.join(groups, inputs.codes, inputs.scales, length)
        return exact.join_on_device(groups, inputs.codes, inputs.scales, length, device)


@dataclass(frozen=True)
class Partition:
    recall: float
    seed: int
    name: str = "partition"
    on_device: bool = False
    prepares: bool = True

    def settings(self) -> Json:
        return {"recall": self.recall, "seed": self.seed}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        drawn = partition.draw_leaders(inputs.vectors, self.seed)
        fan, promised = partition.calibrate(inputs.vectors, partition.Leaders(drawn), k, self.recall, self.seed)
        writer.array(f"{SCRATCH}/leaders.npy", drawn)
        writer.array(f"{SCRATCH}/fan.npy", np.array([fan]))
        return {"leaders": len(drawn), "fan": fan, "promised_recall": round(promised, 4)}

    def describe(self, inputs: Inputs, codes: Codes) -> dict[str, Array]:
        leaders = partition.Leaders(np.array(inputs.store.array(f"{SCRATCH}/leaders.npy")))
        leaves, floors = leaders.leaves(codes.codes, int(inputs.store.array(f"{SCRATCH}/fan.npy")[0]))
        return {"leaves": leaves, "floors": floors}

    def joins(self, nodes: int) -> list[Any]:
        return partition.joins(nodes)

    def length(self, k: int, nodes: int) -> int:
        return partition.list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        leaves, floors = inputs.of("leaves"), inputs.of("floors")
        return partition.join((argument[0], argument[1]), leaves, floors, inputs.codes, inputs.scales, length)


@dataclass(frozen=True)
class Faiss:
    factory: str
    recall: float
    seed: int
    on_device: bool = True
    prepares: bool = True

    @property
    def name(self) -> str:
        return f"faiss:{self.factory}"

    def settings(self) -> Json:
        return {"recall": self.recall, "seed": self.seed}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        with writer.file(f"{SCRATCH}/index.faiss") as path:
            facts = faiss_index.build(inputs.vectors, self.factory, k, self.recall, self.seed, path)
        return facts

    def describe(self, inputs: Inputs, codes: Codes) -> dict[str, Array]:
        return {}

    def joins(self, nodes: int) -> list[Any]:
        rows = partition.TASK_NODES
        return [(first, min(rows, nodes - first)) for first in range(0, nodes, rows)]

    def length(self, k: int, nodes: int) -> int:
        return partition.list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        first, count = argument
        record = inputs.store.read_json("_state/prepare/all.done.json")
        if record is None:
            raise StageError("the faiss index has no record", "run `graphbuild index --force`")
        index = faiss_index.open_index(inputs.store.local_copy(f"{SCRATCH}/index.faiss"), record["facts"], device)
        ids = np.arange(first, first + count)
        keys = np.empty((count, length), np.int64)
        for start in range(0, count, faiss_index.BLOCK_ROWS):
            rows = ids[start : start + faiss_index.BLOCK_ROWS]
            queries = faiss_index.unit(inputs.vectors.take(rows))
            scores, found = faiss_index.search(index, queries, rows, length)
            keys[start : start + len(rows)] = np.where(found < 0, kernels.EMPTY, kernels.pack(scores, found))
        keys[:, ::-1].sort(axis=1)
        return ids, keys


def choose(index: Index, nodes: int, width: int) -> tuple[Engine, str]:
    """The engine of a build and why: as asked, or exact where it is affordable, else partition."""
    approximate = {"recall": index.recall, "seed": index.seed}
    if index.engine.startswith("faiss:"):
        return Faiss(index.engine.removeprefix("faiss:"), **approximate), "asked for"
    if index.engine == "exact":
        return Exact(), "asked for"
    if index.engine == "partition":
        return Partition(**approximate), "asked for"
    operations = float(nodes) ** 2 * width
    sizes = f"{nodes:,} nodes x {width}: {operations:.1g} int8 operations"
    if index.device == "cuda" or (index.device == "auto" and torch.cuda.is_available()):
        return Exact(), f"{sizes}, on a GPU"
    if operations <= EXACT_OPERATIONS:
        return Exact(), f"{sizes}, at most {EXACT_OPERATIONS:.0g}"
    return Partition(**approximate), f"{sizes}, more than {EXACT_OPERATIONS:.0g} on a CPU; recall {index.recall}"
