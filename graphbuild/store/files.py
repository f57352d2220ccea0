"""Input files outside the store, on any fsspec URL: a local path to read them by, and what tells that they changed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from graphbuild.errors import InputError, public
from graphbuild.store.mapped import map_array
from graphbuild.store.remote import ANEW, READERS, file_system, reaching, version


@contextlib.contextmanager
def local_file(url: str) -> Iterator[Path]:
    """A local path with the content of any input file; a remote one is copied to a temporary file for the while."""
    fs, path = _file_system(url)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).exists():
            raise _absent(url)
        if Path(path).is_dir():
            raise _folder(url)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(public(path)).name
        try:
            with reaching(url):
                fs.get_file(path, str(copy))
        except FileNotFoundError:
            raise _absent(url) from None
        yield copy


def read_array(url: str, fix: str = "write it again with numpy.save") -> NDArray[Any]:
    """The array of a .npy; InputError, with `fix`, where it is missing or damaged."""
    with local_file(url) as path:
        try:
            return np.array(map_array(path))
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{url} is not a whole .npy file ({error})", fix) from None


@contextlib.contextmanager
def open_parts(url: str) -> Iterator[IO[bytes]]:
    """Any input file, opened to read some of its bytes; of a remote one nothing else is fetched."""
    fs, path = _file_system(url)
    try:
        with reaching(url):
            file = fs.open(path, "rb", cache_type="none")
    except FileNotFoundError:
        raise _absent(url) from None
    except IsADirectoryError:
        raise _folder(url) from None
    with file, reaching(url):
        yield file


def is_there(url: str) -> bool:
    """Whether an input file exists."""
    fs, path = _file_system(url)
    with reaching(url):
        return bool(fs.exists(path))


def file_identity(url: str) -> str:
    """Name, size and last change of an input file outside the store: what tells that it is still the same."""
    fs, path = _file_system(url)
    try:
        with reaching(url):
            info = fs.info(path)
    except FileNotFoundError:
        raise _absent(url) from None
    return f"{Path(public(path)).name}, {info['size']} bytes, {version(info)}"


def file_identities(urls: Sequence[str]) -> dict[str, str]:
    """`file_identity` of each; of many remote files at once."""
    if all("://" not in url for url in urls):  # threads would take turns
        return {url: file_identity(url) for url in urls}
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(urls, pool.map(file_identity, urls), strict=True))


def _absent(url: str) -> InputError:
    query = f"; {ANEW}" if url.startswith("http") else ""
    return InputError(
        f"{url} does not exist", f"check the path; a pattern with * or {{0..9}} must be quoted in the shell{query}"
    )


def _folder(url: str) -> InputError:
    return InputError(f"{url} is a folder", "name one file in it")


def _file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return file_system(url)
    except ValueError as error:
        raise InputError(f"{url} cannot be opened ({error})", "name a path, or a URL that fsspec knows") from None
