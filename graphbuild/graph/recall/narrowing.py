"""Which vectors of a block can be near some queries, told by a twelfth to a third of their numbers. numpy alone.

A vector is shortened to its coordinates in a few directions and the norm of what these leave. Two shortened vectors
have the product of the whole ones or a larger one (Cauchy and Schwarz), and the norms are the same, so by any metric
their score is no less: what it rules out is ruled out. Directions in which the queries are long rule out most. Where
lists are of near nodes, as in large graphs, nearly all is; where the scores of far pairs come near those of listed
ones, little is, and the whole vectors are compared as if nothing had been tried.
"""

from __future__ import annotations

import math

import numpy as np

from graphbuild.graph.recall.metric import Array, Metric, rounding

PARTS = (12, 6, 3)  # of a vector's numbers that are tried, one after the other
LEAST_DIRECTIONS = 10  # that are worth a try
FEW = 0.25  # of a block's vectors, that are worth gathering
LEAST = float(np.finfo(np.float32).min)


class Narrowing:
    """For prepared queries float32 [n, d]. Time: 2 (n + d) d / 12 operations a vector, or 2 or 4 times that."""

    def __init__(self, queries: Array, metric: Metric) -> None:
        self.queries, self.metric = queries, metric
        self.parts = [part for part in PARTS if len(queries) and queries.shape[1] >= LEAST_DIRECTIONS * part]
        self._next()

    def _next(self) -> None:
        """Take more of the numbers, or none any more."""
        self.tiles = self.failed = 0
        self.directions: Array | None = None
        self.short: Array | None = None
        self.others: Array | None = None
        if not self.parts:
            return
        d = self.queries.shape[1]
        directions = np.random.default_rng(0).standard_normal((d, d // self.parts.pop(0)), np.float32)
        for _ in range(2):  # of a subspace iteration
            directions = np.linalg.qr(self.queries.T @ (self.queries @ directions))[0]
        # A coordinate is wrong by half of `rounding` at most, m of them together by sqrt(m) times that, and as it is
        # with both vectors' so by twice that their product; what a rest's square lacks by it, is added to it.
        self.wider = 2 + 2 * math.sqrt(directions.shape[1])
        self.directions = directions
        self.short = self._shortened(self.queries)

    def look_at(self, others: Array) -> None:
        """The block of prepared vectors float32 [m, d] that `columns` tells of."""
        self.others = None if self.directions is None else self._shortened(others)

    @property
    def helps(self) -> bool:
        """Whether `columns` tells more of this block than that all may."""
        return self.others is not None

    def columns(self, rows: slice, floor: Array, margin: Array) -> Array | slice:
        """The vectors of the block that may score `floor` [n, 1] or more with one of these queries at least; margin
        [n, 1]: as the metric's."""
        if self.short is None or self.others is None:
            return slice(None)
        near = may_exceed(self.metric.scores(self.short[rows], self.others), floor - self.wider * margin)
        found = np.flatnonzero(near.any(axis=0))
        self.tiles += 1
        if len(found) <= FEW * near.shape[1]:
            return found
        self.failed += 1
        if 2 * self.failed > self.tiles:
            self._next()
        return slice(None)

    def _shortened(self, vectors: Array) -> Array:
        """float32 [n, m + 1] of vectors float32 [n, d]."""
        assert self.directions is not None
        short = np.empty((len(vectors), self.directions.shape[1] + 1), np.float32)
        np.matmul(vectors, self.directions, out=short[:, :-1])
        squares = np.einsum("ij,ij->i", vectors, vectors)
        rest = squares - np.einsum("ij,ij->i", short[:, :-1], short[:, :-1])
        short[:, -1] = np.sqrt(np.maximum(rest, 0) + self.wider * rounding(vectors.shape[1]) * squares)
        return short


def may_exceed(scores: Array, floor: Array) -> Array:
    """bool [n, m], which scores [n, m] may exceed floors [n, 1]; so may what is no number, of sums beyond float32."""
    return ~(scores < np.maximum(floor, LEAST).astype(np.float32))
