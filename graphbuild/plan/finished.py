"""What of a job a store has already, read without touching it: the share of each stage that a rerun skips, and the
seconds that its finished tasks took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphbuild.embed import STAGE as ENCODE
from graphbuild.encoder import find_encoder
from graphbuild.matrix import is_matrix
from graphbuild.pipeline import stages_of
from graphbuild.recipe import Recipe
from graphbuild.stage import Stage, records, total_counts
from graphbuild.state import is_done, pending
from graphbuild.store import Store


@dataclass(frozen=True)
class Finished:
    """Tasks of a stage that are done: how many, the seconds of the median one, and the sums of what they counted."""

    tasks: int
    seconds: float
    counts: Mapping[str, int]


def finished(store: Store, stages: Sequence[Stage]) -> dict[str, Finished]:
    """By stage, what its finished tasks in a store took, wherever they ran."""
    found = {}
    for stage in stages:
        if done := list(records(store, stage.name).values()):
            seconds = statistics.median(record["seconds"] for record in done)
            found[stage.name] = Finished(len(done), seconds, total_counts(done))
    return found


def shares_done(verb: str, recipe: Recipe, store: Store, *, force: bool = False) -> dict[str, float]:
    """By stage; stages behind the first with something to do count as not done at all.

    Raises what the verb would raise before it runs anything: changed settings (unless force), a missing stage or input.
    """
    stages = stages_of(verb, recipe)
    if ENCODE in stages and not is_matrix(recipe.embed.encoder):
        find_encoder(recipe.embed.encoder)
    shares: dict[str, float] = {}
    for stage in stages:
        if stage.serves and all(is_done(other, recipe, store, force=force) for other in stage.serves):
            shares[stage.name] = 1.0
            continue
        tasks = stage.plan(recipe, store)
        done = records(store, stage.name)
        todo = pending(stage, tasks, done, store, force=force, remove=False)
        shares[stage.name] = 1 - len(todo) / len(tasks) if tasks else 1.0
        if todo:
            break
    return shares
