"""How far a stage is, told as it goes: a live view on a terminal, plain lines in a log, or JSON lines for programs.

All of it goes to stderr. Counts and reasons are those of finished tasks. The time left takes the tasks still to do to
last as long as those of this run. It is told once a task has ended: before that, most of the time may be the workers'
start. Inside a Ray session the same numbers are metrics too, which its own exporter offers to Prometheus;
pipelines/grafana.json shows them.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil

from graphbuild.machine.terminal import ProgressMode, harmless
from graphbuild.store.store import Json

if TYPE_CHECKING:
    from rich.live import Live

logger = logging.getLogger(__name__)
UNITS = ("urls", "embeddings", "samples", "nodes", "edges")  # a stage is told by the first that it counts
EVERY_SECONDS = {"plain": 10.0, "json": 1.0}
REASONS = 3
MEMORY_SECONDS = 5.0
_memory = (-math.inf, 0)  # when it was last read, and what it was
BAR_COLUMNS = 30
GAUGES = {
    "total": "tasks of the stage",
    "done": "tasks that need nothing more",
    "failed": "tasks that failed",
    "running": "tasks in flight",
    "again": "tasks tried again, as their worker died",
}


@dataclass
class State:
    """What is known of the running stage. done: tasks that need nothing more, `skipped` of them before this run."""

    stage: str = ""
    total: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    running: int = 0
    again: int = 0  # tasks whose worker died
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    begin: float = field(default_factory=time.monotonic)
    parts: Callable[[], float] = lambda: 0.0  # shares of the running tasks that are done, summed

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def finished(self) -> int:
        """Tasks that this run has finished."""
        return self.done - self.skipped - self.failed

    def unit(self) -> str:
        return next((name for name in UNITS if self.counts.get(name)), "")

    def rate(self) -> float | None:
        """Units a second, over the run so far."""
        return self.counts[self.unit()] / self.seconds if self.unit() and self.seconds > 0 else None

    def seconds_left(self) -> float | None:
        parts, ended = self.parts(), self.done - self.skipped
        return self.seconds / (ended + parts) * max(self.total - self.done - parts, 0) if ended else None

    def success(self) -> float | None:
        """The share of URLs that gave an image, or of samples that have a usable caption."""
        for part, whole in (("images", "urls"), ("captions", "samples")):
            if self.counts.get(whole) and part in self.counts:
                return self.counts[part] / self.counts[whole]
        return None

    def top_reasons(self) -> list[tuple[str, int]]:
        return sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))[:REASONS]

    def as_json(self, event: str) -> Json:
        rate, left = self.rate(), self.seconds_left()
        return {
            "event": event,
            "stage": self.stage,
            "tasks": {name: getattr(self, name) for name in ("total", "done", "skipped", "failed", "running", "again")},
            "part_done": round(self.parts(), 3),
            "counts": self.counts,
            "reasons": dict(self.top_reasons()),
            "success": self.success(),
            "unit": self.unit(),
            "per_second": None if rate is None else round(rate, 3),
            "seconds": round(self.seconds, 3),
            "seconds_left": None if left is None else round(left, 3),
            "memory_bytes": memory_bytes(),
        }


class Progress:
    """Shows one stage at a time; the runner tells it what happens.

    mode: live (rich), plain (a line every 10 s, and one at the end) or json (an object a line, every second and at the
    beginning and end); auto: live on a terminal, else plain.
    """

    def __init__(self, mode: ProgressMode = "auto") -> None:
        self.mode = mode if mode != "auto" else "live" if sys.stderr.isatty() else "plain"
        self.state = State()
        self._view: Live | _Ticker | None = None

    def begin(self, stage: str, *, total: int, done: int) -> None:
        self.state = State(stage, total, done, skipped=done)
        if self.mode == "json":
            emit(self.state.as_json("begin"))
        if done < total:
            self._view = live_view(self.state) if self.mode == "live" else _Ticker(self.state, self.mode)
            self._view.start()

    def running(self, tasks: int) -> None:
        """So many tasks are in flight now."""
        self.state.running = tasks

    def again(self) -> None:
        """A task is tried again: its worker died."""
        self.state.again += 1

    def advance(self, counts: Mapping[str, int], reasons: Mapping[str, int], *, failed: bool = False) -> None:
        """One more task has ended, having counted `counts`, and turned away items for `reasons`."""
        state = self.state
        state.done += 1
        state.failed += failed
        state.counts.update(counts)
        state.reasons.update(reasons)

    def end(self, counts: Mapping[str, int] | None = None) -> None:
        """Close the stage with one line that stays. counts: of all its tasks, those done before too."""
        self.close()
        state = self.state
        state.running = 0
        if self.mode == "json":
            emit({**state.as_json("end"), "all_counts": dict(counts or {})})
            return
        if state.skipped == state.total:
            logger.info("%-9s up to date (%d of %d tasks done before)", state.stage, state.skipped, state.total)
            return
        parts = [f"{state.finished} task{'s' * (state.finished != 1)} in {state.seconds:.1f} s"]
        parts += [f"{state.skipped} done before"] if state.skipped else []
        parts += [f"{state.failed} FAILED"] if state.failed else []
        logger.info("%-9s %s%s", state.stage, ", ".join(parts), f": {described(counts)}" if counts else "")

    def close(self) -> None:
        """Show nothing more of the stage, however it ended; a terminal gets its cursor back."""
        if self._view is not None:
            self._view.stop()
            self._view = None


class _Ticker(threading.Thread):
    """Says where a stage is, every so often, from a thread of its own: long tasks are silent."""

    def __init__(self, state: State, mode: str) -> None:
        super().__init__(daemon=True)
        self._state, self._mode = state, mode
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(EVERY_SECONDS[self._mode]):
            if self._mode == "json":
                emit(self._state.as_json("progress"))
            else:
                logger.info("%-9s %s", self._state.stage, "; ".join(lines(self._state)))

    def stop(self) -> None:
        self._over.set()
        self.join()


def live_view(state: State) -> Live:
    """The live view: lines that fit the terminal's width, drawn anew four times a second, gone at the end.

    They stay short on a wide terminal too: when it shrinks it breaks long lines in two, of which one would stay.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    def drawn() -> Group:
        first, *others = lines(state)
        words = Column(no_wrap=True, overflow="ellipsis")
        head = Table.grid(Column(no_wrap=True), Column(max_width=BAR_COLUMNS), words, padding=(0, 1))
        bar = ProgressBar(state.total, state.done + state.parts())
        head.add_row(Text(f"{state.stage:<9}", style="bold"), bar, Text(first))
        return Group(head, *(Text(f"{'':10}{line}", no_wrap=True, overflow="ellipsis", style="dim") for line in others))

    return Live(get_renderable=drawn, console=Console(stderr=True), transient=True, refresh_per_second=4)


