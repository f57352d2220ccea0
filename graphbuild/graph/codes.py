"""Stage codes: int8 codes of nodes, which leaders they are nearest to, and the sums that moments are made of.

A task has the nodes of a shard, or in large stores those of several (`compared_at_once`): the more nodes are compared
with a group of leaders at once, the less each costs. For an engine that has the nodes in the order of their leaders it
copies them too, sorted by nearest leader, so that stage order reads what it needs of each task in one piece, and all
together nothing twice. Memory: what is read and written of a task's nodes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from graphbuild.errors import StageError
from graphbuild.graph import moments
from graphbuild.graph.tasks import built_without, engine_of, engine_of_task, gone_nodes, index_task, nodes_entry
from graphbuild.machine.threads import torch_threads
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.layout import PARTS, SCRATCH, SORTED, VECTORS
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

if TYPE_CHECKING:
    from graphbuild.knn.codes import Codes
    from graphbuild.store.sharded import Array


def plan(recipe: Recipe, store: Store) -> list[Task]:
    from graphbuild.knn.leaders import SORTED_PARTS, compared_at_once

    manifest = nodes_entry(store)
    engine, _ = engine_of(recipe.index, manifest)
    built = {"prepared": manifest["stages"].get("prepare", {}).get("fingerprint"), **built_without(manifest)}
    built |= {"parts": SORTED_PARTS} if engine.ordered else {}
    groups: list[dict[str, int]] = []
    firsts: list[int] = []
    for shard in shards_of(store, manifest).with_nodes:
        if not groups or sum(groups[-1].values()) >= compared_at_once(node_count(manifest)):
            groups.append({})
            firsts.append(shard.first_node)
        groups[-1][shard.name] = shard.nodes
    return [
        index_task(recipe.index, engine, manifest, "codes", next(iter(nodes)), **built, nodes=nodes, first_node=first)
        for nodes, first in zip(groups, firsts, strict=True)
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    import torch

    from graphbuild.knn.codes import NOWHERE, Codes
    from graphbuild.knn.inputs import Inputs

    inputs, shards = Inputs(store), task.built["nodes"]
    parts = [_coded(store, name) for name in shards]
    with torch_threads(1), torch.inference_mode():
        engine = engine_of_task(task, inputs.manifest)
        described = engine.describe(inputs, Codes(*map(np.concatenate, zip(*parts, strict=True))), task.settings["k"])
    any_gone = bool(inputs.manifest.get("gone"))
    gone = gone_nodes(store, list(shards)) if any_gone else np.zeros(sum(shards.values()), bool)
    end = 0
    sums: list[Array] = []
    facts: Json = {"largest_rest": max(float(codes.scales[:, 1].max()) for codes in parts)}
    for name, codes in zip(shards, parts, strict=True):
        begin, end = end, end + len(codes.codes)
        sums.append(moments.moments_of(store.array(VECTORS.format(name))[~gone[begin:end]]))
        if not engine.ordered:
            codes.scales[gone[begin:end], 0] = NOWHERE
            arrays = {what: values[begin:end] for what, values in described.items()} | codes._asdict()
            arrays |= {"gone": gone[begin:end, None]} if any_gone else {}
            for what, values in arrays.items():
                writer.array(f"{SCRATCH}/{what}/{name}.npy", values, durable=False)
    writer.array(PARTS.format(task.name), np.sum(sums, axis=0), durable=False)
    if engine.ordered:
        facts["fan"] = described["leaves"].shape[1]
        facts["starts"] = _write_sorted(task, store, writer, described["leaves"], described["floors"], gone)
    return facts


def _write_sorted(task: Task, store: Store, writer: Writer, leaves: Array, floors: Array, gone: Array) -> list[int]:
    """Write the task's nodes as `member_rows`, by nearest leader, then id, a file a part of the leaders. Returns in
    which row each range of leaders begins."""
    from graphbuild.knn.leaders import parts_of_ranges, ranges_of_leaders

    order = np.argsort(leaves[:, 0], kind="stable")
    rows = np.empty(len(order), member_rows(leaves.shape[1], store.manifest()["embeddings"]["d"]))
    rows["id"] = task.built["first_node"] + order
    for what, values in {"leaves": leaves, "floor": floors[:, 0], "gone": gone}.items():
        rows[what] = values[order]
    places = np.split(np.argsort(order), np.cumsum(list(task.built["nodes"].values()))[:-1])
    for name, mine in zip(task.built["nodes"], places, strict=True):  # a shard's at a time: with all, codes fill 4 GB
        rows["vector"][mine] = store.array(VECTORS.format(name))
    starts: list[int] = np.searchsorted(leaves[order, 0], ranges_of_leaders(node_count(store.manifest()))).tolist()
    for part, (begin, end) in enumerate(pairwise(parts_of_ranges(len(starts) - 1))):
        with writer.file(SORTED.format(part, task.name), durable=False) as path:
            rows[starts[begin] : starts[end]].tofile(path)
    return starts


def member_rows(fan: int, d: int) -> np.dtype[np.void]:
    """The type of what is told of a node to stage order."""
    told = [("id", np.uint32), ("leaves", np.int32, (fan,)), ("floor", np.float32), ("gone", np.uint32)]
    return np.dtype([*told, ("vector", np.float16, (d,))])


def _coded(store: Store, name: str) -> Codes:
    """The codes of a shard's vectors; StageError where one has no direction."""
    from graphbuild.knn.codes import encode

    codes = encode(store.array(VECTORS.format(name)))
    none = codes.scales[:, 0] == 0
    if none.any():
        path, first = store.display(VECTORS.format(name)), int(none.argmax())
        raise StageError(
            f"{path}: row {first} is no vector, but zeros or NaN ({none.sum():,} such rows)",
            f"delete this file and run `graphbuild embed {store.url}`: it makes the file anew, without them",
        )
    return codes


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    return {"largest_rest": max(record["facts"]["largest_rest"] for record in done)}


STAGE = Stage(name="codes", title="codes", plan=plan, run=run, finish=finish, entries=("largest_rest",), scratch=True)
