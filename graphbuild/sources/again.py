"""The lists of URLs that are fetched again: rows of the first lists, with all their columns and the key they had."""

from __future__ import annotations

from collections import Counter

import polars as pl

from graphbuild.runner.stage import Task, outputs, records
from graphbuild.sources.fetched import OPT_OUT, failed_urls, may_pass_later
from graphbuild.store import layout
from graphbuild.store.layout import shard_name
from graphbuild.store.store import Json, Store, Writer

Wanted = str | list[str]


def by_reason(store: Store, wanted: Wanted) -> tuple[Counter[str], Counter[str]]:
    """How many failed URLs are wanted again, by reason, and how many others."""
    chosen: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for failed in failed_urls(store):
        mine = _are_wanted(failed, wanted)
        chosen.update(failed["reason"].filter(mine).to_list())
        others.update(failed["reason"].filter(~mine).to_list())
    return chosen, others


def cut_retry(task: Task, store: Store, writer: Writer) -> Json:
    """Write the lists of one retry, `_state/urls/<first>.parquet` and on. Memory: two of these, and one of before."""
    number, size = task.settings["first"], task.settings["shard_size"]
    sources = list(outputs(list(records(store, "urls").values()), "_state/urls/"))[:number]
    waiting: list[pl.DataFrame] = []
    retried: Counter[str] = Counter()

    def cut(least: int) -> None:
        nonlocal waiting, number
        rows = pl.concat(waiting, how="diagonal_relaxed")
        waiting = [rows]
        while len(rows) >= least:
            writer.table(layout.URLS.format(shard_name(number)), rows[:size].to_arrow())
            rows = rows[size:]
            waiting, number = [rows], number + 1

    before = 0  # rows of the lists so far
    for path, failed in zip(sources, failed_urls(store, shards=number), strict=True):
        chosen = failed.filter(_are_wanted(failed, task.settings["reasons"]))
        every = pl.DataFrame(store.table(path))
        rows = every[(chosen["place"] - before).to_list()].with_columns(retry_of=chosen["key"])
        before += len(every)
        retried.update(chosen["reason"].to_list())
        waiting.append(rows)
        if sum(map(len, waiting)) >= size:
            cut(size)
    if waiting:
        cut(1)
    return {"retried": dict(retried)}


def _are_wanted(failed: pl.DataFrame, wanted: Wanted) -> pl.Series:
    """Which failures are wanted, bool [n]."""
    if wanted == "all":
        kept = [OPT_OUT not in reason for reason in failed["reason"]]
    elif wanted == "passing":
        kept = [may_pass_later(message) for message in failed["message"]]
    else:
        kept = [any(text in reason for text in wanted) for reason in failed["reason"]]
    return pl.Series(kept, dtype=pl.Boolean)
