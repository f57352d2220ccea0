"""Reads URL lists and caption lists: parquet, CSV, TSV, JSONL (text also as .gz), at a path or a fsspec URL.

Every row of the file is delivered, or rejected with its position, a reason and its content. No type is
guessed: "007", "NA" and "null" stay text. One pass; memory is one chunk (`chunk_rows` rows or about 64 MiB,
whichever comes first) and, for parquet, the pages being decoded. `read_chunks` describes the dialects.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphbuild.errors import ConfigError, InputError

PRESETS: Mapping[str, tuple[str, ...]] = {"cc3m": ("caption", "url"), "cc12m": ("url", "caption")}
"""The columns, in order, of the headerless and unquoted TSVs as published."""

MAX_ROW_BYTES = 32 << 20
MAX_ROW_LINES = 1_000
MAX_CONTENT_CHARACTERS = 10_000
_CHUNK_BYTES, _HEAD_BYTES, _READ_BYTES = 64 << 20, 1 << 20, 1 << 20
# Row sizes of parquet are seen here, not in its metadata: pyarrow's getters abort the process on damaged files.
_BATCH_ROWS = 1_000

_FOREIGN = {
    b"\x1f\x8b": ("gzip data", "add .gz to its name"),
    b"PAR1": ("parquet", "name it .parquet"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or export it as CSV"),
}
_BLANK, _NO_URL, _NOT_UTF8 = "blank line", "no url", "invalid UTF-8"
_UNCLOSED, _AFTER_QUOTE = "a quote that is never closed", "text after a closing quote"
_CLOSING_QUOTE = re.compile(rb'(?:[^"]++|"")*+"')
_QUOTED_TSV_FIELD = re.compile(rb'(?:^|[\t\n])"((?:[^"\t\n]++|"")*+)"(?=[\t\r\n]|\Z)')
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
_REJECTED = pa.schema([("position", pa.int64()), ("reason", pa.string()), ("content", pa.large_string())])

# A row's bytes without the line end, and its fields in UTF-8, or the reason why it has none.
_Record = tuple[bytes, Sequence[bytes | None] | str]
# The output's columns as (name, index in the file); the file's number of columns; its records.
_TextTable = tuple[list[tuple[str, int]], int, Iterator[_Record]]


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """Where a list lies, and which of its columns (value) plays which role (key: "caption", "url" or "key").

    `preset` names a published headerless TSV, whose columns are called "caption" and "url".
    """

    path: str
    columns: Mapping[str, str]
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"there is no preset {self.preset!r}", f"--preset takes {' or '.join(PRESETS)}")


class Chunk(NamedTuple):
    """Consecutive rows of a list, both tables in the file's order.

    rows: position int64 (0-based row number in the file, the header not counted), a large_string column for
        each role, then, if asked for, the file's other columns.
    rejected: position int64, reason string, content large_string (the line; of parquet the role columns as
        JSON; cut at 10,000 characters with an ellipsis).
    """

    rows: pa.Table
    rejected: pa.Table


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


def _chunks(spec: TableSpec, keep_others: bool, chunk_rows: int) -> Iterator[Chunk]:
    with _open(spec.path) as file:
        name = (spec.path.partition("?")[0] if _is_url(spec.path) else spec.path).lower()
        suffix = name.removesuffix(".gz").rpartition(".")[2]
        if suffix not in ("parquet", "csv", "tsv", "jsonl") or name.endswith(".parquet.gz"):
            fix = "name it .parquet, .csv, .tsv or .jsonl; the text formats may end in .gz"
            raise InputError(f"{spec.path}: unknown extension", fix)
        if spec.preset and suffix != "tsv":
            cause = f"{spec.path} is no TSV, but --preset {spec.preset} means a headerless TSV"
            raise InputError(cause, "drop --preset and name the columns")
        if suffix == "parquet":
            yield from _parquet_chunks(spec, file, keep_others, chunk_rows)
            return
        lines = _lines(spec.path, gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file)
        head = _head(spec.path, lines)
        if head:
            read = _json_table if suffix == "jsonl" else partial(_delimited_table, is_csv=suffix == "csv")
            yield from _text_chunks(spec, *read(spec, head, lines, keep_others), chunk_rows)


def _open(path: str) -> Any:
    try:
        file_system, inner = fsspec.core.url_to_fs(path)
        try:
            return file_system.open(inner, "rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            if file_system.isdir(inner):
                raise InputError(f"{path} is a folder", "name one file in it") from error
            raise InputError(f"{path} does not exist", "check the path of the list") from error
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path} cannot be opened: {error}", "check the path of the list") from error


def _select(spec: TableSpec, names: list[str], keep_others: bool, hint: str = "") -> list[tuple[str, int]]:
    """The output's columns as (name, index in the file), roles first."""
    selected: list[tuple[str, int]] = []
    for role, column in spec.columns.items():
        if column not in names:
            folded = {name.casefold(): name for name in names}
            close = difflib.get_close_matches(column.casefold(), folded, n=1, cutoff=0.5)
            fix = f"try --{role}-column {folded[close[0]]!r}" if close else f"name one with --{role}-column"
            there = ", ".join(repr(name[:80]) for name in names[:50]) + (", ..." if len(names) > 50 else "")
            raise InputError(f"{spec.path} has no column {column!r}; its columns are {there}", hint or fix)
        if names.count(column) > 1:
            cause = f"{spec.path} has {names.count(column)} columns {column!r}"
            raise InputError(cause, f"rename them, or name another with --{role}-column")
        selected.append((role, names.index(column)))
    taken = {"position", *spec.columns}
    for index, name in enumerate(names if keep_others else []):
        if name not in spec.columns.values():
            while name in taken:
                name = f"other_{name}"
            taken.add(name)
            selected.append((name, index))
    return selected


