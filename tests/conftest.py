"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # they say what CPUs do, also on a machine with a GPU


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project's root (its README says what is in it)."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
