"""Stage columns: for each part that was packed (`graphbuild pack`) a parquet file of the graph's fields, row for row.

columns/<file>.parquet has as many rows as that file, in its order; those that became no sample, or one without a node,
are null. So the two are joined side by side, without a key. Memory: the file's samples, and one shard's sidecar.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graphbuild.errors import ConfigError, StageError
from graphbuild.export.sidecar import sidecar_schema
from graphbuild.export.sidecars import sidecar_table
from graphbuild.graph.certify import require_graph
from graphbuild.graph.select.selection import decided_by, selection_of
from graphbuild.nodes.samples import MORE
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, outputs, records
from graphbuild.runner.state import require
from graphbuild.sources.pack import packed_tars
from graphbuild.store.layout import REJECTED, SAMPLES
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store, Writer

FOLDER = "columns"
LEFT_OUT = ("row", "caption", "image_offset", "image_size")  # of a sidecar: what only its tar gives a meaning


def plan(recipe: Recipe, store: Store) -> list[Task]:
    require_graph(store)
    manifest = store.manifest()
    tars = packed_tars(store) if "pack" in manifest["stages"] else {}
    if not tars or {shard.tar and shard.tar["url"] for shard in shards_of(store, manifest)} != tars.keys():
        raise ConfigError(
            f"--layout columns goes beside files that were packed, and the samples of {store.url} came from none",
            "use the default layout, or `graphbuild pack` the files into a store of their own",
        )
    samples = outputs(require(store, "assign", "embed"), "samples/")
    chosen, selection = decided_by(store, recipe.export.selection)
    parts: dict[str, list[Json]] = {}
    for record in records(store, "pack").values():
        parts.setdefault(record["settings"]["file"], []).append(record)
    tasks = []
    for file, packed in parts.items():
        packed.sort(key=lambda record: int(record["settings"]["first_row"]))
        turned_away = outputs(packed, REJECTED.format("pack"))
        places = [
            {
                "shard": record["task"],
                "first_row": record["settings"]["first_row"],
                "rows": record["settings"]["rows"],
                "samples": samples[SAMPLES.format(record["task"])],
                "rejected": turned_away.get(f"{REJECTED.format('pack')}/{record['task']}.parquet"),
            }
            for record in packed
        ]
        built = {"file": file, "graph": manifest["graph"]["fingerprint"], "parts": places}
        built |= {"embeddings": manifest["embeddings"]["fingerprint"], **selection}
        settings = {"embeddings": recipe.export.embeddings, **chosen}
        tasks.append(Task(stage="columns", name=packed[0]["task"], settings=settings, built=built))
    return tasks


def run(task: Task, store: Store, writer: Writer) -> Json:
    manifest, embeddings = store.manifest(), task.settings["embeddings"]
    tables = [store.table(SAMPLES.format(part["shard"])) for part in task.built["parts"]]
    selection = selection_of(store, task.settings.get("selection"))
    if selection is not None:
        tables = [selection.applied(samples) for samples in tables]
    plural = any(MORE in samples.column_names for samples in tables)
    fields = sidecar_schema(manifest["embeddings"]["d"], manifest["graph"]["k"], embeddings, plural=plural)
    schema = pa.schema([field.with_nullable(True) for field in fields if field.name not in LEFT_OUT])
    counts = {"samples": 0, "without_node": 0, "rejected": 0}
    file = task.built["file"].strip("/").removesuffix(".parquet")
    with (
        writer.file(f"{FOLDER}/{file}.parquet") as path,
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as target,
    ):
        for part, samples in zip(task.built["parts"], tables, strict=True):
            kept = np.ones(part["rows"], bool)
            if part["rejected"]:
                rejected = store.table(f"{REJECTED.format('pack')}/{part['shard']}.parquet", ["position"])
                kept[rejected["position"].to_numpy() - part["first_row"]] = False
            if kept.sum() != len(samples):
                raise StageError(
                    f"{store.url}: shard {part['shard']} has {len(samples):,} samples of {kept.sum():,} packed rows",
                    f"run `graphbuild verify {store.url}`",
                )
            table = sidecar_table(store, manifest, samples, embeddings, shard=part["shard"], tar=None)
            place = pa.array(np.cumsum(kept) - 1, mask=~kept)  # of each row, its sample
            for field in schema:
                if field.name not in table.column_names:  # no sample of this shard has several captions
                    table = table.append_column(field, pa.nulls(len(table), field.type))
            target.write_table(table.select(schema.names).take(place).cast(schema))
            counts["samples"] += len(samples)
            counts["without_node"] += samples["node"].null_count
            counts["rejected"] += int((~kept).sum())
    return {"counts": counts}


STAGE = Stage(name="columns", title="columns", plan=plan, run=run)
