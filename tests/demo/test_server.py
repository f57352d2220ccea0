"""The demo's faulty web over real HTTP: each fault does what the table says, at its share of the URLs."""

from __future__ import annotations

import http.client
import io
import logging
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import ATTRIBUTES, make_scenes
from graphbuild.demo.server import (
    FAULTS,
    SLOW_SECONDS,
    SceneServer,
    assign_faults,
    expected_images,
    image_url,
    write_url_list,
)

COUNT = 300
TIMEOUT_SECONDS = 1.5


@pytest.fixture
def site() -> Iterator[SceneServer]:
    with SceneServer(make_scenes(COUNT, 5), seed=5, pixels=64) as server:
        yield server


def with_fault(site: SceneServer, kind: str | None) -> list[int]:
    return [i for i, fault in enumerate(site.faults) if (fault.kind if fault else None) == kind]


def url_with(site: SceneServer, kind: str | None) -> str:
    return image_url(site.url, with_fault(site, kind)[0])


def get(url: str, timeout: float = TIMEOUT_SECONDS) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request as it comes, redirects and errors included."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    try:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def download(url: str, timeout: float = TIMEOUT_SECONDS, retries: int = 1) -> bytes | None:
    """What a correct downloader ends with: the bytes of an image that decodes, or None."""
    for _ in range(retries + 1):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                body: bytes = answer.read()
            break
        except (OSError, http.client.HTTPException):
            continue
    else:
        return None
    try:
        Image.open(io.BytesIO(body)).load()
    except OSError:
        return None
    return body


# --- the table --------------------


@pytest.mark.parametrize("kind", FAULTS)
def test_a_correct_downloader_ends_with_an_image_exactly_where_the_table_says_so(site: SceneServer, kind: str) -> None:
    indices = with_fault(site, kind)
    assert indices
    timeout = 0.5 if kind == "hang" else TIMEOUT_SECONDS
    for index in indices[:2]:
        body = download(image_url(site.url, index), timeout)
        assert (body is not None) == FAULTS[kind].kept
        if body is not None and kind != "placeholder":
            assert body == site.image(index)


def test_the_expected_number_of_images_is_what_a_downloader_gets() -> None:
    with SceneServer(make_scenes(120, 9), seed=9, pixels=64) as site, ThreadPoolExecutor(32) as pool:
        bodies = list(pool.map(lambda i: download(image_url(site.url, i), timeout=0.8), range(120)))
        assert sum(body is not None for body in bodies) == expected_images(site.faults)
        assert expected_images(site.faults) < 120


def test_three_thousand_urls_have_each_fault_at_its_share() -> None:
    found = Counter(fault.kind for fault in assign_faults(3000) if fault is not None)
    assert found == {kind: round(3000 * fault.share) for kind, fault in FAULTS.items()}
    assert min(found.values()) >= 5
    assert 0.10 <= sum(found.values()) / 3000 <= 0.12


@pytest.mark.parametrize("count", [0, 1, 5, 40, 1000])
def test_small_lists_have_every_fault_that_fits(count: int) -> None:
    faults = assign_faults(count)
    assert len(faults) == count
    assert len({fault.kind for fault in faults if fault is not None}) == min(count, len(FAULTS))


def test_faults_follow_from_the_seed_in_any_process() -> None:
    code = "from graphbuild.demo.server import *; print([f and f.kind for f in assign_faults(500, 4)])"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "999"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [fault and fault.kind for fault in assign_faults(500, 4)]
    assert other.stdout.strip() == str(here)
    assert here != [fault and fault.kind for fault in assign_faults(500, 5)]


# --- each fault on the wire --------------------


def test_healthy_urls_serve_their_own_scene(site: SceneServer) -> None:
    for index in with_fault(site, None)[:20]:
        status, headers, body = get(image_url(site.url, index))
        assert (status, headers["Content-Type"], body) == (200, "image/jpeg", site.image(index))


@pytest.mark.parametrize("path", ["/", "/images/", "/images/abc.jpg", f"/images/{COUNT}.jpg", "/images/-1.jpg"])
def test_unknown_paths_are_not_found(site: SceneServer, path: str) -> None:
    assert get(site.url + path)[0] == 404


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [("not_found", [404] * 3), ("server_error", [500] * 3), ("unavailable_once", [503, 200, 200])],
)
def test_errors_repeat_or_go_away(site: SceneServer, kind: str, statuses: list[int]) -> None:
    for index in with_fault(site, kind):
        assert [get(image_url(site.url, index))[0] for _ in range(3)] == statuses


@pytest.mark.parametrize(("kind", "status"), [("moved_permanently", 301), ("moved_temporarily", 302)])
def test_redirects_lead_to_the_real_image(site: SceneServer, kind: str, status: int) -> None:
    index = with_fault(site, kind)[0]
    found, headers, _ = get(image_url(site.url, index))
    assert found == status
    assert get(site.url + headers["Location"])[2] == site.image(index)


def test_a_redirect_loop_never_arrives(site: SceneServer) -> None:
    url = url_with(site, "redirect_loop")
    status, headers, _ = get(url)
    assert (status, site.url + headers["Location"]) == (302, url)
    with pytest.raises(urllib.error.HTTPError, match="infinite loop"):
        urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)


