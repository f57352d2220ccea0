"""Sites that say no: every spelling of it is obeyed, what is said to others is not; and robots.txt where asked."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphbuild.sources import fetch, hosts
from graphbuild.sources.fetch import Fetcher, Policy
from graphbuild.sources.fetched import may_pass_later
from graphbuild.sources.hosts import RefusedError
from graphbuild.sources.optout import Robots, agents

BODY = b"x" * 5_000
Answer = tuple[int, Sequence[tuple[str, str]], bytes]


@contextlib.contextmanager
def serving(answers: dict[str, Answer], address: str = "127.0.0.1") -> Iterator[tuple[str, Counter[str]]]:
    """A server with these answers by path, 404 elsewhere; its address and what was asked of it."""
    hits: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits[self.path] += 1
            status, headers, body = answers.get(self.path, (404, (), b""))
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://{address}:{server.server_address[1]}", hits
    finally:
        server.shutdown()
        server.server_close()


def fetcher(**policy: Any) -> Fetcher:
    return Fetcher(Policy(**{"timeout_seconds": 0.5, "allow_private_hosts": True, **policy}))


def get(url: str, **policy: Any) -> bytes:
    return fetcher(**policy).open(urllib.request.Request(url)).read()


TAG = "X-Robots-Tag"
NO: dict[str, list[tuple[str, str]]] = {
    "one value": [(TAG, "noai")],
    "for images": [(TAG, "noimageai")],
    "of indexes": [(TAG, "noindex")],
    "of indexes of images": [(TAG, "noimageindex")],
    "of machine learning": [(TAG, "noml")],
    "none, which is noindex and nofollow": [(TAG, "none")],
    "letters": [("x-rObOtS-tAg", "NoAI")],
    "several values": [(TAG, "nofollow, noarchive,noimageai ,max-snippet:-1")],
    "several lines": [(TAG, "nofollow"), (TAG, "noindex")],
    "to img2dataset": [(TAG, "img2dataset: noai")],
    "to graphbuild, with blanks and letters": [(TAG, "  GraphBuild :  NOINDEX ")],
    "to somebody, then to us": [(TAG, "googlebot: nofollow, img2dataset: noai, nofollow")],
    "the second for us": [(TAG, "img2dataset: nofollow, noindex")],
    "to somebody, and in another line to all": [(TAG, "googlebot: noindex"), (TAG, "noai")],
    "behind a date": [(TAG, "unavailable_after: Friday, 25 Jun 2027 15:00:00 GMT, noai")],
    "behind another directive's value": [(TAG, "max-image-preview: large, noai")],
    "to everybody": [(TAG, "*: noai")],
    "the reservation": [("tdm-reservation", "1")],
    "the reservation, with a policy": [("TDM-Policy", "https://a.example/p.json"), ("TDM-Reservation", " 1 ")],
}
YES: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "an empty value": [(TAG, "")],
    "other directives": [(TAG, "nofollow, noarchive, nosnippet, notranslate, all")],
    "to somebody else": [(TAG, "googlebot: noindex, noai")],
    "to two others": [(TAG, "googlebot: noindex"), (TAG, "bingbot: noai, noimageai")],
    "to us something else, to others no": [(TAG, "img2dataset: nofollow, otherbot: noai")],
    "a date alone": [(TAG, "unavailable_after: 2027-06-25T15:00:00+00:00")],
    "a word that holds one": [(TAG, "noaiming, xnoindex, noindex-ish")],
    "to one whose name holds ours": [(TAG, "notgraphbuild: noai, img2dataset-evil: noai")],
    "another header": [("X-Robots", "noai"), ("Robots", "noindex")],
    "no reservation": [("tdm-reservation", "0")],
    "a reservation of no known meaning": [("tdm-reservation", "11")],
}
REDIRECTED = "/moved"


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("name", NO)
def test_what_a_site_opts_out_of_is_left_in_every_spelling(name: str, redirected: bool) -> None:
    answers = {"/x": (200, NO[name], BODY), REDIRECTED: (302, [("Location", "/x")], b"")}
    with serving(answers) as (base, hits):
        url = base + (REDIRECTED if redirected else "/x")
        with pytest.raises(RefusedError) as error:
            get(url, retries=3)
        reason, *said = str(error.value).splitlines()
        tdm = "reservation" in name
        assert reason == ("opt-out: TDM-Reservation" if tdm else "opt-out: X-Robots-Tag")
        assert tdm or {*said[0].split(", ")} <= {"noai", "noimageai", "noindex", "noimageindex", "noml", "none"}
        assert not may_pass_later(str(error.value))
        assert hits["/x"] == 1, "and it is not tried again"
        assert get(url, ignore_opt_out=True) == BODY


@pytest.mark.parametrize("name", YES)
def test_what_is_said_to_others_or_about_something_else_is_no_opt_out(name: str) -> None:
    with serving({"/x": (200, YES[name], BODY)}) as (base, _):
        assert get(f"{base}/x") == BODY


def test_more_agents_can_be_addressed() -> None:
    answers: dict[str, Answer] = {"/x": (200, [(TAG, "laion: noai, GPTBot: noindex")], BODY)}
    with serving(answers) as (base, _):
        assert get(f"{base}/x", user_agent_token="ccbot") == BODY
        for token in ("LAION", "ccbot, gptbot"):
            with pytest.raises(RefusedError, match="opt-out"):
                get(f"{base}/x", user_agent_token=token)


def test_what_a_redirect_says_of_itself_is_not_about_the_image() -> None:
    answers: dict[str, Answer] = {"/x": (200, [], BODY), "/short": (301, [("Location", "/x"), (TAG, "noindex")], b"")}
    with serving(answers) as (base, _):
        assert get(f"{base}/short") == BODY


def test_the_body_of_what_is_left_is_not_read() -> None:
    with serving({"/x": (200, [(TAG, "noai")], bytes(50_000_000))}) as (base, _):
        begin = time.process_time()
        with pytest.raises(RefusedError, match="opt-out"):
            get(f"{base}/x", max_bytes=1_000)
        assert time.process_time() - begin < 0.5


# -- robots.txt

RULES = b"""\xef\xbb\xbfUser-agent: *
Disallow: /private/
Disallow: /\xc3\xb1/
Allow: /

