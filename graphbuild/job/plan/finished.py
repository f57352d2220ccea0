"""What of a job a store has already, read without touching it: the share of each stage that a rerun skips, and the
seconds that its finished tasks took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphbuild.job.steps import Step, is_spared, replaced_by, steps_of
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import records, total_counts
from graphbuild.runner.state import pending
from graphbuild.store.store import Store


@dataclass(frozen=True)
class Finished:
    """Tasks of a stage that are done: how many, the seconds of the median one, and the sums of what they counted."""

    tasks: int
    seconds: float
    counts: Mapping[str, int]


def finished(store: Store, steps: Sequence[Step]) -> dict[str, Finished]:
    """By step, what its finished tasks in a store took, wherever they ran."""
    found = {}
    for step in steps:
        if done := list(records(store, step.name).values()):
            seconds = statistics.median(record["seconds"] for record in done)
            found[step.name] = Finished(len(done), seconds, total_counts(done))
    return found


def shares_done(verb: str, recipe: Recipe, store: Store, *, force: bool = False) -> dict[str, float]:
    """By stage; stages behind the first with something to do count as not done at all.

    Raises what the verb would raise before it runs anything: changed settings (unless force), a missing stage or input.
    """
    steps = steps_of(verb, recipe)
    for step in steps:
        step.stage.check(recipe)
    if replaced_by(steps[0], recipe, store, force=force):
        return {}
    shares: dict[str, float] = {}
    for step in steps:
        stage = step.stage
        if is_spared(step, recipe, store, force=force):
            shares[stage.name] = 1.0
            continue
        tasks = stage.plan(recipe, store)
        done = records(store, stage.name)
        todo = pending(stage, tasks, done, store, force=force, remove=False)
        shares[stage.name] = 1 - len(todo) / len(tasks) if tasks else 1.0
        if todo:
            break
    return shares
