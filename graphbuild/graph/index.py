"""Nodes to the k-nearest-neighbour graph: the stages base, prepare, codes, moments, join, merge and search.

An engine (`graphbuild.knn.engine`) makes candidate lists of nodes in independent join tasks; merge unites each shard's;
search looks at neighbours' neighbours where the engine is approximate, scores all candidates again (float64 sums,
rounded to float32), proves lists complete where it is exact, completes those that are short or unproved by a second
search, and writes graph/<shard>.neighbors.npy, .similarities.npy, .background.npy and .sketch.npy. Files between the
stages lie in _work/ and are removed when the graph is whole. Memory: codes and lists of one join task's nodes
(docs/explanation/scaling.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from graphbuild.errors import ConfigError, QualityError, StageError
from graphbuild.graph import grow, moments, sketch
from graphbuild.graph.certify import floor_of
from graphbuild.graph.grow import base_lists
from graphbuild.graph.tasks import (
    built_without,
    engine_of,
    first_new_node,
    forecast,
    gone_nodes,
    graph_fingerprint,
    index_task,
    list_tasks,
    living_nodes,
    nodes_entry,
    ranges_of,
    shard_tasks,
    vectors_of,
)
from graphbuild.knn import engine as engines
from graphbuild.knn.lists import EMPTY, LARGEST_ID, merge_lists, unpack
from graphbuild.machine.threads import torch_threads
from graphbuild.nodes.captions import read_class_names
from graphbuild.recipe import Index, Recipe
from graphbuild.runner.stage import Stage, Task, finished_tasks, records
from graphbuild.store import layout
from graphbuild.store.files import is_there
from graphbuild.store.layout import (
    BACKGROUND,
    BASIS,
    NEIGHBORS,
    PARTS,
    SCRATCH,
    SIMILARITIES,
    SKETCH,
    VECTORS,
    shard_name,
)
from graphbuild.store.mapped import check_mappings
from graphbuild.store.shards import Shard, node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

if TYPE_CHECKING:
    from graphbuild.knn.codes import Codes


def _engine(task: Task, manifest: Json) -> engines.Engine:
    return engine_of(Index.model_validate({**task.hints["index"], "engine": task.settings["engine"]}), manifest)[0]


# -- prepare: what needs all nodes at once


def check_k(recipe: Recipe) -> None:
    """ConfigError before anything is embedded, where class names say that there are too few nodes for k."""
    path, k = recipe.embed.class_names, recipe.index.k
    if k is not None and path is not None and is_there(path) and k >= (nodes := len(read_class_names(path))):
        raise ConfigError(
            f"--k {k}: {path} names {nodes:,} classes, so a node has {nodes - 1:,} possible neighbours",
            "use --k 0: all others",
        )


def plan_prepare(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    nodes, living = node_count(manifest), living_nodes(manifest)
    if not 0 < (k := recipe.index.neighbors(nodes)) < living:
        nodes = living
        raise ConfigError(
            f"--k {k}: the store has {nodes:,} nodes, so a node has {nodes - 1:,} possible neighbours",
            f"use --k {max(nodes - 1, 1)} or fewer" if nodes > 1 else "give at least two different captions",
        )
    if nodes > LARGEST_ID:
        raise ConfigError(
            f"{store.url} has {nodes:,} nodes, and a graph holds {LARGEST_ID:,} at most",
            "divide the captions among several stores",
        )
    engine, _ = engine_of(recipe.index, manifest)
    shards = shards_of(store, manifest).with_nodes
    check_mappings(engine.mapped_files * len(shards))
    whole, ranges = index_task(recipe.index, engine, manifest, "prepare", "all"), ranges_of(shards)
    if engine.name != "partition" or len(ranges) == 1:
        return [whole]
    parts = [
        index_task(recipe.index, engine, manifest, "prepare", shard_name(number), shards=some)
        for number, some in enumerate(ranges)
    ]
    return [*parts, whole] if all(map(finished_tasks(store, "prepare"), parts)) else parts


def run_prepare(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.inputs import Inputs, write_range
    from graphbuild.knn.partition import DEEP

    inputs = Inputs(store)
    if "shards" in task.built:
        some, seed = range(*task.built["shards"]), task.settings["seed"]
        with torch_threads(1):
            deep = min(DEEP * task.settings["k"], node_count(inputs.manifest) - 1)
            write_range(inputs, some, seed, deep, task.name, writer)
        return {}
    with torch_threads(os.cpu_count() or 1):  # nothing else runs
        return _engine(task, inputs.manifest).prepare(inputs, task.settings["k"], writer)


def finish_prepare(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    """How many candidates a list holds, where the engine has found that out (`engine_of`).

    ConfigError where --memory is too little for such lists; QualityError where the engine promises less than the floor,
    before hours go into a graph that would miss it.
    """
    facts = done[-1]["facts"]
    found = {"listed": facts["listed"]} if "listed" in facts else {}
    manifest = nodes_entry(store) | found
    engine, _ = engine_of(recipe.index, manifest)
    engines.nodes_at_once(engine, recipe.index, node_count(manifest), manifest["embeddings"]["d"])
    promised, floor = facts.get("promised_recall", 1.0), floor_of(recipe, engine.name)
    if promised < floor:
        raise QualityError(
            f"{store.url}: engine {engine.name} promises a recall of {promised:.3f} for these vectors, under the floor "
            f"of {floor}: the near neighbours of a node are spread over too many groups of nodes",
            "use --engine exact, or a FAISS index (--engine faiss:FACTORY); or lower --min-recall, only if that "
            "recall, or even less, is good enough for you",
        )
    return found


# -- codes: int8 codes of nodes, a shard's or in large stores those of several, and the sums that moments are made of


def plan_codes(recipe: Recipe, store: Store) -> list[Task]:
    from graphbuild.knn.leaders import compared_at_once

    manifest = nodes_entry(store)
    engine, _ = engine_of(recipe.index, manifest)
    built = {"prepared": manifest["stages"].get("prepare", {}).get("fingerprint"), **built_without(manifest)}
    groups: list[dict[str, int]] = []
    for shard in shards_of(store, manifest).with_nodes:
        if not groups or sum(groups[-1].values()) >= compared_at_once(node_count(manifest)):
            groups.append({})
        groups[-1][shard.name] = shard.nodes
    return [
        index_task(recipe.index, engine, manifest, "codes", next(iter(nodes)), **built, nodes=nodes) for nodes in groups
    ]


def run_codes(task: Task, store: Store, writer: Writer) -> Json:
    import torch

    from graphbuild.knn.codes import NOWHERE, Codes
    from graphbuild.knn.inputs import Inputs

    inputs, shards = Inputs(store), task.built["nodes"]
    parts = [_coded(store, name) for name in shards]
    with torch_threads(1), torch.inference_mode():
        engine = _engine(task, inputs.manifest)
        described = engine.describe(inputs, Codes(*map(np.concatenate, zip(*parts, strict=True))), task.settings["k"])
    end, any_gone = 0, inputs.manifest.get("gone")
    for name, codes in zip(shards, parts, strict=True):
        begin, end = end, end + len(codes.codes)
        arrays = {what: values[begin:end] for what, values in described.items()}
        gone = gone_nodes(store, [name]) if any_gone else np.zeros(len(codes.codes), bool)
        codes.scales[gone, 0] = NOWHERE
        if any_gone:
            arrays["gone"] = gone[:, None]
        if not engine.ordered:  # else made anew, with its vectors, where a node has its place
            arrays |= {"codes": codes.codes, "scales": codes.scales}
        for what, values in arrays.items():
            writer.array(f"{SCRATCH}/{what}/{name}.npy", values, durable=False)
        raw = store.array(VECTORS.format(name))
        writer.array(PARTS.format(name), moments.moments_of(raw[~gone]), durable=False)
    return {"largest_rest": max(float(codes.scales[:, 1].max()) for codes in parts)}


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


def finish_codes(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    return {"largest_rest": max(record["facts"]["largest_rest"] for record in done)}


# -- moments: of all embeddings


def plan_moments(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    built = {"embeddings": manifest["embeddings"]["fingerprint"], **built_without(manifest)}
    return [Task(stage="moments", name="all", built=built)]


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
    engine = _engine(task, manifest)
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
    engine = _engine(task, manifest)
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
    engine = _engine(task, inputs.manifest)
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


BASE = Stage(name="base", title="old lists", plan=grow.plan, run=grow.run, scratch=True)
PREPARE = Stage(
    name="prepare",
    title="prepare",
    plan=plan_prepare,
    run=run_prepare,
    finish=finish_prepare,
    entries=("listed",),
    scratch=True,
    grows=True,
    note=forecast,
    check=check_k,
)
CODES = Stage(
    name="codes",
    title="codes",
    plan=plan_codes,
    run=run_codes,
    finish=finish_codes,
    entries=("largest_rest",),
    scratch=True,
)
MOMENTS = Stage(name="moments", title="moments", plan=plan_moments, run=moments.run)
JOIN = Stage(name="join", title="join", plan=plan_join, run=run_join, scratch=True, on_device=True)
MERGE = Stage(name="merge", title="merge", plan=plan_merge, run=run_merge, scratch=True)
REFINE = Stage(name="refine", title="refine", plan=plan_refine, run=run_refine, scratch=True)
SEARCH = Stage(
    name="search", title="search", plan=plan_search, run=run_search, finish=finish_search, entries=("graph",)
)
