"""Stages cells and arrange: the place of each sample among tars in neighbour order, by tasks that hold CELL samples.

A sample belongs to the leader most similar to its node; leaders are the means of clusters of some nodes. cells (a task
a run of old tars) writes the samples of its run, those of one leader behind each other, each with its node and list.
Leader after leader, and of each run after run, all samples are one sequence, with those without a node behind; a cell
is CELL of them behind each other. arrange (a task a cell) makes its chunks by `NeighborOrder`, as if there were no
other nodes; chance gives each chunk its place among those of all cells. One cell, of small stores, needs no leaders.

What cells cost: of 50,000 real captions in one cell a sample has 4.5 of its neighbours in its chunk of 32, in 4 cells
3.8, in 12 cells 3.7.

Memory: 400 bytes a sample of a run or cell, at most. Scratch: 160 bytes a sample.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from graphbuild.errors import ConfigError
from graphbuild.export.runs import SCRATCH
from graphbuild.graph.certify import require_graph
from graphbuild.graph.select.selection import decided_by, selection_of
from graphbuild.nodes.samples import NO_NODE
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, records
from graphbuild.runner.state import require
from graphbuild.store.layout import NEIGHBORS, SAMPLES, VECTORS, shard_name
from graphbuild.store.sharded import Array, node_array
from graphbuild.store.shards import Shards, node_count, present_shards, shards_of
from graphbuild.store.store import Json, Store, Writer

RUNS, RUN_SAMPLES = 256, 400_000  # a new tar is read from each; a task holds so many sidecar rows
CELL = 4_000_000  # samples whose order one task makes
LEADERS, SEEN, RANGE = 4, 64, 16  # a cell; nodes a cell that they are the means of, so many behind each other
LISTED = 32  # neighbours of a sample by which it is ordered, at most
GROUP = 8  # samples that NeighborOrder groups, at most
BLOCK = 65_536
MEMBERS = f"{SCRATCH}/cells/{{}}.npy"  # int64 [n, 2] of a run, in order of leader: row, node
LISTS = f"{SCRATCH}/cells/{{}}.lists.npy"  # uint32 [n, k]: the neighbours of each one's node
PLACES = f"{SCRATCH}/places/{{}}.npy"  # int64 [n, 2] of a cell, in order of row: row, place


def shards_with_tars(store: Store, layout: str) -> Shards:
    """The store's shards; ConfigError where the samples came from no tars."""
    require_graph(store)
    shards = present_shards(store, store.manifest())
    if shards.table["tar_url"].null_count:
        raise ConfigError(
            f"--layout {layout} copies images, and the samples of {store.url} came from no tars",
            "use the default layout, or embed tars (--shards)",
        )
    return shards


def of_all(recipe: Recipe, store: Store) -> tuple[Json, Json]:
    """The settings of all stages of this layout, and what each of their tasks reads of the store."""
    built = {
        "graph": store.manifest()["graph"]["fingerprint"],
        "samples": digest(outputs(require(store, "assign", "embed"), "samples/")),
    }
    chosen, selection = decided_by(store, recipe.export.selection)
    return {"chunk": recipe.export.chunk, "seed": recipe.index.seed, **chosen}, {**built, **selection}


