"""Nodes to the k-nearest-neighbour graph: the stages join, merge, refine and search.

An engine (`graphbuild.knn.engine`) makes candidate lists of nodes in independent join tasks; merge unites each shard's;
refine looks at neighbours' neighbours where the engine has the nodes in the order of their leaders; search scores all
candidates again (float64 sums, rounded to float32), proves lists complete where the engine is exact, completes those
that are short or unproved by a second search, and writes graph/<shard>.neighbors.npy, .similarities.npy,
.background.npy and .sketch.npy. Files between the stages lie in _work/ until nobody reads them any more. Memory: codes
and lists of one join task's nodes (docs/explanation/scaling.md).
"""

from __future__ import annotations

import numpy as np

from graphbuild.graph import moments, sketch
from graphbuild.graph.grow import base_lists
from graphbuild.graph.tasks import (
    built_without,
    engine_of,
    engine_of_task,
    first_new_node,
    graph_fingerprint,
    index_task,
    list_tasks,
    living_nodes,
    nodes_entry,
    shard_tasks,
    vectors_of,
)
from graphbuild.knn import engine as engines
from graphbuild.knn.lists import EMPTY, merge_lists, unpack
from graphbuild.machine.threads import torch_threads
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.store import layout
from graphbuild.store.layout import BACKGROUND, BASIS, NEIGHBORS, SCRATCH, SIMILARITIES, SKETCH, VECTORS, shard_name
from graphbuild.store.shards import Shard, node_count
from graphbuild.store.store import Json, Store, Writer

# -- join: candidate lists, in tasks of the engine's making


def plan_join(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    engine, _ = engine_of(recipe.index, manifest)
    nodes = node_count(manifest)
    at_once = engines.nodes_at_once(engine, recipe.index, nodes, manifest["embeddings"]["d"])
    codes = manifest["stages"]["codes"]["fingerprint"]
    return [
        index_task(recipe.index, engine, manifest, "join", shard_name(number), codes=codes, argument=argument)
        for number, argument in enumerate(engine.joins(nodes, at_once, first_new_node(manifest)))
    ]


def run_join(task: Task, store: Store, writer: Writer) -> Json:
    import torch

    from graphbuild.knn.inputs import Inputs

    manifest = store.manifest()
    engine = engine_of_task(task, manifest)
    inputs = Inputs(store, ordered=engine.ordered, manifest=manifest)
    length = engine.length(task.settings["k"], node_count(inputs.manifest))
    with torch_threads(1), torch.inference_mode():
        ids, keys = engine.join(task.built["argument"], inputs, length, task.hints["device"])
    writer.array(f"{SCRATCH}/join/{task.name}.ids.npy", ids, durable=False)
    writer.array(f"{SCRATCH}/join/{task.name}.keys.npy", keys, durable=False)
    return {}


# -- merge: one list a node


def plan_merge(recipe: Recipe, store: Store) -> list[Task]:
    joined = nodes_entry(store)["stages"].get("join", {}).get("fingerprint")  # none where no node is new
    return list_tasks(recipe, store, "merge", {"joined": joined})


def run_merge(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.final import lists_of
    from graphbuild.knn.inputs import Inputs

    manifest = store.manifest()
    first, count = task.built["first_node"], task.built["nodes"]
    engine = engine_of_task(task, manifest)
    length = engine.length(task.settings["k"], node_count(manifest))
    if first < first_new_node(manifest):
        inputs = Inputs(store, ordered=engine.ordered, manifest=manifest)
        keys = base_lists(inputs, first, count, length, whole=engine.name == "exact")
    else:
        keys = np.full((count, length), EMPTY, np.int64)
    for ids, lists in lists_of(store, first, count):
        merge_lists(keys, ids, lists)
    writer.array(f"{SCRATCH}/merged/{task.name}.npy", keys, durable=False)
    return {}


# -- refine: of an engine that has the nodes in the order of their leaders, the lists of a block


def plan_refine(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    if not engine_of(recipe.index, manifest)[0].ordered:
        return []
    return list_tasks(recipe, store, "refine", {"merged": manifest["stages"]["merge"]["fingerprint"]})


def run_refine(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.final import exact_lists
    from graphbuild.knn.inputs import Inputs

    inputs = Inputs(store, ordered=True)
    first, count = task.built["first_node"], task.built["nodes"]
    keys, _ = exact_lists(inputs, task.settings["engine"], first, count, task.settings["k"])
    places = unpack(keys)[1]
    keys += places - inputs.ids(places)
    ties = (keys[:, 1:] > keys[:, :-1]).any(axis=1)  # of equal similarities the smaller id comes first, as everywhere
    keys[ties] = np.sort(keys[ties], axis=1)[:, ::-1]
    writer.array(f"{SCRATCH}/refined/{task.name}.npy", keys, durable=False)
    return {}


# -- search: the graph


def plan_search(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    vectors, without = vectors_of(store, manifest), built_without(manifest)

    def built(shard: Shard) -> Json:
        of_shard = vectors.get(VECTORS.format(shard.name))
        return {"first_node": shard.first_node, "nodes": shard.nodes, "vectors": of_shard, **without}

    return shard_tasks(recipe, store, "search", built)


def run_search(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.final import exact_lists
    from graphbuild.knn.inputs import Inputs
    from graphbuild.knn.products import unit

    inputs = Inputs(store)
    engine = engine_of_task(task, inputs.manifest)
    first, count, k = task.built["first_node"], task.built["nodes"], task.settings["k"]
    vectors = inputs.vectors
    if engine.ordered:
        ordered = Inputs(store, ordered=True, manifest=inputs.manifest)
        keys, searched_again = ordered.of("refined").take(ordered.places(np.arange(first, first + count))), 0
    else:
        keys, searched_again = exact_lists(inputs, engine.name, first, count, k)
    similarities, neighbors = unpack(keys)
    with torch_threads(1):
        x = unit(vectors.span(first, count))
    living = living_nodes(inputs.manifest)
    background = moments.background_of(x, similarities, store.array(layout.MOMENTS), living)
    writer.array(NEIGHBORS.format(task.name), neighbors.astype(np.uint32))
    writer.array(SIMILARITIES.format(task.name), similarities.astype(np.float16))
    writer.array(BACKGROUND.format(task.name), background)
    writer.array(SKETCH.format(task.name), sketch.pack(x.numpy(), store.array(BASIS)))
    return {"counts": {"nodes": count, "edges": count * k}, "searched_again": searched_again}


def finish_search(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    manifest = store.manifest()
    engine, reason = engine_of(recipe.index, manifest)
    prepared = records(store, "prepare").get("all", {}).get("facts", {})
    entry = {
        "k": recipe.index.neighbors(node_count(manifest)),
        "engine": engine.name,
        "reason": reason,
        **prepared,
        "fingerprint": graph_fingerprint(done),
    }
    kept = first_new_node(manifest)
    return {"graph": entry | ({"kept_nodes": kept} if kept else {})}


JOIN = Stage(name="join", title="join", plan=plan_join, run=run_join, scratch=True, on_device=True)
MERGE = Stage(name="merge", title="merge", plan=plan_merge, run=run_merge, scratch=True)
REFINE = Stage(name="refine", title="refine", plan=plan_refine, run=run_refine, scratch=True)
SEARCH = Stage(
    name="search", title="search", plan=plan_search, run=run_search, finish=finish_search, entries=("graph",)
)
