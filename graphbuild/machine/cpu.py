"""What this machine's CPU can do, by the names of `torch.cpu.get_capabilities`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

LINUX_NAMES = {"avx512_f": "avx512f"}  # where the kernel's differ
NAMES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "bf16")


@cache
def cpu_features() -> Mapping[str, object]:
    """Name -> whether the CPU has it; with a torch that does not know, those of NAMES that Linux tells of."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    told = Path("/proc/cpuinfo")
    flags = set(told.read_text().split()) if told.exists() else set()
    return {name: LINUX_NAMES.get(name, name) in flags for name in NAMES}