def test_an_html_page_comes_with_status_200(site: SceneServer) -> None:
    status, headers, body = get(url_with(site, "html_page"))
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert body.startswith(b"<!doctype html>")


def test_a_truncated_image_is_good_http_and_a_bad_jpeg(site: SceneServer) -> None:
    status, headers, body = get(url_with(site, "truncated"))
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert len(body) == int(headers["Content-Length"])
    image = Image.open(io.BytesIO(body))  # the header is whole
    with pytest.raises(OSError, match="truncated"):
        image.load()


def test_a_wrong_content_type_hides_a_good_image(site: SceneServer) -> None:
    index = with_fault(site, "wrong_type")[0]
    _, headers, body = get(image_url(site.url, index))
    assert (headers["Content-Type"], body) == ("text/plain", site.image(index))


def test_the_placeholder_is_one_grey_picture_under_many_urls(site: SceneServer) -> None:
    indices = with_fault(site, "placeholder")
    bodies = {get(image_url(site.url, index))[2] for index in indices}
    assert len(indices) >= 3
    assert len(bodies) == 1
    pixels = np.asarray(Image.open(io.BytesIO(bodies.pop())), np.float64)
    assert pixels.shape == (64, 64, 3)
    assert np.ptp(pixels, axis=2).max() < 12  # no hue
    assert pixels.min() < 150 < 190 < np.median(pixels)  # and yet there is writing on it


def test_a_connection_cut_off_leaves_half_a_body(site: SceneServer) -> None:
    index = with_fault(site, "cut_off")[0]
    with pytest.raises(http.client.IncompleteRead) as error:
        get(image_url(site.url, index))
    whole = site.image(index)
    assert error.value.partial == whole[: len(whole) // 2]
    assert error.value.expected == math.ceil(len(whole) / 2)


def test_slow_answers_are_late_but_whole(site: SceneServer) -> None:
    index = with_fault(site, "slow")[0]
    start = time.monotonic()
    assert get(image_url(site.url, index))[2] == site.image(index)
    assert time.monotonic() - start >= SLOW_SECONDS


def test_a_hanging_answer_ends_when_the_server_closes() -> None:
    before = set(threading.enumerate())
    ended: list[float] = []

    def hang(url: str) -> None:
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            get(url, timeout=20)
        ended.append(time.monotonic())

    with SceneServer(make_scenes(60)) as site:
        client = threading.Thread(target=hang, args=(url_with(site, "hang"),))
        client.start()
        client.join(0.8)
        assert client.is_alive()
        closing = time.monotonic()
    client.join(5)
    assert ended
    assert ended[0] - closing < 2
    for thread in set(threading.enumerate()) - before:
        thread.join(2)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]


# --- under load --------------------


def test_sixty_four_clients_at_once_are_all_served_while_others_hang(site: SceneServer) -> None:
    address = (urlsplit(site.url).hostname, urlsplit(site.url).port)
    hanging = []
    for _ in range(16):
        connection = socket.create_connection(address, timeout=TIMEOUT_SECONDS)
        connection.sendall(f"GET {urlsplit(url_with(site, 'hang')).path} HTTP/1.0\r\n\r\n".encode())
        hanging.append(connection)
    healthy = with_fault(site, None)
    ready = threading.Barrier(64)

    def client(number: int) -> int:
        ready.wait(10)
        mine = [healthy[(number * 4 + i) % len(healthy)] for i in range(4)]
        return sum(download(image_url(site.url, i), timeout=2, retries=0) == site.image(i) for i in mine)

    with ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(client, range(64))) == 64 * 4
    for connection in hanging:
        connection.close()


def test_nothing_is_printed_or_logged_even_when_clients_hang_up(
    site: SceneServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    address = (urlsplit(site.url).hostname, urlsplit(site.url).port)
    kinds = ("slow", "unavailable_once", "cut_off", None)
    for kind in kinds * 3:
        connection = socket.create_connection(address, timeout=TIMEOUT_SECONDS)
        connection.sendall(f"GET {urlsplit(url_with(site, kind)).path} HTTP/1.0\r\n\r\n".encode())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # a reset: what the server writes from here on fails
    time.sleep(SLOW_SECONDS + 0.3)
    assert get(url_with(site, "not_found"))[0] == 404
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


# --- the URL list --------------------


def test_the_url_list_has_urls_captions_and_labels_in_scene_order(site: SceneServer, tmp_path: Path) -> None:
    path = tmp_path / "urls.parquet"
    write_url_list(path, site.scenes, site.url)
    table = pq.read_table(path)
    assert table.column_names == ["url", "caption", *ATTRIBUTES]
    rows = table.to_pylist()
    assert [row["caption"] for row in rows] == [caption(scene) for scene in site.scenes]
    for name in ATTRIBUTES:
        assert [row[name] for row in rows] == [getattr(scene, name) for scene in site.scenes]
    assert len({row["url"] for row in rows}) == COUNT
    index = with_fault(site, None)[-1]
    assert download(rows[index]["url"]) == site.image(index)


def test_a_later_server_at_the_same_port_serves_the_same_urls() -> None:
    scenes = make_scenes(60)
    with SceneServer(scenes) as first:
        url = url_with(first, None)
        body = get(url)[2]
        port = urlsplit(url).port or 0
    with pytest.raises(OSError, match="refused"):
        get(url)
    with SceneServer(scenes, port=port):
        assert get(url)[2] == body
