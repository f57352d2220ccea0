"""The cores and GPUs of this machine that a job may use."""

from __future__ import annotations

import os


def gpu_here() -> bool:
    """A driver alone is not enough: it may be too old for torch, or hidden from it. Costs the import of torch."""
    import torch

    return torch.cuda.is_available()


def cores_here() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
