"""Byte ranges of many tars, and the tar member that a range begins with.

Local tars are read with pread, from files that each process opens for itself and keeps open; others by fsspec, all
ranges of a call at once.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from graphbuild.errors import ShardError
from graphbuild.store.remote import file_system

OPEN_FILES = 256  # a process; the usual limit is 1,024


class TarRanges:
    """The bytes of tars (paths or URLs) by number of the tar. Works in forked processes, and pickled in any other."""

    def __init__(self, tars: Sequence[str]) -> None:
        self._tars = tars
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._places: dict[int, tuple[Any, str]] = {}  # file system and path of a tar
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()  # last used last

    def __reduce__(self) -> Any:
        return TarRanges, (self._tars,)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the open files; the next read opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, tars: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> list[bytes]:
        """The bytes starts..ends-1 of each tar, [n] each, read tar by tar in order of offset; short at a tar's end.

        Raises:
            ShardError: a tar is gone or cannot be read.
        """
        if self._process != os.getpid():  # a fork must not use its parent's connections
            self.close()
            self._begin()
        contents = [b""] * len(tars)
        remote: dict[Any, list[int]] = {}
        for i in np.lexsort((starts, tars)).tolist():
            file_system, _ = self._place(int(tars[i]))
            if isinstance(file_system, LocalFileSystem):
                contents[i] = self._read_local(int(tars[i]), int(starts[i]), int(ends[i]))
            else:
                remote.setdefault(file_system, []).append(i)
        for file_system, chosen in remote.items():
            paths = [self._place(int(tars[i]))[1] for i in chosen]
            found = file_system.cat_ranges(paths, starts[chosen].tolist(), ends[chosen].tolist(), on_error="return")
            for i, content in zip(chosen, found, strict=True):
                if isinstance(content, Exception):
                    raise self._unreadable(int(tars[i]), content) from content
                contents[i] = content
        return contents

    def _place(self, tar: int) -> tuple[Any, str]:
        if tar not in self._places:
            self._places[tar] = file_system(self._tars[tar])
        return self._places[tar]

    def _read_local(self, tar: int, start: int, end: int) -> bytes:
        try:
            if tar in self._files:
                self._files.move_to_end(tar)
            else:
                self._files[tar] = io.FileIO(self._place(tar)[1])
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            return os.pread(self._files[tar].fileno(), end - start, start)
        except OSError as error:
            raise self._unreadable(tar, error) from error

    def _unreadable(self, tar: int, error: Exception) -> ShardError:
        if isinstance(error, FileNotFoundError):
            return ShardError(f"{self._tars[tar]}: there is no such tar", "check the path or pattern")
        return ShardError(
            f"{self._tars[tar]} cannot be read ({error})", "see that the file is reachable, and run again"
        )


def member_behind(blocks: bytes) -> tarfile.TarInfo | None:
    """The tar member whose content begins behind these blocks of 512 bytes, the last of them its header; or None.

    Long names, and names that are not ASCII, stand in headers before that one: they need these blocks too.
    """
    for start in range(0, len(blocks), tarfile.BLOCKSIZE):
        try:
            with tarfile.open(fileobj=io.BytesIO(blocks[start:]), mode="r:") as archive:
                member = archive.next()
        except (tarfile.TarError, ValueError):  # no header stands there
            continue
        if member is not None and member.isreg() and member.offset_data == len(blocks) - start:
            return member
    return None
