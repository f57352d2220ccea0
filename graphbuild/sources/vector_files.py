"""Files of vectors: .npy [n, d], .npz with one, parquet with a column of lists; float16, float32, float64 or int8.

Of a .npy or parquet file, also of a remote one, only the rows or row groups that are asked for are read; a .npz is
read from its beginning. Memory: the rows asked for, at most five times over, or a row group.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphbuild.errors import InputError, public
from graphbuild.store.files import local_file, open_parts
from graphbuild.store.mapped import read_header
from graphbuild.store.remote import READERS

ENDING = re.compile(r"\.(npy|npz|parquet)$", re.IGNORECASE)
EMPTY_NORM = 1e-6
GAP_ROWS = 4  # between two rows that are read as one range
Array = np.ndarray[Any, Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]


def shapes_of(urls: Sequence[str], column: str) -> list[tuple[int, int]]:
    """Rows and width of each file, from its header; a width of 0 where there are no rows.

    Raises:
        InputError: one cannot be read, or holds vectors of another width than the first; both are named.
    """
    with ThreadPoolExecutor(READERS) as pool:
        shapes = list(pool.map(lambda url: _shape(url, column), urls))
    widths: dict[int, str] = {}
    for url, (_, width) in zip(urls, shapes, strict=True):
        if width:
            widths.setdefault(width, url)
    if len(widths) > 1:
        told = ", ".join(f"{width} in {public(url)}" for width, url in widths.items())
        raise InputError(f"vectors of mixed length: {told}", "give vectors of one encoder, all of one length")
    return shapes


def _shape(url: str, column: str) -> tuple[int, int]:
    if is_array(url):
        with _open_array(url, column) as (file, size):
            return npy_header(file, url, size)[0]
    with open_parts(url) as file:
        parquet = _open_parquet(file, url, column)
        rows, kind = parquet.metadata.num_rows, parquet.schema_arrow.field(column).type
        if pa.types.is_fixed_size_list(kind) or not rows:
            return rows, kind.list_size if rows else 0
        with _reading(url):
            first = next(parquet.iter_batches(1, columns=[column], use_threads=False)).column(0)[0]
        return rows, len(first) if first.is_valid else 0


def take_rows(url: str, column: str, rows: Rows, *, needed: bool) -> Array:
    """Those rows [n] of a file, ascending and each once, as they are there: [n, d].

    needed: a row of parquet without a vector is an error; else it is NaN, and d is 0 where all are without.

    Raises:
        InputError: the file cannot be read, or a row's vector is missing or of another length; it is named.
    """
    with _reading(url):
        if is_array(url):
            with _open_array(url, column) as (file, size):
                return _array_rows(file, url, size, rows)
        with open_parts(url) as file:
            return _parquet_rows(file, url, column, rows, needed=needed)


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{url} is truncated or damaged ({error})", "fetch or write the file again") from None


def is_array(url: str) -> bool:
    return public(url).lower().endswith((".npy", ".npz"))


@contextlib.contextmanager
def _open_array(url: str, column: str) -> Iterator[tuple[IO[bytes], int]]:
    """A file in .npy's format, and its bytes: the file itself, or the one of that name in a .npz, or its only one."""
    if public(url).lower().endswith(".npy"):
        with open_parts(url) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            yield file, size
        return
    with local_file(url) as path, contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            raise InputError(f"{url} is no .npz file ({error})", "write it with numpy.savez") from None
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if column not in names and len(names) != 1:
            raise InputError(
                f"{url} has no array {column!r}; it has {', '.join(map(repr, names[:50]))}",
                "name the vectors' array by --vector-column",
            )
        member = archive.namelist()[names.index(column) if column in names else 0]
        yield stack.enter_context(archive.open(member)), archive.getinfo(member).file_size


