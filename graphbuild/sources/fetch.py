"""How URLs are fetched: the opener that img2dataset's requests pass through while `fetching(policy)` holds.

A list from the web names dead hosts, hosts that answer forever or too much, and addresses that are nobody else's
business. A host is connected to at an address that was looked at, after every redirect anew: addresses that are not
public are refused. Whatever a server does, a fetch ends by its deadline. Errors that may pass are tried again after a
pause, others not; none names the URL, which may hold a password or a signature. Memory: `max_bytes` a request.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import urllib.response
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from graphbuild.sources.hosts import Host, RefusedError, refuse_private
from graphbuild.sources.optout import Robots, agents, opted_out
from graphbuild.sources.proxy import Proxies
from graphbuild.sources.target import Target, response_of

REDIRECTS = 5
REDIRECTING = frozenset({301, 302, 303, 307, 308})
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 30.0  # seconds, whatever a server's Retry-After says
DEADLINES = 6  # a whole fetch may take so many times the time-out
READ_BYTES = 65_536


@dataclass(frozen=True)
class Policy:
    """timeout_seconds: to connect, and between two packets; a whole fetch, from its host's turn on and with its
    redirects, may take DEADLINES times as long. retries: of errors that may pass. max_bytes: of a body, unpacked.
    host_connections: at a time to one host, of this process. allow_private_hosts: also fetch from loopback, link-local,
    private and other addresses that are not public. user_agent_token: whom sites may address, too, when they say no
    (`graphbuild.sources.optout`); robots_txt: read it; ignore_opt_out: fetch all the same. proxy: see `Proxies`.
    """

    timeout_seconds: float = 10
    retries: int = 1
    max_bytes: int = 50_000_000
    host_connections: int = 8
    allow_private_hosts: bool = False
    user_agent_token: str | None = None
    robots_txt: bool = False
    ignore_opt_out: bool = False
    proxy: str | None = None


@contextlib.contextmanager
def fetching(policy: Policy) -> Iterator[None]:
    """urllib.request.urlopen follows the policy meanwhile, in this whole process."""
    install: Any = urllib.request.install_opener
    install(fetcher(policy))
    try:
        yield
    finally:
        install(None)


class Fetcher:
    """Fetches whole bodies under a policy; `open` is what urlopen calls, from any number of threads."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._hosts: dict[tuple[str, int], Host] = {}  # to both only setdefault adds: one step for threads
        self._turns: dict[str, threading.Semaphore] = {}
        self._agents = agents(policy.user_agent_token)
        self._robots: dict[tuple[bool, str, int], Robots] = {}
        self._proxies = Proxies(policy.proxy)

    def open(self, request: Any, data: None = None, timeout: Any = None) -> urllib.response.addinfourl:
        """The response with its whole body in memory.

        Raises:
            OSError: of the last try (HTTPError, URLError, TimeoutError, RefusedError, ...).
            HTTPException: the same.
        """
        request = urllib.request.Request(request) if isinstance(request, str) else request
        return self._tries(request.full_url, dict(request.header_items()), obeys=not self.policy.ignore_opt_out)

    def _tries(self, url: str, headers: dict[str, str], *, obeys: bool) -> urllib.response.addinfourl:
        """obeys: leaves what its site says no to."""
        for attempt in range(self.policy.retries + 1):
            try:
                return self._fetch(url, headers, obeys=obeys)
            except (OSError, http.client.HTTPException) as error:
                if attempt == self.policy.retries or not may_pass(error):
                    raise
                time.sleep(pause(attempt, error))
        raise AssertionError("the last try returns or raises")

    def _fetch(self, url: str, headers: dict[str, str], *, obeys: bool) -> urllib.response.addinfourl:
        seconds = DEADLINES * self.policy.timeout_seconds
        target = Target.of(url)
        for redirects_left in reversed(range(REDIRECTS + 1)):
            if obeys and self.policy.robots_txt:
                self._ask_robots(target, headers)
            turn = self._turns.get(target.name) or threading.Semaphore(self.policy.host_connections)
            with self._turns.setdefault(target.name, turn):
                begin = time.monotonic()
                try:
                    response, body = self._exchange(target, headers, begin + seconds, obeys=obeys)
                except (OSError, http.client.HTTPException):
                    if time.monotonic() >= begin + seconds:
                        raise TimeoutError(f"not complete after {DEADLINES} time-outs") from None
                    raise
                seconds -= time.monotonic() - begin
            status, location = response.status, response.headers.get("Location", "")
            if 200 <= status < 300:
                return urllib.response.addinfourl(io.BytesIO(body), response.headers, target.url, status)
            redirected = status in REDIRECTING and location
            if not redirected or not redirects_left:
                phrase = http.client.responses.get(status, "a status of its own")  # the server's may hold the URL
                if redirected:
                    phrase = urllib.request.HTTPRedirectHandler.inf_msg.splitlines()[0]
                raise urllib.error.HTTPError("", status, phrase, response.headers, None)
            target = Target.of(location.encode("latin-1").decode(errors="surrogateescape"), target.url)
        raise AssertionError("the last redirect returns or raises")

    def _ask_robots(self, target: Target, headers: dict[str, str]) -> None:
        origin = target.secure, target.name, target.port
        robots = self._robots.get(origin) or self._robots.setdefault(origin, Robots(self._agents))

        def read() -> bytes | None:
            try:  # what its own headers say is not about images
                return self._tries(urljoin(target.url, "/robots.txt"), headers, obeys=False).read()
            except urllib.error.HTTPError as error:
                if error.code >= 500 or may_pass(error):
                    raise
                return None

        robots.check(target.path, read)

    def _exchange(
        self, target: Target, headers: dict[str, str], deadline: float, *, obeys: bool
    ) -> tuple[http.client.HTTPResponse, bytearray]:
        """The response and, of a success, its body."""

        def wait() -> float:
            """Seconds that the next step may take."""
            seconds = min(self.policy.timeout_seconds, deadline - time.monotonic())
            if seconds <= 0:
                raise TimeoutError("timed out")
            return seconds

        proxy, path = self._proxies.of(target), target.path
        headers = headers | target.headers | {"Connection": "close"}
        with contextlib.ExitStack() as opened:
            connection = http.client.HTTPConnection(target.name, target.port)
            try:
                if proxy is None:
                    place = target.name, target.port
                    host = self._hosts.get(place) or self._hosts.setdefault(place, Host(*place))
                    sock = opened.enter_context(host.connect(wait, self.policy.allow_private_hosts))
                else:
                    if not self.policy.allow_private_hosts:
                        refuse_private(target.name)
                    sock = opened.enter_context(proxy.host.connect(wait, allow_private=True))
                    if target.secure:
                        proxy.tunnel(sock, wait, target)
                    else:
                        path, headers = f"http://{target.authority.removesuffix(':80')}{path}", headers | proxy.headers
                if target.secure:
                    connection.default_port = 443
                    sock.settimeout(wait())
                    sock = opened.enter_context(_trusted().wrap_socket(sock, server_hostname=target.name))
            except (RefusedError, urllib.error.HTTPError):
                raise
            except OSError as error:
                raise urllib.error.URLError(error) from None
            connection.sock = sock
            connection.request("GET", path, headers=headers)
            response = opened.enter_context(response_of(sock, wait, "GET"))
            if not 200 <= response.status < 300:
                return response, bytearray()
            if obeys and (reason := opted_out(response.headers, self._agents)):
                raise RefusedError(reason)
            return response, self._body(response)

    def _body(self, response: http.client.HTTPResponse) -> bytearray:
        """The body, unpacked if the server packed it unasked."""
        body, received, declared = bytearray(), 0, response.length or 0
        packed = response.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip", "deflate")
        unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed else None  # finds out which of both it is
        while max(declared, received, len(body)) <= self.policy.max_bytes:
            part = response.read1(READ_BYTES)
            if not part:
                if received < declared or (unpacking and not unpacking.eof):
                    raise http.client.IncompleteRead(bytes(body), max(declared - received, 0) or None)
                return body
            received += len(part)
            try:
                body += unpacking.decompress(part, self.policy.max_bytes + 1 - len(body)) if unpacking else part
            except zlib.error:
                raise OSError("not packed as its Content-Encoding says") from None
        raise RefusedError(f"too large: over {self.policy.max_bytes:,} bytes")


fetcher = functools.cache(Fetcher)  # what a process learns of hosts serves its next shard too


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


def may_pass(error: BaseException) -> bool:
    """Whether the same request may go well later: time-outs, resets, cut bodies, busy servers, DNS out of breath."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in PASSING_STATUS
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    return isinstance(cause, TimeoutError | ConnectionError | http.client.IncompleteRead)


def pause(attempt: int, error: BaseException) -> float:
    """Seconds to wait after a try, 0 the first: what the server asks for, else twice as long each time, at random."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    seconds = float(asked) if asked.isdigit() else 2.0**attempt * random.uniform(0.5, 1)
    return min(seconds, LONGEST_PAUSE)
