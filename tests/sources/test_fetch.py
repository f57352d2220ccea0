"""A hostile web on loopback: what is fetched, tried again, given up or refused, counted where the server sees it."""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from graphbuild.sources import fetch, hosts
from graphbuild.sources.fetch import Fetcher, Policy, Target, fetching
from graphbuild.sources.fetched import may_pass_later
from graphbuild.sources.hosts import RefusedError

BODY = b"x" * 100_000


class Web:
    """A server that misbehaves by path and remembers who asked for what."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.authorizations: dict[str, str | None] = {}  # of the last request for each path
        self.elsewhere = ""
        self.sent = 0  # bytes of bodies of redirects

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path
        with self.lock:
            self.hits[path] += 1
            self.authorizations[path] = handler.headers.get("Authorization")
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            self.reply(handler, path, self.hits[path] == 1)
        finally:
            with self.lock:
                self.now -= 1

    def reply(self, handler: BaseHTTPRequestHandler, path: str, first: bool) -> None:
        def send(status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(body) if length is None else length))
            handler.end_headers()
            handler.wfile.write(body)

        match path.split("/")[1]:
            case "busy" if first:
                send(503, Retry_After="0")
            case "gone":
                send(404)
            case "cut" if first:
                send(200, BODY[:500], len(BODY))
            case "reset" if first:
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                handler.connection.close()
            case "declared":
                send(200, b"", 10**9)
            case "endless":
                handler.send_response(200)
                handler.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        handler.wfile.write(BODY)
            case "drip":
                handler.send_response(200)
                handler.send_header("Content-Length", "1000")
                handler.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(200):
                        handler.wfile.write(b"x")
                        time.sleep(0.1)
            case "silent":
                time.sleep(1.5)
            case "headers":
                handler.send_response(200)
                handler.flush_headers()
                with contextlib.suppress(OSError):
                    for number in range(200):
                        handler.wfile.write(b"X-%d: x\r\n" % number)
                        time.sleep(0.1)
            case "away":
                handler.send_response(302)
                handler.send_header("Location", "/fine")
                handler.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.sent += handler.wfile.write(BODY)
            case "gzip":
                body = gzip.compress(bytes(5_000_000) if path.endswith("bomb") else BODY)
                send(200, body[:-9] if path.endswith("cut") else body, Content_Encoding="gzip")
            case "liar":
                send(200, BODY, Content_Encoding="gzip")
            case "chatter":
                handler.wfile.write(b"ICY 200 " + path.encode() + b"\r\n\r\n")
            case "own":
                handler.send_response(499, f"no {path} here")
                handler.end_headers()
            case "foreign":
                handler.wfile.write("HTTP/1.0 302 Found\r\nLocation: /fine/ñ und so?q=ü&x=%2f\r\n\r\n".encode())
            case "late":
                time.sleep(0.4)
                send(302, Location=f"/late/{int(path.split('/')[2]) + 1}")
            case "loop":
                send(302, Location=f"/loop/{int(path.split('/')[2]) + 1}")
            case "moved":
                send(301, Location="/fine")
            case "inside":
                send(302, Location=f"{self.elsewhere}/secret")
            case "slow":
                time.sleep(0.1)
                send(200, BODY)
            case _:
                send(200, BODY)


@contextlib.contextmanager
def serve(address: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[tuple[Web, str]]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                web.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Listener((address, 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield web, f"http{'s' * (certificate is not None)}://{address}:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def web() -> Iterator[tuple[Web, str]]:
    with serve() as served:
        yield served


def get(url: str, **policy: Any) -> bytes:
    given = {"timeout_seconds": 0.5, "allow_private_hosts": True, **policy}
    return Fetcher(Policy(**given)).open(urllib.request.Request(url)).read()


@pytest.mark.parametrize("path", ["fine", "busy", "cut", "reset", "moved"])
def test_what_passes_is_tried_again(web: tuple[Web, str], path: str) -> None:
    served, base = web
    assert get(f"{base}/{path}") == BODY
    assert served.hits[f"/{path}"] == (2 if path in ("busy", "cut", "reset") else 1)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key, and a certificate for 127.0.0.1 that it has signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now)
    made = made.not_valid_after(now + datetime.timedelta(days=1)).add_extension(address, critical=False)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = tmp_path / "certificate.pem"
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return path


def test_https_wants_a_certificate_that_is_trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(certificate=certificate) as (served, base):
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            get(f"{base}/fine", retries=0)
        assert served.hits.total() == 0
        monkeypatch.setattr(fetch, "_trusted", lambda: ssl.create_default_context(cafile=str(certificate)))
        assert get(f"{base}/fine") == BODY


def test_what_does_not_pass_is_asked_for_once(web: tuple[Web, str]) -> None:
    served, base = web
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{base}/gone", retries=5)
    assert served.hits["/gone"] == 1
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(f"{base}/busy", retries=0)


def test_time_outs_hold_for_silence_and_for_drops(web: tuple[Web, str]) -> None:
    _, base = web
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        get(f"{base}/silent", retries=0)
    assert time.monotonic() - begin < 1.4
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="not complete after"):
        get(f"{base}/drip", retries=0, timeout_seconds=0.3)
    assert time.monotonic() - begin < 0.3 * fetch.DEADLINES + 1


@pytest.mark.parametrize("path", ["drip", "headers", "late/0"])
def test_one_deadline_holds_for_headers_body_and_redirects(
    web: tuple[Web, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DEADLINES", 2)
    _, base = web
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="not complete after 2 time-outs"):
        get(f"{base}/{path}", retries=0, timeout_seconds=0.5)
    assert 0.9 < time.monotonic() - begin < 2.3


def test_a_tls_handshake_that_never_ends_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(urllib.error.URLError, match="timed out"):
        get(f"https://127.0.0.1:{deaf.getsockname()[1]}/x", retries=0, timeout_seconds=0.3)


def test_the_body_of_a_redirect_is_left(web: tuple[Web, str]) -> None:
    served, base = web
    assert get(f"{base}/away", max_bytes=len(BODY)) == BODY
    time.sleep(0.2)
    assert served.sent < 20_000_000, "what fits the sockets' buffers, and no more"


def test_the_wait_for_a_turn_is_no_part_of_a_fetch(web: tuple[Web, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DEADLINES", 1)
    served, base = web
    fetcher = Fetcher(Policy(timeout_seconds=1.5, retries=0, host_connections=1, allow_private_hosts=True))
    with ThreadPoolExecutor(16) as threads:
        bodies = list(threads.map(lambda _: fetcher.open(f"{base}/slow").read(), range(24)))
    assert bodies == [BODY] * 24, "though the last one waited for more than two seconds"
    assert served.most <= 2


@pytest.mark.parametrize("path", ["declared", "endless"])
def test_a_body_over_the_cap_is_left(web: tuple[Web, str], path: str) -> None:
    served, base = web
    with pytest.raises(RefusedError, match="too large: over 1,000,000 bytes"):
        get(f"{base}/{path}", max_bytes=1_000_000, retries=3)
    assert served.hits[f"/{path}"] == 1


def test_redirects_end(web: tuple[Web, str]) -> None:
    served, base = web
    with pytest.raises(urllib.error.HTTPError, match="redirect"):
        get(f"{base}/loop/0", retries=3)
    assert served.hits.total() == fetch.REDIRECTS + 1


PRIVATE = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "0x7f.1",
    "2130706433",
    "0.0.0.0",
    "10.1.2.3",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "[fe80::1]",
    "[fc00::1]",
    "[::ffff:10.0.0.1]",
    "[64:ff9b::a00:1]",
    "[64:ff9b:1::5db8:d822]",
    "[::127.0.0.1]",
    "[2002:a00:1::]",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_addresses_that_are_not_public_are_refused_before_a_packet_is_sent(web: tuple[Web, str], host: str) -> None:
    served, base = web
    begin = time.monotonic()
    with pytest.raises(RefusedError, match="not a public address") as refused:
        get(f"http://{host}:{base.rsplit(':', 1)[1]}/fine", allow_private_hosts=False, retries=4)
    assert "\n" in str(refused.value), "the address is told, apart from the reason"
    assert time.monotonic() - begin < 0.5, "and it is not tried again"
    assert not served.hits


def test_a_redirect_to_a_private_host_is_refused(web: tuple[Web, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, base = web
    monkeypatch.setattr(hosts, "is_public", lambda address: address == "127.0.0.1")
    with serve("127.0.0.2") as (inside, elsewhere):
        served.elsewhere = elsewhere
        assert get(f"{base}/fine", allow_private_hosts=False) == BODY
        with pytest.raises(RefusedError, match="not a public address"):
            get(f"{base}/inside", allow_private_hosts=False)
        assert not inside.hits
        assert get(f"{base}/inside") == BODY, "it is there for those who may"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://x/"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
        get(url)


def test_a_host_that_is_down_is_skipped_after_three_tries() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        fetcher = Fetcher(Policy(timeout_seconds=1, retries=0, allow_private_hosts=True))
        errors = []
        for _ in range(hosts.FAILURES_IN_A_ROW + 2):
            with pytest.raises(OSError, match="Connection refused") as found:
                fetcher.open(urllib.request.Request(url))
            errors.append(str(found.value))
    skipped = [error.startswith("skipped: its host is down") for error in errors]
    assert skipped == [False] * hosts.FAILURES_IN_A_ROW + [True] * 2


def test_a_host_is_looked_up_once_and_has_few_connections(
    web: tuple[Web, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, base = web
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def counted(host: Any, *rest: Any, **named: Any) -> Any:
        asked.append(host)
        return look_up(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    fetcher = Fetcher(Policy(host_connections=3, allow_private_hosts=True))
    url = base.replace("127.0.0.1", "localhost")
    with ThreadPoolExecutor(16) as threads:
        requests = [urllib.request.Request(f"{url}/slow") for _ in range(24)]
        bodies = list(threads.map(lambda request: fetcher.open(request).read(), requests))
    assert bodies == [BODY] * 24
    assert 3 <= served.most <= 4  # it may still be closing one when the next arrives
    assert asked.count("localhost") == 1


def test_a_redirect_in_raw_utf_8_is_encoded_and_followed(web: tuple[Web, str]) -> None:
    served, base = web
    assert get(f"{base}/foreign") == BODY
    assert served.hits["/fine/%C3%B1%20und%20so?q=%C3%BC&x=%2f"] == 1


def encoded(text: str, kept: str) -> str:
    """The URL standard's percent-encoding, character by character: https://url.spec.whatwg.org/#percent-encoded-bytes"""
    ways = (c if c in kept else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)
    return "".join(ways)


PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
PATH = PRINTABLE.translate(dict.fromkeys(map(ord, '"#<>?^`{}\\')))
QUERY = PRINTABLE.translate(dict.fromkeys(map(ord, "\"#<>'")))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n#"))


@settings(deadline=None)
@given(TEXT.filter(lambda text: not set(text) & set("?\\")), TEXT.filter(lambda text: text == text.strip()))
def test_paths_and_queries_are_encoded_as_browsers_do(path: str, query: str) -> None:
    target = Target.of(f"http://example.com/{path}?{query}x")
    assert target.path == f"/{encoded(path, PATH)}?{encoded(query, QUERY)}x"
    assert Target.of(f"http://example.com{target.path}").path == target.path, "%XX stays as it is"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/ñandú.jpg", "/%C3%B1and%C3%BA.jpg"),
        ("/%C3%B1%2F%7e.jpg?sig=a%2Bb%3D", "/%C3%B1%2F%7e.jpg?sig=a%2Bb%3D"),
        ("/with space.jpg?a=b c&d=100%", "/with%20space.jpg?a=b%20c&d=100%"),
        ("\\back.jpg#part", "/back.jpg"),
    ],
)
def test_what_browsers_get_is_fetched(web: tuple[Web, str], url: str, path: str) -> None:
    served, base = web
    assert get(base + url) == BODY
    assert list(served.hits) == [path]


