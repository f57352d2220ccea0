"""What became of a list's URLs, read from img2dataset's rows of the finished shards: each URL once, by its last try.

Memory: the asked columns of all rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graphbuild.errors import StageError
from graphbuild.runner.stage import outputs, records, summed, total_counts
from graphbuild.store.store import Json, Store

if TYPE_CHECKING:
    import polars as pl

REFUSED = "refused: not a public address"  # how the reason begins
OPT_OUT = "opt-out"  # and of a site that says no, which is not asked again (`graphbuild.sources.optout`)
_PASSING = re.compile(
    r"HTTP Error (408|425|429|500|502|503|504)\b|timed out|time-outs|reset by peer|Connection (refused|aborted)"
    r"|Broken pipe|Remote end closed|IncompleteRead|Temporary failure in name|unreachable|its host is down"
)


def may_pass_later(message: str) -> bool:
    """Whether a URL that failed with this message may go well later; hosts that were down may be up again, too."""
    return bool(_PASSING.search(message))


def reason_of(status: str, message: str | None) -> str:
    """A failure's message without what differs from URL to URL: its first line, numbers but error codes as N, and
    nothing in quotes, where the URL may stand."""
    line = (message or "").strip().splitlines()[0] if message else "no message"
    line = re.sub(r"(?<!\w)(['\"]).*\1(?!\w)", "…", line)
    line = re.sub(r"(Error |Errno )?\d+", lambda found: found[0] if found[1] else "N", line)
    return f"{status.removeprefix('failed_to_')}: {line}"[:100]


def last_tries(store: Store, columns: Sequence[str], shards: int | None = None) -> pl.DataFrame:
    """Those columns, `key` and `place` (the row's among all of all lists) of each URL's last try in all or the first
    shards."""
    import polars as pl

    names = list(outputs(list(records(store, "download").values()), "shards/", ".parquet"))
    wanted = {"key", "retry_of", *columns}
    parts = []
    for name in names[:shards]:
        table = store.table(name)
        parts.append(pl.DataFrame(pl.from_arrow(table.select([c for c in table.column_names if c in wanted]))))
    if not parts:
        return pl.DataFrame({name: [] for name in ("place", "key", *columns)})
    rows = pl.concat([part.sort("key") for part in parts], how="diagonal_relaxed").with_row_index("place")
    if "retry_of" in rows.columns:
        rows = rows.join(rows.select("retry_of").drop_nulls().unique(), left_on="key", right_on="retry_of", how="anti")
    return rows.select("place", "key", *columns)


def failed_urls(store: Store, shards: int | None = None) -> pl.DataFrame:
    """The URLs of all or the first shards that have no image and were not tried again there since.

    Columns: place, among all rows of these lists; key; reason; message.
    """
    import polars as pl

    failed = last_tries(store, ["status", "error_message"], shards).filter(pl.col("status") != "success")
    reasons = [reason_of(*pair) for pair in failed.select("status", "error_message").iter_rows()]
    messages = failed["error_message"].fill_null("")
    return failed.select("place", "key").with_columns(reason=pl.Series(reasons, dtype=pl.String), message=messages)


# -- counts


def failures(tries: pl.DataFrame) -> Counter[str]:
    """How many of these tries (status, error_message) failed, by reason."""
    import polars as pl

    found: Counter[str] = Counter()
    failed = tries.filter(pl.col("status") != "success").group_by("status", "error_message").len()
    for status, message, count in failed.sort("status", "error_message").iter_rows():
        found[reason_of(status, message)] += count
    return found


def retried(store: Store) -> Counter[str]:
    """How many URLs were tried again, by the reason of the try before."""
    return summed(records(store, "urls").values(), "retried")


def counts(store: Store, done: Sequence[Json]) -> dict[str, int]:
    """URLs, images and failed URLs of the download; a URL tried again counts once."""
    again = retried(store).total()
    found = total_counts(done)
    return {**found, "failed": found["failed"] - again, "urls": found["urls"] - again} if again else found


def failing_hosts(tries: pl.DataFrame, most: int = 20) -> Json:
    """The hosts with most URLs that gave no image, and how many of how many."""
    import polars as pl

    host = pl.col("url").str.extract(r"^[A-Za-z]+://(?:[^/?#]*@)?([^/?#]*)").str.to_lowercase().alias("host")
    failed = (pl.col("status") != "success").sum().alias("failed")
    counted = tries.group_by(host).agg(failed, pl.len().alias("urls")).filter(pl.col("failed") > 0)
    worst = counted.sort(["failed", "host"], descending=[True, False]).head(most)
    return {row["host"] or "": {"failed": row["failed"], "urls": row["urls"]} for row in worst.to_dicts()}


def placeholders(tries: pl.DataFrame, at_least: int = 5) -> Json:
    """How many images came byte for byte from `at_least` or more URLs, and how many URLs gave them."""
    import polars as pl

    hashed = tries.select("sha256", "url").drop_nulls().unique()
    repeated = hashed.group_by("sha256").len().filter(pl.col("len") >= at_least)
    return {"images": repeated.height, "urls": int(repeated["len"].sum())}


# -- what to do next


def refused(failures: Mapping[str, int], begin: str = REFUSED) -> int:
    """How many URLs were not fetched because their address is not public, or for another reason that begins so."""
    return sum(count for reason, count in failures.items() if begin in reason)


def fetch_refused(store: Store) -> str:
    """The command that fetches the URLs that were refused."""
    return f"graphbuild retry {store.url} --reason refused --allow-private-hosts"


def fetch_failed(store: Store, failures: Mapping[str, int]) -> str:
    """The command that fetches what failed, of a download without an image; "" where all sites said no."""
    count = sum(failures.values())
    if refused(failures, OPT_OUT) == count:
        return ""
    return fetch_refused(store) if refused(failures) == count else f"graphbuild retry {store.url}"


def require_images(store: Store) -> None:
    """StageError when the finished download gave no image."""
    manifest = store.manifest()
    counted = manifest["stages"]["download"]["counts"]
    if counted["images"]:
        return
    failures = manifest["download"]["failures"]
    most = max(failures, key=lambda reason: failures[reason])
    command = fetch_failed(store, failures)
    fix = f"run `{command}`"
    if not command:
        fix = "use another list; if you may use what these sites opt out of: "
        fix += f"`graphbuild retry {store.url} --reason {OPT_OUT} --ignore-opt-out`"
    elif not refused(failures):
        fix += ", once the servers can be reached; --all fetches also what failed for good"
    raise StageError(f"{store.url}: the download gave no image ({failures[most]:,} URLs: {most})", fix)
