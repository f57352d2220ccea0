"""Lists as they are found: URLs that only browsers take, secrets in them, values that JSON cannot hold, taken names."""

from __future__ import annotations

import datetime
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.sources.download import RESERVED
from graphbuild.sources.fetched import reason_of
from tests.e2e.web import Refusal, serving

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
OPTIONS = ("--allow-private-hosts", "--workers", 0, "--retries", 0)


@pytest.fixture
def site(pictures: list[Picture]) -> Iterator[tuple[str, Counter[str]]]:
    """A server with a picture under every path but those of /gone; what was asked of it."""
    hits: Counter[str] = Counter()

    def answer(path: str) -> bytes | Refusal:
        hits[path] += 1
        return (404, f"see {path}") if path.startswith("/gone") else pictures[0][0]

    with serving(answer) as address:
        yield address, hits


def samples(store: Path) -> dict[str, dict[str, Any]]:
    """The json members of the store's tars, by URL."""
    found = {}
    for path in sorted((store / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    sample = json.loads(archive.extractfile(member).read())  # type: ignore[union-attr]
                    found[sample["url"]] = sample
    return found


def test_what_a_browser_gets_is_downloaded_and_no_secret_or_url_is_told(
    site: tuple[str, Counter[str]], cli: Cli, tmp_path: Path
) -> None:
    base, hits = site
    secret = "X-Amz-Signature=5ec2e7"
    named = base.replace("//", "//5ec2e7:5ec2e7@")
    good = [f"{base}/ñandú.jpg", f"{base}/with space.jpg?a=b c", f"{named}/x?{secret}", f" {base}/%7Ex.jpg "]
    bad = [f"{url}/{n}?{secret}" for n in range(30) for url in (f"{base}/gone", "example.com/x", "http://[x/y")]
    bad += [f"ftp://h{n}/x?{secret}" for n in range(10)] + [f"http://℀.x{n}/x?{secret}" for n in range(10)]
    lines = [json.dumps({"url": url, "caption": f"picture {n}"}) for n, url in enumerate(good + bad)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    store = tmp_path / "store"
    done = cli("download", store, tmp_path / "list.jsonl", *OPTIONS)
    assert f"-> {len(good)} images" in done.stdout
    expected = {"/%C3%B1and%C3%BA.jpg", "/with%20space.jpg?a=b%20c", f"/x?{secret}", "/%7Ex.jpg"}
    assert {path for path in hits if not path.startswith("/gone")} == expected
    failures = json.loads((store / "manifest.json").read_text())["download"]["failures"]
    assert sum(failures.values()) == len(bad)
    assert len(failures) <= 5, failures
    assert failures["download: HTTP Error 404: Not Found"] == 30
    assert "5ec2e7" not in done.stdout + done.stderr
    lists = {path for folder in ("_state/urls", "shards") for path in (store / folder).glob("*.parquet")}
    tars = set(store.glob("shards/*.tar"))
    for path in store.rglob("*"):
        assert "5ec2e7" not in path.name
        if path.is_file() and path not in lists | tars:
            assert b"5ec2e7" not in path.read_bytes(), path


def test_columns_that_json_cannot_hold_are_text_in_the_sample_and_typed_in_the_table(
    site: tuple[str, Counter[str]], cli: Cli, tmp_path: Path
) -> None:
    base, _ = site
    rows = 40
    seen = [datetime.datetime(2024, 1, 1, 12) + datetime.timedelta(days=n) for n in range(rows)]
    columns = {
        "url": [f"{base}/{n}" for n in range(rows)],
        "caption": [f"picture {n}" for n in range(rows)],
        "seen": pa.array(seen, pa.timestamp("us")),
        "price": pa.array([Decimal(n) / 4 for n in range(rows)], pa.decimal128(9, 2)),
        "hash": [bytes([n]) for n in range(rows)],
        "history": pa.array([seen[n : n + 2] for n in range(rows)], pa.list_(pa.timestamp("us"))),
        "source": [{"id": n, "raw": b"x"} for n in range(rows)],
        "score": [n / 8 for n in range(rows)],
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "list.parquet")
    store = tmp_path / "store"
    done = cli("download", store, tmp_path / "list.parquet", *OPTIONS)
    assert f"-> {rows} images (100.0%)" in done.stdout
    sample = samples(store)[f"{base}/5"]
    assert sample["seen"] == "2024-01-06T12:00:00"
    assert sample["price"] == "1.25"
    assert sample["hash"] == "BQ=="
    assert sample["history"] == ["2024-01-06T12:00:00", "2024-01-07T12:00:00"]
    assert sample["source"] == {"id": 5, "raw": "eA=="}
    assert sample["score"] == 0.625
    kept = pq.read_table(store / "shards/00000.parquet").sort_by("key").select(table.column_names)
    assert kept.equals(table.set_column(0, "url", kept["url"]).set_column(1, "caption", kept["caption"]))
    assert kept["url"].to_pylist() == columns["url"]


def test_columns_named_as_img2datasets_own_are_kept_under_names_of_their_own(
    site: tuple[str, Counter[str]], cli: Cli, tmp_path: Path
) -> None:
    base, _ = site
    names = [f"{name}{'_in_list' * times}" for name in RESERVED for times in (0, 1, 2)]
    row = {"url": f"{base}/1", "caption": "a picture", **{name: f"my {name}" for name in names}}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    cli("download", tmp_path / "store", tmp_path / "list.jsonl", *OPTIONS)
    [sample] = samples(tmp_path / "store").values()
    assert {value for value in sample.values() if str(value).startswith("my ")} == {f"my {name}" for name in names}
    assert sample["status"] == "success"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("URL can't contain control characters. '/with space.jpg?sig=it's' (found at least ' ')", "URL can't contain"),
        ("unknown url type: 'example.com/x?sig=1'", "unknown url type: …"),
        ("nonnumeric port: 'secret'", "nonnumeric port: …"),
        (
            "<urlopen error certificate is not valid for 'a.example'. (_ssl.c:1006)>",
            "<urlopen error certificate is not",
        ),
        ("HTTP Error 404: Not Found", "HTTP Error 404: Not Found"),
    ],
)
def test_reasons_of_older_messages_hold_nothing_that_was_quoted(message: str, reason: str) -> None:
    found = reason_of("failed_to_download", message)
    assert found.startswith(f"download: {reason}")
    assert "'" not in found.replace("can't", "")
