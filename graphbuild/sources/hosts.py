"""What is known of the web's hosts: their addresses, looked up once, which of them are public, and who is down.

Memory: about 2 KB a host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from graphbuild.sources.fetched import REFUSED

FAILURES_IN_A_ROW = 3  # to connect, until a host counts as down
REMEMBERED = 600.0  # seconds that a host's addresses, or its being down, are remembered

NOT_PUBLIC = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 2002::/16 3fff::/20
"""
"""What RFC 6890's registries, with RFC 8215 and RFC 9637, do not call globally reachable, and multicast. Of IPv6 only
2000::/3 is assigned; 6to4 (2002::/16) and Teredo (2001::/32) lead to addresses that would not be looked at."""
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, NOT_PUBLIC.split()))
_WRAPPING = tuple(map(ipaddress.ip_network, ("::ffff:0:0/96", "64:ff9b::/96")))  # an IPv4 address in the last 32 bits


class RefusedError(OSError):
    """A fetch that is not tried, or not to its end. The first line is the reason, alike for all URLs."""


@dataclass(slots=True)
class Host:
    """What is known of a host and port: its addresses, or why there are none, both until `fresh_until`.

    failures: to connect, in a row. After too many it is skipped, with the last one as the reason, until `down_until`.
    """

    name: str
    port: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    addresses: list[str] = field(default_factory=list)
    error: OSError | None = None
    fresh_until: float = 0.0
    failures: int = 0
    last_failure: str = ""
    down_until: float = 0.0

    def connect(self, wait: Callable[[], float], allow_private: bool) -> socket.socket:
        """A connection to one of the host's addresses; wait: seconds that the next step may take.

        Raises:
            RefusedError: it is down, or has no address that may be connected to.
            OSError: it cannot be found or reached.
        """
        if time.monotonic() < self.down_until:
            raise RefusedError(f"skipped: its host is down ({self.last_failure})")
        last: OSError = OSError("no address")
        for address in self._look_up(allow_private):
            try:
                connection = socket.create_connection((address, self.port), wait())
            except OSError as error:
                last = error
            else:
                self.failures = 0
                return connection
        self.failures, self.last_failure = self.failures + 1, str(last)
        if self.failures >= FAILURES_IN_A_ROW:
            self.failures, self.down_until = 0, time.monotonic() + REMEMBERED
        raise last

    def _look_up(self, allow_private: bool) -> list[str]:
        with self.lock:  # threads that want the same host wait for one answer
            if time.monotonic() >= self.fresh_until:
                self.addresses, self.error, remembered = [], None, REMEMBERED
                try:
                    self.addresses = addresses_of(self.name, allow_private)
                except (OSError, UnicodeError) as error:
                    self.error = error if isinstance(error, OSError) else OSError(f"not a host name: {error}")
                    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                        remembered = 0.0
                self.fresh_until = time.monotonic() + remembered
            if self.error is not None:
                raise self.error.with_traceback(None)  # or it would grow with each fetch
            return self.addresses


def addresses_of(name: str, allow_private: bool, flags: int = 0) -> list[str]:
    """A host's addresses, but for those that are not public; flags: of getaddrinfo.

    Raises:
        RefusedError: it has no others.
        OSError: it cannot be found. UnicodeError: it is no host name.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=flags)
    every = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    kept = [address for address in every if allow_private or is_public(address)]
    if not kept:
        raise RefusedError(f"{REFUSED} (--allow-private-hosts)\n{', '.join(every)}")
    return kept


def refuse_private(name: str) -> None:
    """RefusedError where a name alone, which somebody else will look up, means an address that is not public."""
    local = name == "localhost" or name.endswith(".localhost")
    with contextlib.suppress(socket.gaierror, UnicodeError):  # a name, of which nothing is known
        addresses_of("127.0.0.1" if local else name, allow_private=False, flags=socket.AI_NUMERICHOST)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where it wraps an IPv4 address in an IPv6 one."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if any(ip in network for network in _WRAPPING):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _NOT_PUBLIC)
