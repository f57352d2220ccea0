"""Stage codes: int8 codes of nodes, which leaders they are nearest to, and the sums that moments are made of.

A task has the nodes of a shard, or in large stores those of several (`compared_at_once`): the more nodes are compared
with a group of leaders at once, the less each costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphbuild.errors import StageError
from graphbuild.graph import moments
from graphbuild.graph.tasks import built_without, engine_of, engine_of_task, gone_nodes, index_task, nodes_entry
from graphbuild.machine.threads import torch_threads
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.layout import PARTS, SCRATCH, VECTORS
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

if TYPE_CHECKING:
    from graphbuild.knn.codes import Codes


def plan(recipe: Recipe, store: Store) -> list[Task]:
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


def run(task: Task, store: Store, writer: Writer) -> Json:
    import torch

    from graphbuild.knn.codes import NOWHERE, Codes
    from graphbuild.knn.inputs import Inputs

    inputs, shards = Inputs(store), task.built["nodes"]
    parts = [_coded(store, name) for name in shards]
    with torch_threads(1), torch.inference_mode():
        engine = engine_of_task(task, inputs.manifest)
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


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    return {"largest_rest": max(record["facts"]["largest_rest"] for record in done)}


STAGE = Stage(name="codes", title="codes", plan=plan, run=run, finish=finish, entries=("largest_rest",), scratch=True)
