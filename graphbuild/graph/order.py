"""Stage order: where engine partition has the nodes, each behind those that have the same or a near leader.

Joins, merge and refine then read near rows for near nodes: at random over all, each look at another node costs a page.
A node's place is its rank by nearest leader, then id; of a graph that grows old nodes come first. One task a range of
leaders takes its nodes from where codes has sorted them, and codes their vectors; one writes where each node is. What
is sorted of a part of the leaders goes when the tasks of its ranges are done: they come before those of the next part.
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
    from graphbuild.knn.leaders import parts_of_ranges

    manifest = nodes_entry(store)
    engine, _ = engine_of(recipe.index, manifest)
    done = records(store, "codes")
    if not engine.ordered or any("starts" not in record["facts"] for record in done.values()):
        return []
    firsts = np.array([record["built"]["first_node"] for record in done.values()] + [node_count(manifest)])
    starts = np.array([record["facts"]["starts"] for record in done.values()])  # int64 [codes tasks, ranges + 1]
    parts = parts_of_ranges(starts.shape[1] - 1)
    fan = next(iter(done.values()))["facts"]["fan"]
    built, tasks = {"codes": manifest["stages"]["codes"]["fingerprint"]}, list[Task]()
    ranges = enumerate(_ranges(parts, first_new_node(manifest), node_count(manifest)))
    for number, (part, begin, end, first, stop) in sorted(ranges, key=lambda one: one[1][0]):
        task = index_task(
            recipe.index, engine, manifest, "order", shard_name(number), **built, range=[begin, end, first, stop]
        )
        some = slice(np.searchsorted(firsts, first, side="right") - 1, np.searchsorted(firsts, stop))
        files = [SORTED.format(part, name) for name in list(done)[some]]
        rows = starts[some][:, [begin, end]] - starts[some][:, [parts[part]]]
        frees = [SORTED.format(part, "").rpartition("/")[0]]
        tasks.append(replace(task, hints={**task.hints, "files": files, "rows": rows, "fan": fan}, frees=frees))
    whole = index_task(recipe.index, engine, manifest, "order", "all", **built, ranges=len(tasks))
    return [*tasks, whole] if all(map(finished_tasks(store, "order"), tasks)) else tasks


def _ranges(parts: list[int], new: int, nodes: int) -> list[tuple[int, int, int, int, int]]:
    """Of each task the part of the leaders, its ranges of leaders (first, end), and nodes (first, end): of old nodes,
    then of new, which are fewer. new: the first new node."""
    return [
        (part, at, min(at + width, stop), begin, end)
        for begin, end in ((0, new), (new, nodes))
        if begin < end
        for width in (nodes // (end - begin),)
        for part, (start, stop) in enumerate(pairwise(parts))
        for at in range(start, stop, width)
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
    rows = _sorted(task, store)
    vectors = np.ascontiguousarray(rows["vector"])
    codes = encode(vectors)
    arrays = {"ids": rows["id"], "vectors": vectors, **codes._asdict()}
    arrays |= {"leaves": rows["leaves"], "floors": rows["floor"][:, None]}
    if store.manifest().get("gone"):
        arrays["gone"] = rows["gone"][:, None].astype(bool)
        codes.scales[arrays["gone"][:, 0], 0] = NOWHERE
    for what, values in arrays.items():
        writer.array(ORDERED.format(what, task.name), values, durable=False)
    return {"counts": {"nodes": len(rows)}}


def _sorted(task: Task, store: Store) -> Array:
    """The `member_rows` of a range of leaders and of nodes, in order: of each task of codes a request."""
    from graphbuild.graph.codes import member_rows

    row = member_rows(task.hints["fan"], store.manifest()["embeddings"]["d"])
    bytes_of = task.hints["rows"] * row.itemsize
    some = np.flatnonzero(bytes_of[:, 0] < bytes_of[:, 1])
    pieces = store.ranges([task.hints["files"][file] for file in some], *bytes_of[some].T.tolist()) if len(some) else []
    rows = np.concatenate([np.empty(0, row), *(np.frombuffer(piece, row) for piece in pieces)])
    del pieces
    _, _, first, stop = task.built["range"]
    mine = np.flatnonzero((rows["id"] >= first) & (rows["id"] < stop))
    order = np.argsort(rows["leaves"][mine, 0], kind="stable")  # tasks of codes follow each other by id
    return rows[mine[order]]


STAGE = Stage(name="order", title="order", plan=plan, run=run, scratch=True, grows=True, frees=True)
