"""Retry: what failed, once more. URLs that failed get shards of their own; tasks with a failed.json run again.

The URLs go, with all their columns and the key that they had, to further lists `_state/urls/<shard>.parquet`: new
shards behind the old ones, so nothing that is finished changes, and no URL is fetched that has its image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphbuild.errors import ConfigError
from graphbuild.job.steps import step_of, steps_of
from graphbuild.job.summary import NEXT, refused_line
from graphbuild.job.verbs import run_step, run_verb
from graphbuild.recipe import Recipe, resolve
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task, digest, outputs, records
from graphbuild.sources.again import Wanted, by_reason
from graphbuild.sources.download import DOWNLOAD, URLS, plan_urls
from graphbuild.sources.fetched import RETRY, refused, require_images
from graphbuild.store.layout import shard_name
from graphbuild.store.store import Json, Store

VERBS = ("download", "pack", "embed", "index", "export")


def wanted_urls(reasons: Sequence[str], *, everything: bool, opted_out: bool = False) -> Wanted:
    """Which failed URLs are fetched again: all, opted_out: also of sites that said no; those whose reason contains one
    of these texts; or "passing", those whose failure may have passed."""
    if everything:
        return [""] if opted_out else "all"  # every reason contains ""
    return sorted(reasons) or "passing"


def retry_store(
    store: Store, runner: Runner, wanted: Wanted = "passing", changes: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Run failed tasks of the download again, then fetch the wanted URLs (`wanted_urls`), then run later failed tasks
    again; yields what came of each. changes: of the download's settings, as in `resolve`.

    Raises:
        ConfigError: there is nothing to retry. InputError or StageError: tasks failed again, or still no image.
    """
    recipe = resolve(store, "download", changes or {})
    verbs = list(failed_tasks(recipe, store))
    downloaded = "download" in store.manifest()["stages"]
    if not verbs and not downloaded:
        raise nothing_failed(store)
    if "download" in verbs:
        verbs.remove("download")
        run_verb("download", recipe, store, runner)
        yield "retry     failed tasks of download ran again"
        downloaded = True
    images = 0
    if downloaded:
        images, said = _retry_urls(store, recipe, runner, wanted)
        yield said
        require_images(store)
    for verb in verbs:
        run_verb(verb, recipe, store, runner)
        yield f"retry     failed tasks of {verb} ran again"
    last = verbs[-1] if verbs else "download" if images else None
    if last in NEXT:
        yield f"next      graphbuild {NEXT[last]} {store.url}"


def failed_tasks(recipe: Recipe, store: Store) -> dict[str, list[Json]]:
    """Verb -> records of its failed tasks, of verbs that have any, in the order in which they run."""
    found = {
        verb: [record for step in steps_of(verb, recipe) for record in records(store, step.name, "failed").values()]
        for verb in VERBS
    }
    return {verb: tasks for verb, tasks in found.items() if tasks}


def nothing_failed(store: Store) -> ConfigError:
    return ConfigError(f"{store.url} has no failed task and no download", "there is nothing to retry")


def _retry_urls(store: Store, recipe: Recipe, runner: Runner, wanted: Wanted) -> tuple[int, str]:
    """How many images the wanted URLs gave, and what to say of it."""
    again, others = (found.total() for found in by_reason(store, wanted))
    if again:
        lists = outputs(list(records(store, "urls").values()), "_state/urls/")
        built = {
            "list": plan_urls(recipe, store)[0].fingerprint,
            "download": digest(sorted(records(store, "download"))),
        }
        task = Task(
            stage="urls",
            name=f"{RETRY}{shard_name(len(lists))}",
            settings={"reasons": wanted, "shard_size": recipe.download.shard_size, "first": len(lists)},
            built=built,
        )
        stage = dataclasses.replace(URLS, plan=lambda recipe, store: [*plan_urls(recipe, store), task])
        run_step(step_of(URLS), recipe, store, runner, stage=stage)
        run_step(step_of(DOWNLOAD), recipe, store, runner)
    still, _ = by_reason(store, [""])
    images = again + others - still.total()
    lines = [
        f"retry     {again:,} of {again + others:,} failed URLs -> {images:,} images; {still.total():,} without one"
    ]
    if wanted == "passing" and others:
        lines.append("          others failed for good (--reason TEXT, --all)")
    left = refused(still)
    if left:
        lines.append(refused_line(left, store))
    return images, "\n".join(lines)
