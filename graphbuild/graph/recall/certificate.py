"""The certificate of anybody's k-NN graph, from arrays alone: structure, metric, recall.

Written with numpy alone: it shares no code with the engine it judges, whichever that is. Structure is of all
lists, LISTS at a time; the rest of a sample. Time and memory: as of graph/recall/recall.py, by SLICE nodes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from graphbuild.errors import InputError
from graphbuild.graph.recall.metric import Array, Explained, Name, candidates, explain, metric_of_lists
from graphbuild.graph.recall.recall import certificate_of, measure, not_finite, sampled

Json = dict[str, Any]
LISTS = 65_536  # lists whose structure is checked at a time
SLICE = 1_000  # nodes that are searched at a time
THREADS = min(len(os.sched_getaffinity(0)), 8)
SAMPLE = 500  # nodes that `certify_graph` searches again
WORST = 10
PAIRED = 250  # sampled lists that are compared at a time with those of their neighbours
NOBODY = np.iinfo(np.int64).min  # the node whose list a query's is
FAULTS = {
    "self": "names the node itself",
    "twice": "names a node twice",
    "missing": "has an empty place (-1)",
    "range": "names a node that does not exist",
    "number": "has a similarity that is no number",
    "order": "is not in order, nearest first",
    "wrong": "has a similarity that is not its pair's",
    "contradiction": "gives a pair another similarity than the other node's list",
}


def certify_graph(
    vectors: Array,
    neighbors: Array,
    similarities: Array | None = None,
    *,
    queries: Array | None = None,
    metric: Name | None = None,
    with_self: bool = False,
    ordered: bool = True,
    sample: int = SAMPLE,
    seed: int = 0,
) -> Json:
    """The certificate of anybody's graph; fields: docs/how-to/certify.md. 2 S N d operations on all cores for S nodes.

    Arrays may be memory-mapped; only blocks of them are copied.

    vectors: numbers [N, d], as the graph's maker had them. neighbors: integers [N, k]; -1, or the largest number of an
    unsigned type, is an empty place. similarities [N, k]: what the maker wrote for each pair, a similarity or distance.
    queries: numbers [Q, d]; the lists are theirs, [Q, k]. metric: None finds it. with_self: each list names its own
    node, which is left out (of a list that does not, the last). ordered: whether the first of a list means the nearest.

    Raises:
        InputError: shapes or types do not fit, a vector is not finite, or no metric explains the similarities.
    """
    asked = vectors if queries is None else queries
    _check_shapes(vectors, asked, neighbors, similarities, others=queries is None, dropped=with_self)
    lists = _Lists(neighbors, similarities, queries is None, with_self)
    order = sampled(sample, seed, len(asked))
    drawn = np.sort(order)
    raw = np.asarray(asked[drawn], np.float64)
    if not np.isfinite(raw).all():
        raise not_finite(drawn[~np.isfinite(raw).all(axis=1)][0])
    ids, listed, given = lists.rows(drawn)
    sound, rows = _sound(ids, listed, len(vectors)), ArrayRows(vectors)
    metrics, explained, found_by = candidates(metric, raw), None, "asked for" if metric else "the lists"
    some = slice(None, None, -(-len(drawn) // SAMPLE))
    if given is not None:
        explained = explain(given[some], sound[some], rows, raw[some], metrics, seed)
        chosen, found_by = metrics[explained.form.metric], found_by if metric else "the similarities"
    elif metric is not None:
        chosen = metrics[metric]
    else:
        chosen = metric_of_lists(ids[some], sound[some], rows, raw[some], metrics, seed)
    prepared = chosen.prepare(raw)
    true = chosen.pairs(rows, prepared, sound)
    nearest = np.minimum.accumulate(np.where(sound < 0, np.inf, true), axis=1)
    in_order = (true[:, 1:] <= nearest[:, :-1] + chosen.tolerance(prepared)).all(axis=1)
    faults = _faults(lists, len(vectors), explained if ordered else None)
    if explained is not None:
        faults |= _sampled_faults(lists, drawn, sound, true, explained)
    slices = [slice(begin, begin + SLICE) for begin in range(0, len(drawn), SLICE)]
    measured = [measure(rows, ids[part], sound[part], chosen, raw[part]) for part in slices]
    recalls, deficits = (np.concatenate(each) for each in zip(*measured, strict=True))
    in_turn = np.searchsorted(drawn, order)
    certificate = certificate_of(listed.shape[1], len(asked), recalls[in_turn], deficits[in_turn])
    if chosen.name == "l2":
        certificate["mean_distance_excess"] = certificate.pop("mean_similarity_deficit")
    worst = [at for at in np.argsort(recalls, kind="stable")[:WORST] if recalls[at] < 1]
    return certificate | {
        "nodes": len(vectors),
        "width": vectors.shape[1],
        "lists": len(neighbors),
        "metric": chosen.name,
        "metric_found_by": found_by,
        "similarities": explained and {"form": explained.form.name, "median_error": explained.error},
        "faults": [{"fault": name, "says": FAULTS[name], **faults[name]} for name in FAULTS if name in faults],
        "nearest_first": float(in_order.mean()) if ordered else None,
        "worst_nodes": [{"node": int(drawn[at]), "recall": round(float(recalls[at]), 6)} for at in worst],
        "seed": seed,
    }


@dataclass(frozen=True)
class ArrayRows:
    """An array [N, d], of which `blocks` gives rows first..end-1."""

    array: Array
    first: int = 0
    end: int | None = None

    def __len__(self) -> int:
        return len(self.array)

    def take(self, ids: Array) -> Array:
        return np.asarray(self.array[ids])

    def blocks(self, rows: int) -> Iterator[tuple[int, Array]]:
        end = len(self.array) if self.end is None else self.end
        for begin in range(self.first, end, rows):
            yield begin, self.array[begin : min(begin + rows, end)]

    def parts(self) -> list[ArrayRows]:
        """One for each thread: while some copy and scale, others multiply."""
        cuts = np.linspace(0, len(self), THREADS + 1).astype(int).tolist()
        return [ArrayRows(self.array, *cut) for cut in pairwise(cuts)]


@dataclass(frozen=True)
class _Lists:
    """own: list i is node i's, not a query's."""

    neighbors: Array
    similarities: Array | None
    own: bool
    with_self: bool

    def rows(self, at: Array) -> tuple[Array, Array, Array | None]:
        """The nodes [n] of those lists, the nodes int64 [n, k] that they name, and their similarities [n, k]."""
        raw = np.asarray(self.neighbors[at])
        ids, listed = at if self.own else np.full(len(at), NOBODY), raw.astype(np.int64)
        given = None if self.similarities is None else np.asarray(self.similarities[at])
        if raw.dtype.kind == "u":
            listed[raw == np.iinfo(raw.dtype).max] = -1
        if self.with_self:
            is_self, k = listed == ids[:, None], listed.shape[1]
            kept = np.arange(k) != np.where(is_self.any(axis=1), is_self.argmax(axis=1), k - 1)[:, None]
            listed = listed[kept].reshape(-1, k - 1)
            given = given if given is None else given[kept].reshape(-1, k - 1)
        return ids, listed, given


def _check_shapes(
    vectors: Array, asked: Array, neighbors: Array, similarities: Array | None, *, others: bool, dropped: bool
) -> None:
    for what, array in (("VECTORS", vectors), ("--queries", asked)):
        if array.ndim != 2 or array.dtype.kind not in "fiu" or 0 in array.shape:
            raise InputError(f"{what} are {array.dtype} {list(array.shape)}", "give numbers [n, d], a vector a row")
    if asked.shape[1] != vectors.shape[1]:
        raise InputError(f"--queries are of {asked.shape[1]} numbers, VECTORS of {vectors.shape[1]}", "give both alike")
    if neighbors.ndim != 2 or neighbors.dtype.kind not in "iu":
        raise InputError(
            f"NEIGHBORS are {neighbors.dtype} {list(neighbors.shape)}", "give integers [n, k], a list of rows a vector"
        )
    if len(neighbors) != len(asked):
        raise InputError(
            f"NEIGHBORS have {len(neighbors):,} lists, and there are {len(asked):,} vectors",
            "give a list for each vector; lists of other vectors take these by --queries",
        )
    k = neighbors.shape[1] - dropped
    if not 1 <= k <= len(vectors) - others:
        raise InputError(f"lists of {k} nodes, of {len(vectors):,} vectors", "give lists of 1 to all other nodes")
    if similarities is not None and (similarities.shape != neighbors.shape or similarities.dtype.kind not in "fiu"):
        raise InputError(
            f"SIMILARITIES are {similarities.dtype} {list(similarities.shape)}, NEIGHBORS {list(neighbors.shape)}",
            "give numbers of the same shape",
        )


def _sound(ids: Array, listed: Array, nodes: int) -> Array:
    """The lists [n, k] with -1 for what is no neighbour: no node, the node itself, and what was named before."""
    order = np.argsort(listed, axis=1, kind="stable")
    ordered = np.take_along_axis(listed, order, axis=1)
    again = np.zeros(listed.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(again | (listed < 0) | (listed >= nodes) | (listed == ids[:, None]), -1, listed)


def list_faults(ids: Array, listed: Array, nodes: int) -> dict[str, Array]:
    """By name in FAULTS, which of the lists int64 [n, k] of nodes `ids` have it: bool [n]."""
    ordered = np.sort(listed, axis=1)
    return {
        "self": (listed == ids[:, None]).any(axis=1),
        "twice": ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(axis=1),
        "missing": (listed == -1).any(axis=1),
        "range": (ordered[:, -1] >= nodes) | (listed < -1).any(axis=1),
    }


def _faults(lists: _Lists, nodes: int, explained: Explained | None) -> dict[str, Json]:
    """What is wrong in any list, LISTS at a time, side by side."""

    def look(begin: int) -> list[tuple[str, int, int]]:
        ids, listed, given = lists.rows(np.arange(begin, min(begin + LISTS, len(lists.neighbors))))
        found = list_faults(ids, listed, nodes)
        if given is not None:
            found["number"] = (~np.isfinite(given) & (listed != -1)).any(axis=1)
            if explained is not None:
                scores = explained.form.score(given.astype(np.float64))
                found["order"] = np.any(scores[:, 1:] > scores[:, :-1], axis=1)
        return [(name, int(bad.sum()), begin + int(bad.argmax())) for name, bad in found.items() if bad.any()]

    faults: dict[str, Json] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        for block in threads.map(look, range(0, len(lists.neighbors), LISTS)):
            for name, count, first in block:
                faults.setdefault(name, {"lists": 0, "first": first})["lists"] += count
    return faults


def _sampled_faults(lists: _Lists, at: Array, sound: Array, true: Array, explained: Explained) -> dict[str, Json]:
    """Which of the lists `at` [n] have similarities that are not those of their pairs, true scores [n, k]."""

    def scores_of(raw: Array | None) -> Array:
        return explained.form.score(np.asarray(raw, np.float64))

    found = {name: np.zeros(len(at), bool) for name in ("wrong", "contradiction")}
    for part in (slice(begin, begin + PAIRED) for begin in range(0, len(at), PAIRED)):
        own, listed, scores = at[part, None], sound[part], scores_of(lists.rows(at[part])[2])
        with np.errstate(invalid="ignore"):  # of infinite ones
            found["wrong"][part] = ((np.abs(scores - true[part]) > explained.astray) & (listed >= 0)).any(axis=1)
            if lists.own:
                _, theirs, values = lists.rows(np.maximum(listed, 0).ravel())
                back = (theirs.reshape(*listed.shape, -1) == own[..., None]) & (listed >= 0)[..., None]
                apart = np.abs(scores_of(values).reshape(back.shape) - scores[..., None]) > 2 * explained.astray
                found["contradiction"][part] = (back & apart).any(axis=(1, 2))
    return {
        name: {"lists": int(bad.sum()), "first": int(at[bad.argmax()]), "of_sampled": len(at)}
        for name, bad in found.items()
        if bad.any()
    }
