"""Proxies that are spoken to by HTTP: requests for http are given to them, connections for https led on (CONNECT).

Where a URL's host is a name, the proxy looks it up: whether its address is public is not known here.
"""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

from graphbuild.errors import ConfigError
from graphbuild.sources.hosts import Host
from graphbuild.sources.target import Target, response_of


class Proxies:
    """Which proxy a request goes through.

    named: http://[USER:PASSWORD@]HOST[:PORT] for all requests; "env": as the environment's http_proxy, https_proxy,
    all_proxy and no_proxy say; None: none.

    Raises:
        ConfigError: one is not spoken to by HTTP.
    """

    def __init__(self, named: str | None) -> None:
        self._environment = urllib.request.getproxies_environment() if named == "env" else {}
        urls = self._environment if named in ("env", None) else {"all": named}
        self._proxies = {name: Proxy.of(url) for name, url in urls.items() if url and name in ("http", "https", "all")}

    def of(self, target: Target) -> Proxy | None:
        if not self._proxies or urllib.request.proxy_bypass(target.authority, self._environment):
            return None
        return self._proxies.get("https" if target.secure else "http") or self._proxies.get("all")


class Proxy(NamedTuple):
    """Through whom requests go. headers: of its URL's user and password."""

    host: Host
    headers: dict[str, str]

    @classmethod
    def of(cls, url: str) -> Proxy:
        """ConfigError: it is none that is spoken to by HTTP."""
        try:
            target = Target.of(url if "://" in url else f"http://{url}")
            if target.secure:
                raise urllib.error.URLError("https")
        except urllib.error.URLError:  # a message must not hold the URL, which may have a password
            raise ConfigError(
                "a proxy is named that is no http://HOST:PORT",
                "give --proxy http://HOST:PORT; with --proxy env, set http_proxy and https_proxy so, or unset them",
            ) from None
        found = {f"Proxy-{name}": value for name, value in target.headers.items()}
        return cls(Host(target.name, target.port), found)

    def tunnel(self, sock: socket.socket, wait: Callable[[], float], target: Target) -> None:
        """Lead a connection to the proxy on to a server. HTTPError: the proxy does not."""
        lines = [f"CONNECT {target.authority} HTTP/1.1", f"Host: {target.authority}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        sock.settimeout(wait())
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        response = response_of(sock, wait, "CONNECT")
        if not 200 <= response.status < 300:
            phrase = f"of the proxy: {http.client.responses.get(response.status, 'a status of its own')}"
            raise urllib.error.HTTPError("", response.status, phrase, response.headers, None)