def npy_header(file: IO[bytes], url: str, size: int) -> tuple[tuple[int, int], bool, np.dtype[Any], int]:
    """Shape, whether columns lie behind each other, type, and where the numbers begin; InputError when it is cut."""
    try:
        shape, fortran, dtype = read_header(file)
        begin = file.tell()
        if size - begin < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it is cut: {size:,} bytes for {dtype} {list(shape)}")
    except (ValueError, EOFError) as error:
        raise InputError(
            f"{url} is not a whole .npy file ({error})", "write it with numpy.save, as a float array [n, d]"
        ) from None
    if len(shape) != 2 or not is_number_type(dtype) or shape[1] == 0:
        raise InputError(f"{url} holds {dtype} {list(shape)}", "give a float array [n, d], one vector a row")
    return shape, fortran, dtype, begin


def is_number_type(dtype: np.dtype[Any]) -> bool:
    """Whether vectors may be of this type: of floats, or int8."""
    return np.issubdtype(dtype, np.floating) or dtype == np.int8


def _array_rows(file: IO[bytes], url: str, size: int, rows: Rows) -> Array:
    (total, width), fortran, dtype, begin = npy_header(file, url, size)

    def numbers(at: int, length: int) -> Array:
        file.seek(begin + at * dtype.itemsize)
        return np.frombuffer(file.read(length * dtype.itemsize), dtype)

    parts = []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > GAP_ROWS) + 1):
        first, count = int(run[0]), int(run[-1] - run[0]) + 1
        if fortran:
            values = np.stack([numbers(column * total + first, count) for column in range(width)], axis=1)
        else:
            values = numbers(first * width, count * width).reshape(count, width)
        parts.append(values[run - first])
    return np.concatenate(parts)


def _open_parquet(source: IO[bytes], url: str, name: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(source, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{url} is neither .npy nor parquet ({error})", "give --vectors a .npy or parquet file"
        ) from None
    if file.schema_arrow.names.count(name) != 1:
        raise InputError(
            f"{url} has no column {name!r}, or several; it has {', '.join(map(repr, file.schema_arrow.names[:50]))}",
            "name the vectors' column by --vector-column",
        )
    kind = file.schema_arrow.field(name).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_int8(kind.value_type))):
        raise InputError(f"{url}: column {name!r} is {kind}", "give a column of lists of floats")
    return file


def _parquet_rows(source: IO[bytes], url: str, name: str, rows: Rows, *, needed: bool) -> Array:
    file = pq.ParquetFile(source, pre_buffer=False)
    begin, chunks = 0, []
    for group in range(file.metadata.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        mine = rows[np.searchsorted(rows, begin) : np.searchsorted(rows, end)] - begin
        if len(mine):
            chunks += file.read_row_group(group, [name], use_threads=False).column(0).take(pa.array(mine)).chunks
        begin = end
    column = pa.chunked_array(chunks).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    width = lengths[0] if needed else lengths.max()
    bad = (lengths != width) | (lengths < 1)
    if not needed:
        bad &= lengths > 0
    if bad.any():
        at = int(np.argmax(bad))
        what = "has no vector" if lengths[at] < 1 else f"has a vector of {lengths[at]} numbers, not {width}"
        raise InputError(f"{url}: row {rows[at]} of column {name!r} {what}", "give every row a vector of one length")
    flat = column.drop_null().flatten()
    values = np.asarray(flat.cast(pa.float64()) if flat.null_count else flat)
    found = np.full((len(rows), width), np.nan, np.result_type(values.dtype, np.float16))
    if width:
        found[lengths > 0] = values.reshape(-1, width)
    return found


def unit_or_fault(values: Array) -> tuple[np.ndarray[Any, np.dtype[np.float16]], dict[int, str]]:
    """Rows scaled to unit norm as float16 [n, d]; of those that cannot be, which are zeros there, what is wrong."""
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(exact, axis=1)
    faults: dict[int, str] = {}
    for bad, what in (
        (~np.isfinite(exact).all(axis=1), "holds NaN or infinity"),
        (~np.isfinite(norms), "is too long for float64"),
        (norms < EMPTY_NORM, "is a zero vector"),
    ):
        faults |= {row: what for row in np.flatnonzero(bad).tolist() if row not in faults}
    sound = np.isin(np.arange(len(exact)), list(faults), invert=True)
    unit = np.zeros(exact.shape, np.float16)
    unit[sound] = exact[sound] / norms[sound, None]
    return unit, faults
