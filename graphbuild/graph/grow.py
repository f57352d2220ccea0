"""Stage base: the lists of a finished graph to which nodes were added, so that only pairs with a new one are joined.

Old nodes keep numbers, vectors and lists; joins then compare new nodes with all, and merge offers what they find to the
old lists. Where tars are gone search takes their nodes out of the lists and completes these, if few are gone. For the
engines exact and partition, where k and the old vectors are as they were. From an exact graph comes an exact graph,
byte for byte that of a build from nothing; recall is certified on the whole either way. One task an old shard, which
keeps its lists in scratch: the search stage removes the old files. Memory: a shard's lists.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import numpy as np

from graphbuild.graph.tasks import graph_fingerprint, living_nodes, nodes_entry, shard_tasks, vectors_of
from graphbuild.knn.lists import EMPTY, pack
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.store.layout import NEIGHBORS, SCRATCH, SIMILARITIES, VECTORS
from graphbuild.store.sharded import Array, ShardedArray
from graphbuild.store.shards import Shard, node_count
from graphbuild.store.store import Json, Store, Writer

if TYPE_CHECKING:
    from graphbuild.knn.inputs import Inputs

OLD_NEIGHBORS, OLD_SIMILARITIES = f"{SCRATCH}/base/{{}}.neighbors.npy", f"{SCRATCH}/base/{{}}.similarities.npy"
MOST_GONE = 0.03  # of all nodes: of more the lists are made anew
FIRST = 4.0  # added to the similarities of lists that must stay whole: more than any similarity


def plan(recipe: Recipe, store: Store) -> list[Task]:
    """A task a shard of the old graph; none where there is no graph that can be added to."""
    manifest = nodes_entry(store)
    begun = list(records(store, "base").values())
    vectors = vectors_of(store, manifest)

    def built(shard: Shard) -> Json:
        return {"vectors": vectors.get(VECTORS.format(shard.name)), "nodes": shard.nodes}

    tasks = shard_tasks(recipe, store, "base", built)
    known = {(record["task"], record["fingerprint"]) for record in begun}
    kept = [task for task in tasks if (task.name, task.fingerprint) in known]
    if begun and len(kept) == len(begun):  # the search may have removed the old graph since
        return kept
    old = records(store, "search")
    kept = [task for task in tasks if task.name in old]
    finished = manifest.get("graph", {}).get("fingerprint") == graph_fingerprint(list(old.values()))
    whole = finished and kept == tasks[: len(kept)] and len(kept) == len(old)
    lost = any(record["built"].get("gone") != manifest.get("gone") for record in old.values())
    few = node_count(manifest) - living_nodes(manifest) <= MOST_GONE * node_count(manifest)
    if not whole or not (lost or len(old) < len(tasks)) or (lost and not few):
        return []
    files = store.sizes("graph")
    return kept if all(_still_holds(task, old[task.name], files) for task in kept) else []


def _still_holds(task: Task, old: Json, files: Container[str]) -> bool:
    """Whether a shard's lists are there, of the same vectors and k, and good enough for the engine."""
    same = old["settings"] == task.settings or (old["settings"]["engine"], old["settings"]["k"]) == (
        "exact",
        task.settings["k"],
    )
    there = all(output["path"] in files for output in old["outputs"])
    engine = task.settings["engine"]
    vectors = task.built["vectors"]
    return same and there and not engine.startswith("faiss:") and old["built"].get("vectors") == vectors is not None


def run(task: Task, store: Store, writer: Writer) -> Json:
    neighbors = store.array(NEIGHBORS.format(task.name))
    writer.array(OLD_NEIGHBORS.format(task.name), neighbors, durable=False)
    writer.array(OLD_SIMILARITIES.format(task.name), store.array(SIMILARITIES.format(task.name)), durable=False)
    return {"counts": {"nodes": len(neighbors)}}


def base_lists(inputs: Inputs, first: int, count: int, length: int, *, whole: bool) -> Array:
    """Old lists as candidates, keys int64 [count, length], by similarity over the row's scale, as joins score.

    whole: before all others, so that none of an exact list falls out.
    """
    old = records(inputs.store, "base")
    lengths = [record["facts"]["counts"]["nodes"] for record in old.values()]
    ids, scales = inputs.ids(np.arange(first, first + count)), inputs.of("scales").span(first, count)
    neighbors, similarities = (
        ShardedArray(inputs.store, list(old), lengths, what).take(ids) for what in (OLD_NEIGHBORS, OLD_SIMILARITIES)
    )
    neighbors, similarities = inputs.places(neighbors), similarities.astype(np.float32)
    keys = np.full((len(neighbors), length), EMPTY, np.int64)
    keys[:, : neighbors.shape[1]] = pack((similarities + FIRST * whole) / scales[:, :1], neighbors)
    keys[:, ::-1].sort(axis=1)
    return keys


STAGE = Stage(name="base", title="old lists", plan=plan, run=run, scratch=True)
