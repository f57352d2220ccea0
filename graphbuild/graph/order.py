"""Stage order: where engine partition has the nodes, each behind those that have the same or a near leader.

Joins, merge and refine then read near rows for near nodes: at random over all, each look at another node costs a page.
A node's place is its rank by nearest leader, then id; of a graph that grows old nodes come first. One task a range of
leaders takes its nodes from where codes has sorted them, and codes their vectors; one writes where each node is.
Memory: a range's vectors, twice, and codes. Scratch: 3 d + 24 bytes a node, and 4 for each of its leaders.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from graphbuild.graph.tasks import engine_of, first_new_node, index_task, nodes_entry
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, finished_tasks, records
from graphbuild.store.layout import SORTED, shard_name
from graphbuild.store.sharded import Array
from graphbuild.store.shards import node_count
from graphbuild.store.store import Json, Store, Writer


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    engine, _ = engine_of(recipe.index, manifest)
    done = records(store, "codes")
    if not engine.ordered or any("starts" not in record["facts"] for record in done.values()):
        return []
    firsts = np.array([record["built"]["first_node"] for record in done.values()] + [node_count(manifest)])
    starts = np.array([record["facts"]["starts"] for record in done.values()], np.int32)  # [codes tasks, ranges + 1]
    built, parts = {"codes": manifest["stages"]["codes"]["fingerprint"]}, list[Task]()
    for begin, end, first, stop in _ranges(starts.shape[1] - 1, first_new_node(manifest), node_count(manifest)):
        task = index_task(
            recipe.index, engine, manifest, "order", shard_name(len(parts)), **built, range=[begin, end, first, stop]
        )
        some = slice(np.searchsorted(firsts, first, side="right") - 1, np.searchsorted(firsts, stop))
        pieces = {"names": list(done)[some], "begins": starts[some, begin], "ends": starts[some, end]}
        parts.append(replace(task, hints={**task.hints, **pieces}))
    whole = index_task(recipe.index, engine, manifest, "order", "all", **built, ranges=len(parts))
    return [*parts, whole] if all(map(finished_tasks(store, "order"), parts)) else parts


def _ranges(ranges: int, new: int, nodes: int) -> list[tuple[int, int, int, int]]:
    """Ranges of leaders (first, end) and nodes (first, end) of each task: of old nodes, then of new, which are fewer.
    new: the first new node."""
    return [
        (at, min(at + width, ranges), begin, end)
        for begin, end in ((0, new), (new, nodes))
        if begin < end
        for width in (nodes // (end - begin),)
        for at in range(0, ranges, width)
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.codes import NOWHERE, encode
    from graphbuild.knn.inputs import IDS, ORDERED, PLACES, STARTS

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
    members, vectors = (_pieces(task, store, what) for what in ("members", "vectors"))
    _, _, first, stop = task.built["range"]
    ids = members[:, 0].view(np.uint32)
    mine = np.flatnonzero((ids >= first) & (ids < stop))
    mine = mine[np.argsort(members[mine, 1], kind="stable")]  # tasks of codes follow each other by id
    vectors, members = vectors[mine], members[mine]
    codes = encode(vectors)
    arrays = {"ids": ids[mine], "vectors": vectors, **codes._asdict()}
    arrays |= {"leaves": members[:, 1:-2], "floors": members[:, -2:-1].view(np.float32)}
    if store.manifest().get("gone"):
        arrays["gone"] = members[:, -1:].astype(bool)
        codes.scales[arrays["gone"][:, 0], 0] = NOWHERE
    for what, values in arrays.items():
        writer.array(ORDERED.format(what, task.name), values, durable=False)
    return {"counts": {"nodes": len(mine)}}


def _pieces(task: Task, store: Store, what: str) -> Array:
    """What codes has sorted of the nodes of a range of leaders."""
    names, begins, ends = (task.hints[part] for part in ("names", "begins", "ends"))
    return store.rows_of([SORTED.format(what, name) for name in names], begins.tolist(), ends.tolist())


STAGE = Stage(name="order", title="order", plan=plan, run=run, scratch=True, grows=True)
