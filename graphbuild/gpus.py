"""Whether this machine has a GPU that torch can use."""

from __future__ import annotations


def gpu_here() -> bool:
    """A driver alone is not enough: it may be too old for torch, or hidden from it. Costs the import of torch."""
    import torch

    return torch.cuda.is_available()