def test_a_host_of_other_letters_and_a_port_are_asked_for_in_ascii() -> None:
    target = Target.of("HTTPS://Bücher.example:8443/x")
    assert target[1:5] == (True, "xn--bcher-kva.example", 8443, "/x")
    assert [Target.of(f"{scheme}://h").port for scheme in ("http", "https")] == [80, 443]


@pytest.mark.parametrize("url", ["http://", "http://h:port/", "http://h:99999/", "http://a b/", "http://a..b/"])
def test_what_is_no_url_says_so_without_it(url: str) -> None:
    with pytest.raises(urllib.error.URLError) as error:
        get(url)
    assert str(error.value) == "<urlopen error not a URL>"


def test_user_and_password_are_sent_to_their_host_alone(web: tuple[Web, str]) -> None:
    served, base = web
    get(f"{base.replace('//', '//us%25er:p%C3%A4:ß@')}/moved")
    told = "Basic " + base64.b64encode("us%er:pä:ß".encode()).decode()
    assert served.authorizations == {"/moved": told, "/fine": told}
    with serve("127.0.0.2") as (other, elsewhere):
        served.elsewhere = elsewhere
        get(f"{base.replace('//', '//user:word@')}/inside")
        assert other.authorizations == {"/secret": None}


def test_a_packed_body_is_unpacked_under_the_cap(web: tuple[Web, str]) -> None:
    served, base = web
    assert get(f"{base}/gzip", max_bytes=len(BODY)) == BODY
    with pytest.raises(RefusedError, match="too large: over 1,000,000 bytes"):
        get(f"{base}/gzip/bomb", max_bytes=1_000_000)
    with pytest.raises(http.client.IncompleteRead):
        get(f"{base}/gzip/cut", retries=1)
    assert served.hits["/gzip/cut"] == 2
    with pytest.raises(OSError, match="not packed as its Content-Encoding says"):
        get(f"{base}/liar")