def runs(shards: Shards) -> list[tuple[int, int]]:
    """The old tars (begin, end) of each run: RUNS of them, or more where those would have over RUN_SAMPLES samples."""
    length = max(min(-(-int(shards.column("samples").sum()) // RUNS), RUN_SAMPLES), 1)
    begins = np.unique(shards.column("first_row") // length, return_index=True)[1].tolist()
    return list(itertools.pairwise([*begins, len(shards)]))


def tars_of(shards: Shards, run: tuple[int, int]) -> list[Json]:
    """What tasks read of the old tars of a run."""
    columns = shards.table.slice(run[0], run[1] - run[0]).select(["shard", "first_row", "samples", "tar_sha256"])
    return list(columns.to_pylist())


# -- cells: of each run, which samples are whose


def plan_cells(recipe: Recipe, store: Store) -> list[Task]:
    shards = shards_with_tars(store, "clustered")
    settings, built = of_all(recipe, store)
    selection = selection_of(store, recipe.export.selection)
    if selection is not None and not selection.kept:
        raise ConfigError(
            f"{selection.url} keeps no sample, so there is nothing to export",
            "make it again with `graphbuild select` and looser rules, or name another by --selection",
        )
    total = int(shards.column("samples").sum()) if selection is None else selection.kept
    built["cells"] = -(-total // CELL) if total > CELL else 0
    return [
        Task(stage="cells", name=shard_name(number), settings=settings, built={**built, "tars": tars_of(shards, run)})
        for number, run in enumerate(runs(shards))
    ]


def run_cells(task: Task, store: Store, writer: Writer) -> Json:
    manifest, selection = store.manifest(), selection_of(store, task.settings.get("selection"))
    shards = shards_of(store, manifest).with_nodes
    found = []
    for tar in task.built["tars"]:
        table = store.table(SAMPLES.format(tar["shard"]), ["row", "node"])
        both = np.stack([table["row"].to_numpy(), pc.fill_null(table["node"], NO_NODE).to_numpy()], axis=1)
        found.append(both if selection is None else both[selection.keeps(both[:, 0]) & (both[:, 1] != NO_NODE)])
    members = np.concatenate(found)
    leaders = _leaders(store, shards, task.built["cells"], task.settings["seed"])
    lists = node_array(store, shards, NEIGHBORS)
    vectors = node_array(store, shards, VECTORS) if len(leaders) > 1 else None
    of = np.full(len(members), len(leaders))
    listed = np.zeros((len(members), min(lists.width, LISTED)), np.uint32)
    has_node = np.flatnonzero(members[:, 1] != NO_NODE)
    for some in (has_node[begin : begin + BLOCK] for begin in range(0, len(has_node), BLOCK)):
        nodes = members[some, 1]
        listed[some] = lists.take(nodes)[:, :LISTED]
        of[some] = 0 if vectors is None else (vectors.take(nodes).astype(np.float32) @ leaders.T).argmax(axis=1)
    order = np.argsort(of, kind="stable")
    writer.array(MEMBERS.format(task.name), members[order], durable=False)
    writer.array(LISTS.format(task.name), listed[order], durable=False)
    return {"sizes": np.bincount(of, minlength=len(leaders) + 1).tolist()}


def _leaders(store: Store, shards: Shards, cells: int, seed: int) -> Array:
    """Unit-norm means of LEADERS clusters a cell, by k-means on SEEN nodes a cell: float32 [n, d], near ones behind one
    another."""
    import scipy.cluster.vq

    if not cells:
        return np.zeros((1, 1), np.float32)
    draw = np.random.default_rng(seed)
    first = draw.integers(node_count(store.manifest()), size=SEEN // RANGE * cells)
    begins = shards.column("first_node")
    numbers = (np.searchsorted(begins, first, side="right") - 1).tolist()
    at = (first - begins[numbers]).tolist()
    names = [VECTORS.format(shards.names[number]) for number in numbers]
    ends = [min(begin + RANGE, shards[number].nodes) for begin, number in zip(at, numbers, strict=True)]
    seen = store.rows_of(names, at, ends).astype(np.float32)
    with warnings.catch_warnings(action="ignore"):  # of clusters that are empty: they stay where they began
        means = scipy.cluster.vq.kmeans2(seen, min(LEADERS * cells, len(seen)), 10, minit="points", seed=draw)[0]
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.asarray(means[_near(means, np.arange(len(means)))])


def _near(vectors: Array, ids: Array) -> Array:
    """Ids of vectors [n, d] so that near ones are behind each other: by halves along their principal direction."""
    if len(ids) <= 2:
        return ids
    own = vectors[ids] - vectors[ids].mean(axis=0)
    ids = ids[np.argsort(own @ np.linalg.svd(own, full_matrices=False)[2][0], kind="stable")]
    return np.concatenate([_near(vectors, half) for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :])])


# -- arrange: the order of each cell


@dataclass(frozen=True)
class Cells:
    """starts: where in the sequence of all samples each cell begins, and the end. ranges: of each cell and run the
    members that are in both, int64 [cells, runs, 2]. with_node: how many samples have a node."""

    starts: list[int]
    ranges: Array
    with_node: int


def cells_of(store: Store, chunk: int) -> Cells:
    """All cells, by the records of stage cells: first those of samples with a node, whose sizes are as equal as whole
    chunks allow, then those of the others."""
    sizes = np.array([record["facts"]["sizes"] for record in records(store, "cells").values()])  # [runs, leaders + 1]
    with_node, total = int(sizes[:, :-1].sum()), int(sizes.sum())
    count = max(-(-with_node // CELL), 1)
    size = max(-(-with_node // (count * chunk)) * chunk, 1)
    starts = [*range(0, with_node, size), *range(with_node, total, CELL), total]
    begins = np.cumsum([0, *sizes.T.ravel()])[:-1].reshape(sizes.T.shape)  # of each leader's part of each run
    before = np.array([np.clip(start - begins, 0, sizes.T).sum(axis=0) for start in starts])  # [cells + 1, runs]
    return Cells(starts, np.stack([before[:-1], before[1:]], axis=2), with_node)


def plan_arrange(recipe: Recipe, store: Store) -> list[Task]:
    settings, built = of_all(recipe, store)
    if not records(store, "cells"):  # all is exported
        return []
    cells = cells_of(store, settings["chunk"])
    built["cells"] = digest([record["facts"]["sizes"] for record in records(store, "cells").values()])
    return [
        Task(
            stage="arrange",
            name=shard_name(number),
            settings=settings,
            built=built,
            hints={"ranges": ranges.tolist(), "with_node": cells.with_node, "first": first},
        )
        for number, (first, ranges) in enumerate(zip(cells.starts, cells.ranges, strict=False))
    ]


def run_arrange(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.graph.batches.order import NeighborOrder

    chunk, first, with_node = task.settings["chunk"], task.hints["first"], task.hints["with_node"]
    ranges = task.hints["ranges"]
    members = _rows_of(store, MEMBERS, ranges)
    by_row = np.argsort(members[:, 0])
    members = members[by_row]
    places = np.arange(first, first + len(members))
    if first >= with_node:
        members[:, 1] = places
    else:
        nodes, where, local = np.unique(members[:, 1], return_index=True, return_inverse=True)
        own = _of_cell(_rows_of(store, LISTS, ranges), by_row[where], nodes)
        planned = NeighborOrder(own, chunk, nodes=local, group=min(GROUP, chunk), seed=task.settings["seed"])
        if len(members) < with_node:  # chunks of all cells are mixed
            chunks = np.random.default_rng([task.settings["seed"], 0]).permutation(with_node // chunk)
            whole = len(members) // chunk
            mixed = chunks[first // chunk : first // chunk + whole, None] * chunk + np.arange(chunk)
            places[: whole * chunk] = mixed.ravel()
        members[planned.epoch(int(task.name)).order, 1] = places
    writer.array(PLACES.format(task.name), members, durable=False)
    return {"counts": {"samples": len(members)}}


@dataclass
class _Lists:
    """Lists uint32 [n, k], as NeighborOrder reads a graph."""

    k: int
    lists: Array

    def __len__(self) -> int:
        return len(self.lists)

    def edge_blocks(self) -> Iterator[tuple[int, Array, Array]]:
        yield 0, self.lists, self.lists


def _of_cell(lists: Array, where: Array, nodes: Array) -> _Lists:
    """The lists [n, k] at these places, of nodes [n], as of a graph that has no others: by their numbers in it, with
    the node itself, which nobody looks at, in place of one that is not there."""
    found = np.empty((len(nodes), lists.shape[1]), np.uint32)
    for begin in range(0, len(nodes), BLOCK):
        listed = lists[where[begin : begin + BLOCK]]
        at = np.minimum(np.searchsorted(nodes, listed), len(nodes) - 1)
        itself = np.arange(begin, begin + len(listed))[:, None]
        found[begin : begin + BLOCK] = np.where(nodes[at] == listed, at, itself)
    return _Lists(lists.shape[1], found)


def places_of(store: Store, ranges: Sequence[Sequence[int]]) -> Array:
    """Of a run the samples that have a place, in order of row: int64 [n, 2], row and place. ranges: of the run in each
    cell, by `places_by_run`."""
    placed = _rows_of(store, PLACES, ranges)
    return placed[np.argsort(placed[:, 0])]


def _rows_of(store: Store, path: str, ranges: Sequence[Sequence[int]]) -> Array:
    """A range of rows of each file, behind each other."""
    begins, ends = zip(*ranges, strict=True)
    return store.rows_of([path.format(shard_name(number)) for number in range(len(ranges))], begins, ends)


def places_by_run(store: Store, chunk: int) -> list[list[list[int]]]:
    """Of each run, and in it of each cell, which rows of PLACES are the run's."""
    if not records(store, "cells"):
        return []
    lengths = np.diff(cells_of(store, chunk).ranges, axis=2)[..., 0]  # [cells, runs]
    ends = np.cumsum(lengths, axis=1)
    found: list[list[list[int]]] = np.stack([ends - lengths, ends], axis=2).transpose(1, 0, 2).tolist()
    return found


CELLS = Stage(name="cells", title="cells", plan=plan_cells, run=run_cells, scratch=True)
ARRANGE = Stage(name="arrange", title="order", plan=plan_arrange, run=run_arrange, scratch=True)
