"""Integer products of int8 codes at the speed of the machine's int8 instructions. Imports torch and numpy alone."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from graphbuild.machine.cpu import cpu_features

if TYPE_CHECKING:
    from torch import Tensor

    from graphbuild.store.sharded import Array

LEAST_TERMS = 8  # torch 2.13 multiplies columns of one number wrongly
FLOAT32_TERMS = 2**24 // 127**2  # up to this d, a float32 sum of int8 products is an exact integer


def unit(raw: Array | Tensor) -> Tensor:
    """Rows scaled to unit norm, float32, from stored float16 [..., d] (whose norm is 1 only to 1e-3)."""
    import torch

    stored = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(np.require(raw, requirements="W"))
    exact = stored.float()
    norms: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return exact / norms


TILE_ROWS = 384  # a tile of products and its codes fit the 2 MB of cache that a core has of its own


def tile_memory() -> Tensor:
    """Memory for one tile of at most TILE_ROWS^2 products; fresh memory a tile costs a third of its time."""
    import torch

    return torch.empty(TILE_ROWS**2, dtype=torch.int32)


def products(a: Tensor, b: Tensor, memory: Tensor | None = None, *, upper: bool = False) -> Tensor:
    """Integer products int32 [m, n] of codes a int8 [m, d] and b int8 [n, d], on their device.

    memory: where to put them, as long as nothing else is put there. upper: only those right of the diagonal are wanted.
    """
    import torch

    (m, width), n = a.shape, b.shape[0]
    out = None if memory is None else memory[: m * n].view(m, n)
    if width >= LEAST_TERMS and _has_int8(a.device.type):
        if a.is_cuda:  # cuBLAS wants more than 16 rows and multiples of 8
            rows, columns, rest = max(-m % 8, 24 - m), -n % 8, -width % 8
            pad = torch.nn.functional.pad
            padded: Tensor = torch._int_mm(pad(a, (0, rest, 0, rows)), pad(b, (0, rest, 0, columns)).T)
            return padded[:m, :n]
        return torch._int_mm(a, b.T, out=out)
    if a.device.type == "cpu" and _has_pairs():
        from graphbuild.knn.intrinsics import COLUMNS, ROWS, STEP
        from graphbuild.knn.kernels import multiply

        if m >= ROWS and n >= COLUMNS and width >= STEP and width % STEP == 0:
            found = torch.empty((m, n), dtype=torch.int32) if out is None else out
            multiply(a.numpy(), b.numpy(), found.numpy(), upper)
            return found
    if width <= FLOAT32_TERMS:
        return (a.float() @ b.float().T).to(torch.int32)
    return (a.double() @ b.double().T).to(torch.int32)


@lru_cache
def _has_pairs() -> bool:
    """Whether int8 products are quickest two at a time, as they are with AVX2 alone: 1.1 to 1.6 times float32's."""
    able = cpu_features()
    return bool(able.get("avx2")) and not able.get("avx512_f")


@lru_cache
def _has_int8(device: str) -> bool:
    """Whether torch multiplies int8 at speed here, and rightly at the extremes (without VNNI, sums may saturate)."""
    import torch

    able = cpu_features()
    if device == "cpu" and not any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return False
    extreme = torch.full((32, 64), -127, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(extreme, -extreme.T) == -(127**2) * 64).all())
    except RuntimeError:  # cuBLAS has none for GPUs without int8 tensor cores
        return False
