"""What is asked for at which host, as URLs and redirects say it, and how the answer is read."""

from __future__ import annotations

import base64
import http.client
import io
import socket
import urllib.error
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit


class Target(NamedTuple):
    """What is asked for at which host. path: with the query; headers: of the URL's user and password."""

    url: str
    secure: bool
    name: str
    port: int
    path: str
    headers: dict[str, str]

    @property
    def authority(self) -> str:
        return f"{f'[{self.name}]' if ':' in self.name else self.name}:{self.port}"

    @classmethod
    def of(cls, reference: str, base: str = "") -> Target:
        """A URL, or what a redirect from `base` refers to, encoded as browsers do by the sets of the WHATWG's URL
        standard: %XX stays as it is.

        Raises:
            URLError: it is none of http or https.
        """
        try:
            before, mark, query = reference.strip().partition("?")
            url = urljoin(base, before.replace("\\", "/") + mark + query)
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https"):
                kind = parts.scheme if parts.scheme.isalpha() else "none"
                raise urllib.error.URLError(f"unknown url type: {kind}")
            secure = parts.scheme == "https"
            name = (parts.hostname or "").encode("idna").decode()
            port = parts.port or (443 if secure else 80)
            if not name or not name.isprintable() or " " in name:
                raise ValueError(name)
        except ValueError:
            raise urllib.error.URLError("not a URL") from None
        path = quote(parts.path or "/", "!$%&'()*+,/:;=@[]|", errors="surrogateescape")
        query = quote(parts.query, "!$%&()*+,/:;=?@[\\]^`{|}", errors="surrogateescape")
        headers = {}
        if parts.username is not None:
            pair = unquote_to_bytes(parts.username) + b":" + unquote_to_bytes(parts.password or "")
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        return cls(url, secure, name, port, f"{path}?{query}" if query else path, headers)


def response_of(sock: socket.socket, wait: Callable[[], float], method: str) -> http.client.HTTPResponse:
    """What a server answers to a request of this method, up to the body."""
    response = http.client.HTTPResponse(cast(Any, Received(sock, wait)), method=method)
    try:
        response.begin()
    except http.client.RemoteDisconnected:
        raise
    except (http.client.BadStatusLine, http.client.UnknownProtocol):  # which hold what the server said
        raise OSError("the answer is not HTTP") from None
    return response


class Received(io.RawIOBase):
    """What comes in through a socket. No read waits longer than `wait()`, whatever the server lets drip."""

    def __init__(self, sock: socket.socket, wait: Callable[[], float]) -> None:
        self._sock, self._wait = sock, wait

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self._wait()
        if seconds != self._sock.gettimeout():  # a system call a read for nothing, until the deadline is near
            self._sock.settimeout(seconds)
        return self._sock.recv_into(buffer)
