"""How loops are compiled: numba's machine code, cached on disk where numba finds a folder that it can write.

It looks in NUMBA_CACHE_DIR, beside the source and in the user's cache folder. Without any, a process compiles the loops
that it calls again, some seconds each, and says so once in the log. No folder is made up in a shared temporary one:
the cache holds pickles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import njit

Function = Callable[..., Any]

log = logging.getLogger(__name__)

inlined: Callable[[Function], Any] = njit(inline="always")


def compiled(**options: Any) -> Callable[[Function], Any]:
    """A decorator: the function as machine code that leaves the GIL alone. options: numba's, such as fastmath."""

    def decorate(function: Function) -> Any:
        loop = njit(nogil=True, **options)(function)
        try:
            loop.enable_caching()
        except RuntimeError:  # no folder can be written: njit(cache=True) would raise where the module is imported
            _say_not_cached()
        return loop

    return decorate


@cache
def _say_not_cached() -> None:
    log.warning("no folder to cache compiled loops in: every process compiles them again; set NUMBA_CACHE_DIR")
