"""This machine's calibration, made once for all tests here, in a cache folder of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graphbuild.plan.calibration import Rates, cache_file, rates_here
from graphbuild.progress import Progress

STAGES = """vectors scan number assign encode fidelity prepare codes moments join merge search certify export"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def rates(cache: Path) -> Rates:
    """Really measured, by the small jobs."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        return rates_here(Progress())
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def made_up() -> Rates:
    """Round numbers, for what does not depend on this machine."""
    seconds = {
        name: 1e-6
        for name, field in Rates.model_fields.items()
        if field.annotation is float and name not in ("far", "cache_bytes", "disk_bytes_second")
    }
    return Rates.model_validate(
        {
            **seconds,
            "far": 2.0,
            "cache_bytes": 32e6,
            "disk_bytes_second": 1e9,
            "image_memory": 1e8,
            "machine": "a machine",
            "cores": 2,
            "key": "0",
            "memory": dict.fromkeys([*STAGES.split(), "with_encoder.scan", "with_encoder.export"], 5e8),
        }
    )


@pytest.fixture
def made_up_cache(made_up: Rates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a command that finds these as this machine's calibration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(made_up.model_dump_json())
    return dict(os.environ)
