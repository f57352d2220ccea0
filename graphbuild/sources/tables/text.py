"""Text lists of any dialect: bytes to lines, and the dialect's records to chunks.

A row that is blank, over 32 MiB, ragged or not UTF-8 is rejected alone. Memory is one chunk and the first MiB,
from which the dialect is known; of an overlong line only the first 32 MiB are held.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import pyarrow as pa

from graphbuild.errors import InputError, public
from graphbuild.sources.tables.spec import BLANK, CHUNK_BYTES, NO_URL, NOT_UTF8, Chunk, TableSpec, is_utf8, rejected

MAX_ROW_BYTES = 32 << 20
_HEAD_BYTES, _READ_BYTES = 1 << 20, 1 << 20
_FOREIGN = {
    b"\x1f\x8b": ("gzip data", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "add .zst to its name"),
    b"PAR1": ("parquet", "name it .parquet"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or export it as CSV"),
}

Field = bytes | list[str] | None  # in UTF-8, or several texts
# A row's bytes without the line end, and its fields, or the reason why it has none.
Record = tuple[bytes, Sequence[Field] | str]
# The output's columns as (name, index in the file); the file's number of columns; its records.
TextTable = tuple[list[tuple[str, int]], int, Iterator[Record]]


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


class Span:
    """The bytes begin..end-1 of a file, as one to read."""

    def __init__(self, file: Any, begin: int, end: int) -> None:
        file.seek(begin)
        self._file, self._left = file, end - begin

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def line_begin(file: Any, part: int, parts: int) -> int:
    """Where the first line begins that begins in a part of a file, one of `parts` equal ones, or later: its end."""
    size = file.seek(0, io.SEEK_END)
    place = size * part // parts - 1
    if place < 0:
        return 0
    file.seek(place)  # a line that begins at the part's first byte is its own
    while place < size and (data := file.read(_READ_BYTES)):
        if (found := data.find(b"\n")) >= 0:
            return int(place + found + 1)
        place += len(data)
    return int(size)


def read_lines(path: str, file: Any) -> Iterator[bytes]:
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
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
            raise  # of reading, not of unpacking
        kind = "zstd" if public(path).lower().endswith(".zst") else "gzip"
        cause = f"{path}: broken {kind} after line {number:,}: {error}"
        raise InputError(cause, f"fetch the file again; `{kind} -t` tests it") from error


def read_head(path: str, lines: Iterator[bytes]) -> list[bytes]:
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


def chomp(line: bytes) -> bytes:
    """The line without its end, LF or CRLF."""
    return line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")


def text_chunks(
    spec: TableSpec, selected: list[tuple[str, int]], width: int, records: Iterable[Record], chunk_rows: int
) -> Iterator[Chunk]:
    """Chunks out of the records of a TextTable; a record that cannot be delivered is rejected with the reason."""
    url = dict(selected)["url"] if "url" in spec.columns else None
    positions: list[int] = []
    targets: list[tuple[list[Field], int]] = [([], index) for _, index in selected]
    rejects: list[tuple[int, str, bytes]] = []
    size = 0

    def chunk() -> Chunk:
        columns = {"position": pa.array(positions, pa.int64())}
        for (name, _), (column, _) in zip(selected, targets, strict=True):
            if any(isinstance(value, list) for value in column):
                texts = [[value.decode()] if isinstance(value, bytes) else value for value in column]
                columns[name] = pa.array(texts, pa.large_list(pa.large_string()))
            else:  # several times faster than an array of strings at once; the cast validates the UTF-8 again
                columns[name] = pa.array(column, pa.large_binary()).cast(pa.large_string())
        return Chunk(pa.table(columns), rejected(rejects))

    for position, (raw, fields) in enumerate(records):
        if not raw:
            reason = BLANK
        elif len(raw) > MAX_ROW_BYTES:
            reason = f"longer than {MAX_ROW_BYTES:,} bytes"
        elif not raw.isascii() and not is_utf8(raw):
            reason = NOT_UTF8
        elif isinstance(fields, str):
            reason = fields
        elif len(fields) != width:
            reason = f"{len(fields)} fields instead of {width}"
        elif url is not None and not (cast(bytes | None, fields[url]) or b"").strip():
            reason = NO_URL
        else:
            reason = ""
            positions.append(position)
            for column, index in targets:
                column.append(fields[index])
        if reason:
            rejects.append((position, reason, raw))
        size += len(raw)
        if len(positions) + len(rejects) >= chunk_rows or size >= CHUNK_BYTES:
            yield chunk()
            positions, rejects, size = [], [], 0
            targets = [([], index) for _, index in selected]
    if positions or rejects:
        yield chunk()
