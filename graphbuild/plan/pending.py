"""What of a verb is done already, without touching the store: the share of each stage's tasks that a rerun skips."""

from __future__ import annotations

from graphbuild.embed import STAGE as ENCODE
from graphbuild.encoder import find_encoder
from graphbuild.matrix import is_matrix
from graphbuild.pipeline import stages_of
from graphbuild.recipe import Recipe
from graphbuild.stage import records
from graphbuild.state import is_done, pending
from graphbuild.store import Store


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
