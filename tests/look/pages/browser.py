"""A tab of headless Chromium, and requests as it sends them."""

from __future__ import annotations

import http.cookiejar
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

Serve = Callable[..., str]


@dataclass
class Tab:
    """A browser's page, and what went wrong in it."""

    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression holds; the browser's own waiting needs eval, which the pages forbid."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"never: {condition}"
            self.page.wait_for_timeout(20)

    def accessible(self) -> None:
        """axe finds no fault in either colour scheme, and no screen, from a phone's to a wide one, scrolls sideways."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python"
        )
        for width, scheme in ((390, "light"), (1280, "dark"), (2560, "")):
            self.page.set_viewport_size({"width": width, "height": 900})
            if scheme:  # colours do not depend on the width
                if self.page.evaluate("document.documentElement.dataset.theme") != scheme:
                    self.page.click("#theme")
                found = axe.Axe().run(self.page)
                assert found.violations_count == 0, (width, scheme, found.generate_report())
            assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"scrolls sideways at {width}"
            )


def draw(tab: Tab) -> None:
    """Draw the explorer's map, and wait until its points are there."""
    tab.page.evaluate("document.getElementById('map-show').click()")  # of a map that is there it is drawn already
    tab.wait("chart.about !== null && chart.count === chart.places.length / 2 && chart.codes !== null")


def wait_for(tab: Tab, node: int) -> None:
    tab.wait(f"document.querySelector('.asked dd')?.textContent === '{node}'")


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read().decode("latin-1")
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def signed_in(address: str) -> tuple[str, dict[str, str]]:
    """The address without its token, and the header that a browser sends once it has opened it."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar := http.cookiejar.CookieJar()))
    with opener.open(address, timeout=20) as answer:
        assert "token" not in answer.url, "it would be in the browser's history, and in what the user copies"
    cookie = next(iter(jar))
    return address.partition("?")[0], {"Cookie": f"{cookie.name}={cookie.value}"}
