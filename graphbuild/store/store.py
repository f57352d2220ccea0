"""A job's output folder, on any fsspec URL: where files lie, and the commit protocol that keeps half-written ones out.

A file is written under a temporary name, flushed to disk and renamed (one upload on an object store); the record that
a task is done (`graphbuild.runner.stage`) is written after all its files. Layout and formats: docs/reference/format.md.
Memory: nothing is held; arrays are memory-mapped (a remote store's arrays are first copied to a local cache folder).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from graphbuild.errors import ConfigError, StageError, StorageError
from graphbuild.store.checksum import file_sha256
from graphbuild.store.layout import MANIFEST
from graphbuild.store.leftovers import hold
from graphbuild.store.remote import READERS, cache_folder, cached_copy, file_system, reaching, version

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT_VERSION = 1
TABLE_VERSION = 2  # of a manifest whose shards lie in a table (graphbuild.store.shards); older graphbuilds refuse it
HEADER_BYTES = 128  # of a .npy file that `Writer.array` wrote
TOGETHER = 1_000  # JSON objects that are read as one
SETTLED_NS = 2 * 10**9  # after which the next change of a file shows in its date
Json = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """The store at `url`, a local folder or any fsspec URL. Cheap to pickle; opens its file system on first use."""

    url: str

    def __post_init__(self) -> None:
        _, root = file_system(self.url)
        if "://" not in self.url:  # workers may run in another folder
            object.__setattr__(self, "url", root)

    @cached_property
    def fs(self) -> fsspec.AbstractFileSystem:
        return file_system(self.url, use_listings_cache=False)[0]

    @cached_property
    def root(self) -> str:
        return str(file_system(self.url)[1]).rstrip("/")

    @cached_property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of a file of the store, as its file system spells it."""
        return f"{self.root}/{name}"

    def resolve(self, url: str) -> str:
        """A path or URL as recorded in the store: one without a root lies in the store."""
        return url if "://" in url or url.startswith("/") else self.display(url)

    def display(self, name: str = "") -> str:
        """The path or URL to print for a file of the store."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    # -- reading

    def exists(self, name: str) -> bool:
        with reaching(self.display(name)):
            return bool(self.fs.exists(self.path(name)))

    def sizes(self, folder: str) -> dict[str, int]:
        """Name in the store -> bytes, for each file of one folder; one listing, empty when there is no folder."""
        return {name: size for name, (size, _) in self.listed(folder).items()}

    def listed(self, folder: str) -> dict[str, tuple[int, object]]:
        """As `sizes`, with what else tells that a file has changed; None where it may have, unseen."""
        with contextlib.suppress(FileNotFoundError), reaching(self.display(folder)):
            if self.is_local:
                return {f"{folder}/{name}": told for name, told in listed_here(self.path(folder))}
            files = [entry for entry in self.fs.ls(self.path(folder), detail=True) if entry["type"] == "file"]
            return {f"{folder}/{e['name'].rsplit('/', 1)[-1]}": (int(e["size"]), version(e)) for e in files}
        return {}

    def read_bytes(self, name: str) -> bytes:
        with reaching(self.display(name)):
            return bytes(self.fs.cat_file(self.path(name)))

    def read_json(self, name: str) -> Json | None:
        """The JSON object in a file, or None when the file is not there."""
        try:
            text = self.read_bytes(name)
        except FileNotFoundError:
            return None
        try:
            value: Json = json.loads(text, parse_constant=lambda _: None)  # a NaN of versions that wrote one
        except ValueError as error:
            raise StageError(
                f"{self.display(name)} is not valid JSON ({error})", "restore it, or build into a new folder"
            ) from error
        return value

    def read_jsons(self, sizes: Mapping[str, int]) -> list[Json | None]:
        """Many JSON objects, files of these sizes, at once; None for one that is damaged.

        An object store fetches them side by side: a request each, as their sizes are known.
        """
        names = list(sizes)
        if self.is_local or not names:
            contents = [_content(self.path(name)) for name in names]
        else:
            contents = self.ranges(names, [0] * len(names), list(sizes.values()))
        parts = (contents[begin : begin + TOGETHER] for begin in range(0, len(contents), TOGETHER))
        return [value for part in parts for value in _parsed(part)]

    def ranges(self, names: Sequence[str], begins: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Bytes begin..end-1 of each file, fewer at its end; of an object store side by side."""
        with reaching(self.display(names[0])):
            return list(self.fs.cat_ranges([self.path(name) for name in names], begins, ends, on_error="raise"))

    def local_copy(self, name: str, told: tuple[int, object] | None = None) -> Path:
        """A local path with the file's content: the file itself, or a copy in this user's cache folder. told: what
        `listed` told of it, in place of a request."""
        if self.is_local:
            return Path(self.path(name))
        with reaching(self.display(name)):
            return cached_copy(self.fs, self.path(name), self.display(name), told)

    def array(self, name: str, told: tuple[int, object] | None = None) -> np.ndarray[Any, Any]:
        """A .npy file, memory-mapped read-only; never unpickles. told: as for `local_copy`."""
        from graphbuild.store.mapped import map_array

        try:
            return map_array(self.local_copy(name, told))
        except (ValueError, OSError) as error:
            raise self._damaged(name, f"cannot be read as a .npy array ({error})") from error

    def rows(self, name: str, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Rows begin..end-1 of a .npy file; of a remote one no others are fetched."""
        import numpy as np

        from graphbuild.store.mapped import read_header

        if self.is_local:
            return self.array(name)[begin:end]
        with reaching(self.display(name)):
            header = io.BytesIO(self.fs.cat_file(self.path(name), start=0, end=HEADER_BYTES))
            shape, _, dtype = read_header(header)
            row = dtype.itemsize * math.prod(shape[1:])
            places = {"start": header.tell() + begin * row, "end": header.tell() + end * row}
            content = self.fs.cat_file(self.path(name), **places) if begin < end else b""
        if len(content) != (end - begin) * row:
            raise self._damaged(name, f"ends before its row {end:,}")
        return np.frombuffer(content, dtype).reshape(end - begin, *shape[1:])

    def rows_of(self, names: Sequence[str], begins: Sequence[int], ends: Sequence[int]) -> np.ndarray[Any, Any]:
        """Rows begin..end-1 of each file, as of `rows`, behind each other; those of an object store side by side."""
        import numpy as np

        with ThreadPoolExecutor(READERS) as pool:
            return np.concatenate(list((map if self.is_local else pool.map)(self.rows, names, begins, ends)))

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A parquet file as an Arrow table."""
        with self._parquet(name) as parquet:
            return parquet.read(columns=columns, use_threads=False)

    def footer(self, name: str) -> pq.FileMetaData:
        """What a parquet file says of its row groups; some ms of parsing where there are hundreds."""
        with self._parquet(name) as parquet:
            return parquet.metadata

    def row_group(self, name: str, columns: list[str], row: int, footer: pq.FileMetaData) -> pa.Table:
        """Of a parquet file the row group that holds a row, where all but the last are of one size."""
        with self._parquet(name, footer) as parquet:
            group = row // max(footer.row_group(0).num_rows, 1)
            return parquet.read_row_group(group, columns=columns, use_threads=False)

    @contextlib.contextmanager
    def _parquet(self, name: str, footer: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
        """A parquet file to read from; StageError where it is damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            path = self.path(name)
            with (
                reaching(self.display(name)),
                contextlib.nullcontext(path) if self.is_local else self.fs.open(path, "rb") as file,
                # Arrow's own threads may outlive the interpreter and abort it while they hold a Python file's buffers.
                pq.ParquetFile(file, metadata=footer, pre_buffer=False, page_checksum_verification=True) as parquet,
            ):
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(name, f"cannot be read as parquet ({error})") from error

    def _damaged(self, name: str, fault: str) -> StageError:
        return StageError(f"{self.display(name)} {fault}", f"run `graphbuild verify {self.url}` to see what is damaged")

    # -- writing

    @contextlib.contextmanager
    def staged(self, name: str, *, durable: bool = True) -> Iterator[Path]:
        """A local path to write to; committed under `name` on a clean exit, removed otherwise.

        durable: flushed to disk before it gets its name; scratch is not. The temporary file is locked while it is
        written, which tells it from the leftovers of a killed process (`graphbuild.store.leftovers`).
        """
        final = self.path(name)
        folder = Path(final).parent if self.is_local else cache_folder()
        temporary = folder / f".{Path(final).name}.{uuid.uuid4().hex}.tmp"
        with reaching(self.display(name), folder=folder):
            if self.is_local:
                folder.mkdir(parents=True, exist_ok=True)
            locked = hold(temporary)
            try:
                yield temporary
                if not self.is_local:
                    self.fs.put_file(str(temporary), final)
                elif durable:
                    _flush(temporary)
                    temporary.rename(final)
                    _flush(folder)
                else:
                    temporary.rename(final)
            finally:
                temporary.unlink(missing_ok=True)
                locked.close()

    def write_bytes(self, name: str, content: bytes, *, durable: bool = True) -> None:
        with self.staged(name, durable=durable) as path:
            path.write_bytes(content)

    def write_json(self, name: str, value: Mapping[str, Any], *, durable: bool = True) -> None:
        self.write_bytes(name, json_text(value), durable=durable)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), reaching(self.display(name)):
            self.fs.rm_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), reaching(self.display(name)):
            self.fs.rm(self.path(name), recursive=True)

    def check_writable(self) -> None:
        """Raise ConfigError when nothing can be written here; leaves nothing behind (killed: until the next time)."""
        probe = ".graphbuild-probe"
        try:
            self.write_bytes(probe, b"")
            self.remove(probe)
        except OSError as error:
            raise self.unwritable(error) from error

    def unwritable(self, error: OSError) -> ConfigError:
        """The error for a store that one may not write to."""
        return ConfigError(
            f"cannot write to the store {self.url} ({error.strerror or error})",
            "give STORE a folder or URL that you may write to",
        )

    # -- the manifest

    def manifest(self) -> Json:
        """manifest.json, or an empty one; ConfigError when this graphbuild does not know its format version."""
        found = self.read_json(MANIFEST)
        if found is None:
            return {"format_version": FORMAT_VERSION, "stages": {}}
        version = found.get("format_version")
        if version not in (FORMAT_VERSION, TABLE_VERSION):
            raise ConfigError(
                f"{self.display(MANIFEST)} has format version {version}; "
                f"this graphbuild reads {FORMAT_VERSION} and {TABLE_VERSION}",
                "use the graphbuild that wrote the store, or build into a new folder",
            )
        return found


def json_text(value: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes: the same whenever the value is. ValueError where it holds NaN or infinity: JSON has none."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class Writer:
    """Commits one task's files to the store and remembers them, hashed as they lie on disk.

    outputs: of each file the path in the store, bytes and the sha256 of its content ("" of scratch), as records say.
    As a context manager it removes them again when the task fails: each is whole, but the task is not.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.outputs: list[Json] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(StorageError):  # the next attempt writes them anew
            for output in self.outputs if kind is not None else ():
                self.store.remove(output["path"])

    @contextlib.contextmanager
    def file(self, name: str, *, durable: bool = True) -> Iterator[Path]:
        """A local path to write to, committed as `name` on a clean exit."""
        with self.store.staged(name, durable=durable) as path:
            yield path
            sha256 = file_sha256(path) if durable else ""
            self.outputs.append({"path": name, "bytes": path.stat().st_size, "sha256": sha256})

    def array(self, name: str, values: np.ndarray[Any, Any], *, durable: bool = True) -> None:
        """A plain C-order .npy file."""
        import numpy as np

        with self.file(name, durable=durable) as path, path.open("wb") as file:
            np.save(file, np.ascontiguousarray(values), allow_pickle=False)

    @contextlib.contextmanager
    def growing(self, name: str, rows: int) -> Iterator[Callable[[np.ndarray[Any, Any]], object]]:
        """An int64 [rows] as `array` writes it, of parts that come one after the other: what is called with each."""
        import numpy as np

        with self.file(name) as path, path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (rows,)})
            yield lambda part: file.write(part.astype("<i8", copy=False).tobytes())

    def table(self, name: str, table: pa.Table, **options: Any) -> None:
        """A zstd-compressed parquet file, its pages with checksums."""
        import pyarrow.parquet as pq

        with self.file(name) as path:
            pq.write_table(table, path, compression="zstd", write_page_checksum=True, **options)


