"""Stage vectors: ready vectors as nodes, one a row in order, instead of captions and an encoder.

Writes each shard's samples/, nodes/*.parquet and nodes/*.npy: float16, scaled to unit norm, and checked; a NaN, an
infinity or a zero vector is refused with its row. Several files lie behind each other, and a shard never spans two, so
that a file that is added changes no earlier one. A task reads its own rows of its file. Memory: one shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from graphbuild.errors import InputError
from graphbuild.nodes.encode import embeddings_entry
from graphbuild.nodes.samples import COLUMNS, READY, SCHEMA
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.sources.paths import known_first, named_files
from graphbuild.sources.vector_files import ENDING, shapes_of, take_rows, unit_or_fault
from graphbuild.store.files import file_identities
from graphbuild.store.layout import SAMPLES, TEXTS, TEXTS_OPTIONS, VECTORS, shard_name
from graphbuild.store.shards import Shard, is_whole, write_shards
from graphbuild.store.store import Json, Store, Writer


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    assert embed.vectors is not None
    done = sorted(records(store, "vectors").values(), key=lambda record: record["settings"]["first_row"])
    known = [record["inputs"]["vectors"] for record in done]
    identities = known_first(file_identities(named_files(embed.vectors, ENDING, "--vectors")), known)
    shapes = shapes_of(list(identities), embed.vector_column)
    if not any(rows for rows, _ in shapes):
        raise InputError(f"{embed.vectors} holds no vectors", "give a file with at least two rows")
    tasks: list[Task] = []
    begin = 0  # row of a file's first vector
    for (url, identity), (rows, _) in zip(identities.items(), shapes, strict=True):
        for first in range(0, rows, embed.shard_size):
            settings = {
                "first_row": begin + first,
                "rows": min(embed.shard_size, rows - first),
                "vector_column": embed.vector_column,
            }
            tasks.append(
                Task(
                    stage="vectors",
                    name=shard_name(len(tasks)),
                    settings=settings | ({"file_begins": begin} if begin else {}),
                    inputs={"vectors": identity},
                    hints={"url": url},
                )
            )
        begin += rows
    return tasks


def run(task: Task, store: Store, writer: Writer) -> Json:
    url, first, count = task.hints["url"], task.settings["first_row"], task.settings["rows"]
    in_file = first - task.settings.get("file_begins", 0)
    values = take_rows(url, task.settings["vector_column"], np.arange(in_file, in_file + count), needed=True)
    vectors = unit_vectors(values, first_row=in_file, source=url)
    rows = np.arange(first, first + count)
    empty = {field.name: pa.nulls(count, field.type) for field in SCHEMA}
    columns = {**empty, "row": pa.array(rows), "key": pa.array(rows.astype(str)), "node": pa.array(rows)}
    writer.table(SAMPLES.format(task.name), pa.table({name: columns[name] for name in COLUMNS}))
    writer.table(
        TEXTS.format(task.name),
        pa.table({"node": rows, "text": empty["text"], "samples": np.ones(count, np.int64)}),
        **TEXTS_OPTIONS,
    )
    writer.array(VECTORS.format(task.name), vectors)
    return {"counts": {"samples": count, "nodes": count}, "d": vectors.shape[1]}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    entry = embeddings_entry(done, {"encoder": READY, "weights_sha256": None})
    return {**write_shards(store, vector_shards(done)), **entry}


def vector_shards(done: Iterable[Json]) -> list[Shard]:
    """The shards of this stage's records, in order of row."""
    places = ((record["task"], record["settings"]["first_row"], record["settings"]["rows"]) for record in done)
    found = [Shard(name, first, count, first, count, None) for name, first, count in places]
    return sorted(found, key=lambda shard: shard.first_row)


def unit_vectors(values: np.ndarray[Any, Any], *, first_row: int, source: str) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Rows scaled to unit norm as float16 [n, d]; InputError naming the row of a NaN, an infinity or a zero vector."""
    unit, faults = unit_or_fault(values)
    for what in dict.fromkeys(faults.values()):
        bad = [row for row, fault in faults.items() if fault == what]
        raise InputError(
            f"{source}: row {first_row + bad[0]} {what} ({len(bad)} such rows near it)",
            "remove or mend these rows, then run again",
        )
    return unit


STAGE = Stage(
    name="vectors",
    title="vectors",
    plan=plan,
    run=run,
    finish=finish,
    entries=("shards", "embeddings"),
    whole=is_whole,
)
