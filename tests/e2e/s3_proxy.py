"""A proxy between a client and an S3 server on loopback that answers as busy servers and bad networks do, and counts.

Which fault meets which request follows from a seed and the order of the requests.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>{}</Message></Error>"
REFUSALS = {
    "internal error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
}
KINDS = (
    "internal error",  # 500, and nothing was done
    "slow down",  # 503, and nothing was done
    "delay",  # then all goes well
    "reset",  # the connection, before anything was done
    "lost answer",  # the server did it, and the connection is reset
    "cut answer",  # as that, in the middle of the body
)
HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "date", "server"}


class S3Proxy(ThreadingHTTPServer):
    """A server in a thread of its own; a context manager. `share` of the requests meet a fault, all kinds alike.

    outage: every request meets that fault. outage_at: begins one, of that kind, with the first PUT to such a path.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, *, seed: int = 0, share: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.upstream = upstream.removeprefix("http://")
        self.share = share
        self.outage: str | None = None
        self.outage_at: tuple[str, str] | None = None  # part of the path, kind
        self.requests: Counter[str] = Counter()  # by method
        self.bytes = 0  # of answers
        self.faults: Counter[str] = Counter()  # by kind
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment in which commands find this proxy instead of the server."""
        return {**environment, "AWS_ENDPOINT_URL_S3": self.url}

    def __enter__(self) -> S3Proxy:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections end here as they please."""

    def fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests[method] += 1
            if self.outage_at and method == "PUT" and self.outage_at[0] in path:
                self.outage, self.outage_at = self.outage_at[1], None
            kind = self.outage or (self._random.choice(KINDS) if self._random.random() < self.share else None)
            if kind:
                self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    server: S3Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _handle(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.fault(self.command, self.path)
        if kind in REFUSALS:
            status, code, message = REFUSALS[kind]
            self._answer(status, {"Content-Type": "application/xml"}, ERROR.format(code, message).encode())
            return
        if kind == "reset":
            self._reset()
            return
        if kind == "delay":
            time.sleep(0.2)
        upstream = http.client.HTTPConnection(self.server.upstream)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            upstream.request(self.command, self.path, content, headers)
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        if kind == "lost answer":
            self._reset()
            return
        self.server.bytes += len(body)
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length", "0")
        self._answer(answer.status, headers, body, cut=kind == "cut answer")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 as http.server wants them

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        has_body = bool(body) and self.command != "HEAD"
        if cut and not has_body:
            self._reset()
            return
        self.end_headers()
        if has_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            time.sleep(0.02)  # the reset overtakes what has not arrived
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
