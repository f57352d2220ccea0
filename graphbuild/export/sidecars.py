"""Stage export: a sidecar beside each tar, one row per sample in tar order (schema: graphbuild.export.sidecar).

One task a shard of samples. A sample whose caption appeared in an earlier shard has its node there, so a task gathers
rows from the memory-mapped files of other shards too. Memory: the shard's rows, about d + 6 k + 100 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.export.quantized import quantize_int8
from graphbuild.export.sidecar import SidecarHeader, TarIdentity, sidecar_schema
from graphbuild.graph import sketch
from graphbuild.graph.certify import require_graph
from graphbuild.graph.select.selection import decided_by, selection_of
from graphbuild.graph.tasks import living_nodes
from graphbuild.nodes.samples import MORE
from graphbuild.recipe import EmbeddingKind, Recipe
from graphbuild.runner.stage import Stage, Task, outputs
from graphbuild.runner.state import require
from graphbuild.sources.tars import tar_stem
from graphbuild.store.layout import BACKGROUND, BASIS, NEIGHBORS, SAMPLES, SIDECAR, SIMILARITIES, SKETCH, VECTORS
from graphbuild.store.sharded import Array, node_array
from graphbuild.store.shards import Shard, present_shards, shards_of
from graphbuild.store.store import Json, Store, Writer

SIZES = "shards/sizes.json"


def plan(recipe: Recipe, store: Store) -> list[Task]:
    require_graph(store)
    manifest = store.manifest()
    source = "vectors" if "vectors" in manifest["stages"] else "assign"
    samples = outputs(require(store, source, "embed"), "samples/")
    built = {"graph": manifest["graph"]["fingerprint"], "embeddings": manifest["embeddings"]["fingerprint"]}
    classes = {} if recipe.embed.class_names is None else {"classes": True}
    chosen, selection = decided_by(store, recipe.export.selection)
    return [
        Task(
            stage="export",
            name=shard.name,
            settings={"embeddings": recipe.export.embeddings, **chosen},
            built={
                **built,
                **selection,
                "samples": samples[SAMPLES.format(shard.name)],
                "tar": shard.tar,
                **named_image(recipe),
                **classes,
            },
        )
        for shard in present_shards(store, manifest)
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    every = store.table(SAMPLES.format(task.name))
    selection = selection_of(store, task.settings.get("selection"))
    samples = every if selection is None else selection.applied(every)
    tar = task.built["tar"]
    identity = None if tar is None else TarIdentity(name=tar["name"], bytes=tar["bytes"], sha256=tar["sha256"])
    table = sidecar_table(
        store,
        store.manifest(),
        samples,
        task.settings["embeddings"],
        shard=task.name,
        tar=identity,
        image_member=task.built.get("image_member"),
    )
    name = task.name if tar is None else tar_stem(tar["name"])
    writer.table(SIDECAR.format(name), table, **(packed(table) if "classes" in task.built else {}))
    counts = {"samples": len(samples), "without_node": every["node"].null_count}
    left_out = samples["node"].null_count - counts["without_node"]
    return {"counts": counts if selection is None else {**counts, "not_selected": left_out}}


def packed(table: pa.Table) -> Json:
    """How the sidecar of a class graph is written, in which the lists of a node stand in many rows: in one page, bytes
    of ids by their place, by levels of zstd that look back far enough to find a list again. Three times the time for an
    eighth of the size: 10,000 rows of 1,000 classes take 5 s, and 0.38 KB each in place of 2.8; of 1,251 rows, 1.5."""
    lists = [name for name in table.column_names if pa.types.is_fixed_size_list(table.schema.field(name).type)]
    levels = {f"{name}.list.element": 17 if name == "neighbors" else 9 for name in lists}
    return {
        "use_dictionary": [name for name in table.column_names if name not in lists],
        "use_byte_stream_split": ["neighbors.list.element"],
        "compression_level": levels,
        "data_page_size": 1 << 30,
    }


def named_image(recipe: Recipe) -> Json:
    """The member that is a sample's image, which a sidecar's header tells; nothing where none is named."""
    return {} if recipe.embed.image_member is None else {"image_member": recipe.embed.image_member}


def sidecar_table(
    store: Store, manifest: Json, samples: pa.Table, embeddings: EmbeddingKind, **header: Any
) -> pa.Table:
    """The sidecar of some samples, in their order; samples as for `sidecar_columns`, header as for `titled`."""
    return titled(sidecar_columns(store, manifest, samples, embeddings), store, manifest, embeddings, **header)


def titled(rows: pa.Table, store: Store, manifest: Json, embeddings: EmbeddingKind, **more: Any) -> pa.Table:
    """A sidecar of rows of one or of several, of which some may be of samples with several captions.

    more: what else its `SidecarHeader` says: shard, tar, chunk, image_member.
    """
    header = SidecarHeader(
        encoder=manifest["embeddings"]["encoder"],
        d=manifest["embeddings"]["d"],
        k=manifest["graph"]["k"],
        embeddings=embeddings,
        graph=manifest["graph"]["fingerprint"],
        rows=len(rows),
        sketch_steps=sketch.steps(store.array(BASIS)).tolist() if embeddings == "sketch:64" else None,
        node_count=living_nodes(manifest),
        **more,
    )
    schema = sidecar_schema(header.d, header.k, embeddings, plural=MORE in rows.column_names)
    columns = {field.name: rows[field.name].combine_chunks() for field in schema}
    if MORE in columns:
        columns[MORE] = _listed(columns[MORE], columns[MORE].flatten())
    return pa.table(columns, schema=schema.with_metadata(header.metadata()))


def sidecar_columns(store: Store, manifest: Json, samples: pa.Table, embeddings: EmbeddingKind) -> pa.Table:
    """The columns of the sidecar of some samples, in their order; samples: row, key, node, caption, image_offset,
    image_size, and of several captions weight and MORE, as in samples/."""
    plural = MORE in samples.column_names
    schema = sidecar_schema(manifest["embeddings"]["d"], manifest["graph"]["k"], embeddings, plural=plural)
    own = [field for field in schema if field.name != MORE]
    columns = _gathered(store, manifest, samples, own, embeddings)
    if plural:
        more = samples[MORE].combine_chunks()
        texts = pa.Table.from_struct_array(more.flatten())
        inner = list(schema.field(MORE).type.value_type)
        values = pa.StructArray.from_arrays(_gathered(store, manifest, texts, inner, embeddings), fields=inner)
        columns.append(_listed(more, values))
    return pa.table(columns, schema=schema)


def _listed(more: pa.Array, values: pa.Array) -> pa.Array:
    """Lists of these values, as long as those in a column; empty in place of null."""
    lengths = pc.fill_null(pc.list_value_length(more), 0).to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), values, type=pa.list_(values.type))


def _gathered(
    store: Store, manifest: Json, rows: pa.Table, fields: Sequence[pa.Field], embeddings: EmbeddingKind
) -> list[pa.Array]:
    """These columns of a sidecar for rows that have a node each, or null: what the graph says, and the rows' own."""
    node = rows["node"].fill_null(-1).to_numpy()
    found = graph_fields(store, manifest, np.maximum(node, 0), embeddings)
    return [
        _column(found[field.name], node >= 0, field.type)
        if field.name in found
        else rows[field.name].combine_chunks().cast(field.type)
        for field in fields
    ]


