"""Progress of a stage: a live bar on a terminal, plain lines in a log. Writes to stderr only."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)
LOG_EVERY_SECONDS = 10.0


class Progress:
    """Shows one stage at a time: tasks done, what they counted, and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._bar_task: Any = None
        self._counts: dict[str, int] = {}
        self._title = ""
        self._done = self._total = self._failed = self._skipped = 0
        self._begin = self._logged = 0.0

    def begin(self, title: str, *, total: int, done: int) -> None:
        self._title, self._total, self._done, self._skipped, self._failed = title, total, done, done, 0
        self._counts = {}
        self._begin = self._logged = time.monotonic()
        if sys.stderr.isatty() and done < total:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            columns = [
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[counts]}"),
            ]
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar_task = self._bar.add_task(title, total=total, completed=done, counts="")

    def advance(self, counts: Mapping[str, int], *, failed: bool = False) -> None:
        """One more task has ended, having counted `counts`."""
        self._done += 1
        self._failed += failed
        for key, value in counts.items():
            self._counts[key] = self._counts.get(key, 0) + value
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=self._done, counts=self._describe(self._counts))
        elif time.monotonic() - self._logged > LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            logger.info("%-9s %d of %d tasks, %s", self._title, self._done, self._total, self._describe(self._counts))

    def end(self, counts: Mapping[str, int] | None = None) -> None:
        """Close the stage with one line that stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        seconds = time.monotonic() - self._begin
        if self._skipped == self._total:
            logger.info("%-9s up to date (%d of %d tasks done before)", self._title, self._skipped, self._total)
            return
        finished = self._done - self._skipped - self._failed
        parts = [f"{finished} task{'s' * (finished != 1)} in {seconds:.1f} s"]
        parts += [f"{self._skipped} done before"] if self._skipped else []
        parts += [f"{self._failed} FAILED"] if self._failed else []
        logger.info("%-9s %s%s", self._title, ", ".join(parts), f": {self._describe(counts)}" if counts else "")

    @staticmethod
    def _describe(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items() if value)
