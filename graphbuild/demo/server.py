"""A loopback HTTP server that serves scenes with the web's faults, each at a known share of the URLs.

Which URL has which fault follows from the seed alone, so what a downloader ought to bring home is known
beforehand. Costs one daemon thread a connection and 1 ms of one core a picture: drawn on request, not kept.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import ATTRIBUTES, Scene, encode_jpeg, render

SLOW_SECONDS = 0.3
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which the web fails, at `share` of the URLs; `kept`: a correct downloader gets an image."""

    kind: str
    share: float
    kept: bool


FAULTS: dict[str, Fault] = {
    fault.kind: fault
    for fault in (
        Fault("not_found", 0.025, False),  # 404: the page is gone, a retry is wasted
        Fault("server_error", 0.007, False),  # 500 every time, retries do not help
        Fault("unavailable_once", 0.012, True),  # 503 at first, fine on a retry
        Fault("slow", 0.010, True),  # a late answer is an answer
        Fault("hang", 0.002, False),  # no answer before any sensible time-out
        Fault("moved_permanently", 0.008, True),  # 301 to the image: redirects are followed
        Fault("moved_temporarily", 0.008, True),  # 302 to the image: redirects are followed
        Fault("redirect_loop", 0.003, False),  # 302 to itself: the client gives up
        Fault("html_page", 0.008, False),  # status 200 with a web page: not an image
        Fault("truncated", 0.006, False),  # HTTP succeeds, but half of the JPEG is missing: it does not decode
        Fault("wrong_type", 0.006, True),  # a good image sent as text/plain: the bytes decide, not the header
        Fault("placeholder", 0.015, True),  # a valid image that says it is gone; only its many copies give it away
        Fault("cut_off", 0.004, False),  # the connection closes before Content-Length bytes came
    )
}


def assign_faults(count: int, seed: int = 0) -> list[Fault | None]:
    """The fault of each of `count` URLs, None where all is well. Every kind gets its share, at least one."""
    faults: list[Fault | None] = []
    for fault in FAULTS.values():
        faults.extend([fault] * max(1, round(fault.share * count)))
    faults = (faults + [None] * count)[:count]
    random.Random(f"faults {seed}").shuffle(faults)
    return faults


def expected_images(faults: Sequence[Fault | None]) -> int:
    """How many URLs a correct downloader turns into images, if it retries and waits for `SLOW_SECONDS`."""
    return sum(fault is None or fault.kept for fault in faults)


def image_url(base_url: str, index: int) -> str:
    """The URL of scene `index`. It does not tell whether there is a fault behind it."""
    return f"{base_url}/images/{index:06d}.jpg"


def write_url_list(path: str | Path, scenes: Sequence[Scene], base_url: str) -> None:
    """Write the URL list as parquet, one row a scene: url, caption, then each attribute as a column."""
    columns: dict[str, list[Any]] = {
        "url": [image_url(base_url, index) for index in range(len(scenes))],
        "caption": [caption(scene) for scene in scenes],
    }
    columns |= {name: [getattr(scene, name) for scene in scenes] for name in ATTRIBUTES}
    pq.write_table(pa.table(columns), path)


class SceneServer:
    """Serves `scenes` on 127.0.0.1 (port 0: a free one) for the length of a `with` block; `url` is the base.

    `faults[i]` is the fault of scene i. Answers that hang or wait when the block ends are given up.
    """

    def __init__(self, scenes: Sequence[Scene], seed: int = 0, pixels: int = 96, port: int = 0) -> None:
        self.scenes = scenes
        self.pixels = pixels
        self.faults = assign_faults(len(scenes), seed)
        self.closing = threading.Event()
        self._refused_once: set[int] = set()
        self._lock = threading.Lock()
        self._http = _Listener(self, port)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def image(self, index: int) -> bytes:
        """The JPEG of scene `index`, as a healthy URL serves it."""
        return encode_jpeg(render(self.scenes[index], self.pixels))

    @cached_property
    def placeholder(self) -> bytes:
        """The JPEG that stands in for every image that is gone."""
        image = Image.new("RGB", (96, 96), (203, 203, 206))
        draw = ImageDraw.Draw(image)
        draw.rectangle((5, 5, 90, 90), outline=(150, 150, 154))
        text = "image\nno longer\navailable"
        left, top, right, bottom = draw.multiline_textbbox((0, 0), text, align="center")
        place = (48 - (left + right) / 2, 48 - (top + bottom) / 2)
        draw.multiline_text(place, text, fill=(112, 112, 118), align="center")
        return encode_jpeg(image.resize((self.pixels, self.pixels)))

    def first_visit(self, index: int) -> bool:
        """True the first time that it is asked for this scene."""
        with self._lock:
            first = index not in self._refused_once
            self._refused_once.add(index)
            return first


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # the default of 5 refuses connections when a downloader opens 64 at once

    def __init__(self, site: SceneServer, port: int) -> None:
        self.site = site
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):  # clients that hang up are part of the demo
            logger.error("answering %s failed", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 10  # seconds for a client to say what it wants

    def do_GET(self) -> None:
        site = self.server.site
        folder, _, name = self.path.lstrip("/").partition("/")
        stem = name.removesuffix(".jpg")
        if folder not in ("images", "moved") or not stem.isdecimal() or int(stem) >= len(site.scenes):
            self._status(404)
            return
        index = int(stem)
        fault = site.faults[index]
        if folder == "moved" or fault is None:
            self._answer(site.image(index))
        else:
            self._fail(fault.kind, index)

    def _fail(self, kind: str, index: int) -> None:
        """Answer as the fault has it."""
        site = self.server.site
        match kind:
            case "not_found":
                self._status(404)
            case "server_error":
                self._status(500)
            case "unavailable_once" if site.first_visit(index):
                self._status(503)
            case "unavailable_once":
                self._answer(site.image(index))
            case "slow":
                if not site.closing.wait(SLOW_SECONDS):
                    self._answer(site.image(index))
            case "hang":
                site.closing.wait()
            case "moved_permanently" | "moved_temporarily":
                self._status(301 if kind == "moved_permanently" else 302, location=f"/moved/{index:06d}.jpg")
            case "redirect_loop":
                self._status(302, location=self.path)
            case "html_page":
                page = b"<!doctype html><title>Gallery</title><p>Please enable cookies.</p>\n"
                self._answer(page, "text/html; charset=utf-8")
            case "truncated" | "cut_off":
                body = site.image(index)
                self._answer(body[: len(body) // 2], claimed_bytes=len(body) if kind == "cut_off" else None)
            case "wrong_type":
                self._answer(site.image(index), "text/plain")
            case "placeholder":
                self._answer(site.placeholder)
            case _:
                raise ValueError(f"no such fault: {kind}")

    def _answer(self, body: bytes, content_type: str = "image/jpeg", claimed_bytes: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body) if claimed_bytes is None else claimed_bytes))
        self.end_headers()
        self.wfile.write(body)

    def _status(self, status: int, location: str | None = None) -> None:
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the job's progress."""
