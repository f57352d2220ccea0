"""What every threshold for near-duplicates would take, and pairs at its border.

As `graphbuild mine --what duplicates` counts (graph/lists/duplicates.py), but for all thresholds at once: edges are
united from the most similar on. Kept in STORE/explore/duplicates.json. Cost: two passes over the similarities, and one
over the nodes at each threshold; memory: 41 bytes an edge of at most EDGES, and 24 a node.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from graphbuild.graph.lists.derived import blocks
from graphbuild.graph.lists.duplicates import flattened, similarities, unite
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.look.catalog import Catalog
from graphbuild.look.explore.map import FOLDER, writable
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json

LIMITS = np.arange(200, 99, -1) / 200  # the thresholds, descending; from where there are EDGES edges on, no lower ones
EDGES = 16_000_000
PAIRS = 6  # at each threshold
MADE = f"{FOLDER}/duplicates.json"


def duplicates(catalog: Catalog) -> Json:
    """samples; and steps: of each threshold, descending, `threshold`, the samples to `drop` and the `groups` of two and
    more, as `near_duplicates` counts them, and `pairs` that reach this threshold and not the one before: two nodes with
    their texts, and the similarity."""
    found = catalog.store.read_json(MADE)
    if found and found["graph"] == catalog.graph.fingerprint:
        return found
    nodes, parent = catalog.graph.sample_nodes(), np.arange(len(catalog.graph))
    nodes = nodes[nodes >= 0]
    edges, starts = _edges(catalog.graph)
    found = {"graph": catalog.graph.fingerprint, "samples": len(nodes), "steps": []}
    for limit, (begin, end) in zip(LIMITS.tolist(), pairwise(starts), strict=False):
        if begin < end or not found["steps"]:
            unite(parent, edges[begin:end, 0], edges[begin:end, 1])
            parent = flattened(parent)
            sizes = np.bincount(parent[nodes], minlength=len(parent))
        counts = {"drop": len(nodes) - int((sizes > 0).sum()), "groups": int((sizes > 1).sum())}
        found["steps"].append({"threshold": limit, **counts, "pairs": _pairs(catalog, edges[begin:end])})
    if writable(catalog.store):
        catalog.store.write_json(MADE, found)
    return found


def _edges(graph: SampleGraph) -> tuple[Array, list[int]]:
    """Edges int64 [E, 2] in order of the first threshold that they reach, and where each threshold's begin and end."""
    counts = np.zeros(len(LIMITS), np.int64)
    for _, _, values in blocks(graph):
        counts += np.bincount(_steps(values[values >= LIMITS[-1]]), minlength=len(counts))
    enough = min(max(int(np.searchsorted(np.cumsum(counts), EDGES, side="right")), 1), len(LIMITS))
    pairs, steps = [np.empty((0, 2), np.int64)], [np.empty(0, np.uint8)]
    for first, neighbors, values in blocks(graph):
        at, place = np.nonzero(values >= LIMITS[enough - 1])
        pairs.append(np.stack([first + at, neighbors[at, place]], axis=1))
        steps.append(_steps(values[at, place]).astype(np.uint8))
    step = np.concatenate(steps)
    starts = np.concatenate([[0], np.cumsum(counts[:enough])])
    return np.concatenate(pairs)[np.argsort(step, kind="stable")], starts.tolist()


def _steps(values: Array) -> Array:
    """The first threshold, by its number, that each similarity reaches."""
    return np.searchsorted(-LIMITS, -values.astype(np.float64))


def _pairs(catalog: Catalog, edges: Array) -> list[Json]:
    """Some of a threshold's edges, spread evenly, each pair once, with their texts."""
    some = edges[np.linspace(0, len(edges) - 1, min(8 * PAIRS, len(edges))).astype(np.int64)]
    pairs = np.unique(np.sort(some, axis=1), axis=0)
    pairs = pairs[np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).astype(np.int64)]
    texts = [one.text and one.text[:300] for one in catalog.describe(pairs.reshape(-1), np.zeros(pairs.size))]
    scores = similarities(catalog.graph, pairs[:, 0], pairs[:, 1]).tolist()
    return [
        {"similarity": round(score, 4), "nodes": pair, "texts": texts[2 * at : 2 * at + 2]}
        for at, (pair, score) in enumerate(zip(pairs.tolist(), scores, strict=True))
    ]
