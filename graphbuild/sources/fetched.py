"""What became of a list's URLs, read from img2dataset's rows of the finished shards: each URL once, by its last try.

A shard after the other. Memory: a shard's rows, the keys of URLs tried again, and what `told` counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphbuild.errors import StageError
from graphbuild.runner.stage import outputs, records, summed, total_counts
from graphbuild.store.store import Json, Store

if TYPE_CHECKING:
    import polars as pl

REFUSED = "refused: not a public address"  # how the reason begins
RETRY = "retry-"  # how the name of a list of URLs tried again begins
REPEATED = 5  # an image that so many URLs gave may be a placeholder
MOST_HOSTS = 20
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


def last_tries(store: Store, columns: Sequence[str], shards: int | None = None) -> Iterator[pl.DataFrame]:
    """Of all or the first shards one after the other: those columns, `key` and `place` (the row's among all of all
    lists) of the URLs that were not tried again in these shards."""
    import polars as pl

    names = list(outputs(list(records(store, "download").values()), "shards/", ".parquet"))[:shards]
    retries = [record for name, record in records(store, "urls").items() if name.startswith(RETRY)]
    later = {Path(path).stem for path in outputs(retries, "_state/urls/")}
    again = pl.concat(
        [pl.Series("key", [], pl.String)]
        + [pl.Series("key", store.table(name, ["retry_of"])["retry_of"]) for name in names if Path(name).stem in later]
    )
    place = 0
    for name in names:
        rows = pl.DataFrame(store.table(name, ["key", *columns])).sort("key")
        rows = rows.select(pl.int_range(place, place + len(rows)).alias("place"), "key", *columns)
        place += len(rows)
        yield rows.filter(~pl.col("key").is_in(again.implode()))


def failed_urls(store: Store, shards: int | None = None) -> Iterator[pl.DataFrame]:
    """The URLs that have no image, as `last_tries`.

    Columns: place; key; reason; message.
    """
    import polars as pl

    for tries in last_tries(store, ["status", "error_message"], shards):
        failed = tries.filter(pl.col("status") != "success")
        reasons = [reason_of(*pair) for pair in failed.select("status", "error_message").iter_rows()]
        messages = failed["error_message"].fill_null("")
        yield failed.select("place", "key").with_columns(reason=pl.Series(reasons, dtype=pl.String), message=messages)


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


def told(store: Store) -> Json:
    """Of all last tries: failures by reason; the hosts with most URLs that gave no image, and how many of how many;
    how many images came byte for byte from REPEATED URLs or more, and how many URLs gave those.

    Rows are read once, those of images twice. Memory: a line a host, and 1 to 2 bytes an image: how many URLs gave an
    image is counted by some bits of its SHA-256 first, and by all of them only where that is many.
    """
    import polars as pl

    total: Counter[str] = Counter()
    failed: Counter[str] = Counter()  # by host
    tried: Counter[str] = Counter()
    images = sum(record["facts"]["counts"]["images"] for record in records(store, "download").values())
    seen = np.zeros(1 << max(images - 1, 1).bit_length(), np.uint8)
    host = pl.col("url").str.extract(r"^[A-Za-z]+://(?:[^/?#]*@)?([^/?#]*)").str.to_lowercase().fill_null("")
    for tries in last_tries(store, ["url", "status", "error_message", "sha256"]):
        total.update(failures(tries))
        by_host = tries.group_by(host.alias("host")).agg(
            (pl.col("status") != "success").sum().alias("failed"), pl.len()
        )
        failed.update({name: count for name, count, _ in by_host.iter_rows() if count})
        tried.update({name: count for name, _, count in by_host.iter_rows()})
        cells, here = np.unique(_cells(tries["sha256"].drop_nulls(), len(seen)), return_counts=True)
        seen[cells] = np.minimum(seen[cells] + here, REPEATED)
    many = pl.DataFrame(schema={"sha256": pl.UInt64, "url": pl.UInt64})  # hashes of both
    for tries in last_tries(store, ["url", "sha256"]) if (seen == REPEATED).any() else ():
        had = tries.select("sha256", "url").drop_nulls()
        had = had.filter(seen[_cells(had["sha256"], len(seen))] == REPEATED)
        many = many.extend(had.select(pl.all().hash())).unique()
    repeated = many.group_by("sha256").len().filter(pl.col("len") >= REPEATED)
    worst = sorted(failed, key=lambda name: (-failed[name], name))[:MOST_HOSTS]
    return {
        "failures": dict(sorted(total.items(), key=lambda found: (-found[1], found[0]))),
        "hosts": {name: {"failed": failed[name], "urls": tried[name]} for name in worst},
        "placeholders": {"images": repeated.height, "urls": int(repeated["len"].sum())},
    }


def _cells(sha256: pl.Series, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """0..count-1 of each hexadecimal SHA-256; count: a power of 2."""
    return sha256.str.slice(0, 15).str.to_integer(base=16).to_numpy() % count


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
