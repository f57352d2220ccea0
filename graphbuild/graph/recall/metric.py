"""By what two vectors are near: cosine, inner product or L2; and by which of them somebody's graph was made.

A score is larger for what is nearer: the cosine, the inner product, or the squared distance, negated. numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from graphbuild.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
Name = Literal["cosine", "inner-product", "l2"]
TOLERANCE = 2.0**-23  # similarities that a graph rounds to one float32 number are ties
FAR = 1e15  # from 1, where squares of float32 come near their end
LEAST_NORMAL = float(np.finfo(np.float32).tiny)  # a product below it is wrong by that at most
PAIR_NUMBERS = 1 << 18  # of vectors that are gathered at a time
BACKGROUND = 16_384  # nodes that lists without similarities are compared with
FOREIGN, ASTRAY = 0.05, 16  # shares of a neighbour's lead over a random node, and of the usual error: see `explain`


class Rows(Protocol):
    """Vectors by number, in memory or in files."""

    def __len__(self) -> int: ...
    def take(self, ids: Array) -> Array: ...
    def blocks(self, rows: int) -> Iterator[tuple[int, Array]]: ...
    def parts(self) -> Sequence[Rows]: ...


@dataclass(frozen=True)
class Metric:
    """centre [d]: what L2 is computed around, so that it is not the small difference of large numbers.
    size: the vectors' mean squared norm, around the centre."""

    name: Name = "cosine"
    centre: Array | float = 0.0
    size: float = 1.0

    @classmethod
    def of(cls, name: Name, some: Array) -> Metric:
        """For vectors of which these are some [n, d], float64."""
        if name == "cosine":
            return cls()
        centre = some.mean(axis=0).astype(np.float32) if name == "l2" else 0.0  # so that float32 can subtract exactly
        return cls(name, centre, float(_squares(some - centre).mean()))

    def prepare(self, raw: Array, dtype: type[np.floating[Any]] = np.float64) -> Array:
        if self.name == "l2":
            return np.subtract(raw, self.centre, dtype=np.result_type(raw, dtype)).astype(dtype, copy=False)
        exact = raw.astype(dtype)
        if self.name == "cosine":
            rough = dtype is np.float32  # einsum takes half the time, and its error lies within `margin`
            norms = np.sqrt(_squares(exact))[:, None] if rough else np.linalg.norm(exact, axis=1, keepdims=True)
            if rough and not ((norms > 1 / FAR) & (norms < FAR)).all():
                return self.prepare(raw).astype(dtype)
            exact /= np.where(norms > 0, norms, 1)
        return exact

    def scores(self, queries: Array, others: Array) -> Array:
        """Of prepared vectors [n, d] with others [m, d]: [n, m]."""
        scores: Array = queries @ others.T
        if self.name == "l2":
            scores *= 2
            scores -= _squares(others)
            scores -= _squares(queries)[:, None]
        return scores

    def margin(self, queries: Array, others: Array) -> Array:
        """How wrong float32 scores may be, with the vectors' preparation, [n, 1]."""
        unit = rounding(queries.shape[1])
        if self.name == "cosine":
            return np.full((len(queries), 1), unit)
        own, other = np.sqrt(_squares(queries))[:, None], float(np.sqrt(_squares(others).max()))
        size = own * other if self.name == "inner-product" else (own + other) ** 2
        return np.asarray(unit * size + queries.shape[1] * LEAST_NORMAL)

    def tolerance(self, queries: Array) -> Array | float:
        """By how much a score may be less and still be a tie, [n, 1]: TOLERANCE of what such scores are sums of."""
        if self.name == "cosine":
            return TOLERANCE
        squares = _squares(queries)[:, None]
        return TOLERANCE * (np.sqrt(squares * self.size) if self.name == "inner-product" else squares + self.size)

    def of_pairs(self, queries: Array, query: Array, others: Array, other: Array) -> Array:
        """Scores float64 [p] of prepared vectors, of rows query[i] and other[i]; the same in any company."""
        result, step = np.empty(len(query)), max(PAIR_NUMBERS // queries.shape[1], 1)
        for part in (slice(begin, begin + step) for begin in range(0, len(query), step)):
            one, two = queries[query[part]], others[other[part]]
            result[part] = np.einsum("ij,ij->i", one, two)
            if self.name == "l2":
                result[part] = 2 * result[part] - _squares(two) - _squares(one)
        return result

    def pairs(self, vectors: Rows, queries: Array, listed: Array) -> Array:
        """Scores float64 [n, k] of prepared queries with the nodes that they list; -inf where that is below 0."""
        scores = np.full(listed.shape, -np.inf)
        step = max(PAIR_NUMBERS // (queries.shape[1] * listed.shape[1]), 1)
        for part in (slice(begin, begin + step) for begin in range(0, len(listed), step)):
            query, place = np.nonzero(listed[part] >= 0)
            others = self.prepare(vectors.take(listed[part][query, place]))
            scores[part][query, place] = self.of_pairs(queries[part], query, others, np.arange(len(others)))
        return scores


def rounding(numbers: int) -> float:
    """By how much a float32 product of two vectors of so many numbers may be wrong, where both have unit norm, and as
    much for preparing them (Higham 2002, section 3.1)."""
    return (numbers + 8) * 2.0**-23


class Form(NamedTuple):
    """What a tool may write for a pair: its name, the metric, and the score that it stands for."""

    name: str
    metric: Name
    score: Callable[[Array], Array]


FORMS = (  # of those that explain equally well the first is named
    Form("cosine", "cosine", lambda given: given),
    Form("1 - cosine", "cosine", lambda given: 1 - given),
    Form("inner product", "inner-product", lambda given: given),
    Form("1 - inner product", "inner-product", lambda given: 1 - given),
    Form("negated inner product", "inner-product", lambda given: -given),
    Form("L2 distance", "l2", lambda given: -(given * np.abs(given))),
    Form("squared L2 distance", "l2", lambda given: -given),
    Form("L2 distance of unit vectors", "cosine", lambda given: 1 - given * np.abs(given) / 2),
    Form("squared L2 distance of unit vectors", "cosine", lambda given: 1 - given / 2),
)


class Explained(NamedTuple):
    """form; error: the median difference of given and computed scores; astray: one that differs by more is wrong."""

    form: Form
    error: float
    astray: float


def candidates(name: Name | None, some: Array) -> dict[Name, Metric]:
    """The metrics that come into question, for vectors of which these are some."""
    return {each: Metric.of(each, some) for each in ([name] if name else get_args(Name))}


def explain(
    given: Array, listed: Array, vectors: Rows, queries: Array, metrics: Mapping[Name, Metric], seed: int
) -> Explained:
    """In which form values [n, k] are those of pairs: of queries [n, d] and the nodes listed [n, k].

    A form explains them if half of them are nearer the computed scores than FOREIGN of what a neighbour's score is
    above a random node's, or than rounding. Then wrong is what is further off than ASTRAY of the usual difference.

    Raises:
        InputError: none does, as where the graph is of other vectors.
    """
    steps = max(float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else 0.0, 64 * 2.0**-23)
    known = (listed >= 0) & np.isfinite(given)
    exact = np.where(known, given, 0).astype(np.float64)
    others = np.asarray(np.random.default_rng(seed).integers(len(vectors), size=listed.shape))
    computed: dict[Name, tuple[Array, float, float]] = {}
    for metric in metrics.values() if known.any() else ():
        prepared = metric.prepare(queries)
        true = metric.pairs(vectors, prepared, listed)
        lead = float(np.median(true[known]) - np.median(metric.pairs(vectors, prepared, others)))
        large = 1.0 if metric.name == "cosine" else 2 * float(_squares(queries).mean())
        computed[metric.name] = true, max(FOREIGN * lead, steps * large), steps * large
    tried = []
    for form in (form for form in FORMS if form.metric in computed):
        true, enough, rounding = computed[form.metric]
        error = float(np.median(np.abs(form.score(exact) - true)[known]))
        tried.append((error / enough, Explained(form, error, max(ASTRAY * error, rounding))))
    best = min((ratio for ratio, _ in tried), default=np.inf)
    if not best <= 1:
        nearest = min(tried, key=lambda one: one[0], default=None)
        told = f" (nearest: {nearest[1].form.name}, wrong by {nearest[1].error:.4f} in the median)" if nearest else ""
        raise InputError(
            f"its similarities are of other vectors: no metric of these explains them{told}",
            "give the vectors that the graph was made of, in its order; or, if it holds rough values on purpose, judge "
            "the lists alone, without SIMILARITIES",
        )
    return next(explained for ratio, explained in tried if ratio <= 2 * best + 1e-4)


def metric_of_lists(
    ids: Array, listed: Array, vectors: Rows, queries: Array, metrics: Mapping[Name, Metric], seed: int
) -> Metric:
    """The metric by which the fewest of some random nodes, not listed, are nearer than the middle of the list."""
    draw = np.random.default_rng(seed)
    some = np.sort(draw.choice(len(vectors), min(BACKGROUND, len(vectors)), replace=False))
    nearer = {}
    for name, metric in metrics.items():
        prepared = metric.prepare(queries)
        found = metric.pairs(vectors, prepared, listed)
        middle = np.sort(found, axis=1)[:, listed.shape[1] // 2, None]
        scores = metric.scores(prepared, metric.prepare(vectors.take(some)))
        above = scores > middle + metric.tolerance(prepared)
        above &= some != ids[:, None]
        of_list = np.isin(listed, some) & (found > middle + metric.tolerance(prepared))
        nearer[name] = int(above.sum() - of_list.sum())
    return metrics[min(nearer, key=lambda name: nearer[name])]


def _squares(vectors: Array) -> Array:
    return np.asarray(np.einsum("ij,ij->i", vectors, vectors))
