"""A 2-D map of a store's nodes: of all, or of POINTS drawn ones, by principal components, with communities.

Communities are those of the drawn nodes' own graph (their NEAR nearest among each other, weighted by similarity), by
Louvain's method (Blondel et al., arXiv 0803.0476; networkx). Cost: POINTS^2 d operations and some seconds.
"""

from __future__ import annotations

import networkx
import numpy as np

from graphbuild.look.catalog import Catalog
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json

POINTS = 1_500
NEAR = 10
SHOWN = 10  # communities with a colour and a name of their own


def node_map(catalog: Catalog) -> Json:
    """nodes [p], x and y [p] in 0..1, community [p] (0 the largest; SHOWN: all smaller ones), texts [p]; and for each
    community that is shown its name, the text of its most central node, and size; last of all smaller ones together."""
    total = len(catalog.graph)
    nodes = np.sort(np.random.default_rng(0).choice(total, min(POINTS, total), replace=False))
    vectors = catalog.graph.embeddings(nodes)
    scores = vectors @ vectors.T
    groups = communities(scores)
    label = np.full(len(nodes), SHOWN)
    found = catalog.describe(nodes, np.zeros(len(nodes)))
    names = []
    for number, members in enumerate(groups[:SHOWN]):
        label[members] = number
        central = members[int(scores[np.ix_(members, members)].sum(axis=1).argmax())]
        names.append({"name": found[central].text or f"node {found[central].node}", "size": len(members)})
    if len(groups) > SHOWN:
        names.append({"name": "smaller ones", "size": int((label == SHOWN).sum())})
    x, y = principal(vectors).T
    return {
        "nodes": nodes.tolist(),
        "x": x.round(4).tolist(),
        "y": y.round(4).tolist(),
        "community": label.tolist(),
        "texts": [(one.text or "")[:200] for one in found],
        "communities": names,
        "of": total,
    }


def principal(vectors: Array) -> Array:
    """The first two principal components of vectors [n, d], each scaled to 0..1: [n, 2]."""
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    flat = centred @ axes[:, [-1, -2 if axes.shape[1] > 1 else -1]]
    least, most = flat.min(axis=0), flat.max(axis=0)
    return np.asarray((flat - least) / np.maximum(most - least, 1e-12))


def communities(scores: Array) -> list[list[int]]:
    """Groups of nodes by their similarities [n, n], largest first; every node is in one."""
    count = len(scores)
    near = min(NEAR, count - 1)
    apart = scores - 3 * np.eye(count, dtype=scores.dtype)  # no node is its own neighbour
    graph = networkx.Graph()
    graph.add_nodes_from(range(count))
    if near:
        lists = np.argpartition(-apart, near - 1, axis=1)[:, :near]
        graph.add_weighted_edges_from(
            (row, int(column), float(scores[row, column])) for row in range(count) for column in lists[row]
            if scores[row, column] > 0
        )  # fmt: skip
    found = networkx.community.louvain_communities(graph, seed=0)
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group[0]))
