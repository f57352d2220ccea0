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
        writer.table(layout.URLS.format(shard_name(first + number)), part.to_arrow())
    return {"retried": dict(Counter(chosen["reason"].to_list()))}


def matches(failed: pl.DataFrame, wanted: Wanted) -> pl.Series:
    """Which failures are wanted, bool [n]."""
    if wanted == "all":
        kept = [OPT_OUT not in reason for reason in failed["reason"]]
    elif wanted == "passing":
        kept = [may_pass_later(message) for message in failed["message"]]
    else:
        kept = [any(text in reason for text in wanted) for reason in failed["reason"]]
    return pl.Series(kept, dtype=pl.Boolean)
