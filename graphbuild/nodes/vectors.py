"""Stage vectors: ready vectors as nodes, one a row in order, instead of captions and an encoder.

Writes each shard's samples/, nodes/*.parquet and nodes/*.npy: float16, scaled to unit norm, and checked; a NaN, an
infinity or a zero vector is refused with its row. A task reads its own rows of the file. Memory: one shard.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphbuild.errors import InputError, public
from graphbuild.nodes.encode import embeddings_entry
from graphbuild.nodes.samples import COLUMNS, SCHEMA
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.files import file_identity, open_parts
from graphbuild.store.layout import SAMPLES, TEXTS, VECTORS, shard_name
from graphbuild.store.mapped import read_header
from graphbuild.store.shards import Shard, is_whole, write_shards
from graphbuild.store.store import Json, Store, Writer

EMPTY_NORM = 1e-6


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    assert embed.vectors is not None
    with open_parts(embed.vectors) as file:
        rows = (
            npy_header(file, embed.vectors)[0][0]
            if public(embed.vectors).endswith(".npy")
            else _open_parquet(file, embed).metadata.num_rows
        )
    if rows == 0:
        raise InputError(f"{embed.vectors} holds no vectors", "give a file with at least two rows")
    identity = file_identity(embed.vectors)
    return [
        Task(
            stage="vectors",
            name=shard_name(number),
            settings={
                "first_row": first,
                "rows": min(embed.shard_size, rows - first),
                "vector_column": embed.vector_column,
            },
            inputs={"vectors": identity},
            hints={"url": embed.vectors},
        )
        for number, first in enumerate(range(0, rows, embed.shard_size))
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    url, first, count = task.hints["url"], task.settings["first_row"], task.settings["rows"]
    with open_parts(url) as file:
        values = (
            _npy_rows(file, url, first, count)
            if public(url).endswith(".npy")
            else _parquet_rows(file, url, task.settings)
        )
    vectors = unit_vectors(values, first_row=first, source=url)
    rows = np.arange(first, first + count)
    empty = {field.name: pa.nulls(count, field.type) for field in SCHEMA}
    columns = {**empty, "row": pa.array(rows), "key": pa.array(rows.astype(str)), "node": pa.array(rows)}
    writer.table(SAMPLES.format(task.name), pa.table({name: columns[name] for name in COLUMNS}))
    writer.table(
        TEXTS.format(task.name),
        pa.table({"node": rows, "text": empty["text"], "samples": np.ones(count, np.int64)}),
    )
    writer.array(VECTORS.format(task.name), vectors)
    return {"counts": {"samples": count, "nodes": count}, "d": vectors.shape[1]}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    entry = embeddings_entry(done, {"encoder": "ready vectors", "weights_sha256": None})
    return {**write_shards(store, vector_shards(done)), **entry}


def vector_shards(done: Iterable[Json]) -> list[Shard]:
    """The shards of this stage's records, in order of row."""
    places = ((record["task"], record["settings"]["first_row"], record["settings"]["rows"]) for record in done)
    found = [Shard(name, first, count, first, count, None) for name, first, count in places]
    return sorted(found, key=lambda shard: shard.first_row)


def unit_vectors(values: np.ndarray[Any, Any], *, first_row: int, source: str) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Rows scaled to unit norm as float16 [n, d]; InputError naming the row of a NaN, an infinity or a zero vector."""
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(exact, axis=1)
    for bad, what in (
        (~np.isfinite(exact).all(axis=1), "holds NaN or infinity"),
        (~np.isfinite(norms), "is too long for float64"),
        (norms < EMPTY_NORM, "is a zero vector"),
    ):
        if bad.any():
            row = first_row + int(np.argmax(bad))
            raise InputError(
                f"{source}: row {row} {what} ({int(bad.sum())} such rows near it)",
                "remove or mend these rows, then run again",
            )
    unit: np.ndarray[Any, np.dtype[np.float16]] = (exact / norms[:, None]).astype(np.float16)
    return unit


def npy_header(file: IO[bytes], url: str) -> tuple[tuple[int, int], bool, np.dtype[Any], int]:
    """Shape, whether columns lie behind each other, type, and where the numbers begin; InputError when it is cut."""
    try:
        shape, fortran, dtype = read_header(file)
        begin = file.tell()
        if file.seek(0, io.SEEK_END) - begin < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it is cut: {file.tell():,} bytes for {dtype} {list(shape)}")
    except (ValueError, EOFError) as error:
        raise InputError(
            f"{url} is not a whole .npy file ({error})", "write it with numpy.save, as a float array [n, d]"
        ) from None
    if len(shape) != 2 or not np.issubdtype(dtype, np.floating) or shape[1] == 0:
        raise InputError(f"{url} holds {dtype} {list(shape)}", "give a float array [n, d], one vector a row")
    return shape, fortran, dtype, begin


def _npy_rows(file: IO[bytes], url: str, first: int, count: int) -> np.ndarray[Any, Any]:
    """Rows first..first+count-1, [count, d]; no other bytes are read."""
    (rows, width), fortran, dtype, begin = npy_header(file, url)

    def numbers(at: int, length: int) -> np.ndarray[Any, Any]:
        file.seek(begin + at * dtype.itemsize)
        return np.frombuffer(file.read(length * dtype.itemsize), dtype)

    if fortran:
        return np.stack([numbers(column * rows + first, count) for column in range(width)], axis=1)
    return numbers(first * width, count * width).reshape(count, width)


def _open_parquet(source: IO[bytes], embed: Any) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(source, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{embed.vectors} is neither .npy nor parquet ({error})", "give --vectors a .npy or parquet file"
        ) from None
    if file.schema_arrow.names.count(embed.vector_column) != 1:
        raise InputError(
            f"{embed.vectors} has no column {embed.vector_column!r}, or several; "
            f"it has {', '.join(map(repr, file.schema_arrow.names[:50]))}",
            "name the vectors' column by --vector-column",
        )
    kind = file.schema_arrow.field(embed.vector_column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and pa.types.is_floating(kind.value_type)):
        raise InputError(
            f"{embed.vectors}: column {embed.vector_column!r} is {kind}", "give a column of lists of floats"
        )
    return file


def _parquet_rows(source: IO[bytes], url: str, settings: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Rows [first_row, first_row + rows) of a list column, reading only the row groups that hold them."""
    first, count = settings["first_row"], settings["rows"]
    file = pq.ParquetFile(source, pre_buffer=False)
    begin, parts = 0, []
    try:
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if begin < first + count and begin + size > first:
                column = file.read_row_group(group, [settings["vector_column"]]).column(0)
                parts.append(column.slice(max(first - begin, 0), first + count - max(begin, first)))
            begin += size
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url} is truncated or damaged ({error})", "fetch or write the file again") from None
    column = pa.chunked_array([chunk for part in parts for chunk in part.chunks]).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    if (lengths != lengths[0]).any() or lengths[0] < 1:
        row = int(np.argmax(lengths != lengths[0])) if lengths[0] > 0 else 0
        what = "has no vector" if lengths[row] < 1 else f"has a vector of {lengths[row]} numbers, not {lengths[0]}"
        raise InputError(
            f"{url}: row {first + row} of column {settings['vector_column']!r} {what}",
            "give every row a vector of one length",
        )
    return np.asarray(column.flatten()).reshape(count, -1)


STAGE = Stage(
    name="vectors",
    title="vectors",
    plan=plan,
    run=run,
    finish=finish,
    entries=("shards", "embeddings"),
    whole=is_whole,
)
