"""int8 codes of embeddings: what every engine picks candidates by.

A unit vector x is its code times its scale plus a rest: x = s q + e, with q int8 [d] and s = max |x| / 127. The integer
product q_i . q_j is exact, so candidate lists are the same on every machine, and |x_i . x_j - s_i s_j q_i . q_j| is at
most |e_i| + |e_j| + |e_i||e_j| (Cauchy-Schwarz), which proves candidate lists complete.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from graphbuild.knn.kernels import encode_rows
from graphbuild.store.sharded import Array

NOWHERE = 1e-30  # the scale of the code of a node that no sample has: no list takes it for near


class Codes(NamedTuple):
    """codes int8 [n, d]; scales float32 [n, 2]: s, and the rest's norm |e| rounded up."""

    codes: Array
    scales: Array


def encode(raw: Array) -> Codes:
    """Codes of stored vectors, float16 [n, d], of any length; the scale is 0 where that is zero, or NaN."""
    codes, scales = np.empty(raw.shape, np.int8), np.empty((len(raw), 2), np.float32)
    encode_rows(np.ascontiguousarray(raw).view(np.uint16), codes, scales)
    return Codes(codes, scales)
