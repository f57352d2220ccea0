"""Retry: what failed, once more. Tasks with a failed.json run again; URLs that failed get shards of their own.

The URLs go, with all their columns and the key that they had, to further lists `_state/urls/<shard>.parquet`: new
shards behind the old ones, so nothing that is finished changes, and no URL is fetched that has its image. Memory: all
rows of the list.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import polars as pl

from graphbuild.download import DOWNLOAD, URLS, plan_urls, reason_of
from graphbuild.errors import ConfigError
from graphbuild.fetch import may_pass_later
from graphbuild.pipeline import run_verb, stages_of
from graphbuild.recipe import Recipe, resolve
from graphbuild.runner import Runner
from graphbuild.stage import Task, digest, outputs, records
from graphbuild.store import Json, Store, Writer

Wanted = str | list[str]
VERBS = ("download", "embed", "index", "export")


def wanted_urls(reasons: Sequence[str], *, everything: bool) -> Wanted:
    """Which failed URLs are fetched again: all, those whose reason contains one of these texts, or "passing", those
    whose failure may have passed."""
    return "all" if everything else sorted(reasons) or "passing"


def retry_store(store: Store, runner: Runner, wanted: Wanted = "passing") -> str:
    """Run failed tasks again, then the wanted URLs (`wanted_urls`); returns what came of it.

    Raises:
        ConfigError: there is nothing to retry. InputError or StageError: tasks failed again.
    """
    recipe = resolve(store, "download", {})
    verbs = list(failed_tasks(recipe, store))
    for verb in verbs:
        run_verb(verb, recipe, store, runner)
    lines = [f"retry     failed tasks of {', '.join(verbs)} ran again"] if verbs else []
    if "download" in store.manifest()["stages"]:
        lines += _retry_urls(store, recipe, runner, wanted)
    elif not verbs:
        raise nothing_failed(store)
    return "\n".join(lines)


def failed_tasks(recipe: Recipe, store: Store) -> dict[str, list[Json]]:
    """Verb -> records of its failed tasks, of verbs that have any, in the order in which they run."""
    found = {
        verb: [record for stage in stages_of(verb, recipe) for record in records(store, stage.name, "failed").values()]
        for verb in VERBS
    }
    return {verb: tasks for verb, tasks in found.items() if tasks}


def nothing_failed(store: Store) -> ConfigError:
    return ConfigError(f"{store.url} has no failed task and no download", "there is nothing to retry")


def _retry_urls(store: Store, recipe: Recipe, runner: Runner, wanted: Wanted) -> list[str]:
    failed = failed_urls(store)
    chosen = failed.filter(matches(failed, wanted))
    if chosen.height:
        lists = outputs(list(records(store, "urls").values()), "_state/urls/")
        built = {
            "list": plan_urls(recipe, store)[0].fingerprint,
            "download": digest(sorted(records(store, "download"))),
        }
        task = Task(
            stage="urls",
            name=f"retry-{len(lists):05d}",
            settings={"reasons": wanted, "shard_size": recipe.download.shard_size, "first": len(lists)},
            built=built,
        )
        stage = dataclasses.replace(URLS, plan=lambda recipe, store: [*plan_urls(recipe, store), task])
        runner.run(stage, recipe, store)
        runner.run(DOWNLOAD, recipe, store)
    still = failed_urls(store).height
    images = failed.height - still
    lines = [
        f"retry     {chosen.height:,} of {failed.height:,} failed URLs -> {images:,} images; {still:,} without one"
    ]
    if wanted == "passing" and chosen.height < failed.height:
        lines.append("          others failed for good (--reason TEXT, --all)")
    return [*lines, f"next      graphbuild embed {store.url}"] if images else lines


def cut_retry(task: Task, store: Store, writer: Writer) -> Json:
    """Write the lists of one retry, `_state/urls/<first>.parquet` and on."""
    first = task.settings["first"]
    failed = failed_urls(store, shards=first)
    chosen = failed.filter(matches(failed, task.settings["reasons"]))
    sources = list(outputs(list(records(store, "urls").values()), "_state/urls/"))[:first]
    every = pl.concat([pl.DataFrame(pl.from_arrow(store.table(path))) for path in sources], how="diagonal_relaxed")
    rows = every.with_row_index("place").join(chosen.select("place", "key"), on="place", maintain_order="left")
    rows = rows.with_columns(pl.col("key").alias("retry_of")).drop("place", "key")
    for number, part in enumerate(rows.iter_slices(task.settings["shard_size"])):
        writer.table(f"_state/urls/{first + number:05d}.parquet", part.to_arrow())
    return {"retried": dict(Counter(chosen["reason"].to_list()))}


def failed_urls(store: Store, shards: int | None = None) -> pl.DataFrame:
    """The URLs of all or the first shards that have no image and were not tried again there since.

    Columns: place, among all rows of these lists; key; reason; message.
    """
    names = list(outputs(list(records(store, "download").values()), "shards/", ".parquet"))
    parts = []
    for name in names[:shards]:
        table = store.table(name)
        columns = [column for column in ("key", "status", "error_message", "retry_of") if column in table.column_names]
        parts.append(pl.DataFrame(pl.from_arrow(table.select(columns))).sort("key"))
    rows = pl.concat(parts, how="diagonal_relaxed").with_row_index("place")
    if "retry_of" in rows.columns:
        rows = rows.join(rows.select("retry_of").drop_nulls().unique(), left_on="key", right_on="retry_of", how="anti")
    failed = rows.filter(pl.col("status") != "success")
    reasons = [reason_of(*pair) for pair in failed.select("status", "error_message").iter_rows()]
    messages = failed["error_message"].fill_null("")
    return failed.select("place", "key").with_columns(reason=pl.Series(reasons, dtype=pl.String), message=messages)


def matches(failed: pl.DataFrame, wanted: Wanted) -> pl.Series:
    """Which failures are wanted, bool [n]."""
    if wanted == "all":
        kept = [True] * failed.height
    elif wanted == "passing":
        kept = [may_pass_later(message) for message in failed["message"]]
    else:
        kept = [any(text in reason for text in wanted) for reason in failed["reason"]]
    return pl.Series(kept, dtype=pl.Boolean)
