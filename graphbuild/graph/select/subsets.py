"""Data-efficient subsets: which rows of a store to keep when only so many may stay, chosen over its stored graph.

Nothing is searched: pairs that no list holds count as unlike. docs/how-to/selections.md says what each method leaves
out by that, and its time and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.edges import Edges
from graphbuild.graph.lists.derived import blocks
from graphbuild.graph.sample_graph import Ids, SampleGraph
from graphbuild.graph.select.clusters import clustered, whole_shares
from graphbuild.graph.select.greedy import CENTER, CUT, MESSAGE, gathered, take_greatest

Floats = NDArray[np.float64]
Chosen = NDArray[np.bool_]  # of a pool's rows

CLUSTERS = 100  # the best for 12.8 million samples in arXiv 2401.04578; 500 for 280 million
NEAREST_CLUSTERS = 20
BEYOND = 2.0  # the greatest distance of two unit vectors, 1 - cos


@dataclass(frozen=True, eq=False)
class Pool:
    """The rows that may be chosen: those of a node behind each other, in the order in which they are taken.

    rows, nodes int64 [n]; copies int64 [n]: how many rows of the same node stand before; counts int64 [M]: rows of
    each node; scores float64 [n]; group int64 [M]: the label of each node's first row, as a number; 0 without labels.
    """

    graph: SampleGraph
    rows: Ids
    nodes: Ids
    copies: Ids
    counts: Ids
    scores: Floats | None
    group: Ids
    labelled: bool

    @classmethod
    def of(cls, graph: SampleGraph, scores: Any = None, labels: Any = None, within: Any = None) -> Pool:
        """Of one node's rows the one of greatest score comes first, then the smallest. Rows without a node stay out."""
        node_of = graph.sample_nodes()
        allowed = node_of >= 0
        if within is not None:
            allowed &= _by_row("within", within, node_of, "b")
        rows = np.flatnonzero(allowed)
        own = None if scores is None else _by_row("scores", scores, node_of, "iuf")[rows].astype(np.float64)
        if own is not None and not np.isfinite(own).all():
            bad = rows[~np.isfinite(own)][0]
            raise InputError(f"the score of row {bad} is no finite number", "score all rows, or leave it out by within")
        order = np.lexsort((node_of[rows],) if own is None else (-own, node_of[rows]))
        rows, own = rows[order], None if own is None else own[order]
        nodes = node_of[rows]
        counts = np.bincount(nodes, minlength=len(graph))
        copies = np.arange(len(rows)) - (np.cumsum(counts) - counts)[nodes]
        group = np.zeros(len(graph), np.int64)
        if labels is not None:
            first = copies == 0
            group[nodes[first]] = np.unique(_by_row("labels", labels, node_of)[rows[first]], return_inverse=True)[1]
        return cls(graph, rows, nodes, copies, counts, own, group, labels is not None)

    def greatest(self, edges: Edges, values: Floats, count: int, kind: int, gamma: float = 0) -> Chosen:
        """`take_greatest`, of each group its share of the rows."""
        sizes = np.bincount(self.group[self.nodes])
        quota = whole_shares(count * sizes / len(self.rows), np.zeros(len(sizes)), sizes, count)
        taken = take_greatest(*vars(edges).values(), values, self.counts, self.group, quota, kind, gamma)
        return np.asarray(self.copies < taken[self.nodes])

    def clusters(self, count: int, seed: int) -> tuple[Ids, Floats, Floats]:
        """The cluster of each row, the cosine to its centroid, and the centroids: `clustered`, of the rows' texts."""
        texts = np.flatnonzero(self.counts)
        own = self.group[texts] if self.labelled else None
        found, cosines, centroids = clustered(self.graph, texts, own, count, seed)
        of = np.cumsum(self.copies == 0) - 1
        return found[of], cosines[of], centroids


