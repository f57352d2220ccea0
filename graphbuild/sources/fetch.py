"""How URLs are fetched: the opener that img2dataset's requests pass through while `fetching(policy)` holds.

A list from the web names dead hosts, hosts that answer forever or too much, and addresses that are nobody else's
business. Each host is resolved once and connected to at an address that was looked at, after every redirect anew:
addresses that are not public are refused. Errors that may pass are tried again after a pause, others not. Memory:
`max_bytes` a request, and about 200 bytes a host.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

REDIRECTS = 5
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 30.0  # seconds, whatever a server's Retry-After says
FAILURES_IN_A_ROW = 3  # to connect, until a host counts as down
REMEMBERED = 600.0  # seconds that a host's addresses, or its being down, are remembered
REFUSED = "refused: not a public address"  # how the reason begins
DEADLINES = 6  # a whole fetch may take so many times the time-out


@dataclass(frozen=True)
class Policy:
    """timeout_seconds: to connect, and between two packets; a whole fetch may take DEADLINES times as long. retries:
    of errors that may pass. max_bytes: of a body. host_connections: at a time to one host, of this process.
    allow_private_hosts: also fetch from loopback, link-local, private and other addresses that are not public.
    """

    timeout_seconds: float = 10
    retries: int = 1
    max_bytes: int = 50_000_000
    host_connections: int = 8
    allow_private_hosts: bool = False


class RefusedError(OSError):
    """A fetch that is not tried, or not to its end. The first line is the reason, alike for all URLs."""


@contextlib.contextmanager
def fetching(policy: Policy) -> Iterator[None]:
    """urllib.request.urlopen follows the policy meanwhile, in this whole process."""
    install: Any = urllib.request.install_opener
    install(fetcher(policy))
    try:
        yield
    finally:
        install(None)


@functools.cache
def fetcher(policy: Policy) -> Fetcher:
    """This process's fetcher: what it learns of hosts serves the next shard too."""
    return Fetcher(policy)


class Fetcher:
    """Fetches whole bodies under a policy; `open` is what urlopen calls, from any number of threads."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.hosts = Hosts(policy)
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            _Http(self.hosts),
            _Redirects(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):  # neither files nor FTP, and no proxy, behind which addresses could not be looked at
            self._opener.add_handler(handler)

    def open(self, request: Any, data: None = None, timeout: Any = None) -> urllib.response.addinfourl:
        """The response with its whole body in memory.

        Raises:
            OSError: of the last try (HTTPError, URLError, TimeoutError, RefusedError, ...).
        """
        request = urllib.request.Request(request) if isinstance(request, str) else request
        for attempt in range(self.policy.retries + 1):
            try:
                return self._fetch(request)
            except (OSError, http.client.HTTPException) as error:
                if attempt == self.policy.retries or not may_pass(error):
                    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, RefusedError):
                        raise error.reason from None
                    raise
                time.sleep(pause(attempt, error))
        raise AssertionError("the last try returns or raises")

    def _fetch(self, request: Any) -> urllib.response.addinfourl:
        policy = self.policy
        deadline = time.monotonic() + DEADLINES * policy.timeout_seconds
        with self.hosts.turn(request.host), self._opener.open(request, timeout=policy.timeout_seconds) as response:
            length = response.headers.get("Content-Length", "")
            if length.isdigit() and int(length) > policy.max_bytes:
                raise RefusedError(f"too large: over {policy.max_bytes:,} bytes")
            body = bytearray()
            while part := response.read1(65_536):
                body += part
                if len(body) > policy.max_bytes:
                    raise RefusedError(f"too large: over {policy.max_bytes:,} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {DEADLINES} time-outs")
            if length.isdigit() and len(body) < int(length):
                raise http.client.IncompleteRead(bytes(body), int(length) - len(body))
            return urllib.response.addinfourl(io.BytesIO(body), response.headers, response.geturl(), response.status)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may go well later: time-outs, resets, cut bodies, busy servers, DNS out of breath."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in PASSING_STATUS
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    return isinstance(cause, TimeoutError | ConnectionError | http.client.IncompleteRead)


def may_pass_later(message: str) -> bool:
    """The same, of the message that is kept with a URL; hosts that were down may be up again too."""
    return bool(re.search(_PASSING_MESSAGE, message))


_PASSING_MESSAGE = re.compile(
    r"HTTP Error (408|425|429|500|502|503|504)\b|timed out|time-outs|reset by peer|Connection (refused|aborted)"
    r"|Broken pipe|Remote end closed|IncompleteRead|Temporary failure in name|unreachable|its host is down"
)


def pause(attempt: int, error: BaseException) -> float:
    """Seconds to wait after a try, 0 the first: what the server asks for, else twice as long each time, at random."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    seconds = float(asked) if asked.isdigit() else 2.0**attempt * random.uniform(0.5, 1)
    return min(seconds, LONGEST_PAUSE)


