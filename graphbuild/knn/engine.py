"""What an engine is, which of the three a build takes, and what memory and scratch it will take.

An engine's work is `prepare` (one task over all nodes), `describe` (one a shard) and `join`s: independent tasks, each
of which returns candidate lists of some nodes. What follows is the same for all: lists are merged by shard, scored
again exactly, proved or completed (`graphbuild.graph.index`). Heavy imports wait until an engine is chosen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from graphbuild.errors import ConfigError
from graphbuild.machine.gpus import gpu_here
from graphbuild.recipe import Index
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json, Writer

if TYPE_CHECKING:
    from graphbuild.knn.codes import Codes
    from graphbuild.knn.inputs import Inputs

BASE_BYTES = 1e9  # a worker with torch and numba loaded
LEAST_NODES = 4_096
EXACT_OPERATIONS = 2e14  # what `auto` spends on a CPU: about five minutes of one core with VNNI
EXACT_ON_GPU = 4e17  # and on a GPU: 32 million nodes of d = 384, an hour or two of an H100 as `plan` reckons


class Engine(Protocol):
    """One of `Exact`, `Partition` and `Faiss`; what its methods promise is said here alone."""

    @property
    def name(self) -> str: ...

    @property
    def on_device(self) -> bool: ...

    @property
    def ordered(self) -> bool:
        """Whether it has the nodes in the order of their leaders (`graphbuild.graph.order`), not of their ids."""

    @property
    def mapped_files(self) -> int:
        """Of each shard, how many a worker keeps mapped: vectors, codes, scales, floors, ..."""

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

    def beside(self, nodes: int) -> float:
        """Bytes that a join task holds of a node beside what `bytes_a_node` says."""

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        """ids int64 [m] ascending, and their candidate lists, keys int64 [m, length] (`graphbuild.knn.lists`): by
        similarity over the row's own scale, as lists of a graph that grows are merged with these by score."""


def choose(index: Index, nodes: int, width: int, listed: int | None = None) -> tuple[Engine, str]:
    """The engine of a build and why: as asked, or exact where it is affordable, else partition. listed: candidates of
    partition's lists, where it has been prepared."""
    from graphbuild.knn.exact import Exact
    from graphbuild.knn.faiss_index import Faiss
    from graphbuild.knn.partition import Partition

    if index.engine.startswith("faiss:"):
        return Faiss(index.engine.removeprefix("faiss:"), index.recall, index.seed), "asked for"
    if index.engine == "exact":
        return Exact(index.seed), "asked for"
    if index.engine == "partition":
        return Partition(index.recall, index.seed, listed), "asked for"
    operations = float(nodes) ** 2 * width
    on_gpu = index.device == "cuda" or (index.device == "auto" and operations > EXACT_OPERATIONS and gpu_here())
    most, place = (EXACT_ON_GPU, "a GPU") if on_gpu else (EXACT_OPERATIONS, "a CPU")
    sizes = f"{nodes:,} nodes x {width}: {operations:.1g} int8 operations"
    if operations <= most:
        return Exact(index.seed), f"{sizes}, at most {most:.0g} on {place}"
    reason = f"{sizes}, more than {most:.0g} on {place}; recall {index.recall}"
    return Partition(index.recall, index.seed, listed), reason


def nodes_at_once(engine: Engine, index: Index, nodes: int, width: int) -> int:
    """How many nodes' codes and lists a join task may hold; ConfigError when --memory is too little for any."""
    one = bytes_a_node(engine, index.neighbors(nodes), nodes, width)
    fixed = BASE_BYTES + (nodes * width * 4 if engine.name.startswith("faiss:") else 0)
    at_once = int((index.memory * 1e9 - fixed) / one)
    if at_once < LEAST_NODES:
        needed = math.ceil((fixed + LEAST_NODES * one) / 1e6) / 1e3
        raise ConfigError(
            f"--memory {index.memory:g}: {engine.name} needs at least {needed:g} GB a worker",
            f"pass --memory {needed:g}, or more for fewer tasks",
        )
    return at_once


def bytes_a_node(engine: Engine, k: int, nodes: int, width: int) -> float:
    """Codes, list, and its ids, scale, floor and place while it is joined, and what the engine needs beside."""
    return width + 8 * engine.length(k, nodes) + 32 + engine.beside(nodes)


def forecast(index: Index, nodes: int, width: int, first_new: int = 0) -> str:
    """One line before anything runs: the engine, why, and the most memory and scratch it will take."""
    from graphbuild.knn.partition import LONGEST

    engine, reason = choose(index, nodes, width)
    at_once = nodes_at_once(engine, index, nodes, width)
    tasks, of_all = engine.joins(nodes, at_once, first_new), len(engine.joins(nodes, at_once))
    held, scratch = _space(engine, of_all, index, nodes, width)
    kept = f"{nodes - first_new:,} new nodes, the lists of {first_new:,} are kept; " if first_new else ""
    joins = f"{len(tasks)} join task{'s' * (len(tasks) != 1)}"
    more = ""
    if engine.ordered:  # how long lists have to be is not known yet
        longest, _ = choose(index, nodes, width, min(LONGEST * index.neighbors(nodes), nodes - 1))
        more = f" ({_space(longest, of_all, index, nodes, width)[1]:.1f} GB where it takes the longest lists)"
    return (
        f"{engine.name} ({reason}); {kept}{joins}, up to {held:.1f} GB a worker beside mapped files, "
        f"{scratch:.1f} GB of scratch{more}"
    )


def _space(engine: Engine, joins: int, index: Index, nodes: int, width: int) -> tuple[float, float]:
    """GB that one of so many join tasks holds, and of scratch."""
    k = index.neighbors(nodes)
    held_nodes, lists = engine.spread(nodes, joins)
    held = BASE_BYTES + min(held_nodes, nodes) * bytes_a_node(engine, k, nodes, width)
    if engine.name.startswith("faiss:"):
        held += nodes * width * 4
    scratch = width + 8 * engine.length(k, nodes) * (lists + 1)
    if engine.ordered:  # the vectors too, and once more while they are put in order
        scratch = max(scratch + 2 * width, 5 * width)
    return held / 1e9, nodes * scratch / 1e9
