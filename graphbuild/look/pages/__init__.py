"""What the report and the explorer share: the look of a page, in light and dark."""

from __future__ import annotations

from importlib import resources


def own_text(package: str, name: str) -> str:
    """A text file that is part of a package."""
    return resources.files(package).joinpath(name).read_text("utf-8")


def base_css() -> str:
    return own_text(__name__, "base.css")
