"""What of a verb is done already, without touching the store: the share of each stage's tasks that a rerun skips."""

from __future__ import annotations

from graphbuild.pipeline import is_spared, replaced_by, steps_of
from graphbuild.recipe import Recipe
from graphbuild.stage import records
from graphbuild.state import pending
from graphbuild.store import Store


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
