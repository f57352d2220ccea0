"""Stages moments and search: the k-nearest-neighbour graph and each node's background.

search is one task a shard, over all nodes' embeddings: graph/<shard>.neighbors.npy, .similarities.npy and
.background.npy. The background is the mean and deviation of a node's similarity to the nodes that are *not* its
neighbours, from the first two moments of all embeddings, so it costs d^2 a node and no search. moments is one task that
reads every embedding once (float64 [d + 1, d]: the sum, then the sum of outer products).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphbuild.encoder import one_thread
from graphbuild.errors import ConfigError
from graphbuild.recipe import Recipe
from graphbuild.sharded import Array, node_array
from graphbuild.stage import Stage, Task, digest
from graphbuild.store import Json, Store, Writer

BLOCK_ROWS = 8_192
MOMENTS = "_state/moments/moments.npy"
VECTORS = "nodes/{}.npy"


def nodes_entry(store: Store) -> Json:
    """The manifest, once embeddings are finished; ConfigError before that."""
    manifest = store.manifest()
    if not {"encode", "vectors"} & manifest["stages"].keys():
        raise ConfigError(f"{store.url} has no finished embeddings", f"run `graphbuild embed {store.url}` first")
    return manifest


def node_count(manifest: Json) -> int:
    return sum(shard["nodes"] for shard in manifest["shards"])


def plan_moments(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    nodes = node_count(manifest)
    if recipe.index.k >= nodes:
        raise ConfigError(
            f"--k {recipe.index.k}: the store has {nodes:,} nodes, so a node has {nodes - 1:,} possible neighbours",
            f"use --k {max(nodes - 1, 1)} or fewer" if nodes > 1 else "give at least two different captions",
        )
    return [
        Task(
            stage="moments",
            name="all",
            built={"embeddings": manifest["embeddings"]["fingerprint"]},
        )
    ]


def run_moments(task: Task, store: Store, writer: Writer) -> Json:
    import torch

    from graphbuild.knn.exact import unit

    vectors = node_array(store, store.manifest(), VECTORS)
    moments = torch.zeros(vectors.width + 1, vectors.width, dtype=torch.float64)
    with one_thread("cpu"):
        for _, block in vectors.blocks(BLOCK_ROWS):
            x = unit(torch.from_numpy(np.array(block)), torch.float64)
            moments[0] += x.sum(dim=0)
            moments[1:].addmm_(x.T, x)
    writer.array(MOMENTS, moments.numpy())
    return {}


def plan_search(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    return [
        Task(
            stage="search",
            name=shard["shard"],
            settings={"k": recipe.index.k},
            built={
                "embeddings": manifest["embeddings"]["fingerprint"],
                "first_node": shard["first_node"],
                "nodes": shard["nodes"],
            },
            hints={"device": recipe.index.device},
        )
        for shard in manifest["shards"]
        if shard["nodes"]
    ]


def run_search(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.knn.exact import search

    vectors = node_array(store, store.manifest(), VECTORS)
    first, count, k = task.built["first_node"], task.built["nodes"], task.settings["k"]
    neighbors, similarities, searched_again = search(vectors, first, count, k, task.hints["device"])
    background = background_of(
        vectors.take(np.arange(first, first + count)), similarities, store.array(MOMENTS), len(vectors)
    )
    writer.array(f"graph/{task.name}.neighbors.npy", neighbors.astype(np.uint32))
    writer.array(f"graph/{task.name}.similarities.npy", similarities.astype(np.float16))
    writer.array(f"graph/{task.name}.background.npy", background)
    return {"counts": {"nodes": count, "edges": count * k}, "searched_again": searched_again}


def background_of(raw: Array, similarities: Array, moments: Array, total: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Mean and standard deviation, float32 [n, 2], of the similarities of n nodes to those outside their lists.

    raw: their stored vectors [n, d]; similarities: to their neighbours [n, k]; moments: of all `total` nodes. Zeros
    where every other node is a neighbour.
    """
    import torch

    from graphbuild.knn.exact import unit

    rest = total - 1 - similarities.shape[1]
    if rest == 0:
        return np.zeros((len(raw), 2), np.float32)
    near = similarities.astype(np.float64)
    with one_thread("cpu"):
        x = unit(torch.from_numpy(raw), torch.float64)
        all_moments = torch.from_numpy(np.array(moments))
        first = (x @ all_moments[0]).numpy() - 1 - near.sum(axis=1)
        second = torch.einsum("nd,nd->n", x @ all_moments[1:], x).numpy() - 1 - (near**2).sum(axis=1)
    mean = first / rest
    deviation = np.sqrt(np.maximum(second / rest - mean**2, 0))
    return np.stack([mean, deviation], axis=1).astype(np.float32)


def finish_search(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    files = sorted(o["path"] + o["sha256"] for record in done for o in record["outputs"])
    return {"graph": {"k": recipe.index.k, "engine": "exact", "fingerprint": digest(files)}}


STAGE_MOMENTS = Stage(name="moments", title="moments", plan=plan_moments, run=run_moments)
STAGE_SEARCH = Stage(
    name="search", title="search", plan=plan_search, run=run_search, finish=finish_search, on_device=True
)