def lines(state: State) -> list[str]:
    """The state in words, by weight: tasks and time; rates; reasons. Only what is known."""
    left = state.seconds_left()
    parts = state.parts()
    done = f"{state.done + parts:.1f}" if parts >= 0.05 else str(state.done)
    first = f"{done} of {state.total} tasks, {duration(state.seconds)}"
    first += f", {duration(left)} left" if left is not None else ""
    rate, success = state.rate(), state.success()
    second = [f"{state.counts[state.unit()]:,} {state.unit()} ({rate:,.0f}/s)"] if rate is not None else []
    second += [f"{success:.1%} usable"] if success is not None else []
    second.append(f"{state.running} running" if state.running else "starting workers")
    second += [f"{state.failed} FAILED"] if state.failed else []
    second += [f"{state.again} tried again"] if state.again else []
    second.append(f"{memory_bytes() / 1e9:.1f} GB")
    found = [first, ", ".join(second)]
    found += [f"{count:,} {reason}" for reason, count in state.top_reasons()]
    return [harmless(line.replace("\n", " ")) for line in found]


def described(counts: Mapping[str, int]) -> str:
    """Without computed_tokens: those of whole batches, empty rows included, which only the records keep."""
    told = {key: value for key, value in counts.items() if value and key != "computed_tokens"}
    return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in told.items())


def duration(seconds: float) -> str:
    """As h:mm:ss, or m:ss below an hour."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def emit(value: Json) -> None:
    sys.stderr.write(json.dumps(value) + "\n")
    sys.stderr.flush()


def memory_bytes() -> int:
    """Resident memory of this process and those that it started, pages of files that they share left out.

    At most MEMORY_SECONDS old: to find its children, every process of the machine is looked at.
    """
    global _memory
    if time.monotonic() >= _memory[0] + MEMORY_SECONDS:
        _memory = time.monotonic(), _memory_now()
    return _memory[1]


def _memory_now() -> int:
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            memory = process.memory_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += memory.rss - getattr(memory, "shared", 0)
    return total


class Metrics:
    """The state as gauges of a Ray session, set by `show`. Prometheus sees each under the prefix `ray_`.

    Labels: store (its URL) and stage; and unit of items, or reason, of which the most frequent are shown.
    """

    def __init__(self, store: str) -> None:
        from ray.util.metrics import Gauge

        labels = ("store", "stage")
        self._store = store
        self._tasks: dict[str, Any] = {
            name: Gauge(f"graphbuild_tasks_{name}", text, labels) for name, text in GAUGES.items()
        }
        self._items = Gauge("graphbuild_items", "items of finished tasks of this run, by unit", (*labels, "unit"))
        self._rejected = Gauge(
            "graphbuild_rejected", "items turned away by finished tasks of this run", (*labels, "reason")
        )

    def show(self, state: State) -> None:
        labels = {"store": self._store, "stage": state.stage}
        for name, gauge in self._tasks.items():
            gauge.set(getattr(state, name), labels)
        for unit, count in state.counts.items():
            self._items.set(count, {**labels, "unit": unit})
        for reason, count in state.top_reasons():
            self._rejected.set(count, {**labels, "reason": reason})
