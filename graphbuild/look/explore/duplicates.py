"""What every threshold for near-duplicates would take, and pairs at its border.

As `graphbuild mine --what duplicates` counts (graph/lists/duplicates.py), but for all thresholds at once: edges are
united from the most similar on. Kept in STORE/explore/duplicates.json. Cost: two passes over the similarities, and one
over the nodes at each threshold; memory: 41 bytes an edge of at most EDGES, and 24 a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

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
    found = {"graph": catalog.graph.fingerprint, "samples": len(nodes), "steps": []}
    for limit, parts in groupby(_edges(catalog.graph), itemgetter(0)):
        some = np.empty((0, 2), np.int64)
        for _, edges in parts:
            some = np.concatenate([some, _spread(edges)])
            unite(parent, edges[:, 0], edges[:, 1])
        if len(some) or not found["steps"]:
            parent = flattened(parent)
            sizes = np.bincount(parent[nodes], minlength=len(parent))
        counts = {"drop": len(nodes) - int((sizes > 0).sum()), "groups": int((sizes > 1).sum())}
        found["steps"].append({"threshold": limit, **counts, "pairs": _pairs(catalog, _spread(some))})
    if writable(catalog.store):
        catalog.store.write_json(MADE, found)
    return found


def _edges(graph: SampleGraph) -> Iterator[tuple[float, Array]]:
    """Each threshold, descending, with its edges, int64 [E, 2]: those that reach it and not the one before. Those of
    the first come in parts where they are more than EDGES, and no lower threshold comes then."""
    counts = np.zeros(len(LIMITS), np.int64)
    for _, _, values in blocks(graph):
        counts += np.bincount(_steps(values[values >= LIMITS[-1]]), minlength=len(counts))
    enough = min(max(int(np.searchsorted(np.cumsum(counts), EDGES, side="right")), 1), len(LIMITS))
    pairs, steps, held = [np.empty((0, 2), np.int64)], [np.empty(0, np.uint8)], 0
    for first, neighbors, values in blocks(graph):
        at, place = np.nonzero(values >= LIMITS[enough - 1])
        held += len(at)
        if held > EDGES:
            yield float(LIMITS[0]), np.concatenate(pairs)
            pairs, steps, held = pairs[:1], steps[:1], len(at)
        pairs.append(np.stack([first + at, neighbors[at, place]], axis=1))
        steps.append(_steps(values[at, place]).astype(np.uint8))
    step, edges = np.concatenate(steps), np.concatenate(pairs)
    del pairs, steps
    edges = edges[np.argsort(step, kind="stable")]
    ends = np.cumsum(np.bincount(step, minlength=enough)).tolist()
    for limit, begin, end in zip(LIMITS.tolist(), [0, *ends], ends, strict=False):
        yield limit, edges[begin:end]


def _steps(values: Array) -> Array:
    """The first threshold, by its number, that each similarity reaches."""
    return np.searchsorted(-LIMITS, -values.astype(np.float64))


def _spread(edges: Array) -> Array:
    """Some of these edges, spread evenly."""
    return edges[np.linspace(0, len(edges) - 1, min(8 * PAIRS, len(edges))).astype(np.int64)]


def _pairs(catalog: Catalog, edges: Array) -> list[Json]:
    """Some of these edges, each pair once, with their texts."""
    pairs = np.unique(np.sort(edges, axis=1), axis=0)
    pairs = pairs[np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).astype(np.int64)]
    texts = [one.text and one.text[:300] for one in catalog.describe(pairs.reshape(-1), np.zeros(pairs.size))]
    scores = similarities(catalog.graph, pairs[:, 0], pairs[:, 1]).tolist()
    return [
        {"similarity": round(score, 4), "nodes": pair, "texts": texts[2 * at : 2 * at + 2]}
        for at, (pair, score) in enumerate(zip(pairs.tolist(), scores, strict=True))
    ]
