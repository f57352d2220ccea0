"""A tab of headless Chromium."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest


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
        """axe finds no fault, in both colour schemes, at the widths of a phone, a laptop and a wide screen."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python"
        )
        for width in (390, 1280, 2560):
            self.page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                if self.page.evaluate("document.documentElement.dataset.theme") != scheme:
                    self.page.click("#theme")
                found = axe.Axe().run(self.page)
                assert found.violations_count == 0, (width, scheme, found.generate_report())
            assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"scrolls sideways at {width}"
            )
