"""A web server on loopback that answers each path as a test says."""

from __future__ import annotations

import contextlib
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
