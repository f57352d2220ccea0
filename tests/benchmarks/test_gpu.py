"""What runs on a bare machine with a GPU, in miniature on a CPU, with torch and numpy as the only packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import knn_gpu
from graphbuild.knn import codes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALONE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first in {"pyarrow", "polars", "numba", "ray", "faiss", "fsspec", "pydantic", "scipy", "transformers",
                     "sentence_transformers", "webdataset", "yaml", "typer", "rich", "PIL", "aiohttp"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
"""


def alone(*lines: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE + "\n".join(lines)], capture_output=True, text=True, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_losses_targets_the_device_search_and_the_packed_forward_need_torch_alone() -> None:
    alone("import graphbuild.torch, graphbuild.knn.device, graphbuild.nodes.encoder.packed")


def test_codes_made_on_a_device_are_those_made_by_the_cpu() -> None:
    x = np.random.default_rng(0).standard_normal((300, 48)).astype(np.float16)
    made, scales = knn_gpu.encode(torch.from_numpy(x))
    coded = codes.encode(x)
    assert (made.numpy() == coded.codes).mean() > 0.999  # float32 rounds a tie either way
    np.testing.assert_allclose(scales.numpy(), coded.scales[:, 0], rtol=1e-6)


@pytest.mark.slow
def test_the_kit_for_a_gpu_is_right_and_prints_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    argv = ["gpu.py", "--device", "cpu", "--small", "--out", str(page)]
    alone(
        f"sys.argv, sys.path[0] = {argv!r}, {str(BENCHMARKS)!r}",
        f"runpy.run_path({str(BENCHMARKS / 'gpu.py')!r}, run_name='__main__')",
    )
    lines = page.read_text().splitlines()
    parts = ("losses", "encoding", "exact search", "a ResNet-50 step")
    assert all(any(line.startswith(f"| {part}") for line in lines) for part in parts)
