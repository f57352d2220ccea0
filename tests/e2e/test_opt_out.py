"""Downloads whose sites say no, through proxies, and past filters: what is kept, counted and remembered."""

from __future__ import annotations

import io
import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Download, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import records
from graphbuild.store.store import Store
from tests.e2e.web import proxying, serving

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
PRIVATE = ("--allow-private-hosts", "--workers", 0)
OPEN, TAGGED, RESERVED, GONE = 6, 3, 2, 1
LEFT = {"download: opt-out: X-Robots-Tag": TAGGED, "download: opt-out: TDM-Reservation": RESERVED}


@pytest.fixture
def site(pictures: list[Picture], tmp_path: Path) -> Iterator[tuple[Path, Counter[str]]]:
    """A list of pictures at /open, /tagged and /reserved, of which two kinds are not to be used, and one that is gone;
    what was asked of their server."""
    hits: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits[self.path] += 1
            kind, number = self.path.strip("/").split("-")
            body = b"" if kind == "gone" else pictures[int(number)][0]
            self.send_response(404 if kind == "gone" else 200)
            if kind == "tagged":
                self.send_header("X-Robots-Tag", "noai, noimageai")
            if kind == "reserved":
                self.send_header("TDM-Reservation", "1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    kinds = ["open"] * OPEN + ["tagged"] * TAGGED + ["reserved"] * RESERVED + ["gone"] * GONE
    base = f"http://127.0.0.1:{server.server_address[1]}"
    rows = [{"url": f"{base}/{kind}-{n}", "caption": pictures[n][1]} for n, kind in enumerate(kinds)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield tmp_path / "list.jsonl", hits
    server.shutdown()
    server.server_close()


def manifest_of(store: Path) -> Any:
    return json.loads((store / "manifest.json").read_text())["download"]


def asked(hits: Counter[str]) -> Counter[str]:
    return Counter(path.strip("/").split("-")[0] for path in hits.elements())


def test_what_sites_opt_out_of_is_left_counted_by_its_reason_and_not_asked_for_again(
    site: tuple[Path, Counter[str]], cli: Cli, tmp_path: Path
) -> None:
    (urls, hits), store = site, tmp_path / "store"
    said = cli("download", store, urls, *PRIVATE, "--retries", 3).stdout
    assert f"12 rows -> 12 URLs -> {OPEN} images (50.0%)" in said
    for reason, count in LEFT.items():
        assert f"{count} {reason}" in said
    assert manifest_of(store)["failures"] == {**LEFT, "download: HTTP Error 404: Not Found": GONE}
    table = pq.read_table(store / "shards/00000.parquet").to_pylist()
    told = Counter(row["error_message"] for row in table if "open" not in row["url"] and "gone" not in row["url"])
    assert told == {"opt-out: X-Robots-Tag\nnoai, noimageai": TAGGED, "opt-out: TDM-Reservation": RESERVED}
    assert {row["status"] for row in table} == {"success", "failed_to_download"}
    assert asked(hits) == {"open": OPEN, "tagged": TAGGED, "reserved": RESERVED, "gone": GONE}, "once each"

    cli("report", store)
    assert "opt-out: X-Robots-Tag" in (store / "report/index.html").read_text()
    hits.clear()
    assert f"0 of {TAGGED + RESERVED + GONE} failed URLs" in cli("retry", store, *PRIVATE).stdout
    assert not hits
    assert f"{GONE} of {TAGGED + RESERVED + GONE} failed URLs" in cli("retry", store, "--all", *PRIVATE).stdout
    assert asked(hits) == {"gone": GONE}, "also --all leaves in peace whoever said no"


def test_an_opt_out_is_ignored_by_the_command_that_says_so_and_by_no_later_one(
    site: tuple[Path, Counter[str]], cli: Cli, tmp_path: Path
) -> None:
    (urls, hits), store = site, tmp_path / "store"
    cli("download", store, urls, *PRIVATE)
    assert "opt_out_ignored" not in manifest_of(store)
    assert "ignore_opt_out" not in (store / "recipe.yaml").read_text()
    hits.clear()
    cli("retry", store, "--reason", "opt-out", *PRIVATE)
    assert asked(hits) == {"tagged": TAGGED, "reserved": RESERVED}, "who names them asks again"
    assert manifest_of(store)["failures"] == {**LEFT, "download: HTTP Error 404: Not Found": GONE}
    hits.clear()
    said = cli("retry", store, "--all", "--ignore-opt-out", *PRIVATE).stdout
    assert f"-> {TAGGED + RESERVED} images; {GONE} without one" in said
    assert manifest_of(store)["opt_out_ignored"] == TAGGED + RESERVED + GONE
    assert "6 URLs were fetched with --ignore-opt-out" in cli("download", store).stdout
    assert "ignore_opt_out" not in (store / "recipe.yaml").read_text()

    other = tmp_path / "other"
    cli("download", other, urls, "--ignore-opt-out", *PRIVATE)
    assert manifest_of(other)["opt_out_ignored"] == 12
    assert manifest_of(other)["failures"] == {"download: HTTP Error 404: Not Found": GONE}
    cli("download", tmp_path / "third", urls, *PRIVATE)
    assert manifest_of(tmp_path / "third")["failures"] == manifest_of(store)["failures"] | LEFT


def test_a_list_of_which_every_site_says_no_names_the_way_out(
    cli: Cli, pictures: list[Picture], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with serving(lambda path: pictures[0][0], {"X-Robots-Tag": "noai, noimageai, noindex"}) as address:
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{address}/{n},picture {n}\n" for n in range(3)))
        done = cli("download", store, tmp_path / "list.csv", *PRIVATE, code=1)
        assert "3 URLs: download: opt-out: X-Robots-Tag" in done.stderr
        command = f"graphbuild retry {store} --reason opt-out --ignore-opt-out"
        assert f"use another list; if you may use what these sites opt out of: `{command}`" in done.stderr
        assert "next " not in done.stdout
        assert "an old list, or DNS" not in done.stdout
        assert "3 of 3 failed URLs -> 3 images; 0 without one" in cli(*command.split()[1:], *PRIVATE).stdout


def test_robots_txt_is_obeyed_by_a_store_that_was_told_to(pictures: list[Picture], cli: Cli, tmp_path: Path) -> None:
    def answer(path: str) -> bytes:
        return b"User-agent: *\nDisallow: /no" if path == "/robots.txt" else pictures[0][0]

    with serving(answer) as address:
        lines = [f"{address}/{kind}/{n},picture {n}\n" for n in range(5) for kind in ("yes", "no")]
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(lines))
        cli("download", tmp_path / "store", tmp_path / "list.csv", "--robots-txt", *PRIVATE)
        assert manifest_of(tmp_path / "store")["failures"] == {"download: opt-out: robots.txt": 5}
        cli("download", tmp_path / "store", *PRIVATE)
        refused = cli("download", tmp_path / "store", "--no-robots-txt", *PRIVATE, code=2).stderr
        assert "robots_txt: true -> not set" in refused
        cli("download", tmp_path / "store", "--no-robots-txt", "--force", *PRIVATE)
        assert manifest_of(tmp_path / "store")["failures"] == {}


@pytest.mark.slow
def test_a_download_goes_through_a_proxy_and_keeps_nothing_of_it(
    pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with serving(lambda path: pictures[0][0]) as address, proxying("5ec2e7") as (proxy, seen):
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{address}/{n},picture {n}\n" for n in range(9)))
        wrong = cli("download", store, tmp_path / "list.csv", "--proxy", f"http://us:no@{proxy}", *PRIVATE, code=1)
        assert "9 download: HTTP Error 407: Proxy Authentication Required" in wrong.stdout
        seen.clear()

        def count() -> int:  # other libraries, too, follow the environment
            return sum(url.startswith(address) for _, url, _ in seen)

        right = cli("retry", store, "--all", "--proxy", f"http://us:5ec2e7@{proxy}", *PRIVATE)
        assert "-> 9 images; 0 without one" in right.stdout
        assert count() == 9
        other = tmp_path / "other"
        env = {"http_proxy": f"http://us:5ec2e7@{proxy}", "no_proxy": ""}
        cli(
            "download", other, tmp_path / "list.csv", "--proxy", "env", "--allow-private-hosts", "--workers", 1, env=env
        )
        assert count() == 18
        cli("download", tmp_path / "third", tmp_path / "list.csv", *PRIVATE, env=env)
        assert count() == 18, "not unasked"
    for path in (*store.rglob("*"), *other.rglob("*")):
        assert not path.is_file() or b"5ec2e7" not in path.read_bytes(), path
    assert "5ec2e7" not in wrong.stdout + wrong.stderr + right.stdout + right.stderr


def encoded(width: int, height: int, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["keep_ratio", "no"])
def test_images_are_refused_by_bytes_sides_and_aspect_each_with_its_reason(mode: str, cli: Cli, tmp_path: Path) -> None:
    sideways = Image.Exif()
    sideways[0x0112] = 6
    turned = io.BytesIO()
    Image.radial_gradient("L").resize((300, 100)).save(turned, "JPEG", exif=sideways.tobytes())
    bodies = {
        "/fits": encoded(300, 100),
        "/fits-high": encoded(100, 300, "PNG"),
        "/fits-turned": turned.getvalue(),
        "/narrow": encoded(99, 200),
        "/flat": encoded(200, 99, "PNG"),
        "/long": encoded(301, 100),
        "/high": encoded(100, 301, "PNG"),
        "/tiny": encoded(4, 4, "PNG"),
        "/heavy": encoded(300, 200, "BMP"),
    }
    least = len(bodies["/tiny"]) + 1
    most = max(len(body) for path, body in bodies.items() if path != "/heavy")
    store = tmp_path / "store"
    with serving(bodies.__getitem__) as address:
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{address}{path},{path}\n" for path in bodies))
        given = ("--min-image-size", 100, "--max-aspect-ratio", 3, "--min-bytes", least, "--max-bytes", most)
        cli("download", store, tmp_path / "list.csv", "--resize-mode", mode, "--image-size", 32, *given, *PRIVATE)
        cli("download", store, *PRIVATE)  # which remembers them
    assert manifest_of(store)["failures"] == {
        "resize: too small: a side under N pixels": 2,
        "resize: too long: sides over N to N": 2,
        "resize: too small: under N bytes": 1,
        "download: too large: over N,N bytes": 1,
    }
    table = pq.read_table(store / "shards/00000.parquet").to_pylist()
    told = {row["caption"]: row["error_message"] for row in table}
    assert {path for path, message in told.items() if not message} == {"/fits", "/fits-high", "/fits-turned"}
    assert told["/narrow"] == told["/flat"] == "too small: a side under 100 pixels"
    assert told["/long"] == told["/high"] == "too long: sides over 3 to 1"
    assert told["/tiny"] == f"too small: under {least} bytes"


def test_records_of_earlier_versions_stay_valid_where_nothing_new_is_used(
    pictures: list[Picture], tmp_path: Path
) -> None:
    with serving(lambda path: pictures[0][0]) as address, Runner(workers=0) as runner:
        (tmp_path / "list.csv").write_text(f"url,caption\n{address}/0,a picture\n")
        store = Store(str(tmp_path / "store"))
        config = Download(urls=str(tmp_path / "list.csv"), allow_private_hosts=True)
        run_verb("download", Recipe(download=config), store, runner)
        (record,) = records(store, "download").values()
        names = (
            "image_size resize_mode resize_only_if_bigger encode_quality timeout_seconds retries max_bytes max_pixels"
        )
        assert set(record["settings"]) == {*names.split(), "shard_size"}
        used = config.model_copy(update={"min_bytes": 1, "robots_txt": True})
        other = Store(str(tmp_path / "other"))
        run_verb("download", Recipe(download=used), other, runner)
        (record,) = records(other, "download").values()
        assert set(record["settings"]) == {*names.split(), "shard_size", "min_bytes", "robots_txt"}
