"""Which share of its task a process has done: the code that does the work adds to it, and who shows progress asks.

A task has a process to itself, so one number is enough. What adds nothing has done nothing until it ends.
"""

from __future__ import annotations

import threading

_adding = threading.Lock()
_done = 0.0


def begin() -> None:
    """Another task begins, or none."""
    global _done
    _done = 0.0


def add(share: float) -> None:
    """So much more of the task is done, 0..1; from any thread."""
    global _done
    with _adding:
        _done += share


def done() -> float:
    """Share of the task that is done, 0..1."""
    return _done