def listed_here(folder: str) -> Iterator[tuple[str, tuple[int, object]]]:
    """`Store.listed` of a folder on this machine, in a third of fsspec's time: a driver lists millions of files. Two
    states of a file have different dates once a tick of the clock is over."""
    settled = time.time_ns() - SETTLED_NS
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False) if entry.is_file(follow_symlinks=False) else None
            except FileNotFoundError:  # it has gone since
                continue
            if found is not None:
                when = found.st_mtime_ns
                yield entry.name, (found.st_size, (when, found.st_ino) if when < settled else None)


def _parsed(contents: Sequence[bytes]) -> list[Json | None]:
    """JSON objects, None for what is none. Read together they share the strings that are their keys, which would
    take more memory than all else, in half the time; where one is damaged, one by one."""
    mark = uuid.uuid4().hex
    try:
        values = json.loads(b"[" + f',"{mark}",'.encode().join(contents) + b"]")
    except ValueError:
        values = []
    if len(values) == 2 * len(contents) - 1 and all(value == mark for value in values[1::2]):
        return [value if isinstance(value, dict) else None for value in values[::2]]
    return [None] if len(contents) == 1 else [value for one in contents for value in _parsed([one])]


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 a Path takes as long as the rest, and there are millions
        return file.read()


def _flush(path: Path) -> None:
    """A file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
