"""What a formula gets, a `Case`, and what it gives: a `Cost` of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from graphbuild.job.plan.job import Job
from graphbuild.job.plan.machine import Machine
from graphbuild.job.plan.rates import NEAR_BYTES, Rates
from graphbuild.knn.engine import Engine, choose
from graphbuild.recipe import Index, Recipe

WIDTH = 384  # numbers of a vector, for which rates are


@dataclass(frozen=True)
class Cost:
    """What a stage takes; bytes of all its tasks, unless said otherwise."""

    tasks: int = 1  # still to run
    core_seconds: float = 0.0  # of a task
    read: float = 0.0  # bytes
    written: float = 0.0
    held: float = 0.0  # bytes of a task's arrays
    mapped: float = 0.0  # bytes of files that a node reads at random and would keep in its page cache
    vram: float = 0.0  # bytes of a GPU
    on_gpu: bool = False
    gpu_seconds: float = 0.0  # of a task, computed
    least_seconds: float = 0.0  # of the stage, whatever its cores do
    name: str = ""  # of the stage; this and what follows is set by costs.py
    title: str = ""
    seconds: float = 0.0  # until all tasks have run
    ram: float = 0.0  # bytes of a worker at most
    resident: float = 0.0  # ram, and a worker's share of what is mapped


@dataclass(frozen=True)
class Case:
    """What a formula gets: the job, its recipe, where it runs, and the rates of a core."""

    job: Job
    recipe: Recipe
    machine: Machine
    rates: Rates

    @property
    def shard_rows(self) -> float:
        return self.job.samples / self.job.shards

    @property
    def shard_nodes(self) -> float:
        return self.job.nodes / self.job.shards

    @property
    def width(self) -> float:
        return self.job.d / WIDTH

    @property
    def index(self) -> Index:
        """The recipe's section, its device settled as on that machine."""
        device = "cuda" if self.machine.card else "cpu"
        index = self.recipe.index
        return index if index.device != "auto" else index.model_copy(update={"device": device})

    @property
    def engine(self) -> Engine:
        return self.choice[0]

    @cached_property
    def choice(self) -> tuple[Engine, str]:
        """The engine that a build would choose there, and why."""
        return choose(self.index, self.job.nodes, self.job.d)

    def far(self, table_bytes: float) -> float:
        """How much longer random reads of a table take than of a small one."""
        beyond = max(1 - NEAR_BYTES / max(table_bytes, 1.0), 0.0)
        return 1 + (self.rates.far - 1) * beyond
