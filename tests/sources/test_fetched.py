"""What is told of a download and what a retry cuts, shard by shard, beside the same from all rows at once."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from graphbuild.runner.stage import Task, state_path
from graphbuild.sources import fetched
from graphbuild.sources.again import by_reason, cut_retry
from graphbuild.store.layout import URLS, shard_name
from graphbuild.store.store import Store, Writer

Row = dict[str, Any]
REASONS = {
    "HTTP Error 404: Not Found": "download: HTTP Error 404: Not Found",
    "HTTP Error 503: Service Unavailable": "download: HTTP Error 503: Service Unavailable",
    "<urlopen error timed out>": "download: <urlopen error timed out>",
    "too small: under 5,000 bytes": "download: too small: under N,N bytes",
}
PASSING = {"HTTP Error 503: Service Unavailable", "<urlopen error timed out>"}


def rows_of(rng: random.Random, shard: int, count: int, hosts: int) -> list[Row]:
    rows = []
    for number in range(count):
        host, failed = f"Host{rng.randrange(hosts)}.example", rng.random() < 0.4
        image = rng.randrange(6) if rng.random() < 0.3 else rng.randrange(10**9)  # six are given by many URLs
        rows.append(
            {
                "key": f"{shard:05d}{number:04d}",
                "url": f"https://user@{host}/{rng.randrange(900)}",  # some URLs come twice
                "caption": f"caption {shard} {number}",
                "status": "failed_to_download" if failed else "success",
                "error_message": rng.choice(list(REASONS)) if failed else None,
                "sha256": None if failed else f"{image * 7919:064x}"[::-1],
            }
        )
    return rows


def write_download(store: Store, name: str, lists: list[tuple[int, list[Row]]]) -> None:
    """The lists of a task of stage urls, and the shards that were fetched from them."""
    with Writer(store) as writer:
        for shard, rows in lists:
            writer.table(URLS.format(shard_name(shard)), pa.Table.from_pylist(rows).select(["url", "caption"]))
    store.write_json(state_path("urls", name), {"outputs": writer.outputs, "facts": {}})
    for shard, rows in lists:
        with Writer(store) as writer:
            shuffled = random.Random(shard).sample(rows, len(rows))  # img2dataset's rows come as they were fetched
            writer.table(f"shards/{shard_name(shard)}.parquet", pa.Table.from_pylist(shuffled))
        facts = {"counts": {"images": sum(row["status"] == "success" for row in rows)}}
        store.write_json(state_path("download", shard_name(shard)), {"outputs": writer.outputs, "facts": facts})


@pytest.fixture
def downloaded(tmp_path: Path) -> tuple[Store, list[list[Row]]]:
    """A list of five shards, and two retries: of some that failed, and of some that failed again."""
    rng, store = random.Random(0), Store(str(tmp_path / "store"))
    shards = [rows_of(rng, number, rng.randrange(80, 160), 30) for number in range(5)]
    write_download(store, "list", list(enumerate(shards)))
    for number in (5, 6):
        failed = [row for rows in (shards[:5], shards[5:])[number - 5] for row in rows if row["status"] != "success"]
        again = rows_of(rng, number, len(failed) // 2, 30)
        for row, before in zip(again, rng.sample(failed, len(again)), strict=True):
            row |= {"retry_of": before["key"], "url": before["url"], "caption": before["caption"]}
        shards.append(again)
        write_download(store, f"retry-{shard_name(number)}", [(number, again)])
    return store, shards


def last(shards: list[list[Row]]) -> list[Row]:
    again = {row.get("retry_of") for rows in shards for row in rows}
    return [row for rows in shards for row in rows if row["key"] not in again]


def test_what_a_download_is_told_to_have_given_is_so_of_the_last_try_of_each_url(
    downloaded: tuple[Store, list[list[Row]]],
) -> None:
    store, shards = downloaded
    rows = last(shards)
    failed = [row for row in rows if row["status"] != "success"]
    hosts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    urls: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        host = hosts[row["url"].split("@")[1].split("/")[0].lower()]
        host[0] += row["status"] != "success"
        host[1] += 1
        if row["sha256"]:
            urls[row["sha256"]].add(row["url"])
    worst = sorted((host for host in hosts.items() if host[1][0]), key=lambda host: (-host[1][0], host[0]))[:20]
    many = [len(of) for of in urls.values() if len(of) >= 5]
    assert len(many) == 6
    assert fetched.told(store) == {
        "failures": Counter(REASONS[row["error_message"]] for row in failed),
        "hosts": {name: {"failed": host[0], "urls": host[1]} for name, host in worst},
        "placeholders": {"images": len(many), "urls": sum(many)},
    }


@pytest.mark.parametrize("wanted", ["passing", "all", ["503", "too small"], [""]], ids=str)
@pytest.mark.parametrize("size", [7, 60, 10_000])
def test_a_retry_cuts_the_wanted_rows_of_all_lists_in_their_order(
    downloaded: tuple[Store, list[list[Row]]], wanted: Any, size: int
) -> None:
    store, shards = downloaded
    failed = [row for row in last(shards) if row["status"] != "success"]

    def is_wanted(row: Row) -> bool:
        if wanted == "passing":
            return row["error_message"] in PASSING
        return wanted == "all" or any(text in REASONS[row["error_message"]] for text in wanted)

    chosen = [row for row in failed if is_wanted(row)]
    by = [Counter(REASONS[row["error_message"]] for row in rows) for rows in (failed, chosen)]
    assert by_reason(store, wanted) == (by[1], by[0] - by[1])
    settings = {"first": len(shards), "shard_size": size, "reasons": wanted}
    with Writer(store) as writer:
        facts = cut_retry(Task(stage="urls", name="retry-00007", settings=settings), store, writer)
    assert facts["retried"] == by[1]
    written = [store.table(output["path"]) for output in writer.outputs]
    assert [len(table) for table in written[:-1]] == [size] * (len(written) - 1)
    found = [row for table in written for row in table.to_pylist()]
    assert found == [{"url": row["url"], "caption": row["caption"], "retry_of": row["key"]} for row in chosen]
