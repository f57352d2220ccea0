"""Stages arrange, scatter and cluster: tars in neighbour order, for loaders that can only read tars from end to end.

A chunk is some samples behind each other that are neighbours: whole groups, as `NeighborOrder` makes them.
Chunks lie in random order, so a tar holds neighbourhoods from all over the graph; `graph_webdataset` shuffles chunks
instead of samples. Every sample is written once, the samples without a usable caption at the end. Members are
`<row>.<extension>`: keys of different tars may be equal, rows are not.

arrange (one task) makes the order: about 40 bytes a sample. Then the samples move in two passes, by `export.runs`:
scatter (one a run of old tars) reads the old tars from end to end and writes their samples in that order, with what
their sidecars say, into scratch, which so becomes as large as the tars; cluster (one a new tar) reads its part of each
run, and writes clustered/<tar>.tar with its sidecar. Memory: the sidecar rows of a run or a new tar, and a piece.
"""

from __future__ import annotations

import itertools
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.errors import ConfigError
from graphbuild.export.runs import SCRATCH, copy_samples, laid_out, read_rows, write_run
from graphbuild.export.sidecar import TarIdentity
from graphbuild.export.sidecars import named_image, sidecar_columns, titled
from graphbuild.export.tarwriter import check_members
from graphbuild.graph.certify import require_graph
from graphbuild.graph.select.selection import decided_by, selection_of
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs
from graphbuild.runner.state import require
from graphbuild.sources.tars import given_urls
from graphbuild.store.layout import SAMPLES, shard_name
from graphbuild.store.shards import Shards, present_shards
from graphbuild.store.store import Json, Store, Writer

FOLDER = "clustered"
PLACES = f"{SCRATCH}/places.npy"
SIZES = f"{FOLDER}/sizes.json"
RUNS, RUN_SAMPLES = 256, 400_000  # a new tar is read from each; a task holds so many sidecar rows
GROUP = 8  # samples that NeighborOrder groups, at most


def shards_with_tars(store: Store, layout: str) -> Shards:
    """The store's shards; ConfigError where the samples came from no tars."""
    require_graph(store)
    shards = present_shards(store, store.manifest())
    if shards.table["tar_url"].null_count:
        raise ConfigError(
            f"--layout {layout} copies images, and the samples of {store.url} came from no tars",
            "use the default layout, or embed tars (--shards)",
        )
    return shards


def _of_all(recipe: Recipe, store: Store) -> tuple[Json, Json]:
    """The settings of these stages, and what each of their tasks reads of the store."""
    built = {
        "graph": store.manifest()["graph"]["fingerprint"],
        "samples": digest(outputs(require(store, "assign", "embed"), "samples/")),
    }
    chosen, selection = decided_by(store, recipe.export.selection)
    return {"chunk": recipe.export.chunk, "seed": recipe.index.seed, **chosen}, {**built, **selection}


# -- arrange: the order of all samples


def plan_arrange(recipe: Recipe, store: Store) -> list[Task]:
    shards_with_tars(store, "clustered")
    settings, built = _of_all(recipe, store)
    selection = selection_of(store, recipe.export.selection)
    if selection is not None and not selection.kept:
        raise ConfigError(
            f"{selection.url} keeps no sample, so there is nothing to export",
            "make it again with `graphbuild select` and looser rules, or name another by --selection",
        )
    return [Task(stage="arrange", name="all", settings=settings, built=built)]