def choose(
    graph: SampleGraph,
    count: int,
    method: str,
    *,
    seed: int,
    scores: Any = None,
    labels: Any = None,
    within: Any = None,
    **options: float,
) -> Ids:
    """`count` rows of a graph's store, int64, ascending, by one of METHODS; its function says what it maximises.

    scores, numbers [N] by row: difficulty for d2 (the samples most worth having have most), what of near-duplicates is
    kept for semdedup, losses for sensitivity. labels [N], of any kind: classes for sas, clusters for density and
    sensitivity. within, bool [N]: rows that may be chosen, all by default. options: the further arguments of the
    method's function. seed: for k-means and draws; the others do not depend on it.

    A sample stands at its first caption's node; samples without a node are never chosen. Rows of equal text are
    duplicates at similarity 1, and each counts as a sample. Which of them comes first: the greatest score, then the
    smallest row. A text has one label, that of its first row.

    Raises:
        ConfigError: an unknown method, a count that cannot be had, scores or labels that the method does not take.
        InputError: scores, labels or within that are not one a row, or of a kind that cannot be.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r} to choose rows by", f"use one of {', '.join(METHODS)}")
    function, takes = METHODS[method]
    for name, given in (("scores", scores), ("labels", labels)):
        if given is not None and name not in takes:
            able = ", ".join(other for other, (_, names) in METHODS.items() if name in names)
            raise ConfigError(f"the method {method} takes no {name}", f"leave them out, or use one of {able}")
    pool = Pool.of(graph, scores, labels, within)
    if not 1 <= count <= len(pool.rows):
        raise ConfigError(
            f"{count:,} rows cannot be chosen of {len(pool.rows):,}", f"choose between 1 and {len(pool.rows):,}"
        )
    return np.sort(pool.rows[function(pool, count, seed, **options)])


def sas(pool: Pool, count: int, seed: int) -> Chosen:
    """SAS: subsets that maximise augmentation similarity (Joshi and Mirzasoleiman, arXiv 2302.09195, Algorithm 1).

    Greedy maximisation of F(S) = sum of s_ij over i in V \\ S and j in S, in each class V by itself (without labels all
    rows are one), whose share of the rows is that of V: taking e adds sum_V s_ei - 2 sum_S s_ej. s is the similarity of
    texts. F falls in the end, and rows are taken all the same, until there are `count`; the paper's last step, a
    double greedy that may drop some again, is left out.
    """
    edges = pool.graph.symmetrized()
    around = gathered(*vars(edges).values(), pool.counts.astype(np.float64), pool.group, -1.0)
    return pool.greatest(edges, around + pool.counts - 1, count, CUT)


def d2(pool: Pool, count: int, seed: int, *, forward: float = 1.0, reverse: float = 1.0) -> Chosen:
    """D2 pruning (Maharana, Yadav and Bansal, arXiv 2310.07931, section 3): scores x, 1 without any, spread over edges.

    Forward message passing: x_i += sum_j exp(-forward d_ij^2) x_j. Then, `count` times, the row k of greatest x is
    taken, with reverse message passing: x_j -= exp(-reverse d_kj^2) x_k. d is the Euclidean distance of unit vectors;
    the smaller `reverse`, the more alike must rows not be.
    """
    _check_above_zero(forward=forward, reverse=reverse)
    scores = np.ones(len(pool.rows)) if pool.scores is None else pool.scores
    own = np.bincount(pool.nodes, scores, len(pool.counts))  # rows of a node exchange whole messages
    edges = pool.graph.symmetrized()
    x = own + gathered(*vars(edges).values(), own, pool.group, forward)
    return pool.greatest(edges, x, count, MESSAGE, reverse)


def k_center(pool: Pool, count: int, seed: int) -> Chosen:
    """Greedy k-center (Gonzalez, 1985; for subsets: Sener and Savarese, arXiv 1708.00489): the farthest node next.

    The distance 1 - cos of a node to its nearest chosen one is known where either lists the other. Where none is
    listed it is at least that of the node's k-th neighbour: such nodes come first, by that. Rows of a node that has
    one chosen are at distance 0.
    """
    last = np.concatenate([similarities[:, -1] for _, _, similarities in pool.graph.edge_blocks()])
    return pool.greatest(pool.graph.symmetrized(), BEYOND + 1 - last.astype(np.float64), count, CENTER)


def semdedup(pool: Pool, count: int, seed: int) -> Chosen:
    """SemDeDup (Abbas et al., arXiv 2303.09540, section 3), at the threshold that keeps `count` rows.

    Rows stand in an order, and each is dropped whose greatest similarity to one before it is over the threshold. The
    order is descending score, or without scores ascending mean similarity to the node's list: that stands for the
    similarity to the cluster's centroid, of which SemDeDup keeps the smallest. Pairs are those of the lists, across
    clusters' borders.
    """
    size = len(pool.counts)
    if pool.scores is None:
        hardness = -np.concatenate([block.astype(np.float64).mean(axis=1) for _, _, block in pool.graph.edge_blocks()])
    else:
        hardness = np.zeros(size)
        hardness[np.flatnonzero(pool.counts)] = pool.scores[pool.copies == 0]
    hardness[pool.counts == 0] = -np.inf  # behind all that may be chosen
    rank = np.empty(size, np.int64)
    rank[np.argsort(-hardness, kind="stable")] = np.arange(size)
    nearest = np.full(size, -np.inf)
    for first, neighbors, similarities in blocks(pool.graph):
        nodes = np.repeat(np.arange(first, first + len(neighbors)), pool.graph.k)
        others = neighbors.reshape(-1).astype(np.int64)
        later = np.where(rank[nodes] > rank[others], nodes, others)
        np.maximum.at(nearest, later, np.minimum(similarities.reshape(-1).astype(np.float64), 1))
    own = np.where(pool.copies == 0, nearest[pool.nodes], 1)
    return _first(np.lexsort((pool.copies, rank[pool.nodes], own)), count)


def density(pool: Pool, count: int, seed: int, *, clusters: int = CLUSTERS, temperature: float = 0.5) -> Chosen:
    """Density-based pruning (Abbas et al., arXiv 2401.04578, section 3): more rows of clusters that are complex.

    Clusters are the labels, or those of spherical k-means. d_intra is the mean cosine distance of a cluster's texts to
    its centroid, d_inter that of the centroid to the nearest 20 others, P the softmax of d_inter d_intra / temperature
    over clusters. How many rows each keeps is nearest to count x P in squares, at least 1 and at most all (a quadratic
    program, solved exactly). Kept are those farthest from the centroid; further rows of a text come behind all texts.
    """
    _check_above_zero(clusters=clusters, temperature=temperature)
    own, cosines, centroids = pool.clusters(int(clusters), seed)
    sizes, first = np.bincount(own), pool.copies == 0
    intra = 1 - np.bincount(own[first], cosines[first]) / np.bincount(own[first])
    between = np.sort(1 - centroids @ centroids.T + 4 * np.eye(len(sizes)), axis=1)  # itself last
    inter = between[:, : min(NEAREST_CLUSTERS, len(sizes) - 1)].mean(axis=1) if len(sizes) > 1 else 1
    complexity = inter * intra / temperature
    share = np.exp(complexity - complexity.max())
    least = np.full(len(sizes), count >= len(sizes))
    kept = whole_shares(count * share / share.sum(), least, sizes, count)
    order = np.lexsort((cosines, pool.copies, own))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return np.asarray(place - (np.cumsum(sizes) - sizes)[own] < kept[own])


def sensitivity(pool: Pool, count: int, seed: int, *, clusters: int = CLUSTERS, holder: float = 1.0) -> Chosen:
    """Sensitivity sampling: rows drawn without repetition with chances in proportion to p.

    With scores (losses, at least 0): p = loss + holder x v (Axiotis et al., arXiv 2402.17327, Algorithm 1), v being the
    squared distance to the cluster's centroid of norm 1, and loss the mean of the cluster's scores, for that at its
    centroid. Without: p = v / sum of v + 1 / rows of the cluster, the sensitivity of k-means' cost (Feldman and
    Langberg, STOC 2011). Clusters are the labels, or those of spherical k-means.
    """
    if pool.scores is None and not pool.labelled:
        raise ConfigError("the method sensitivity needs scores or labels", "pass losses as scores, or use random")
    _check_above_zero(clusters=clusters, holder=holder)
    cluster, cosines, _ = pool.clusters(int(clusters), seed)
    distance = np.maximum(2 - 2 * cosines, 0)
    sizes = np.bincount(cluster)
    if pool.scores is None:
        chances = distance / max(distance.sum(), np.finfo(np.float64).tiny) + 1 / sizes[cluster]
    elif pool.scores.min() < 0:
        raise InputError(f"the score of row {pool.rows[pool.scores.argmin()]} is below 0", "pass losses as scores")
    else:
        chances = (np.bincount(cluster, pool.scores) / sizes)[cluster] + holder * distance
    # Efraimidis and Spirakis (2006): the first `count` of independent waiting times are such a sample.
    waits = np.random.default_rng(seed).exponential(size=len(chances))
    return _first(np.argsort(waits / np.maximum(chances, np.finfo(np.float64).tiny), kind="stable"), count)


def random(pool: Pool, count: int, seed: int) -> Chosen:
    """Rows drawn with equal chances, without repetition."""
    return _first(np.random.default_rng(seed).permutation(len(pool.rows)), count)


METHODS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sas": (sas, ("labels",)),
    "d2": (d2, ("scores",)),
    "density": (density, ("labels",)),
    "semdedup": (semdedup, ("scores",)),
    "k-center": (k_center, ()),
    "sensitivity": (sensitivity, ("scores", "labels")),
    "random": (random, ()),
}


def _by_row(name: str, values: Any, nodes: Ids, kinds: str | None = None) -> NDArray[Any]:
    given = np.asarray(values)
    if given.shape != nodes.shape or (kinds and given.dtype.kind not in kinds):
        raise InputError(
            f"{name} are {given.dtype} {list(given.shape)}; the store has {len(nodes):,} rows",
            f"pass {'one of any kind' if not kinds else 'True or False' if kinds == 'b' else 'a number'} for each row",
        )
    return given


def _check_above_zero(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ConfigError(f"{name} = {value}", f"set {name} above 0")


def _first(order: Ids, count: int) -> Chosen:
    chosen = np.zeros(len(order), bool)
    chosen[order[:count]] = True
    return chosen
