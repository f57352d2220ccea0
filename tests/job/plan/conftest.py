"""Rates of this machine, probed once for all tests here, and round ones."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from graphbuild.job.plan.rates import Rates, rates_here


@pytest.fixture(scope="session")
def rates() -> Rates:
    """Really probed."""
    return rates_here()


@pytest.fixture(scope="session")
def made_up() -> Rates:
    """Round numbers, for what does not depend on this machine."""
    seconds = {one.name: 1e-6 for one in fields(Rates) if one.metadata}
    return replace(Rates(), far=2.0, **{**seconds, "disk_bytes_second": 1e9})