def graph_fields(store: Store, manifest: Json, nodes: Array, embeddings: EmbeddingKind) -> dict[str, Array]:
    """What a sidecar says of nodes [n], by the name of its column."""
    shards = shards_of(store, manifest)
    background = node_array(store, shards, BACKGROUND).take(nodes)
    fields = {
        "neighbors": node_array(store, shards, NEIGHBORS).take(nodes),
        "similarities": node_array(store, shards, SIMILARITIES).take(nodes),
        "background_mean": background[:, 0],
        "background_std": background[:, 1],
    }
    if embeddings == "sketch:64":
        fields["sketch"] = node_array(store, shards, SKETCH).take(nodes)
    elif embeddings != "none":
        embedded = node_array(store, shards, VECTORS).take(nodes)
        if embeddings == "int8":
            fields["embedding"], fields["embedding_scale"] = quantize_int8(embedded)
        else:
            fields["embedding"] = embedded
    return fields


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    """shards/sizes.json, samples a tar, by which open_clip and others learn the data set's size."""
    sizes = tar_sizes(present_shards(store, store.manifest()))
    if sizes is not None:
        store.write_json(SIZES, sizes)
    return {}


def tar_sizes(shards: Iterable[Shard]) -> dict[str, int] | None:
    """Samples a tar by its name; None for a store whose samples came from no tar."""
    return {shard.tar["name"]: shard.samples for shard in shards if shard.tar is not None} or None


STAGE = Stage(name="export", title="export", plan=plan, run=run, finish=finish)


def _column(values: Array, named: Array, kind: Any) -> pa.Array:
    """Values of samples [n, ...], null where a sample has no node."""
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, kind, mask=~named)
    flat = pa.Array.from_buffers(kind.value_type, values.size, [None, pa.py_buffer(values)])
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=None if named.all() else pa.array(~named))
