"""Sketches: 64 bytes a node whose products approximate similarities, for trainers that hold a graph without embeddings.

A sketch holds a node's coordinates along the principal directions of all embeddings (eigenvectors of their second
moment, not centred, so products need no mean): the first 16 in 8 bits, where nearly all the similarity between ordinary
pairs lies, the next 96 in 4 bits. How near targets from sketches come: benchmarks/fidelity.py. Layout: int8 of the wide
coordinates, then a byte for coordinates j and j + n/2 of the n narrow ones, low and high half, each plus 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphbuild.machine.threads import torch_threads
from graphbuild.store.sharded import Array

BYTES = 64
DIMENSIONS = 112
WIDE_RANGE, NARROW_RANGE = 6.0, 3.0  # where coordinates are cut, in their root mean squares, if below 1
Float32 = np.ndarray[Any, np.dtype[np.float32]]


def split(dimensions: int) -> tuple[int, int]:
    """How many coordinates are held in 8 and in 4 bits."""
    wide = min(dimensions, 2 * BYTES - dimensions)
    return wide, dimensions - wide


def basis_of(moments: Array, total: int) -> Float32:
    """What sketches are made with, float32 [b, d]: a code is a row's product with a unit vector, rounded.

    moments: float64 [d + 1, d] of `total` embeddings (`graphbuild.graph.moments`). A row is a principal direction over
    the step of its coordinate. b = min(d, DIMENSIONS).
    """
    import torch

    with torch_threads(1):  # the same bytes wherever it runs
        values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(moments[1:] / total)))
    dimensions = min(len(values), DIMENSIONS)
    wide, narrow = split(dimensions)
    spread = np.sqrt(np.maximum(values[::-1][:dimensions], 1e-12))
    widest = np.minimum(spread * np.repeat([WIDE_RANGE, NARROW_RANGE], [wide, narrow]), 1)
    step = widest / np.repeat([127, 7], [wide, narrow])
    return np.asarray(vectors.T[::-1][:dimensions] / step[:, None], np.float32)


def steps(basis: Array) -> Float32:
    """What a code of 1 is worth in each coordinate, float32 [b]."""
    return np.asarray(1 / np.linalg.norm(basis, axis=1), np.float32)


def pack(vectors: Array, basis: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Sketches uint8 [n, 64 or fewer] of unit vectors float32 [n, d]."""
    import torch

    wide, narrow = split(len(basis))
    most = torch.tensor([127.0] * wide + [7.0] * narrow)
    with torch_threads(1):
        codes = (torch.from_numpy(vectors) @ torch.from_numpy(np.array(basis)).T).round_()
        codes = torch.minimum(torch.maximum(codes, -most), most).to(torch.int8)
        nibbles = (codes[:, wide:] + 8).view(torch.uint8)
        low, high = nibbles[:, : narrow // 2], nibbles[:, narrow // 2 :]
        return np.asarray(torch.cat([codes[:, :wide].view(torch.uint8), low | (high << 4)], dim=1).numpy())


def unpack(sketches: Array, step: Array) -> Float32:
    """Vectors float32 [..., b] of sketches uint8 [..., 64 or fewer]; step float32 [b]."""
    wide, _ = split(len(step))
    packed = sketches[..., wide:]
    codes = np.concatenate(
        [sketches[..., :wide].view(np.int8), (packed & 15).astype(np.int8) - 8, (packed >> 4).astype(np.int8) - 8], -1
    )
    return np.asarray(codes * step, np.float32)