User-agent: img2dataset
Disallow: /art/

User-agent: ccbot
Disallow: /
"""
ALLOWED = {"/fine.jpg": True, "/private/x.jpg": False, "/%C3%B1/x.jpg": False, "/art/x.jpg": False, "/articles/x": True}


def files(*paths: str) -> dict[str, Answer]:
    return {path: (200, [], BODY) for path in paths}


def test_robots_txt_is_read_once_a_host_where_it_is_asked_for() -> None:
    with serving({**files(*ALLOWED), "/robots.txt": (200, [(TAG, "noindex")], RULES)}) as (base, hits):
        assert get(f"{base}/private/x.jpg") == BODY
        assert not hits["/robots.txt"], "not unasked"
        hits.clear()
        polite = fetcher(robots_txt=True)

        def fetched(path: str) -> bytes | str:
            try:
                return polite.open(base + path).read()
            except RefusedError as error:
                return str(error)

        expected = [BODY if kept else "opt-out: robots.txt" for kept in ALLOWED.values()]
        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(fetched, 10 * list(ALLOWED))) == 10 * expected
        assert hits["/robots.txt"] == 1
        assert {path for path in hits if path != "/robots.txt"} == {path for path, kept in ALLOWED.items() if kept}
        with pytest.raises(RefusedError, match="opt-out"):
            get(f"{base}/fine.jpg", robots_txt=True, user_agent_token="CCBot")
        assert get(f"{base}/private/x.jpg", robots_txt=True, ignore_opt_out=True) == BODY


def test_a_redirect_is_asked_for_at_the_host_that_it_leads_to() -> None:
    with serving({**files("/x"), "/robots.txt": (200, [], b"User-agent: *\nDisallow: /")}, "127.0.0.2") as (
        other,
        hits,
    ):
        answers: dict[str, Answer] = {"/away": (302, [("Location", f"{other}/x")], b"")}
        with serving(answers) as (base, _), pytest.raises(RefusedError, match=r"opt-out: robots\.txt"):
            get(f"{base}/away", robots_txt=True)
        assert hits == {"/robots.txt": 1}


@pytest.mark.parametrize(("status", "allowed"), [(404, True), (403, True), (410, True), (503, False), (429, False)])
def test_a_host_without_robots_txt_allows_all_and_one_that_cannot_say_allows_nothing(
    status: int, allowed: bool
) -> None:
    with serving({**files("/x"), "/robots.txt": (status, [("Retry-After", "0")], b"")}) as (base, hits):
        polite = fetcher(robots_txt=True, retries=1)
        for _ in range(3):
            if allowed:
                assert polite.open(f"{base}/x").read() == BODY
                continue
            with pytest.raises(RefusedError, match=rf"^robots\.txt: HTTP Error {status}") as error:
                polite.open(f"{base}/x")
            assert may_pass_later(str(error.value)), "retry asks again"
        assert hits["/robots.txt"] == (1 if allowed else 2), "with its own try, and remembered"
        assert hits["/x"] == (3 if allowed else 0)


def test_robots_txt_is_read_under_the_checks_of_every_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "is_public", lambda address: address == "127.0.0.1")
    with serving({"/robots.txt": (200, [], b"")}, "127.0.0.2") as (inside, seen):
        answers: dict[str, Answer] = {**files("/x"), "/robots.txt": (302, [("Location", f"{inside}/robots.txt")], b"")}
        with serving(answers) as (base, _), pytest.raises(RefusedError, match="not a public address"):
            get(f"{base}/x", robots_txt=True, allow_private_hosts=False)
        assert not seen
    monkeypatch.setattr(fetch, "DEADLINES", 1)
    silent = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            silent.wait(5)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(RefusedError, match=r"robots\.txt: .*time"):
        get(f"http://127.0.0.1:{server.server_address[1]}/x", robots_txt=True, retries=0)
    assert time.monotonic() - begin < 2
    silent.set()
    server.shutdown()
    server.server_close()


LINES = ["User-agent: *", "Disallow: //[x", "Crawl-delay: ²", "Crawl-delay: %C2%B2", "Request-rate: ²/1", "Allow", ":"]


@given(st.lists(st.sampled_from(LINES) | st.text()), st.text())
def test_whatever_stands_in_robots_txt_allows_or_refuses(lines: list[str], path: str) -> None:
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    robots = Robots(agents(None))
    with contextlib.suppress(RefusedError):
        robots.check(f"/{path}", lambda: content)


def test_rules_for_others_are_not_kept_in_memory() -> None:
    others = "".join(f"User-agent: bot{n}\nDisallow: /{n}\n\n" for n in range(1_000))
    robots = Robots(agents(None))
    robots.check("/x", lambda: f"{others}User-agent: img2dataset\nDisallow: /y\n".encode())
    with pytest.raises(RefusedError, match="opt-out"):
        robots.check("/y", lambda: b"")
    assert len(robots.rules.entries) == 1
