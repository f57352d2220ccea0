"""Downloads that gave little or nothing: what they say, which command leads on, and that it does."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from graphbuild.job.summary import summary
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Download, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task
from graphbuild.runner.workers import Failure, record_failure
from graphbuild.sources import hosts
from graphbuild.store.store import Store

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
URLS, GONE = 20, 5
GUESS = "an old list, or DNS overloaded"


@contextlib.contextmanager
def serving(pictures: list[Picture], port: int = 0, gone: int = 0) -> Iterator[tuple[int, Counter[str]]]:
    """A server of pictures by number, whose first `gone` answer 404; its port and what was asked of it."""
    hits: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits[self.path] += 1
            number = int(self.path.strip("/"))
            body = b"" if number < gone else pictures[number][0]
            self.send_response(404 if number < gone else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_address[1], hits
    finally:
        server.shutdown()
        server.server_close()


def write_list(path: Path, pictures: list[Picture], port: int, hosts: tuple[str, ...] = ("127.0.0.1",)) -> Path:
    lines = [f"http://{hosts[n % len(hosts)]}:{port}/{n}\t{pictures[n][1]}\n" for n in range(URLS)]
    path.write_text("url\tcaption\n" + "".join(lines))
    return path


def test_what_a_download_wrote_of_each_url_is_a_list_again_any_number_of_times_over(
    pictures: list[Picture], tmp_path: Path
) -> None:
    with serving(pictures, gone=GONE) as (port, _), Runner(workers=0) as runner:
        source = write_list(tmp_path / "list.tsv", pictures, port)
        for generation in range(3):
            store = Store(str(tmp_path / f"store{generation}"))
            recipe = Recipe(download=Download(urls=str(source), allow_private_hosts=True))
            assert run_verb("download", recipe, store, runner)["stages"]["download"]["counts"]["images"] == URLS - GONE
            source = tmp_path / f"store{generation}/shards/00000.parquet"
    columns = pq.read_schema(source).names
    assert len(set(columns)) == len(columns)
    table = pq.read_table(source, columns=["status", "status_in_list", "status_in_list_in_list"]).to_pydict()
    assert table["status"] == table["status_in_list"] == table["status_in_list_in_list"]
    assert sorted(text for _, text in pictures[:URLS]) == sorted(pq.read_table(source)["caption"].to_pylist())


def free_port() -> int:
    with socket.socket() as closed:
        closed.bind(("", 0))
        return int(closed.getsockname()[1])


def test_a_download_from_a_server_that_is_down_leads_to_retry_and_retry_leads_on(
    pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    port, store = free_port(), tmp_path / "store"
    urls = write_list(tmp_path / "list.tsv", pictures, port)
    done = cli("download", store, urls, "--allow-private-hosts", "--retries", 0, "--workers", 0, code=1)
    assert done.stdout.splitlines()[-1] == f"next      graphbuild retry {store}"
    assert GUESS not in done.stdout
    assert "the download gave no image" in done.stderr
    assert "Connection refused" in done.stderr
    assert f"-> run `graphbuild retry {store}`" in done.stderr
    assert len(pq.read_table(store / "shards/00000.parquet")) == URLS

    failed = cli("embed", store, "--workers", 0, code=1).stderr
    assert "the download gave no image" in failed
    assert f"`graphbuild retry {store}`" in failed
    record_failure(Store(str(store)), Task(stage="number", name="all"), Failure("no sample has a caption", "", "", 2))

    still = cli("retry", store, "--allow-private-hosts", "--workers", 0, code=1)
    assert f"{URLS} of {URLS} failed URLs -> 0 images" in still.stdout
    assert "the download gave no image" in still.stderr
    with serving(pictures, port) as (_, hits):
        said = cli("retry", store, "--allow-private-hosts", "--workers", 0).stdout.splitlines()
    assert sum(hits.values()) == URLS
    assert said == [
        f"retry     {URLS} of {URLS} failed URLs -> {URLS} images; 0 without one",
        "retry     failed tasks of embed ran again",
        f"next      graphbuild index {store}",
    ]
    assert not list(store.glob("_state/*/*.failed.json"))
    assert f"{URLS} URLs -> {URLS} images (100.0%)" in cli("download", store).stdout


def test_refused_urls_name_the_command_that_fetches_them(pictures: list[Picture], cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = f"graphbuild retry {store} --reason refused --allow-private-hosts"
    with serving(pictures) as (port, hits):
        urls = write_list(tmp_path / "list.tsv", pictures, port)
        done = cli("download", store, urls, "--workers", 0, code=1)
        assert done.stdout.splitlines()[-1] == f"next      {command}"
        assert f"`{command}`" in done.stderr
        assert GUESS not in done.stdout
        assert f"{URLS} refused: `{command}` if the list may name them" in cli("retry", store, code=1).stdout
        assert not hits
        said = cli(*command.split()[1:], "--workers", 0).stdout
    assert f"-> {URLS} images; 0 without one" in said
    assert "refused:" not in said
    assert "refused:" not in cli("download", store).stdout


def test_private_hosts_are_allowed_by_the_command_that_says_so_and_by_no_later_one(
    pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with serving(pictures, gone=GONE) as (port, hits):
        urls = write_list(tmp_path / "list.tsv", pictures, port)
        cli("download", store, urls, "--allow-private-hosts", "--workers", 0)
        assert "allow_private_hosts" not in (store / "recipe.yaml").read_text()
        hits.clear()
        refused = cli("retry", store, "--all", "--workers", 0)
        assert not hits
        assert f"{GONE} refused: `graphbuild retry {store} --reason refused --allow-private-hosts`" in refused.stdout
        cli("retry", store, "--reason", "refused", "--allow-private-hosts", "--workers", 0)
        assert len(hits) == GONE


def test_a_store_of_an_older_version_that_remembers_private_hosts_is_not_obeyed_and_says_so(
    pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with serving(pictures, gone=GONE) as (port, hits):
        urls = write_list(tmp_path / "list.tsv", pictures, port)
        cli("download", store, urls, "--allow-private-hosts", "--workers", 0)
        recipe = store / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("download:\n", "download:\n  allow_private_hosts: true\n"))
        hits.clear()
        commands = ["retry", store, "--all"], ["embed", store], ["download", store], ["download", store]
        told = [cli(*command, "--workers", 0).stderr for command in commands]
        warned = [text.count("says allow_private_hosts, which is no longer remembered") for text in told]
        assert warned == [1, 0, 0, 0], "once, and embed has written the recipe without it"
        assert not hits


def test_refused_urls_beside_images_are_told_with_the_next_step(
    pictures: list[Picture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hosts, "is_public", lambda address: address == "127.0.0.1")
    store = Store(str(tmp_path / "store"))
    with serving(pictures) as (port, _), Runner(workers=0) as runner:
        urls = write_list(tmp_path / "list.tsv", pictures, port, ("127.0.0.1", "127.0.0.2"))
        manifest = run_verb("download", Recipe(download=Download(urls=str(urls))), store, runner)
        said = summary("download", manifest, store)
        told = f"{URLS // 2} refused: `graphbuild retry {store.url} --reason refused --allow-private-hosts` if"
        assert told in said
        assert said.endswith(f"graphbuild embed {store.url}")
        allowed = Recipe(download=Download(urls=str(urls), allow_private_hosts=True))
        said = summary("download", run_verb("download", allowed, store, runner), store)
    assert told in said, "what is finished is not fetched again"


def test_a_url_tried_again_counts_once(pictures: list[Picture], cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with serving(pictures, gone=GONE) as (port, _):
        urls = write_list(tmp_path / "list.tsv", pictures, port)
        cli("download", store, urls, "--allow-private-hosts", "--workers", 0)
        for _ in range(2):
            told = cli("retry", store, "--all", "--allow-private-hosts", "--workers", 0).stderr
            assert f": {GONE} failed, {URLS - GONE} images, {URLS} urls" in told
        said = cli("download", store).stdout
    assert f"{URLS} rows -> {URLS} URLs -> {URLS - GONE} images (75.0%)" in said
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["download"]["hosts"] == {f"127.0.0.1:{port}": {"failed": GONE, "urls": URLS}}
    assert manifest["stages"]["download"]["counts"] == {"failed": GONE, "images": URLS - GONE, "urls": URLS}


@pytest.mark.parametrize(
    ("reason", "fits"),
    [
        ("HTTP Error 404: Not Found", True),
        ("<urlopen error [Errno -2] Name or service not known>", True),
        ("<urlopen error timed out>", True),
        ("<urlopen error [Errno 111] Connection refused>", False),
        ("skipped: its host is down ([Errno 111] Connection refused)", False),
        ("refused: not a public address (--allow-private-hosts)", False),
        ("HTTP Error 503: Service Unavailable", False),
    ],
)
def test_an_old_list_or_dns_is_named_only_where_it_may_be_the_cause(tmp_path: Path, reason: str, fits: bool) -> None:
    counts = {"failed": 9, "images": 1, "urls": 10, "rejected": 0}
    facts = {"failures": {f"download: {reason}": 9}, "hosts": {}, "placeholders": {"images": 0, "urls": 0}}
    manifest = {"stages": {"urls": {"counts": counts}, "download": {"counts": counts}}, "download": facts}
    said = summary("download", manifest, Store(str(tmp_path / "store")))
    assert "WARNING: more than half of the URLs failed" in said
    assert (GUESS in said) == fits
