"""Which share of its task a process has done: the code that does the work adds to it, and the runner reads it.

It is told in a file, 8 bytes for each task in flight, so to a runner on the same machine alone: a cluster has tasks
enough to tell by. What adds nothing has done nothing until it ends.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
from typing import Any, Self

Place = tuple[str, int]  # a file, and where in it
SHARE = struct.Struct("d")

_adding = threading.Lock()
_done = 0.0
_told: tuple[int, int] | None = None  # the open file of `begin`, and where in it


# -- where the work is done


def begin(place: Place | None = None) -> None:
    """Another task begins, or none. place: where to tell, if there is such a file here."""
    global _done, _told
    if _told is not None:
        os.close(_told[0])
    _done, _told = 0.0, None
    if place is not None:
        with contextlib.suppress(OSError):
            _told = os.open(place[0], os.O_WRONLY), place[1]


def add(share: float) -> None:
    """So much more of the task is done, 0..1; from any thread."""
    global _done
    with _adding:
        _done += share
        if _told is not None:
            with contextlib.suppress(OSError):
                os.pwrite(_told[0], SHARE.pack(_done), _told[1])


def done() -> float:
    """Share of this process's task that is done, 0..1."""
    return _done


# -- where progress is shown


class Told:
    """What the tasks in flight tell, each known by its name. A context manager: its file goes with it."""

    def __init__(self) -> None:
        self._file: Any = None
        self._places: dict[str, int] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):  # where there is no room nothing is told
            self._file = tempfile.NamedTemporaryFile(prefix="graphbuild-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def begin(self, name: str) -> Place | None:
        """Where this task tells, for the other `begin`."""
        if self._file is None:
            return None
        taken = set(self._places.values())
        place = next(at for at in range(0, SHARE.size * (len(taken) + 1), SHARE.size) if at not in taken)
        self._places[name] = place
        return (self._file.name, place) if self._write(place) else None

    def end(self, name: str) -> None:
        if (place := self._places.pop(name, None)) is not None:
            self._write(place)

    def _write(self, place: int) -> bool:
        try:
            return bool(os.pwrite(self._file.fileno(), SHARE.pack(0.0), place))
        except OSError:
            return False

    def done(self) -> float:
        """The shares of those in flight, summed; from any thread."""
        try:
            content = os.pread(self._file.fileno(), 1 << 20, 0)
        except (AttributeError, ValueError, OSError):  # there is none, or no more
            return 0.0
        whole = content[: len(content) // SHARE.size * SHARE.size]
        return float(sum(share for (share,) in SHARE.iter_unpack(whole)))
