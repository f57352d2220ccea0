"""Stage order: where engine partition has the nodes, each behind those that have the same or a near leader.

Joins, merge and refine then read near rows for near nodes: at random over all, each look at another node costs a page.
A node's place is its rank by nearest leader, then id; of a graph that grows old nodes come first. One task a range of
leaders copies its nodes' vectors, codes them, and one writes where each node is. Memory: a range's vectors and codes.
Scratch: 3 d + 24 bytes a node, and 4 for each of its leaders.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from graphbuild.graph.tasks import engine_of, first_new_node, index_task, nodes_entry
from graphbuild.knn import engine as engines
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, finished_tasks
from graphbuild.store.layout import shard_name
from graphbuild.store.sharded import Array, ShardedArray
from graphbuild.store.shards import node_count
from graphbuild.store.store import Json, Store, Writer

BLOCK_ROWS = 65_536


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    engine, _ = engine_of(recipe.index, manifest)
    if not engine.ordered:
        return []
    codes, ranges = manifest["stages"]["codes"]["fingerprint"], _ranges(recipe, engine, manifest)
    parts = [
        index_task(recipe.index, engine, manifest, "order", shard_name(number), codes=codes, range=some)
        for number, some in enumerate(ranges)
    ]
    whole = index_task(recipe.index, engine, manifest, "order", "all", codes=codes, ranges=len(parts))
    return [*parts, whole] if all(map(finished_tasks(store, "order"), parts)) else parts


def _ranges(recipe: Recipe, engine: engines.Engine, manifest: Json) -> list[list[int]]:
    """Leaders (first, end) and nodes (first, end) of each task: of the old nodes, then of the new, which are fewer."""
    nodes, new = node_count(manifest), first_new_node(manifest)
    joins = engine.joins(nodes, engines.nodes_at_once(engine, recipe.index, nodes, manifest["embeddings"]["d"]))
    return [
        [joins[at][0], joins[min(at + width, len(joins)) - 1][1], begin, end]
        for begin, end in ((0, new), (new, nodes))
        if begin < end
        for width in (nodes // (end - begin),)
        for at in range(0, len(joins), width)
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.codes import NOWHERE, encode
    from graphbuild.knn.inputs import IDS, ORDERED, PLACES, STARTS, Inputs

    inputs = Inputs(store)
    if "ranges" in task.built:
        files = [store.array(ORDERED.format("ids", shard_name(number))) for number in range(task.built["ranges"])]
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in files])])
        for name in (IDS, PLACES):
            with writer.file(name, durable=False) as path:
                values = np.lib.format.open_memmap(path, "w+", np.uint32, (int(starts[-1]),))
                for ids, (begin, end) in zip(files, pairwise(starts), strict=True):
                    if name == IDS:
                        values[begin:end] = ids
                    else:
                        values[ids] = np.arange(begin, end)
                values.flush()
        writer.array(STARTS, starts, durable=False)
        return {}
    ids = _members(inputs.of("leaves"), *task.built["range"])
    vectors = inputs.vectors.take(ids)
    codes = encode(vectors)
    arrays = {"ids": ids.astype(np.uint32), "vectors": vectors, **codes._asdict()}
    arrays |= {what: inputs.of(what).take(ids) for what in ("leaves", "floors")}
    if inputs.manifest.get("gone"):
        arrays["gone"] = inputs.of("gone").take(ids)
        codes.scales[arrays["gone"][:, 0], 0] = NOWHERE
    for what, values in arrays.items():
        writer.array(ORDERED.format(what, task.name), values, durable=False)
    return {"counts": {"nodes": len(ids)}}


def _members(leaves: ShardedArray, first: int, end: int, begin: int, stop: int) -> Array:
    """Which of nodes begin..stop-1 have their nearest leader in first..end-1: ids int64 [m], by leader, then id."""
    shards = range(*np.searchsorted(leaves.starts, [begin, stop]).tolist())
    ids, nearest = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start, block in leaves.blocks(BLOCK_ROWS, shards):
        here = np.flatnonzero((block[:, 0] >= first) & (block[:, 0] < end))
        ids.append(start + here)
        nearest.append(block[here, 0])
    order = np.argsort(np.concatenate(nearest), kind="stable")
    return np.concatenate(ids)[order]


STAGE = Stage(name="order", title="order", plan=plan, run=run, scratch=True, grows=True)
