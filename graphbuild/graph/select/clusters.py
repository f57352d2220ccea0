"""Clusters of a graph's texts, given or by k-means, and how many to take of each."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphbuild.graph.lists.derived import slices
from graphbuild.graph.sample_graph import Ids, SampleGraph

Floats = NDArray[np.float64]

SAMPLE = 256  # texts a cluster that k-means sees


def clustered(graph: SampleGraph, nodes: Ids, own: Ids | None, clusters: int, seed: int) -> tuple[Ids, Floats, Floats]:
    """The cluster int64 [u] of each of these nodes, its cosine [u] to that one's centroid, and centroids [K, d].

    own: the clusters, int64 [u], or None: `clusters` of spherical k-means on a sample. Centroids are means scaled to
    norm 1; clusters without a node are left out. Reads the embeddings once, of given clusters twice.
    """
    import scipy.sparse
    from scipy.cluster.vq import kmeans2

    if own is None:
        draw = np.random.default_rng(seed)
        seen = np.sort(draw.choice(nodes, min(len(nodes), SAMPLE * clusters), replace=False))
        with warnings.catch_warnings(action="ignore"):  # of clusters that are empty: they are left out
            means = kmeans2(graph.embeddings(seen), min(clusters, len(seen)), iter=25, minit="points", seed=draw)[0]
    else:
        means = np.zeros((int(own.max()) + 1, graph.d))
        for part in slices(len(nodes)):
            size = len(own[part])
            member = scipy.sparse.csr_array((np.ones(size), own[part], np.arange(size + 1)), shape=(size, len(means)))
            means += member.T @ graph.embeddings(nodes[part])
    centroids = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    found, cosines = np.empty(len(nodes), np.int64), np.empty(len(nodes))
    for part in slices(len(nodes)):
        x = graph.embeddings(nodes[part])
        found[part] = (x @ centroids.T.astype(np.float32)).argmax(axis=1) if own is None else own[part]
        cosines[part] = np.einsum("id,id->i", x, centroids[found[part]])
    present, found = np.unique(found, return_inverse=True)
    return found, cosines, centroids[present]


def whole_shares(wanted: Floats, least: Floats, most: NDArray[Any], count: int) -> Ids:
    """Whole numbers of sum `count` between least and most, nearest to wanted in squares before they are rounded.

    The minimum is wanted + a constant, cut to the bounds; the largest remainders are rounded up.
    """
    low, high = float((least - wanted).min()), float((most - wanted).max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(wanted + middle, least, most).sum() < count else (low, middle)
    exact = np.clip(wanted + high, least, most)
    shares = np.floor(exact + 1e-6).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    return shares
