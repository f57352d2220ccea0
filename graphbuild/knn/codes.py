"""int8 codes of embeddings, and their products: what every engine picks candidates by.

A unit vector x is its code times its scale plus a rest: x = s q + e, with q int8 [d] and s = max |x| / 127. The integer
product q_i . q_j is exact, so candidate lists are the same on every machine, and |x_i . x_j - s_i s_j q_i . q_j| is at
most |e_i| + |e_j| + |e_i||e_j| (Cauchy-Schwarz), which is what proves a candidate list complete. Products run at int8 speed
where the CPU has VNNI or AMX instructions or the device is a GPU, else in float32, with the same result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from graphbuild.knn.kernels import encode_rows
from graphbuild.sharded import Array

Tensor = torch.Tensor
FLOAT32_TERMS = 2**24 // 127**2  # up to this d, a float32 sum of int8 products is an exact integer


class Codes(NamedTuple):
    """codes int8 [n, d]; scales float32 [n, 2]: s, and the rest's norm |e| rounded up."""

    codes: Array
    scales: Array


def encode(raw: Array) -> Codes:
    """Codes of stored vectors, float16 [n, d], of any length but zero."""
    codes, scales = np.empty(raw.shape, np.int8), np.empty((len(raw), 2), np.float32)
    encode_rows(np.ascontiguousarray(raw).view(np.uint16), codes, scales)
    return Codes(codes, scales)


def unit(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows scaled to unit norm in `dtype`, from stored float16 [..., d] (whose norm is 1 only to 1e-3)."""
    exact = raw.to(dtype)
    norms: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return exact / norms


def products(a: Tensor, b: Tensor) -> Tensor:
    """Integer products int32 [m, n] of codes a int8 [m, d] and b int8 [n, d], on their device."""
    if _has_int8(a.device.type):
        if a.is_cuda:  # cuBLAS wants more than 16 rows and multiples of 8
            rows, columns, rest = max(-len(a) % 8, 24 - len(a)), -len(b) % 8, -a.shape[1] % 8
            pad = torch.nn.functional.pad
            padded: Tensor = torch._int_mm(pad(a, (0, rest, 0, rows)), pad(b, (0, rest, 0, columns)).T)
            return padded[: len(a), : len(b)]
        return torch._int_mm(a, b.T)
    if a.shape[1] <= FLOAT32_TERMS:
        return (a.float() @ b.float().T).to(torch.int32)
    return (a.double() @ b.double().T).to(torch.int32)


@lru_cache
def _has_int8(device: str) -> bool:
    """Whether torch multiplies int8 at speed here, and rightly at the extremes (without VNNI, sums may saturate)."""
    able = torch.cpu.get_capabilities()
    if device == "cpu" and not any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return False
    extreme = torch.full((32, 64), -127, dtype=torch.int8, device=device)
    return bool((torch._int_mm(extreme, -extreme.T) == -(127**2) * 64).all())