@pytest.mark.parametrize(
    "path", ["gone", "busy", "own", "chatter", "loop/0", "liar", "cut", "declared", "reset", "drip"]
)
def test_no_failure_names_the_url(web: tuple[Web, str], path: str) -> None:
    _, base = web
    url = f"{base}/{path}/x?X-Amz-Signature=4f1e55"
    with pytest.raises((OSError, http.client.HTTPException)) as error:
        get(url, retries=0, max_bytes=200_000, timeout_seconds=0.2)
    assert "4f1e55" not in str(error.value)
    assert "/x" not in str(error.value)


def test_urlopen_follows_the_policy_only_meanwhile(web: tuple[Web, str]) -> None:
    _, base = web
    with fetching(Policy(allow_private_hosts=False)), pytest.raises(RefusedError):
        urllib.request.urlopen(f"{base}/fine")
    with urllib.request.urlopen(f"{base}/fine") as response:
        assert response.read() == BODY


@pytest.mark.parametrize(
    ("message", "later"),
    [
        ("HTTP Error 503: Service Unavailable", True),
        ("HTTP Error 404: Not Found", False),
        ("HTTP Error 4040: odd", False),
        ("<urlopen error [Errno 111] Connection refused>", True),
        ("<urlopen error timed out>", True),
        ("not complete after 6 time-outs", True),
        ("skipped: its host is down ([Errno 113] No route to host)", True),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", True),
        ("<urlopen error [Errno -2] Name or service not known>", False),
        ("refused: not a public address (--allow-private-hosts)\n10.0.0.1", False),
        ("too large: over 50,000,000 bytes", False),
        ("not an image", False),
    ],
)
def test_which_failures_may_pass_later(message: str, later: bool) -> None:
    assert may_pass_later(message) == later
