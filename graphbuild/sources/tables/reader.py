"""A list of any format as a stream of chunks, in one pass: the file's name decides the format.

The file and its columns are checked before the first chunk is asked for. Memory is one chunk.
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.errors import InputError, public
from graphbuild.sources.tables.delimited import delimited_table, is_quoted_tsv
from graphbuild.sources.tables.jsonl import json_table
from graphbuild.sources.tables.parquet import parquet_chunks
from graphbuild.sources.tables.spec import Chunk, TableSpec
from graphbuild.sources.tables.text import Span, line_begin, read_head, read_lines, text_chunks
from graphbuild.store.remote import file_system, reaching

ENDING = re.compile(r"\.(parquet|csv|tsv|jsonl)(\.gz|\.zst)?$", re.IGNORECASE)


def read_chunks(spec: TableSpec, *, keep_others: bool = False, chunk_rows: int = 100_000) -> Iterator[Chunk]:
    """Stream a list: delivered and rejected rows are all its rows, in order. Chunk borders are reproducible.

    The file and its columns are checked before this returns; damage further on raises while iterating.

    - Text is UTF-8, with or without a BOM; a line ends in LF or CRLF, the last may lack its end. A row that
      is not UTF-8, ragged, blank or over 32 MiB is rejected alone. NUL bytes are ordinary text.
    - CSV quotes with double quotes, doubled inside; a quoted field may hold up to 1,000 lines. A quote that
      is never closed or is followed by text rejects the line it stands in and no other; a quote inside an
      unquoted field is text.
    - TSV is literal, as in IANA's definition; with a preset always. With a header it is read with CSV's
      quoting if its first MiB has fewer bad rows that way, or has what only a quoting writer makes: a
      quoted column name, or a quoted field with doubled quotes or a CR inside.
    - JSONL: a role's value must be a string or null (a key may be an integer). The other columns are the
      keys in the first MiB, as text or JSON; with `keep_others` a row with a later new key is rejected: no
      column holds it.
    - Parquet: string, binary and dictionary columns; for a key integers too. Only the columns wanted are
      read.

    A null or empty "url" is rejected; a null caption or key (parquet and JSONL have them) is delivered.
    Another column that is named like a role, or "position", gets the prefix "other_".

    Raises:
        InputError: the file is missing, a folder, empty, of another format or damaged; a column is missing,
            ambiguous or not text.
    """
    chunks = _chunks(spec, keep_others, chunk_rows)
    first = next(chunks, None)
    if first is None:
        raise InputError(f"{spec.path} has no rows", "give a list with at least one row")
    return chain([first], chunks)


def read_parts(
    spec: TableSpec, paths: Sequence[str], *, keep_others: bool = False, chunk_rows: int = 100_000
) -> Iterator[tuple[int, int, Chunk]]:
    """The number of each chunk's file, that file's first position, and the chunk, of a list in several files, which lie
    behind each other. Positions go on from file to file, and reasons say a row's place in its own. One of several may
    be empty.

    Raises:
        InputError: as `read_chunks`, of any of them.
    """
    begin = 0
    for part, path in enumerate(paths):
        one, rows = replace(spec, path=path), 0
        read: Callable[..., Iterator[Chunk]] = _chunks if len(paths) > 1 else read_chunks
        for chunk in read(one, keep_others=keep_others, chunk_rows=chunk_rows):
            rows += len(chunk.rows) + len(chunk.rejected)
            yield part, begin, placed(chunk, begin, path if len(paths) > 1 else "")
        begin += rows


def placed(chunk: Chunk, begin: int, path: str = "") -> Chunk:
    """A chunk so many rows behind; path: of its file, where reasons tell the row there."""
    rejected = _moved(chunk.rejected, begin)
    if path and len(rejected):
        told = zip(rejected["reason"].to_pylist(), chunk.rejected["position"].to_pylist(), strict=True)
        reasons = pa.array([with_place(reason, path, row) for reason, row in told], pa.string())
        rejected = rejected.set_column(rejected.column_names.index("reason"), "reason", reasons)
    return Chunk(_moved(chunk.rows, begin), rejected)


def can_be_cut(spec: TableSpec) -> bool:
    """Whether `read_piece` can take parts of a file: not where a quoted field may hold lines, nor of packed text."""
    if spec.name.endswith(".tsv") and not spec.preset:
        with reaching(spec.path), _open(spec.path) as file:
            return not is_quoted_tsv(read_head(spec.path, read_lines(spec.path, file)))
    return spec.name.endswith((".parquet", ".jsonl", ".tsv"))


def read_piece(spec: TableSpec, part: int, parts: int, *, keep_others: bool) -> Iterator[Chunk]:
    """The rows that begin in a part of a file, one of `parts` equal ones, as `read_chunks` has them but for positions,
    which are those in the part: row groups of parquet, lines of other formats. Unless there is one part, `can_be_cut`.

    Raises:
        InputError: as `read_chunks`.
    """
    return _chunks(spec, keep_others, 100_000, part, parts)


def with_place(reason: str, path: str, row: int) -> str:
    """Why a row of one of several files is rejected, with its place there."""
    return f"{reason}{', ' if ': ' in reason else ': '}row {row} of {public(path).rpartition('/')[2]}"


def _moved(table: pa.Table, rows: int) -> pa.Table:
    at = table.schema.get_field_index("position")
    return table.set_column(at, table.schema.field(at), pc.add(table["position"], rows)) if rows else table


def unpacked(name: str, file: Any) -> Any:
    """The content of a file that its name says to be compressed, or the file."""
    if name.endswith(".zst"):
        return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file


def _chunks(spec: TableSpec, keep_others: bool, chunk_rows: int, part: int = 0, parts: int = 1) -> Iterator[Chunk]:
    with reaching(spec.path), _open(spec.path) as file:
        suffix = spec.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
        if suffix not in ("parquet", "csv", "tsv", "jsonl") or spec.name.endswith((".parquet.gz", ".parquet.zst")):
            fix = "name it .parquet, .csv, .tsv or .jsonl; the text formats may end in .gz or .zst"
            raise InputError(f"{spec.path}: unknown extension", fix)
        if spec.preset and suffix != "tsv":
            cause = f"{spec.path} is no TSV, but --preset {spec.preset} means a headerless TSV"
            raise InputError(cause, "drop --preset and name the columns")
        if suffix == "parquet":
            yield from parquet_chunks(spec, file, keep_others, chunk_rows, part, parts)
            return
        begin, end = (line_begin(file, part + more, parts) for more in (0, 1)) if parts > 1 else (0, 0)
        lines = read_lines(spec.path, Span(file, 0, end) if end else unpacked(spec.name, file))
        head = read_head(spec.path, lines)
        if begin:  # the columns are known from the first lines of the file, which are not of this part
            lines = read_lines(spec.path, Span(file, begin, end))
        if head:
            read = json_table if suffix == "jsonl" else partial(delimited_table, is_csv=suffix == "csv")
            selected, width, records = read(spec, head, lines, keep_others)
            has_names = suffix == "tsv" and not spec.preset
            records = islice(records, len(head) - has_names, None) if begin else records
            yield from text_chunks(spec, selected, width, records, chunk_rows)


def _open(path: str) -> Any:
    try:
        files, inner = file_system(path)
        try:
            with reaching(path):
                return files.open(inner, "rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            if files.isdir(inner):
                raise InputError(f"{path} is a folder", "name one file in it") from error
            raise InputError(f"{path} does not exist", "check the path of the list") from error
    except io.UnsupportedOperation as error:
        raise InputError(f"{path} is a pipe, and a list is read more than once", "write it to a file first") from error
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path} cannot be opened: {error}", "check the path of the list") from error
