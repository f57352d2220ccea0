"""This machine's calibration, made once for all tests here, in a cache folder of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graphbuild.plan.calibration import Rates, rates_here


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def rates(cache: Path) -> Rates:
    """Really measured, by the small jobs."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        return rates_here()
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