def _rejected(rejects: Sequence[tuple[int, str, bytes]]) -> pa.Table:
    contents = []
    for _, _, raw in rejects:
        text = raw[: 4 * MAX_CONTENT_CHARACTERS + 4].decode(errors="replace")
        contents.append(text if len(text) <= MAX_CONTENT_CHARACTERS else text[:MAX_CONTENT_CHARACTERS] + "…")
    positions, reasons = [position for position, _, _ in rejects], [reason for _, reason, _ in rejects]
    return pa.table([positions, reasons, contents], schema=_REJECTED)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Raw(io.RawIOBase):
    """Makes anything with `read`, such as fsspec's files, fit for io.BufferedReader and its fast readline."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _lines(path: str, file: Any) -> Iterator[bytes]:
    """The lines with their ends. Of a line over MAX_ROW_BYTES only the beginning, which is still over it."""
    stream = io.BufferedReader(_Raw(file), _READ_BYTES)
    number = 0
    try:
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            yield line
            rest = line if len(line) > MAX_ROW_BYTES else b""
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(_READ_BYTES)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        cause = f"{path}: broken gzip after line {number:,}: {error}"
        raise InputError(cause, "fetch the file again; `gzip -t` tests it") from error


def _head(path: str, lines: Iterator[bytes]) -> list[bytes]:
    """The lines of the first MiB, from which the dialect is known; without the BOM."""
    head: list[bytes] = []
    size = 0
    while size < _HEAD_BYTES and (line := next(lines, b"")):
        head.append(line)
        size += len(line)
    for magic, (what, fix) in _FOREIGN.items():
        if head and head[0].startswith(magic):
            raise InputError(f"{path} holds {what}", fix)
    head[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in head[:1]]
    return head if head != [b""] else []


def _chomp(line: bytes) -> bytes:
    return line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")


def _text_chunks(
    spec: TableSpec, selected: list[tuple[str, int]], width: int, records: Iterable[_Record], chunk_rows: int
) -> Iterator[Chunk]:
    url = dict(selected)["url"] if "url" in spec.columns else None
    positions: list[int] = []
    targets: list[tuple[list[bytes | None], int]] = [([], index) for _, index in selected]
    rejects: list[tuple[int, str, bytes]] = []
    size = 0

    def chunk() -> Chunk:
        columns = {"position": pa.array(positions, pa.int64())}
        for (name, _), (column, _) in zip(selected, targets, strict=True):
            # Several times faster than an array of strings at once; the cast validates the UTF-8 again.
            columns[name] = pa.array(column, pa.large_binary()).cast(pa.large_string())
        return Chunk(pa.table(columns), _rejected(rejects))

    for position, (raw, fields) in enumerate(records):
        if not raw:
            reason = _BLANK
        elif len(raw) > MAX_ROW_BYTES:
            reason = f"longer than {MAX_ROW_BYTES:,} bytes"
        elif not raw.isascii() and not _is_utf8(raw):
            reason = _NOT_UTF8
        elif isinstance(fields, str):
            reason = fields
        elif len(fields) != width:
            reason = f"{len(fields)} fields instead of {width}"
        elif url is not None and not (fields[url] or b"").strip():
            reason = _NO_URL
        else:
            reason = ""
            positions.append(position)
            for column, index in targets:
                column.append(fields[index])
        if reason:
            rejects.append((position, reason, raw))
        size += len(raw)
        if len(positions) + len(rejects) >= chunk_rows or size >= _CHUNK_BYTES:
            yield chunk()
            positions, rejects, size = [], [], 0
            targets = [([], index) for _, index in selected]
    if positions or rejects:
        yield chunk()


def _delimited_table(
    spec: TableSpec, head: list[bytes], lines: Iterator[bytes], keep_others: bool, *, is_csv: bool
) -> _TextTable:
    if spec.preset:
        names = list(PRESETS[spec.preset])
        _check_preset(spec.path, spec.preset, _chomp(head[0]).decode(errors="replace").split("\t"))
        return _select(spec, names, keep_others), len(names), _literal_records(chain(head, lines))
    delimiter = b"," if is_csv else b"\t"
    quoted = is_csv or _is_quoted_tsv(head)
    all_lines = chain(head, lines)
    records = _quoted_records(all_lines, delimiter) if quoted else _literal_records(all_lines)
    raw, header = next(records)
    if b"\r" in raw and len(head) == 1:
        raise InputError(f"{spec.path}: its lines end in CR alone", "convert them: tr '\\r' '\\n'")
    if isinstance(header, str) or not raw or not _is_utf8(raw):
        reason = _BLANK if not raw else header if isinstance(header, str) else _NOT_UTF8
        cause = f"{spec.path}: the first line, which should name the columns, is bad: {reason}"
        raise InputError(cause, "mend the first line")
    names = [(name or b"").decode() for name in header]
    hint = ""
    if any(map(_is_url, names)):
        presets = [preset for preset in PRESETS if not is_csv and _fits(preset, names)]
        way = f"--preset {presets[0]}" if presets else "a first line that names the columns"
        hint = f"the first line looks like data, not like names: use {way}"
    return _select(spec, names, keep_others, hint), len(names), records


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _fits(preset: str, fields: list[str]) -> bool:
    """Whether the URL lies where the preset has it, and nowhere else."""
    return [_is_url(field) for field in fields] == [column == "url" for column in PRESETS[preset]]


def _check_preset(path: str, preset: str, first: list[str]) -> None:
    if {field.strip().casefold() for field in first} == set(PRESETS[preset]):
        raise InputError(f"{path} has a header, but --preset {preset} means a list without one", "drop --preset")
    for other in PRESETS:
        if other != preset and _fits(other, first):
            raise InputError(f"{path}: row 0 has its URL where {preset} has captions", f"use --preset {other}")


def _is_quoted_tsv(head: list[bytes]) -> bool:
    """Whether a writer's quoting, not its text, put the quotes into a headed TSV's first lines."""
    text = b"".join(head)
    if b'"' not in text:
        return False
    rows = [[fields for _, fields in read(iter(head))] for read in (_literal_records, _quoted_tsv_records)]
    literal, quoted = (sum(isinstance(row, str) or len(row) != len(all_[0]) for row in all_) for all_ in rows)
    if literal != quoted:
        return quoted < literal
    return rows[0][0] != rows[1][0] or any(
        b'""' in field or b"\r" in field for field in _QUOTED_TSV_FIELD.findall(text)
    )


def _literal_records(lines: Iterator[bytes]) -> Iterator[_Record]:
    for line in lines:
        raw = _chomp(line)
        yield raw, raw.split(b"\t")


def _quoted_records(lines: Iterator[bytes], delimiter: bytes) -> Iterator[_Record]:
    """RFC 4180 records; work is linear, as no quoted field is followed for more than MAX_ROW_LINES lines."""
    field = re.compile(rb'(?:"((?:[^"]++|"")*+)"|([^"D][^D]*+|))(D|\Z)'.replace(b"D", delimiter))

    def split(raw: bytes, fields: list[bytes | None]) -> tuple[str, int]:
        """Appends the fields; what is wrong, if anything, and where the field begins in which it is."""
        end = 0
        while match := field.match(raw, end):
            quoted, plain, more = match.groups()
            fields.append(plain if quoted is None else quoted.replace(b'""', b'"'))
            end = match.end()
            if not more:
                return "", end
        return _AFTER_QUOTE if _CLOSING_QUOTE.match(raw, end + 1) else _UNCLOSED, end

    ahead: deque[bytes] = deque()
    while line := ahead.popleft() if ahead else next(lines, b""):
        raw = _chomp(line)
        if b'"' not in raw:
            yield raw, raw.split(delimiter)
            continue
        fields: list[bytes | None] = []
        fault, begin = split(raw, fields)
        tail, size, taken = [line[begin:]], len(line), 0
        while fault == _UNCLOSED and taken + 1 < MAX_ROW_LINES and size <= MAX_ROW_BYTES:
            if taken == len(ahead):
                ahead.extend(islice(lines, 1))
            if taken == len(ahead):
                break
            tail.append(ahead[taken])
            size += len(ahead[taken])
            taken += 1
            if _CLOSING_QUOTE.match(tail[-1]):
                rest = b"".join(tail)
                fault, begin = split(_chomp(rest), fields)
                tail = [rest[begin:]]
        if fault:
            yield raw, fault
        else:
            yield _chomp(b"".join([line, *(ahead.popleft() for _ in range(taken))])), fields


_quoted_tsv_records = partial(_quoted_records, delimiter=b"\t")


def _json_table(spec: TableSpec, head: list[bytes], lines: Iterator[bytes], keep_others: bool) -> _TextTable:
    objects = [row for row in map(_json_object, head) if isinstance(row, dict)]
    if not objects:
        raise InputError(f"{spec.path}: none of the first {len(head):,} lines is a JSON object", "give JSON Lines")
    names = [name for name in dict.fromkeys(chain.from_iterable(objects)) if not _SURROGATE.search(name)]
    selected = [(name, names[index]) for name, index in _select(spec, names, keep_others)]
    for role, column in spec.columns.items():
        types = {type(row[column]) for row in objects if row.get(column) is not None}
        if types and not types & {str, int if role == "key" else str}:
            kind = " or ".join(sorted({_JSON_TYPES[each] for each in types}))
            raise _wrong_type(spec.path, role, column, kind)

    def fields_of(line: bytes) -> list[bytes | None] | str:
        row = _json_object(line)
        if isinstance(row, str):
            return row
        if keep_others and not row.keys() <= known:
            return f"key {min(row.keys() - known)[:80]!r}, which the first rows do not have"
        fields: list[bytes | None] = []
        for name, column in selected:
            value = row.get(column)
            if name in spec.columns and column not in row:
                return f"no column {column!r}"
            if not isinstance(value, str | None):
                if name in spec.columns and not (name == "key" and type(value) is int):
                    return f"{column!r} is {_JSON_TYPES[type(value)]}, not text"
                value = json.dumps(value, ensure_ascii=False)
            if value is not None and _SURROGATE.search(value):
                return f"{column!r} has a lone surrogate, which is no Unicode text"
            fields.append(None if value is None else value.encode())
        return fields

    known = set(names)
    records = ((_chomp(line), fields_of(line)) for line in chain(head, lines))
    return [(name, index) for index, (name, _) in enumerate(selected)], len(selected), records


def _json_object(line: bytes) -> dict[str, Any] | str:
    if not line.strip():
        return _BLANK
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return _NOT_UTF8
    except (ValueError, RecursionError) as error:
        return f"malformed JSON: {error}"
    return row if isinstance(row, dict) else f"the line is {_JSON_TYPES.get(type(row), 'no object')}"


def _wrong_type(path: str, role: str, column: str, kind: str) -> InputError:
    return InputError(f"{path}: column {column!r} is {kind}, not text", f"name another with --{role}-column")


def _parquet_chunks(spec: TableSpec, file: Any, keep_others: bool, chunk_rows: int) -> Iterator[Chunk]:
    position = 0
    try:
        # Pre-buffering would keep every row group of the file in memory.
        parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        schema = parquet.schema_arrow
        selected = _select(spec, schema.names, keep_others)
        for (role, index), column in zip(selected, spec.columns.values(), strict=False):
            if not _is_text(schema.field(index).type, role):
                raise _wrong_type(spec.path, role, column, str(schema.field(index).type))
        wanted = None if keep_others else list(dict.fromkeys(spec.columns.values()))
        others = selected[len(spec.columns) :]
        batches = parquet.iter_batches(min(chunk_rows, _BATCH_ROWS), columns=wanted, use_threads=False)
        for batch in _merge(batches, chunk_rows):
            yield _parquet_chunk(spec, batch, others, position)
            position += batch.num_rows
        if position != parquet.metadata.num_rows:
            raise pa.ArrowInvalid(f"its footer promises {parquet.metadata.num_rows:,} rows")
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = f"{spec.path}: not parquet, truncated or damaged (read up to row {position:,}): {error}"
        raise InputError(cause, "fetch or write the file again") from error


def _merge(batches: Iterable[pa.RecordBatch], chunk_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of up to chunk_rows rows or about _CHUNK_BYTES, out of small ones."""
    parts: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in chain(batches, [None]):
        if parts and (batch is None or rows + batch.num_rows > chunk_rows or size >= _CHUNK_BYTES):
            yield pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
            parts, rows, size = [], 0, 0
        if batch is not None and batch.num_rows:
            parts.append(batch)
            rows += batch.num_rows
            size += batch.nbytes


