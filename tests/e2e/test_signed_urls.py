"""Sources behind signed URLs: a server that gives nothing without the query, and every place that must not hold it."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import urlsplit

import numpy as np
import pytest

from graphbuild.errors import InputError, public
from graphbuild.machine.terminal import HarmlessFormatter, JsonFormatter
from graphbuild.recipe import Embed, Recipe

Cli = Callable[..., CompletedProcess[str]]
SECRET = "c2VjcmV0LXNpZ25hdHVyZQ"
QUERY = f"X-Amz-SignedHeaders=host&X-Amz-Signature={SECRET}"
TEXTS = ["a red kite over the sea", "two dogs asleep", "an old tram", "rain on a window", "bread and salt"]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., None], pictures: list[tuple[bytes, str]]
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    for number in range(2):
        samples = [(f"{number}{at}", pictures[at][0], text) for at, text in enumerate(TEXTS)]
        members = [m for key, jpg, text in samples for m in ((f"{key}.jpg", jpg), (f"{key}.txt", text.encode()))]
        write_tar(folder / f"{number}.tar", members)
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["caption"], *([text] for text in TEXTS)])
    np.save(folder / "vectors.npy", np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    return {f"/{path.name}": path.read_bytes() for path in folder.iterdir()} | {"/0.jpg": pictures[0][0]}


@pytest.fixture(scope="module")
def server(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a server whose files, but for images, are had by the signature alone; it knows ranges."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, query = urlsplit(self.path)[2:4]
            if path not in files or (query != QUERY and not path.endswith(".jpg")):
                self.send_error(403)
                return
            content, found = files[path], re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            self.send_response(206 if found else 200)
            if found:
                begin, end = int(found[1]), int(found[2] or len(content) - 1)
                self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
                content = content[begin : end + 1]
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        files["/urls.csv"] = f"url,caption\nhttp://127.0.0.1:{running.server_port}/0.jpg,a cat\n".encode()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def nowhere(store: Path, *said: CompletedProcess[str]) -> None:
    """The signature stands in no file's name or content, and in nothing that was printed."""
    for path in store.rglob("*"):
        assert SECRET not in path.name
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    for done in said:
        assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("layout", ["sidecars", "inline", "clustered"])
def test_a_job_on_tars_behind_signed_urls_leaves_no_signature_behind(
    cli: Cli, server: str, tmp_path: Path, layout: str
) -> None:
    recipe, store = tmp_path / "recipe.yaml", tmp_path / "store"
    tars = f"{server}/{{0..1}}.tar"
    recipe.write_text(
        json.dumps({"embed": {"shards": f"{tars}?{QUERY}"}, "index": {"k": 2}, "export": {"layout": layout}})
    )
    done = cli("run", recipe, store, "--workers", 0)
    assert "--shards is kept without its query" in done.stderr
    assert f"shards: {tars}" in (store / "recipe.yaml").read_text().replace("'", "")
    written = {"sidecars": "shards/1.graph.parquet", "inline": "inline/1.tar", "clustered": "clustered/00000.tar"}
    assert (store / written[layout]).is_file(), "named after the tar alone"
    again = cli("embed", store, "--shards", f"{tars}?{QUERY}", "--workers", 0)
    assert "up to date" in again.stderr, "the signature is none of the input's identity"
    wrong = cli("embed", store, "--shards", f"{tars}?X-Amz-Signature={SECRET}1", "--workers", 0, code=2)
    assert "a store keeps no query of a URL: give it again" in wrong.stderr
    nowhere(store, done, again, wrong, cli("report", store))


@pytest.mark.parametrize(("option", "file"), [("--captions", "list.csv"), ("--vectors", "vectors.npy")])
def test_lists_and_vectors_behind_signed_urls_leave_no_signature_behind(
    cli: Cli, server: str, tmp_path: Path, option: str, file: str
) -> None:
    url, store = f"{server}/{file}?{QUERY}", tmp_path / "store"
    planned = cli("embed", store, option, url, "--dry-run")
    done = cli("embed", store, option, url, "--workers", 0, "--progress", "json")
    refused = cli("embed", store, option, url.replace(file, f"no-{file}"), "--workers", 0, code=None)
    assert refused.returncode
    assert (store / "nodes/00000.npy").is_file()
    nowhere(store, planned, done, refused)


def test_a_download_of_a_list_behind_a_signed_url_leaves_no_signature_behind(
    cli: Cli, server: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    done = cli("download", store, f"{server}/urls.csv?{QUERY}", "--allow-private-hosts", "--workers", 0)
    assert (store / "shards/00000.tar").is_file()
    nowhere(store, done, cli("embed", store, "--workers", 0))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/a b.tar?sig=1&x=2", "https://host/a b.tar"),
        ("403, message='Forbidden', url='https://host/x?token=1'", "403, message='Forbidden', url='https://host/x'"),
        ("https://host/{a,b}.tar?sig=1: no (see https://b/y?t=3).", "https://host/{a,b}.tar: no (see https://b/y)."),
        ("https://host/it's?sig=1", "https://host/it's"),
        ("ftp://user:pass@host/x", "ftp://host/x"),
        ("s3://bucket/a?.tar", "s3://bucket/a?.tar"),
        ("/data/a?.tar, really? me@host", "/data/a?.tar, really? me@host"),
    ],
)
def test_errors_logs_and_recipes_show_urls_without_users_and_queries(text: str, shown: str) -> None:
    assert public(text) == shown
    assert str(InputError(text, text)) == f"{shown}\n  -> {shown}"
    record = logging.makeLogRecord({"msg": "read %s", "args": (text,), "levelname": "INFO"})
    assert HarmlessFormatter().format(record) == f"read {shown}"
    assert json.loads(JsonFormatter().format(record))["message"] == f"read {shown}"
    stream = io.StringIO(Recipe(embed=Embed(captions=text)).dump())
    assert Embed(captions=shown).captions in stream.getvalue().replace("''", "'")
