"""The running stage as metrics of Ray, which its own exporter offers to Prometheus; pipelines/grafana.json shows them.

Only inside a Ray session. Prometheus sees each under the prefix `ray_`. Labels: store (its URL) and stage; and reason.
"""

from __future__ import annotations

from typing import Any

from graphbuild.runner.progress import State

TASKS = {
    "graphbuild_tasks_total": "tasks of the stage",
    "graphbuild_tasks_done": "tasks that need nothing more",
    "graphbuild_tasks_failed": "tasks that failed",
    "graphbuild_tasks_running": "tasks in flight",
    "graphbuild_tasks_again": "tasks tried again, as their worker died",
}
ITEMS = "graphbuild_items"
REJECTED = "graphbuild_rejected"


class Metrics:
    """Gauges of one job, set by `show`; the reasons are the most frequent ones."""

    def __init__(self, store: str) -> None:
        from ray.util.metrics import Gauge

        labels = ("store", "stage")
        self._store = store
        self._tasks: dict[str, Any] = {name: Gauge(name, text, labels) for name, text in TASKS.items()}
        self._items = Gauge(ITEMS, "items of finished tasks of this run, by unit", (*labels, "unit"))
        self._rejected = Gauge(REJECTED, "items turned away by finished tasks of this run", (*labels, "reason"))

    def show(self, state: State) -> None:
        labels = {"store": self._store, "stage": state.stage}
        for name, gauge in self._tasks.items():
            gauge.set(getattr(state, name.removeprefix("graphbuild_tasks_")), labels)
        for unit, count in state.counts.items():
            self._items.set(count, {**labels, "unit": unit})
        for reason, count in state.top_reasons():
            self._rejected.set(count, {**labels, "reason": reason})
