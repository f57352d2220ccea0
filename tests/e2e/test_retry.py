"""`graphbuild retry`: what may have passed is fetched again, the rest is not, and the store grows without a change."""

from __future__ import annotations

import hashlib
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.web import Refusal, serving

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
URLS, SHARD = 90, 30
PRIVATE = "--allow-private-hosts"


class Site:
    """Every third picture answers 503 until it is well again, every tenth 404 until it is put back."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures
        self.well = self.back = False
        self.hits: Counter[int] = Counter()

    def status(self, number: int) -> int:
        if number % 10 == 1 and not self.back:
            return 404
        return 503 if number % 3 == 0 and not self.well else 200


@pytest.fixture
def site(pictures: list[Picture]) -> Iterator[tuple[Site, str]]:
    site = Site(pictures)

    def answer(path: str) -> bytes | Refusal:
        number = int(path.strip("/"))
        site.hits[number] += 1
        return site.pictures[number][0] if site.status(number) == 200 else (site.status(number), None)

    with serving(answer, {"Retry-After": "0"}) as address:
        yield site, address


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_failed_urls_are_fetched_again_by_reason_into_shards_of_their_own(
    site: tuple[Site, str], cli: Cli, tmp_path: Path
) -> None:
    served, base = site
    lines = [f"{caption}\t{base}/{number}\n" for number, (_, caption) in enumerate(served.pictures[:URLS])]
    (tmp_path / "list.tsv").write_text("".join(lines))
    store = tmp_path / "store"
    options = ("--preset", "cc3m", "--shard-size", SHARD, "--resize-mode", "no", "--workers", 1)
    refused = cli("download", tmp_path / "refused", tmp_path / "list.tsv", *options, code=1)
    assert "90 download: refused: not a public address" in refused.stdout
    assert "90 of 90 URLs at 127.0.0.1" in refused.stdout
    assert not served.hits

    printed = cli("download", store, tmp_path / "list.tsv", *options, "--allow-private-hosts").stdout
    gone = {number for number in range(URLS) if number % 10 == 1}
    busy = {number for number in range(URLS) if number % 3 == 0} - gone
    assert f"{len(busy)} download: HTTP Error 503: Service Unavailable" in printed
    assert f"{len(gone)} download: HTTP Error 404: Not Found" in printed
    assert all(served.hits[number] == 2 for number in busy)
    assert all(served.hits[number] == 1 for number in gone)
    cli("embed", store, "--workers", 0)
    before = {folder: digests(store / folder) for folder in ("shards", "samples", "nodes")}

    served.well = True
    served.hits.clear()
    said = cli("retry", store, PRIVATE, "--workers", 1).stdout
    assert set(served.hits) == busy, "only what may pass"
    assert f"{len(busy)} of {len(busy) + len(gone)} failed URLs -> {len(busy)} images; {len(gone)} without one" in said
    served.hits.clear()
    assert f"0 of {len(gone)} failed URLs" in cli("retry", store, PRIVATE, "--workers", 1).stdout
    assert not served.hits
    served.back = True
    assert (
        f"0 of {len(gone)} failed URLs"
        in cli("retry", store, PRIVATE, "--reason", "HTTP Error 500", "--workers", 1).stdout
    )
    said = cli("retry", store, PRIVATE, "--reason", "HTTP Error 404", "--workers", 1).stdout
    assert set(served.hits) == gone
    assert f"{len(gone)} failed URLs -> {len(gone)} images; 0 without one" in said

    served.hits.clear()
    again = cli("download", store)
    assert "90 rows -> 90 URLs -> 90 images (100.0%)" in again.stdout
    assert "HTTP Error" not in again.stdout
    assert not served.hits, "a further run fetches nothing"
    for verb in ("embed", "index", "export"):
        cli(verb, store, "--workers", 0)
    for folder, files in before.items():
        now = digests(store / folder)
        assert {name: now.get(name) for name in files} == files, "what was finished is as it was"
    found = [
        row for path in sorted((store / "shards").glob("*.graph.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(row["row"] for row in found) == list(range(URLS))
    assert Counter(row["caption"] for row in found) == Counter(caption for _, caption in served.pictures[:URLS])
    assert "no problems" in cli("verify", store).stdout


@pytest.mark.slow
def test_a_lost_list_of_a_retry_is_cut_again_the_same(site: tuple[Site, str], cli: Cli, tmp_path: Path) -> None:
    served, base = site
    (tmp_path / "list.tsv").write_text("".join(f"a {n}\t{base}/{n}\n" for n in range(20)))
    store = tmp_path / "store"
    cli("download", store, tmp_path / "list.tsv", "--preset", "cc3m", "--allow-private-hosts", "--workers", 1)
    served.well = True
    cli("retry", store, PRIVATE, "--workers", 1)
    lost = store / "_state/urls/00001.parquet"
    content = lost.read_bytes()
    lost.unlink()
    served.hits.clear()
    cli("download", store)
    assert lost.read_bytes() == content
    assert not served.hits


def test_failed_tasks_run_again(pictures: list[Picture], cli: Cli, write_tar: Any, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    for number in range(2):
        members = [
            m
            for i, (jpeg, text) in enumerate(pictures[:8])
            for m in ((f"{i}.jpg", jpeg), (f"{i}.txt", f"{number} {text}".encode()))
        ]
        write_tar(tars / f"{number}.tar", members)
    whole = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(whole[:3000])
    store = tmp_path / "store"
    failed = cli("embed", store, "--shards", tars, "--workers", 0, code=2)
    assert "1.tar" in failed.stderr
    (tars / "1.tar").write_bytes(whole)
    assert "failed tasks of embed ran again" in cli("retry", store, "--workers", 0).stdout
    assert not list(store.glob("_state/*/*.failed.json"))
    assert "nothing to retry" in cli("retry", store, "--workers", 0, code=2).stderr
