"""Compiled loops where no folder can hold their cache, and who needs them at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import graphbuild

PACKAGE = Path(graphbuild.__file__).parent


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, cwd=folder)


@pytest.mark.slow
def test_loops_compile_where_no_cache_can_be_written_and_say_so_once(tmp_path: Path) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "graphbuild", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()  # a file in its place: not even root can write a cache there
    code = """
import numpy as np, graphbuild.knn.kernels
from graphbuild.knn.lists import merge_lists
from graphbuild.torch import NeighborBatchSampler, XSampleLoss
keys = np.array([[5, 1]])
merge_lists(keys, np.array([0]), np.array([[3, 0]]))
print(graphbuild.__file__, keys.tolist())
"""
    run = python(code, tmp_path, HOME="/dev/null")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=1) == [str(copy / "__init__.py"), "[[5, 3]]\n"]
    assert run.stderr.count("set NUMBA_CACHE_DIR") == 1


def test_losses_load_without_numba(tmp_path: Path) -> None:
    code = "import sys, graphbuild.torch; print('numba' in sys.modules, graphbuild.torch.XSampleLoss()._get_name())"
    run = python(code, tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert run.stdout == "False XSampleLoss\n", run.stderr
