"""Temporary files of killed processes: how they are told from those being written, and taken away.

A process locks a file (flock) while it writes it, and the system drops the lock when the process ends, however it ends.
So a temporary file that can be locked belongs to nobody; neither clocks nor process numbers are asked, and what other
runs, workers and nodes are writing stays. Where a file system has no locks nothing is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import IO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def hold(path: Path) -> IO[bytes]:
    """Create a temporary file and lock it until the returned file is closed."""
    file = path.open("xb")
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def remove_leftovers(folder: str) -> list[str]:
    """Remove the temporary files below a local folder that no process is writing; returns their paths.

    Cost: one listing of all folders below.
    """
    removed = []
    for parent, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            path = Path(parent) / name
            with contextlib.suppress(OSError), path.open("r+b") as file:  # gone, or held: its writer goes on
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(str(path))
    return removed