@dataclass
class Host:
    """What is known of a host and port. addresses: to connect to; error: why there are none; both until `fresh_until`.

    failures: to connect, in a row. After too many it is skipped, with the last one as the reason, until `down_until`.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    addresses: list[str] = field(default_factory=list)
    error: OSError | None = None
    fresh_until: float = 0.0
    failures: int = 0
    last_failure: str = ""
    down_until: float = 0.0


class Hosts:
    """The hosts that this process has met: resolved once, taken in turns, skipped while they are down."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._hosts: dict[tuple[str, int], Host] = {}
        self._turns: dict[str, threading.Semaphore] = {}

    def turn(self, netloc: str | None) -> threading.Semaphore:
        """Held while one of the host's connections is used."""
        name = (netloc or "").rpartition("@")[2].rsplit(":", 1)[0].lower()
        with self._lock:
            return self._turns.setdefault(name, threading.Semaphore(self._policy.host_connections))

    def connect(self, name: str, port: int, timeout: float) -> socket.socket:
        """A connection to one of the host's allowed addresses; OSError where there is none."""
        with self._lock:
            host = self._hosts.setdefault((name.lower(), port), Host())
        if time.monotonic() < host.down_until:
            raise RefusedError(f"skipped: its host is down ({host.last_failure})")
        last: OSError = OSError("no address")
        for address in self._addresses(host, name):
            try:
                connection = socket.create_connection((address, port), timeout)
            except OSError as error:
                last = error
            else:
                host.failures = 0
                return connection
        host.failures, host.last_failure = host.failures + 1, str(last)
        if host.failures >= FAILURES_IN_A_ROW:
            host.failures, host.down_until = 0, time.monotonic() + REMEMBERED
        raise last

    def _addresses(self, host: Host, name: str) -> list[str]:
        with host.lock:  # threads that want the same host wait for one answer
            if time.monotonic() >= host.fresh_until:
                host.addresses, host.error, remembered = [], None, REMEMBERED
                try:
                    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                    every = list(dict.fromkeys(str(entry[4][0]) for entry in found))
                    host.addresses = [a for a in every if self._policy.allow_private_hosts or is_public(a)]
                    if not host.addresses:
                        host.error = RefusedError(f"{REFUSED} (--allow-private-hosts)\n{', '.join(every)}")
                except (OSError, UnicodeError) as error:
                    host.error = error if isinstance(error, OSError) else OSError(f"not a host name: {error}")
                    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                        remembered = 0.0
                host.fresh_until = time.monotonic() + remembered
            if host.error is not None:
                raise host.error
            return host.addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where it wraps an IPv4 address in an IPv6 one."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    return ip.is_global and not ip.is_multicast


class _HttpConnection(http.client.HTTPConnection):
    hosts: Hosts

    def connect(self) -> None:
        self.sock = self.hosts.connect(self.host, self.port, cast(float, self.timeout))


class _HttpsConnection(http.client.HTTPSConnection):
    hosts: Hosts

    def connect(self) -> None:
        bare = self.hosts.connect(self.host, self.port, cast("float", self.timeout))
        with contextlib.ExitStack() as unless_wrapped:
            unless_wrapped.callback(bare.close)
            self.sock = _trusted().wrap_socket(bare, server_hostname=self.host)
            unless_wrapped.pop_all()


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS


class _Http(urllib.request.AbstractHTTPHandler):
    """http and https over connections that `Hosts` makes."""

    def __init__(self, hosts: Hosts) -> None:
        super().__init__()
        self._http: Any = type("Http", (_HttpConnection,), {"hosts": hosts})
        self._https: Any = type("Https", (_HttpsConnection,), {"hosts": hosts})

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._http, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._https, request)

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_
