"""Stage inline: the store's tars once more, each sample with its graph fields inside, for loaders that know only tars.

inline/<tar> has the members of the old tar as they are and, in every sample with a node, one more: KEY.graph.npz, which
`webdataset.decode()` opens as a dict of arrays (names and types: docs/reference/format.md). Memory: a shard's sidecar.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.errors import ConfigError
from graphbuild.export.cells import shards_with_tars
from graphbuild.export.sidecar import text_columns
from graphbuild.export.sidecars import graph_fields
from graphbuild.export.tarwriter import check_members, write_tar
from graphbuild.graph.select.selection import decided_by, selection_of
from graphbuild.nodes.samples import MORE
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, outputs
from graphbuild.runner.state import require
from graphbuild.sources.tars import given_urls, tar_stem
from graphbuild.store.layout import SAMPLES
from graphbuild.store.sharded import Array
from graphbuild.store.shards import Shard, present_shards
from graphbuild.store.store import Json, Store, Writer

FOLDER = "inline"
SIZES = f"{FOLDER}/sizes.json"
MEMBER = "graph.npz"
TEXTS = ("node", "caption", "weight", MORE)
NO_DATE = (1980, 1, 1, 0, 0, 0)


def plan(recipe: Recipe, store: Store) -> list[Task]:
    shards = shards_with_tars(store, "inline")
    if recipe.export.embeddings == "sketch:64":
        raise ConfigError("--layout inline has no sketches", "use --embeddings int8, float16 or none")
    samples = outputs(require(store, "assign", "embed"), "samples/")
    chosen, selection = decided_by(store, recipe.export.selection)
    graph = store.manifest()["graph"]["fingerprint"]
    hints = {"given": given_urls(recipe.embed.shards)}
    return [
        Task(
            stage="inline",
            name=shard.name,
            settings={"embeddings": recipe.export.embeddings, **chosen},
            built={**selection, "graph": graph, "samples": samples[SAMPLES.format(shard.name)], "tar": shard.tar},
            hints=hints,
        )
        for shard in shards
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    samples = store.table(SAMPLES.format(task.name))
    selection = selection_of(store, task.settings.get("selection"))
    if selection is not None:
        samples = selection.applied(samples)
        samples = samples.filter(pc.is_valid(samples["node"]))
    recorded = task.built["tar"]["url"]
    url = task.hints["given"].get(recorded, store.resolve(recorded))
    check_members(samples, url)
    row, node = samples["row"].to_numpy(), samples["node"].fill_null(-1).to_numpy()
    manifest, embeddings = store.manifest(), task.settings["embeddings"]
    fields = {"node": node, **graph_fields(store, manifest, np.maximum(node, 0), embeddings)}
    texts, first_more = text_columns(samples.select([name for name in TEXTS if name in samples.column_names]))
    behind = texts["node"].to_numpy(zero_copy_only=False)[len(samples) :].astype(np.int64)
    more = {"node": behind, **graph_fields(store, manifest, behind, embeddings)}
    captions, weight = texts["caption"], texts["weight"].to_numpy()

    def member(i: int) -> tuple[str, bytes] | None:
        if node[i] < 0:
            return None
        own = {name: values[i] for name, values in fields.items()}
        begin, end = first_more[i : i + 2]
        if begin < end:
            of_all = np.array([i, *range(len(samples) + begin, len(samples) + end)])
            own |= {"captions": np.array(captions.take(pa.array(of_all)).to_pylist()), "weights": weight[of_all]}
            own |= {f"more_{name}": values[begin:end] for name, values in more.items()}
        return MEMBER, npz({"row": row[i], **own})

    with writer.file(f"{FOLDER}/{tar_stem(url)}.tar") as path:
        write_tar(path, samples, url, member)
    return {"counts": {"samples": len(samples), "without_node": samples["node"].null_count}}


def npz(arrays: Mapping[str, Array | np.generic]) -> bytes:
    """What `numpy.load` opens as these arrays; unlike `numpy.savez` the same bytes at any time."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, values in arrays.items():
            content = io.BytesIO()
            np.save(content, np.asarray(values), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", NO_DATE), content.getvalue())
    return stream.getvalue()


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    """inline/sizes.json, samples a tar."""
    store.write_json(SIZES, inline_sizes(present_shards(store, store.manifest()), done))
    return {}


def inline_sizes(shards: Iterable[Shard], done: Iterable[Json]) -> dict[str, int]:
    """Samples a tar by its name, from the records of the stage."""
    counts = {record["task"]: record["facts"]["counts"]["samples"] for record in done}
    return {f"{tar_stem(shard.tar['name'])}.tar": counts[shard.name] for shard in shards if shard.tar is not None}


STAGE = Stage(name="inline", title="tars", plan=plan, run=run, finish=finish)
