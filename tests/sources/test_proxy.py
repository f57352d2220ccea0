"""Requests that go through a proxy: which do, how hosts are then reached, and what is still refused."""

from __future__ import annotations

import re
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from graphbuild.errors import ConfigError
from graphbuild.recipe import Download
from graphbuild.sources import fetch, hosts
from graphbuild.sources.fetch import Fetcher, Policy
from graphbuild.sources.hosts import RefusedError
from tests.e2e.web import proxying
from tests.sources.test_fetch import BODY, certificate, get, serve

assert certificate  # a fixture


def test_http_is_asked_of_the_proxy_and_https_led_on(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_trusted", lambda: ssl.create_default_context(cafile=str(certificate)))
    with proxying() as (proxy, seen), serve() as (web, base), serve(certificate=certificate) as (secure, locked):
        assert get(f"{base}/fine?a=b c", proxy=f"http://{proxy}") == BODY
        assert get(f"{base}/moved", proxy=f"http://{proxy}") == BODY
        assert get(f"{locked}/fine", proxy=f"http://{proxy}") == BODY
        place, behind = base.removeprefix("http://"), locked.removeprefix("https://")
        asked = [f"{base}/fine?a=b%20c", f"{base}/moved", f"{base}/fine"]
        assert seen == [*(("GET", url, place) for url in asked), ("CONNECT", behind, behind)]
        assert secure.hits == {"/fine": 1}
        assert web.hits["/fine?a=b%20c"] == 1


def test_a_certificate_behind_a_proxy_must_be_trusted_too(certificate: Path) -> None:
    with proxying() as (proxy, _), serve(certificate=certificate) as (secure, locked):
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            get(f"{locked}/fine", proxy=f"http://{proxy}", retries=0)
        assert not secure.hits


def test_a_password_is_for_the_proxy_alone_and_in_no_message(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_trusted", lambda: ssl.create_default_context(cafile=str(certificate)))
    with proxying("5ec:ret") as (proxy, _), serve() as (web, base), serve(certificate=certificate) as (_, locked):
        for url in (base, locked):
            assert get(f"{url}/fine", proxy=f"http://us:5ec%3Aret@{proxy}") == BODY
            with pytest.raises(urllib.error.HTTPError, match="HTTP Error 407") as error:
                get(f"{url}/fine", proxy=f"http://us:5ec7et@{proxy}")
            assert "5ec7et" not in str(error.value)
        assert set(web.authorizations.values()) == {None}


def test_a_proxy_that_leads_nowhere_says_so(certificate: Path) -> None:
    with proxying(refuses=True) as (proxy, seen), serve(certificate=certificate) as (_, locked):
        with pytest.raises(urllib.error.HTTPError, match="HTTP Error 403: of the proxy: Forbidden"):
            get(f"{locked}/fine", proxy=f"http://{proxy}", retries=3)
        assert len(seen) == 1
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(OSError, match=r"timed out|time-outs"):
        get("https://a.example/x", proxy=f"http://127.0.0.1:{deaf.getsockname()[1]}", retries=0, timeout_seconds=0.3)


def test_the_environment_says_which_proxy_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxying() as (proxy, seen), serve() as (_, base), serve("127.0.0.2") as (_, near):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.2")
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            assert get(f"{base}/fine") == get(f"{near}/fine", proxy="env") == BODY
            assert not seen, "neither unasked nor for hosts that are left out"
            assert get(f"{base}/fine", proxy="env") == BODY
            assert seen.pop()[1] == f"{base}/fine"
            monkeypatch.delenv(name)
        assert get(f"{base}/fine", proxy="env") == BODY
        assert not seen


PRIVATE = ["127.0.0.1", "localhost", "a.localhost", "[::1]", "0x7f.1", "2130706433", "169.254.169.254", "10.1.2.3"]


@pytest.mark.parametrize("host", PRIVATE)
def test_an_address_that_is_not_public_by_its_name_is_not_asked_for(host: str) -> None:
    with proxying() as (proxy, seen):
        for scheme in ("http", "https"):
            with pytest.raises(RefusedError, match="not a public address"):
                get(f"{scheme}://{host}/x", proxy=f"http://{proxy}", allow_private_hosts=False)
        assert not seen


def test_names_are_the_proxys_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def noted(host: Any, *rest: Any, **named: Any) -> Any:
        if not named.get("flags", 0) & socket.AI_NUMERICHOST:
            asked.append(host)
        return look_up(host, *rest, **named)

    with proxying(refuses=True) as (proxy, seen):
        monkeypatch.setattr(hosts.socket, "getaddrinfo", noted)  # type: ignore[attr-defined]
        with pytest.raises(urllib.error.HTTPError, match="of the proxy"):
            get("https://only-the-proxy-knows.example/x", proxy=f"http://{proxy}", allow_private_hosts=False)
        assert seen[0][1] == "only-the-proxy-knows.example:443"
        assert "only-the-proxy-knows.example" not in asked


def test_robots_txt_is_read_through_the_proxy_too() -> None:
    with proxying() as (proxy, seen), serve() as (_, base):
        assert get(f"{base}/fine", proxy=f"http://{proxy}", robots_txt=True) == BODY
        assert [url for _, url, _ in seen] == [f"{base}/robots.txt", f"{base}/fine"]


@pytest.mark.parametrize("url", ["socks5://us:5ec7et@h:1", "https://h:1", "http://h:99999", "http://"])
def test_a_proxy_that_is_not_spoken_to_by_http_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", url)
    with pytest.raises(ConfigError, match="set http_proxy and https_proxy so") as error:
        Fetcher(Policy(proxy="env"))
    assert "5ec7et" not in str(error.value)


@pytest.mark.parametrize(
    "proxy", ["socks5://us:5ec7et@h:1", "us:5ec7et@h:1", "ENV", "http://", "http://h:1/5ec7et", ""]
)
def test_a_recipe_refuses_what_is_no_proxy_without_repeating_it(proxy: str) -> None:
    with pytest.raises(ValueError, match=re.escape("http://USER:PASSWORD@HOST:PORT")) as error:
        Download(proxy=proxy)
    assert "5ec7et" not in error.value.errors()[0]["msg"]  # type: ignore[attr-defined]