def _is_text(type_: pa.DataType, role: str) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if role == "key" and pa.types.is_integer(type_):
        return True
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(pa.types, f"is_{test}")(type_) for test in tests)


def _parquet_chunk(spec: TableSpec, batch: pa.RecordBatch, others: list[tuple[str, int]], position: int) -> Chunk:
    count = batch.num_rows
    table: dict[str, pa.Array] = {"position": pa.array(range(position, position + count), pa.int64())}
    raw: dict[str, pa.Array] = {}
    not_utf8, no_url = np.zeros(count, bool), np.zeros(count, bool)
    for role, column in spec.columns.items():
        values = batch.column(batch.schema.get_field_index(column))
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_integer(values.type):
            values = values.cast(pa.large_string())
        raw[column] = values = values.cast(pa.large_binary())
        try:
            text = values.cast(pa.large_string())
        except pa.ArrowInvalid:
            sound = [value is None or _is_utf8(value) for value in values.to_pylist()]
            not_utf8 |= ~np.array(sound)
            text = pc.if_else(pa.array(sound), values, None).cast(pa.large_string())
        if role == "url":
            is_empty = pc.equal(pc.ascii_trim_whitespace(text), "")
            no_url = pc.fill_null(is_empty, True).to_numpy(zero_copy_only=False)
        table[role] = text
    table |= {name: batch.column(index) for name, index in others}
    bad = not_utf8 | no_url
    if not bad.any():
        return Chunk(pa.table(table), _rejected([]))
    rejects = []
    for row in np.flatnonzero(bad).tolist():
        content: dict[str, str | None] = {}
        for column, array in raw.items():
            value = array[row].as_py()
            content[column] = None if value is None else value.decode(errors="replace")
        reason = _NOT_UTF8 if not_utf8[row] else _NO_URL
        rejects.append((position + row, reason, json.dumps(content, ensure_ascii=False).encode()))
    return Chunk(pa.table(table).filter(pa.array(~bad)), _rejected(rejects))
