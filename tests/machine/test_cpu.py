"""What the CPU can do: torch's answer and Linux's own are one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from graphbuild.machine.cpu import NAMES, cpu_features


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no Linux")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch tells nothing")
def test_an_older_torch_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.cpu.get_capabilities()
    cpu_features.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    found = cpu_features()
    cpu_features.cache_clear()
    assert any(found.values()) or sys.platform != "linux"
    assert {name: has for name, has in found.items() if name in known} == {
        name: known[name] for name in NAMES if name in known
    }
