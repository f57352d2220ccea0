"""Stage certify: measures the finished graph's recall against brute force, checks its structure, refuses a bad graph.

A task takes a slice of the sampled nodes through all embeddings and validates every row of its share of the graph's
shards. How recall is measured, its time and memory: graph/recall/recall.py.
"""

from __future__ import annotations

import math

import numpy as np

from graphbuild.errors import QualityError, StageError
from graphbuild.graph.recall.certificate import FAULTS, list_faults
from graphbuild.graph.recall.recall import certificate_of, facts_of, measure, sampled
from graphbuild.graph.tasks import gone_nodes, nodes_entry
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.runner.state import require
from graphbuild.store.layout import NEIGHBORS, SIMILARITIES, VECTORS, shard_name
from graphbuild.store.sharded import Array, Living, ShardedArray, node_array
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

SLICE_NODES = 1_250
EXACT_FLOOR = 0.999
SLACK = 0.01  # between the recall that an approximate engine is set for and the floor


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    index = recipe.index
    sample = min(index.recall_sample, node_count(manifest))
    built = {
        "graph": manifest["graph"]["fingerprint"],
        "embeddings": manifest["embeddings"]["fingerprint"],
        "min_recall": floor_of(recipe, manifest),
    }
    slices = math.ceil(sample / SLICE_NODES)
    return [
        Task(
            stage="certify",
            name=shard_name(number),
            settings={"sample": index.recall_sample, "seed": index.seed},
            built={**built, "slice": [number, slices]},
        )
        for number in range(slices)
    ]


def floor_of(recipe: Recipe, manifest: Json) -> float:
    if recipe.index.min_recall is not None:
        return recipe.index.min_recall
    return EXACT_FLOOR if manifest["graph"]["engine"] == "exact" else round(recipe.index.recall - SLACK, 6)


def run(task: Task, store: Store, writer: Writer) -> Json:
    number, slices = task.built["slice"]
    manifest = store.manifest()
    shards = shards_of(store, manifest).with_nodes
    for shard in (shards[place] for place in range(number, len(shards), slices)):
        ids = np.arange(shard.first_node, shard.first_node + shard.nodes)
        listed = np.array(store.array(NEIGHBORS.format(shard.name))).astype(np.int64)
        check_lists(ids, listed, node_count(manifest))
        check_similarities(ids, np.array(store.array(SIMILARITIES.format(shard.name))))
    ids = sampled(task.settings["sample"], task.settings["seed"], node_count(manifest))[number::slices]
    recalls, deficits = _measured(store, manifest, ids)
    return facts_of(recalls, deficits)


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    manifest = store.manifest()
    floor = floor_of(recipe, manifest)
    certificate = certificate_of(manifest["graph"]["k"], [record["facts"] for record in done])
    if certificate["recall"] < floor:
        raise under_floor(certificate, floor, store)
    return {"recall": certificate}


def under_floor(certificate: Json, floor: float, store: Store) -> QualityError:
    low, high, worst = (certificate[name] for name in ("recall_95_low", "recall_95_high", "worst_node_recall"))
    if store.manifest()["graph"]["engine"] == "exact":  # then files changed, or the machine computes wrongly
        better = f"see what is damaged by `graphbuild verify {store.url}`, and build it anew by `index --force`"
    else:
        better = f"build a better one with `graphbuild index {store.url} --engine exact --force`, or a higher --recall"
    return QualityError(
        f"{store.url}: recall@{certificate['k']} is {certificate['recall']:.6f} (95%: {low:.4f} to {high:.4f}; worst "
        f"node {worst:.4f}), under the floor of {floor}",
        f"the graph is kept in graph/ for inspection; {better}; or lower --min-recall, only if that recall is good "
        "enough for you",
    )


def require_graph(store: Store) -> None:
    """ConfigError when the index is not finished; QualityError when only its recall is under the floor."""
    manifest = store.manifest()
    if "certify" not in manifest["stages"]:
        refuse_under_floor(store, manifest)
    require(store, "certify", "index")


def refuse_under_floor(store: Store, manifest: Json) -> None:
    """QualityError when a graph without a certificate was measured whole, and its recall is under the floor."""
    done = list(records(store, "certify").values())
    if "search" in manifest["stages"] and done and done[0]["built"]["slice"][1] == len(done):
        certificate = certificate_of(manifest["graph"]["k"], [record["facts"] for record in done])
        floor = done[0]["built"]["min_recall"]
        same = all(record["built"]["graph"] == manifest["graph"]["fingerprint"] for record in done)
        if same and certificate["recall"] < floor:
            raise under_floor(certificate, floor, store)


STAGE = Stage(name="certify", title="recall", plan=plan, run=run, finish=finish, entries=("recall",))


def certify_afresh(store: Store, sample: int, seed: int) -> Json:
    """The certificate of another draw of at most SLICE_NODES nodes."""
    manifest = store.manifest()
    ids = sampled(min(sample, SLICE_NODES), seed, node_count(manifest))
    return certificate_of(manifest["graph"]["k"], [facts_of(*_measured(store, manifest, ids))])


def _measured(store: Store, manifest: Json, ids: Array) -> tuple[Array, Array]:
    """Recall and mean similarity deficit [n] of nodes `ids` [n]."""
    shards = shards_of(store, manifest)
    every = node_array(store, shards, VECTORS)
    vectors: ShardedArray | Living = every
    if manifest.get("gone"):
        gone = gone_nodes(store, shards.with_nodes.names)
        vectors, ids = Living(every, gone), ids[~gone[ids]]
    listed = node_array(store, shards, NEIGHBORS).take(ids).astype(np.int64)
    check_lists(ids, listed, node_count(manifest))
    return measure(vectors, ids, listed)


def check_lists(ids: Array, listed: Array, nodes: int) -> None:
    """StageError when a neighbour list [n, k] of nodes `ids` names the node itself, one twice, or one out of range."""
    for fault, rows in list_faults(ids, listed, nodes).items():
        if rows.any():
            raise StageError(
                f"the neighbour list of node {ids[np.argmax(rows)]} {FAULTS[fault]} ({rows.sum()} lists do)",
                "rebuild with `graphbuild index --force`",
            )


def check_similarities(ids: Array, similarities: Array) -> None:
    """StageError when a list's similarities [n, k] are not finite, descending cosines."""
    values = similarities.astype(np.float32)
    ordered = (values[:, 1:] <= values[:, :-1]).all(axis=1) & (np.abs(values) <= 1.001).all(axis=1)
    if not ordered.all():
        raise StageError(
            f"the similarities of node {ids[np.argmin(ordered)]} are not descending cosines ({(~ordered).sum()} lists)",
            "rebuild with `graphbuild index --force`",
        )
