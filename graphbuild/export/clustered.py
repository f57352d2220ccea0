"""Stages scatter and cluster: tars in neighbour order, for loaders that can only read tars from end to end.

A chunk is some samples behind each other that are neighbours: whole groups, as `NeighborOrder` makes them.
Chunks lie in random order, so a tar holds neighbourhoods from all over the graph; `graph_webdataset` shuffles chunks
instead of samples. Every sample is written once, the samples without a usable caption at the end. Members are
`<row>.<extension>`: keys of different tars may be equal, rows are not.

export/cells.py makes the order. Then the samples move in two passes, by `export.runs`:
scatter (one a run of old tars) reads the old tars from end to end and writes their samples in that order, with what
their sidecars say, into scratch, which so becomes as large as the tars; cluster (one a new tar) reads its part of each
run, and writes clustered/<tar>.tar with its sidecar. Memory: the sidecar rows of a run or a new tar, and a piece.
"""

from __future__ import annotations

import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.export.cells import ARRANGE, CELLS, of_all, places_by_run, places_of, runs, shards_with_tars, tars_of
from graphbuild.export.runs import copy_samples, laid_out, read_rows, write_run
from graphbuild.export.sidecar import TarIdentity
from graphbuild.export.sidecars import named_image, sidecar_columns, titled
from graphbuild.export.tarwriter import check_members
from graphbuild.graph.select.selection import selection_of
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest
from graphbuild.sources.tars import given_urls
from graphbuild.store.layout import SAMPLES, shard_name
from graphbuild.store.shards import Shards
from graphbuild.store.store import Json, Store, Writer

FOLDER = "clustered"
SIZES = f"{FOLDER}/sizes.json"


# -- scatter: runs of old tars, the samples of each in that order


def plan_scatter(recipe: Recipe, store: Store) -> list[Task]:
    shards, given = shards_with_tars(store, "clustered"), given_urls(recipe.embed.shards)
    settings, built, total = _of_tars(recipe, store, shards)
    placed, tasks = places_by_run(store, settings["chunk"]), []
    for number, run in enumerate(runs(shards)):
        urls = [given.get(url, store.resolve(url)) for url in shards.table["tar_url"][run[0] : run[1]].to_pylist()]
        hints = {"urls": urls, **({"placed": placed[number]} if placed else {})}  # not once all is exported
        read, name = {**built, "places": total, "tars": tars_of(shards, run)}, shard_name(number)
        tasks.append(Task(stage="scatter", name=name, settings=settings, built=read, hints=hints))
    return tasks


def run_scatter(task: Task, store: Store, writer: Writer) -> Json:
    manifest, selection = store.manifest(), selection_of(store, task.settings.get("selection"))
    parts, placed = [], places_of(store, task.hints["placed"])
    for tar, url in zip(task.built["tars"], task.hints["urls"], strict=True):
        samples = store.table(SAMPLES.format(tar["shard"]))
        check_members(samples, url)
        samples = samples if selection is None else selection.applied(samples)
        first, end = np.searchsorted(placed[:, 0], [tar["first_row"], tar["first_row"] + tar["samples"]])
        own = placed[first:end]
        samples = samples.take(pa.array(own[:, 0] - tar["first_row"]))
        parts.append((samples.append_column("place", pa.array(own[:, 1])), url))
    size, total, embeddings = task.settings["shard_size"], task.built["places"], task.settings["embeddings"]
    bounds = np.arange(0, total + size, size)
    write_run(writer, task.name, parts, bounds, lambda part: sidecar_columns(store, manifest, part, embeddings))
    return {}


def _of_tars(recipe: Recipe, store: Store, shards: Shards) -> tuple[Json, Json, int]:
    """As `of_all`, of the stages that need to know where a new tar begins; and the number of all samples in them."""
    selection = selection_of(store, recipe.export.selection)
    total = int(shards.column("samples").sum()) if selection is None else selection.kept
    settings, built = of_all(recipe, store)
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


SCATTER = Stage(name="scatter", title="runs", plan=plan_scatter, run=run_scatter, scratch=True)
CLUSTER = Stage(name="cluster", title="tars", plan=plan_cluster, run=run_cluster, finish=finish_cluster)
STAGES = (CELLS, ARRANGE, SCATTER, CLUSTER)
