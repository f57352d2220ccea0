"""How sites say no to being collected: by headers of the response, and by robots.txt where that is read.

Headers: X-Robots-Tag (https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag) with one of
DIRECTIVES, and the TDM reservation protocol's (https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/).
Memory: of a host whose robots.txt was read, the rules that apply.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.robotparser import RobotFileParser

from graphbuild.sources.fetched import OPT_OUT
from graphbuild.sources.hosts import REMEMBERED, RefusedError

AGENTS = ("graphbuild", "img2dataset")  # whom a site may address; what it says to all counts too
DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})  # none: noindex and nofollow
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
ROBOTS_BYTES = 512_000  # of a robots.txt that are read: RFC 9309, 2.5
ROBOTS_REMEMBERED = 86_400.0  # seconds: RFC 9309, 2.4


def agents(tokens: str | None) -> frozenset[str]:
    """Whom a site may address, in lower case; tokens: more of them, with commas between."""
    more = (token.strip().lower() for token in (tokens or "").split(","))
    return frozenset({*AGENTS, *more} - {""})


def opted_out(headers: Message, agents: frozenset[str]) -> str | None:
    """Why the body below these headers is not to be used by `agents`: the reason, and a line of what was said."""
    lines = headers.get_all("X-Robots-Tag", ())
    said = [found for line in lines for found in _directives(line, agents) if found in DIRECTIVES]
    if said:
        return f"{OPT_OUT}: X-Robots-Tag\n{', '.join(dict.fromkeys(said))}"
    if any("1" in map(str.strip, line.split(",")) for line in headers.get_all("TDM-Reservation", ())):
        return f"{OPT_OUT}: TDM-Reservation"
    return None


def _directives(line: str, agents: frozenset[str]) -> Iterator[str]:
    """The directives for everybody or for `agents`. `agent:` holds for what follows it, until the next one."""
    meant = True
    for part in line.lower().split(","):
        before, colon, after = map(str.strip, part.partition(":"))
        # no agent: a directive's own value, nor a date behind a comma ("Fri, 25 Jun 2027 15:00:00 GMT")
        if colon and before not in WITH_VALUE and re.fullmatch(r"\S+", before):
            meant, before = before == "*" or before in agents, after
        if meant:
            yield before


@dataclass(slots=True)
class Robots:
    """The robots.txt of one host and port: its rules for `agents`, or why it could not be read, until `fresh_until`."""

    agents: frozenset[str]
    lock: threading.Lock = field(default_factory=threading.Lock)
    rules: Any = field(default_factory=RobotFileParser)
    problem: str = ""
    fresh_until: float = 0.0

    def check(self, path: str, read: Callable[[], bytes | None]) -> None:
        """Ask for a path with its query; read: fetches robots.txt; None: there is none.

        Raises:
            RefusedError: the rules forbid it to one of `agents`, or could not be read.
        """
        with self.lock:  # threads that want the same host wait for one answer
            if time.monotonic() >= self.fresh_until:
                self._read(read)
                self.fresh_until = time.monotonic() + (REMEMBERED if self.problem else ROBOTS_REMEMBERED)
        if self.problem:
            raise RefusedError(self.problem)
        if not all(self.rules.can_fetch(agent, f"http://host{path}") for agent in self.agents):
            raise RefusedError(f"{OPT_OUT}: robots.txt")

    def _read(self, read: Callable[[], bytes | None]) -> None:
        """RFC 9309, 2.3.1: a host without one allows all; of one that cannot be had nothing is fetched."""
        self.rules, self.problem = RobotFileParser(), ""
        try:
            found = read()
            self.rules.parse((found or b"")[:ROBOTS_BYTES].decode("utf-8-sig", "replace").splitlines())
        except (OSError, http.client.HTTPException) as error:
            self.problem = f"robots.txt: {error}"
        except ValueError:  # what robotparser lets through of numbers and URLs that are none
            self.problem = f"{OPT_OUT}: robots.txt\nit cannot be understood"
        self.rules.entries = [rule for rule in self.rules.entries if any(map(rule.applies_to, self.agents))]
