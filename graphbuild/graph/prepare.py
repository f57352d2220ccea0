"""Stage prepare: what an index needs all nodes for at once, found from a sample before the long stages begin.

The engine draws its leaders, and how much work the recall asked for takes. Large stores are read in ranges of shards, a
task each, of which the last task unites what they found. The build stops here where the engine promises too little.
"""

from __future__ import annotations

import os

from graphbuild.errors import ConfigError, QualityError
from graphbuild.graph.certify import floor_of
from graphbuild.graph.tasks import (
    engine_of,
    engine_of_task,
    forecast,
    index_task,
    living_nodes,
    nodes_entry,
    ranges_of,
)
from graphbuild.knn import engine as engines
from graphbuild.knn.lists import LARGEST_ID
from graphbuild.machine.threads import torch_threads
from graphbuild.nodes.captions import read_class_names
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, finished_tasks
from graphbuild.store.files import is_there
from graphbuild.store.layout import shard_name
from graphbuild.store.mapped import check_mappings
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer


def check_k(recipe: Recipe) -> None:
    """ConfigError before anything is embedded, where class names say that there are too few nodes for k."""
    path, k = recipe.embed.class_names, recipe.index.k
    if k is not None and path is not None and is_there(path) and k >= (nodes := len(read_class_names(path))):
        raise ConfigError(
            f"--k {k}: {path} names {nodes:,} classes, so a node has {nodes - 1:,} possible neighbours",
            "use --k 0: all others",
        )


def plan(recipe: Recipe, store: Store) -> list[Task]:
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


def run(task: Task, store: Store, writer: Writer) -> Json:
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
        return engine_of_task(task, inputs.manifest).prepare(inputs, task.settings["k"], writer)


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
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


STAGE = Stage(
    name="prepare",
    title="prepare",
    plan=plan,
    run=run,
    finish=finish,
    entries=("listed",),
    scratch=True,
    grows=True,
    note=forecast,
    check=check_k,
)
