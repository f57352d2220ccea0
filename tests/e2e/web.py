"""A web server on loopback that answers each path as a test says, and a proxy that leads to such servers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Refusal = tuple[int, str | None]  # a status, and the words of the server's own in place of the status's


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


@contextlib.contextmanager
def serving(answer: Callable[[str], bytes | Refusal], headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """The server's address meanwhile. answer: the body at a path such as /0, or why there is none."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answer(self.path)
            body = found if isinstance(found, bytes) else b""
            self.send_response(*((200,) if isinstance(found, bytes) else found))
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def proxying(password: str = "", refuses: bool = False) -> Iterator[tuple[str, list[tuple[str, str, str | None]]]]:
    """A proxy's address meanwhile, and of each request its method, what it asked for, and its Host.

    password: of the user "us", without which it answers 407. refuses: to lead on connections.
    """
    seen: list[tuple[str, str, str | None]] = []
    wanted = f"Basic {base64.b64encode(f'us:{password}'.encode()).decode()}" if password else None

    class Handler(BaseHTTPRequestHandler):
        def is_let_in(self) -> bool:
            seen.append((self.command, self.path, self.headers.get("Host")))
            if self.headers.get("Proxy-Authorization") == wanted:
                return True
            self.send_error(407)
            return False

        def do_GET(self) -> None:
            if not self.is_let_in():
                return
            _, _, place, path = self.path.split("/", 3)
            forwarded = http.client.HTTPConnection(place, timeout=5)
            try:
                forwarded.request("GET", f"/{path}")
            except OSError:
                self.send_error(502)
                return
            answer = forwarded.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_CONNECT(self) -> None:
            if not self.is_let_in():
                return
            if refuses:
                self.send_error(403)
                return
            name, port = self.path.rsplit(":", 1)
            with socket.create_connection((name, int(port)), 5) as server:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=_pass_on, args=(server, self.connection))
                back.start()
                _pass_on(self.connection, server)
                back.join()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65_536):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)
