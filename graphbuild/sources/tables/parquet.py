"""Parquet: string, binary and dictionary columns to chunks; only the columns wanted are read.

Pages that have checksums are verified against them, the number of rows against the footer. Memory is one chunk
and the pages being decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphbuild.errors import InputError
from graphbuild.sources.tables.spec import (
    CHUNK_BYTES,
    NO_URL,
    NOT_UTF8,
    WEIGHTS_ROLE,
    Chunk,
    TableSpec,
    is_utf8,
    rejected,
    select,
    wrong_type,
)

# Row sizes of parquet are seen here, not in its metadata: pyarrow's getters abort the process on damaged files.
_BATCH_ROWS = 1_000


def parquet_chunks(
    spec: TableSpec, file: Any, keep_others: bool, chunk_rows: int, part: int = 0, parts: int = 1
) -> Iterator[Chunk]:
    """The chunks of a parquet file, or of a part of its row groups, one of `parts` equal ones.

    Raises:
        InputError: the file is damaged; a column is missing, ambiguous or not text.
    """
    position = 0
    try:
        # Pre-buffering would keep every row group of the file in memory.
        parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        schema = parquet.schema_arrow
        selected = select(spec, schema.names, keep_others)
        for (role, index), column in zip(selected, spec.columns.values(), strict=False):
            type_ = schema.field(index).type
            if not _is_text(type_, role, spec):
                raise wrong_type(spec.path, role, column, str(type_))
        wanted = None if keep_others else list(dict.fromkeys(spec.columns.values()))
        others = selected[len(spec.columns) :]
        count = parquet.num_row_groups
        groups = range(count * part // parts, count * (part + 1) // parts)
        options = {"columns": wanted, "row_groups": groups, "use_threads": False}
        batches = parquet.iter_batches(min(chunk_rows, _BATCH_ROWS), **options)
        for batch in _merge(batches, chunk_rows):
            yield _parquet_chunk(spec, batch, others, position)
            position += batch.num_rows
        if parts == 1 and position != parquet.metadata.num_rows:
            raise pa.ArrowInvalid(f"its footer promises {parquet.metadata.num_rows:,} rows")
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = f"{spec.path}: not parquet, truncated or damaged (read up to row {position:,}): {error}"
        raise InputError(cause, "fetch or write the file again") from error


def _merge(batches: Iterable[pa.RecordBatch], chunk_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of up to chunk_rows rows or about CHUNK_BYTES, out of small ones."""
    parts: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in chain(batches, [None]):
        if parts and (batch is None or rows + batch.num_rows > chunk_rows or size >= CHUNK_BYTES):
            yield pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
            parts, rows, size = [], 0, 0
        if batch is not None and batch.num_rows:
            parts.append(batch)
            rows += batch.num_rows
            size += batch.nbytes


def _is_text(type_: pa.DataType, role: str, spec: TableSpec) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if role == "key" and pa.types.is_integer(type_):
        return True
    if _is_list(type_):
        inner = type_.value_type
        return spec.takes_lists(role) and (_is_number(inner) if role == WEIGHTS_ROLE else _is_text(inner, "", spec))
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(pa.types, f"is_{test}")(type_) for test in tests)


def _is_number(type_: pa.DataType) -> bool:
    return any(getattr(pa.types, f"is_{test}")(type_) for test in ("integer", "floating", "decimal", "null"))


def _is_list(type_: pa.DataType) -> bool:
    return any(getattr(pa.types, f"is_{test}")(type_) for test in ("list", "large_list", "fixed_size_list"))


def _texts(value: bytes | list[bytes | None] | None) -> list[bytes]:
    """The texts of a value, none, one or several."""
    return [text for text in (value if isinstance(value, list) else [value]) if text is not None]


def _parquet_chunk(spec: TableSpec, batch: pa.RecordBatch, others: list[tuple[str, int]], position: int) -> Chunk:
    count = batch.num_rows
    table: dict[str, pa.Array] = {"position": pa.array(range(position, position + count), pa.int64())}
    raw: dict[str, pa.Array] = {}
    not_utf8, no_url = np.zeros(count, bool), np.zeros(count, bool)
    for role, column in spec.columns.items():
        values = batch.column(batch.schema.get_field_index(column))
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if role == WEIGHTS_ROLE and _is_list(values.type):
            told = (None if each is None else json.dumps(each, default=float) for each in values.to_pylist())
            values = pa.array(told, pa.string())  # float: of decimals
        if pa.types.is_integer(values.type):
            values = values.cast(pa.large_string())
        binary, string = pa.large_binary(), pa.large_string()
        if _is_list(values.type):
            binary, string = pa.large_list(binary), pa.large_list(string)
        raw[column] = values = values.cast(binary)
        try:
            text = values.cast(string)
        except pa.ArrowInvalid:
            sound = [all(map(is_utf8, _texts(value))) for value in values.to_pylist()]
            not_utf8 |= ~np.array(sound)
            text = pc.if_else(pa.array(sound), values, None).cast(string)
        if role == "url":
            is_empty = pc.equal(pc.ascii_trim_whitespace(text), "")
            no_url = pc.fill_null(is_empty, True).to_numpy(zero_copy_only=False)
        table[role] = text
    table |= {name: batch.column(index) for name, index in others}
    bad = not_utf8 | no_url
    if not bad.any():
        return Chunk(pa.table(table), rejected([]))
    rejects = []
    for row in np.flatnonzero(bad).tolist():
        content: dict[str, str | None] = {}
        for column, array in raw.items():
            texts = [text.decode(errors="replace") for text in _texts(array[row].as_py())]
            content[column] = "; ".join(texts) if texts else None
        reason = NOT_UTF8 if not_utf8[row] else NO_URL
        rejects.append((position + row, reason, json.dumps(content, ensure_ascii=False).encode()))
    return Chunk(pa.table(table).filter(pa.array(~bad)), rejected(rejects))