def run_arrange(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.graph.batches.order import NeighborOrder
    from graphbuild.graph.sample_graph import SampleGraph

    graph = SampleGraph.open(store.url)
    chunk, seed = task.settings["chunk"], task.settings["seed"]
    nodes, selection = graph.sample_nodes(), selection_of(store, task.settings.get("selection"))
    shards = shards_with_tars(store, "clustered")  # rows of tars that are gone have no place
    there = zip(shards.column("first_row"), shards.column("samples"), strict=True)
    behind = np.concatenate([first + np.flatnonzero(nodes[first : first + count] < 0) for first, count in there])
    if selection is not None:
        nodes, behind = selection.nodes(nodes), behind[:0]
    planned = NeighborOrder(graph, chunk, nodes=nodes, group=min(GROUP, chunk), seed=seed)
    order = np.concatenate([planned.items[planned.epoch(0).order], behind])
    places = np.full(len(nodes), -1)
    places[order] = np.arange(len(order))
    writer.array(PLACES, places, durable=False)
    return {"counts": {"samples": len(order)}}


# -- scatter: runs of old tars, the samples of each in that order


def plan_scatter(recipe: Recipe, store: Store) -> list[Task]:
    shards, given = shards_with_tars(store, "clustered"), given_urls(recipe.embed.shards)
    settings, built, total = _of_tars(recipe, store, shards)
    tasks = []
    for number, (begin, end) in enumerate(runs(shards)):
        run = shards.table.slice(begin, end - begin)
        urls = [given.get(url, store.resolve(url)) for url in run["tar_url"].to_pylist()]
        tars = run.select(["shard", "first_row", "samples", "tar_sha256"]).to_pylist()
        read, name = {**built, "places": total, "tars": tars}, shard_name(number)
        tasks.append(Task(stage="scatter", name=name, settings=settings, built=read, hints={"urls": urls}))
    return tasks


def run_scatter(task: Task, store: Store, writer: Writer) -> Json:
    manifest, selection = store.manifest(), selection_of(store, task.settings.get("selection"))
    parts = []
    for tar, url in zip(task.built["tars"], task.hints["urls"], strict=True):
        samples = store.table(SAMPLES.format(tar["shard"]))
        check_members(samples, url)
        places = store.rows(PLACES, tar["first_row"], tar["first_row"] + tar["samples"])
        samples = samples if selection is None else selection.applied(samples)
        parts.append((samples.append_column("place", pa.array(places)).filter(pa.array(places >= 0)), url))
    size, total, embeddings = task.settings["shard_size"], task.built["places"], task.settings["embeddings"]
    bounds = np.arange(0, total + size, size)
    write_run(writer, task.name, parts, bounds, lambda part: sidecar_columns(store, manifest, part, embeddings))
    return {}


def runs(shards: Shards) -> list[tuple[int, int]]:
    """The old tars (begin, end) of each run: RUNS of them, or more where those would have over RUN_SAMPLES samples."""
    length = max(min(-(-int(shards.column("samples").sum()) // RUNS), RUN_SAMPLES), 1)
    begins = np.unique(shards.column("first_row") // length, return_index=True)[1].tolist()
    return list(itertools.pairwise([*begins, len(shards)]))


def _of_tars(recipe: Recipe, store: Store, shards: Shards) -> tuple[Json, Json, int]:
    """As `_of_all`, of the stages that need to know where a new tar begins; and the number of all samples in them."""
    selection = selection_of(store, recipe.export.selection)
    total = int(shards.column("samples").sum()) if selection is None else selection.kept
    settings, built = _of_all(recipe, store)
    size = -(-recipe.export.shard_size // recipe.export.chunk) * recipe.export.chunk
    return {**settings, "shard_size": size, "embeddings": recipe.export.embeddings}, built, total


# -- cluster: the tars


def plan_cluster(recipe: Recipe, store: Store) -> list[Task]:
    shards = shards_with_tars(store, "clustered")
    settings, built, total = _of_tars(recipe, store, shards)
    built |= named_image(recipe)
    built["tars"] = digest(shards.table["tar_sha256"].to_pylist())
    size, hints = settings["shard_size"], {"runs": len(runs(shards))}
    return [
        Task(
            stage="cluster",
            name=shard_name(number),
            settings=settings,
            built={**built, "places": [first, min(size, total - first)]},
            hints=hints,
        )
        for number, first in enumerate(range(0, total, size))
    ]


def run_cluster(task: Task, store: Store, writer: Writer) -> Json:
    rows = read_rows(store, task.hints["runs"], task.built["places"][0] // task.settings["shard_size"])
    order, begins, ends = laid_out(rows["place"].to_numpy(), rows["bytes"].to_numpy())
    name = f"{FOLDER}/{task.name}.tar"
    with writer.file(name) as path:
        copy_samples(store, rows, begins, path)
        end = int(ends[-1]) + 2 * tarfile.BLOCKSIZE
        os.truncate(path, end + -end % tarfile.RECORDSIZE)  # zeros, as tarfile writes them
    tar = writer.outputs[-1]
    identity = TarIdentity(name=f"{task.name}.tar", bytes=tar["bytes"], sha256=tar["sha256"])
    offsets = pc.add(rows["image_offset"], pa.array(begins))
    rows = rows.set_column(rows.column_names.index("image_offset"), "image_offset", offsets).take(pa.array(order))
    about = {"chunk": task.settings["chunk"], "image_member": task.built.get("image_member")}
    table = titled(rows, store, store.manifest(), task.settings["embeddings"], shard=task.name, tar=identity, **about)
    writer.table(f"{FOLDER}/{task.name}.graph.parquet", table)
    return {"counts": {"samples": len(table), "without_node": table["node"].null_count}}


def finish_cluster(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    """clustered/sizes.json, samples a tar."""
    store.write_json(SIZES, tar_sizes(done))
    return {}


def tar_sizes(done: list[Json]) -> dict[str, int]:
    """Samples a tar by its name, from the records of the stage."""
    return {f"{record['task']}.tar": record["facts"]["counts"]["samples"] for record in done}


ARRANGE = Stage(name="arrange", title="order", plan=plan_arrange, run=run_arrange, scratch=True)
SCATTER = Stage(name="scatter", title="runs", plan=plan_scatter, run=run_scatter, scratch=True)
CLUSTER = Stage(name="cluster", title="tars", plan=plan_cluster, run=run_cluster, finish=finish_cluster)
STAGES = (ARRANGE, SCATTER, CLUSTER)
