"""Stages arrange, scatter and cluster: tars in neighbour order, for loaders that can only read tars from end to end.

A chunk is some samples behind each other that are neighbours: whole groups, as `NeighborOrder` makes them.
Chunks lie in random order, so a tar holds neighbourhoods from all over the graph; `graph_webdataset` shuffles chunks
instead of samples. Every sample is written once, the samples without a usable caption at the end. Members are
`<row>.<extension>`: keys of different tars may be equal, rows are not.

arrange (one task) makes the order: about 40 bytes a sample. scatter (one a shard) sorts the samples' rows by place;
cluster (one a new tar) collects its rows from all shards, reads the members where they lie in the old tars, and writes
clustered/<tar>.tar with its sidecar. Memory: a tar's sidecar and `tarwriter.BATCH` samples.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from graphbuild.errors import ConfigError
from graphbuild.export.sidecar import TarIdentity
from graphbuild.export.sidecars import named_image, sidecar_table
from graphbuild.export.tarwriter import check_members, write_tar
from graphbuild.graph.certify import require_graph
from graphbuild.graph.select.selection import decided_by, selection_of
from graphbuild.nodes.samples import MORE
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs
from graphbuild.runner.state import require
from graphbuild.sources.tars import given_urls
from graphbuild.store.layout import SAMPLES, shard_name
from graphbuild.store.sharded import Array
from graphbuild.store.shards import Shards, present_shards, shards_of
from graphbuild.store.store import Json, Store, Writer

FOLDER = "clustered"
SCRATCH = "_work_clustered"
PLACES = f"{SCRATCH}/places.npy"
SIZES = f"{FOLDER}/sizes.json"
SAID = ("row", "node", "caption", "weight", MORE)  # of samples/; the last two where samples have several captions
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
    return [Task(stage="arrange", name="all", settings=settings, built=built)]


def run_arrange(task: Task, store: Store, writer: Writer) -> Json:
    from graphbuild.graph.batches.order import NeighborOrder
    from graphbuild.graph.sample_graph import SampleGraph

    graph = SampleGraph.open(store.url)
    chunk, seed = task.settings["chunk"], task.settings["seed"]
    nodes, selection = graph.sample_nodes(), selection_of(store, task.settings.get("selection"))
    behind = np.flatnonzero(nodes < 0)
    if selection is not None:
        nodes, behind = selection.nodes(nodes), behind[:0]
    planned = NeighborOrder(graph, chunk, nodes=nodes, group=min(GROUP, chunk), seed=seed)
    order = np.concatenate([planned.items[planned.epoch(0).order], behind])
    places = np.full(len(nodes), -1)
    places[order] = np.arange(len(order))
    writer.array(PLACES, places, durable=False)
    return {"counts": {"samples": len(order)}}


# -- scatter: each shard's samples, sorted by their place in that order


def plan_scatter(recipe: Recipe, store: Store) -> list[Task]:
    shards = shards_with_tars(store, "clustered")
    settings, built = _of_all(recipe, store)
    return [
        Task(
            stage="scatter",
            name=shard.name,
            settings=settings,
            built={**built, "rows": [shard.first_row, shard.samples]},
            hints={"tar": shard.tar},
        )
        for shard in shards
    ]


def run_scatter(task: Task, store: Store, writer: Writer) -> Json:
    first, count = task.built["rows"]
    samples = store.table(SAMPLES.format(task.name))
    check_members(samples, store.resolve(task.hints["tar"]["url"]))
    places = store.rows(PLACES, first, first + count)
    selection = selection_of(store, task.settings.get("selection"))
    samples = samples if selection is None else selection.applied(samples)
    samples = samples.append_column("place", pa.array(places)).filter(pa.array(places >= 0)).sort_by("place")
    with (
        writer.file(f"{SCRATCH}/{task.name}.arrow", durable=False) as path,
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, samples.schema) as stream,
    ):
        stream.write_table(samples.combine_chunks())
    return {}


# -- cluster: the tars


def plan_cluster(recipe: Recipe, store: Store) -> list[Task]:
    shards = shards_with_tars(store, "clustered")
    selection = selection_of(store, recipe.export.selection)
    total = int(shards.column("samples").sum()) if selection is None else selection.kept
    chunk = recipe.export.chunk
    size = -(-recipe.export.shard_size // chunk) * chunk
    settings, built = _of_all(recipe, store)
    settings |= {"shard_size": size, "embeddings": recipe.export.embeddings}
    built |= named_image(recipe)
    built["tars"] = digest(shards.table["tar_sha256"].to_pylist())
    hints = {"given": given_urls(recipe.embed.shards)}
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
    manifest = store.manifest()
    shards = shards_of(store, manifest)
    samples, sources = _collect(store, shards.names, *task.built["places"])
    keys = [f"{row:012d}" for row in samples["row"].to_pylist()]
    name = f"{FOLDER}/{task.name}.tar"
    urls = [task.hints["given"].get(url, store.resolve(url)) for url in shards.table["tar_url"].to_pylist()]
    with writer.file(name) as path:
        offsets, sizes = write_tar(path, samples, urls, sources, keys)
    tar = writer.outputs[-1]
    identity = TarIdentity(name=f"{task.name}.tar", bytes=tar.bytes, sha256=tar.sha256)
    placed = samples.select([name for name in SAID if name in samples.column_names])
    for column, values in (("key", keys), ("image_offset", _positive(offsets)), ("image_size", _positive(sizes))):
        placed = placed.append_column(column, pa.array(values) if isinstance(values, list) else values)
    table = sidecar_table(
        store,
        manifest,
        placed,
        task.settings["embeddings"],
        shard=task.name,
        tar=identity,
        chunk=task.settings["chunk"],
        image_member=task.built.get("image_member"),
    )
    writer.table(f"{FOLDER}/{task.name}.graph.parquet", table)
    return {"counts": {"samples": len(samples), "without_node": samples["node"].null_count}}


def _collect(store: Store, shards: list[str], first: int, count: int) -> tuple[pa.Table, Array]:
    """The samples of places first..first+count-1 in that order, and the number of the shard of each."""
    parts, sources = [], []
    for number, shard in enumerate(shards):
        mapped = pa.ipc.open_file(pa.memory_map(str(store.local_copy(f"{SCRATCH}/{shard}.arrow")))).read_all()
        begin, end = np.searchsorted(mapped["place"].to_numpy(), [first, first + count])
        if begin < end:
            parts.append(mapped.slice(begin, end - begin))
            sources.append(np.full(end - begin, number))
    found = pa.concat_tables(parts, promote_options="default")  # some shards have samples of several captions
    order = np.argsort(found["place"].to_numpy())
    return found.take(pa.array(order)), np.concatenate(sources)[order]


def _positive(values: Array) -> pa.Array:
    return pa.array(values, mask=values < 0)


def finish_cluster(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    """clustered/sizes.json, samples a tar."""
    store.write_json(SIZES, tar_sizes(done))
    return {}


def tar_sizes(done: list[Json]) -> dict[str, int]:
    """Samples a tar by its name, from the records of the stage."""
    return {f"{record['task']}.tar": record["facts"]["counts"]["samples"] for record in done}


ARRANGE = Stage(name="arrange", title="order", plan=plan_arrange, run=run_arrange, scratch=True)
SCATTER = Stage(name="scatter", title="places", plan=plan_scatter, run=run_scatter, scratch=True)
CLUSTER = Stage(name="cluster", title="tars", plan=plan_cluster, run=run_cluster, finish=finish_cluster)
STAGES = (ARRANGE, SCATTER, CLUSTER)
