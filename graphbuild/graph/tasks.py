"""What the stages of the index share: the engine that was chosen, their tasks, and what names a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from graphbuild.errors import ConfigError, QualityError
from graphbuild.knn import engine
from graphbuild.knn.engine import Engine
from graphbuild.nodes.matrix import is_matrix
from graphbuild.nodes.samples import READY
from graphbuild.recipe import Index, Recipe
from graphbuild.runner.stage import Task, digest, outputs, records
from graphbuild.store.layout import TEXTS, shard_name
from graphbuild.store.sharded import Array
from graphbuild.store.shards import Shard, Shards, node_count, shards_of
from graphbuild.store.store import Json, Store

PART_NODES, PARTS = 2**18, 256  # of a range of shards, about; at most so many ranges


def nodes_entry(store: Store) -> Json:
    """The manifest, once embeddings are finished; ConfigError before that, QualityError where they failed fidelity."""
    manifest = store.manifest()
    done = manifest["stages"].keys()
    of_samples = {"encode", "assign"} <= done and (
        "fidelity" in done or is_matrix(encoder := manifest["embeddings"]["encoder"]) or encoder == READY
    )
    if "vectors" not in done and not of_samples:
        if failed := records(store, "fidelity", "failed").get("all"):
            raise QualityError(f"{store.url}: {failed['cause']}", failed["fix"])
        raise ConfigError(
            f"{store.url}: `graphbuild embed` is not finished", f"run `graphbuild embed {store.url}` first"
        )
    return manifest


def engine_of(index: Index, manifest: Json) -> tuple[Engine, str]:
    """The engine of this build, as it was prepared, and why it was taken."""
    return engine.choose(index, node_count(manifest), manifest["embeddings"]["d"], manifest.get("listed"))


def engine_of_task(task: Task, manifest: Json) -> Engine:
    """The engine whose settings a task has."""
    return engine_of(Index.model_validate({**task.hints["index"], "engine": task.settings["engine"]}), manifest)[0]


def forecast(recipe: Recipe, store: Store) -> str:
    """The engine, why it was taken, and what memory and scratch the build will take."""
    manifest = nodes_entry(store)
    old = first_new_node(manifest)
    return engine.forecast(recipe.index, node_count(manifest), manifest["embeddings"]["d"], old)


def index_task(index: Index, chosen: Engine, manifest: Json, stage: str, name: str, **built: Any) -> Task:
    """A task of these stages: its settings are k and the engine's."""
    return Task(
        stage=stage,
        name=name,
        settings={"k": index.neighbors(node_count(manifest)), "engine": chosen.name, **chosen.settings()},
        built={"embeddings": manifest["embeddings"]["fingerprint"], **built},
        hints={"device": index.device if chosen.on_device else "cpu", "index": index.model_dump()},
    )


def shard_tasks(recipe: Recipe, store: Store, stage: str, built: Callable[[Shard], Json]) -> list[Task]:
    """A task of these stages for each shard with nodes; built: what it is made from."""
    manifest = nodes_entry(store)
    chosen, _ = engine_of(recipe.index, manifest)
    return [
        index_task(recipe.index, chosen, manifest, stage, shard.name, **built(shard))
        for shard in shards_of(store, manifest).with_nodes
    ]


def list_tasks(recipe: Recipe, store: Store, stage: str, built: Json) -> list[Task]:
    """A task for each shard's lists, or each block's of an engine that has the nodes in the order of their leaders."""
    manifest = nodes_entry(store)
    chosen, _ = engine_of(recipe.index, manifest)
    if chosen.ordered:
        from graphbuild.knn.leaders import blocks_of

        bounds = blocks_of(node_count(manifest), first_new_node(manifest))
        blocks = [(shard_name(number), first, end - first) for number, (first, end) in enumerate(pairwise(bounds))]
    else:
        blocks = [(s.name, s.first_node, s.nodes) for s in shards_of(store, manifest).with_nodes]
    return [
        index_task(recipe.index, chosen, manifest, stage, name, first_node=first, nodes=count, **built)
        for name, first, count in blocks
    ]


def built_without(manifest: Json) -> Json:
    """What a task is made from, where tars are gone: a list holds none of the nodes that no sample has any more."""
    return {"gone": manifest["gone"]} if manifest.get("gone") else {}


def gone_nodes(store: Store, names: Iterable[str]) -> Array:
    """bool [n]: which of these shards' nodes no sample has any more."""
    parts = [store.table(TEXTS.format(name), ["samples"])["samples"].to_numpy() == 0 for name in names]
    return np.concatenate(parts)


def living_nodes(manifest: Json) -> int:
    """Nodes that a sample has."""
    return node_count(manifest) - int(manifest["stages"].get("assign", {}).get("counts", {}).get("gone_nodes", 0))


def graph_fingerprint(searches: list[Json]) -> str:
    """What names a graph: the digest of all files of the search stage."""
    return digest(sorted(o["path"] + o["sha256"] for record in searches for o in record["outputs"]))


def first_new_node(manifest: Json) -> int:
    """Nodes 0.. below this one have their old lists; 0 where all are new."""
    return int(manifest["stages"].get("base", {}).get("counts", {}).get("nodes", 0))


def vectors_of(store: Store, manifest: Json) -> dict[str, str]:
    """Path -> sha256 of each shard's vectors, from the records of the stage that wrote them: read once a process."""
    return _vectors_of(
        store, "vectors" if "vectors" in manifest["stages"] else "encode", manifest["embeddings"]["fingerprint"]
    )


@lru_cache(maxsize=1)
def _vectors_of(store: Store, stage: str, fingerprint: str) -> dict[str, str]:
    """fingerprint: of all the vectors, as the manifest has it; another one is read anew."""
    return outputs(list(records(store, stage).values()), "nodes/", ".npy")


def ranges_of(shards: Shards) -> list[list[int]]:
    """Ranges of shards (first, end) of about as many nodes each."""
    begins = shards.column("first_node")
    nodes = int(begins[-1]) + int(shards.column("nodes")[-1])
    wanted = np.linspace(0, nodes, min(math.ceil(nodes / PART_NODES), PARTS) + 1)
    return [list(pair) for pair in pairwise(np.unique([*np.searchsorted(begins, wanted[:-1]), len(shards)]).tolist())]
