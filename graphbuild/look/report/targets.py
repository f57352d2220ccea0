"""What tau_s and k do to the targets: how far a target's mass spreads, and how much of it the stored lists hold.

A target is softmax(similarity / tau_s) over a batch, the sample itself included with similarity 1 (Sobal et al.,
arXiv 2407.18134, section 3); of two views without itself. All values are means over anchors drawn with a fixed seed;
arithmetic is float64.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import softmax

from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.store.store import Json
from graphbuild.torch.batch_edges import BatchEdges
from graphbuild.torch.calibration import calibrated

TAU_S = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
ANCHORS = 256
OTHERS = 100_000  # of more nodes, so many stand for all
BLOCK = 16_384
ASKED = (0.6, 0.8, 0.9, 0.95)  # shares of the other view
LOW = 0.3  # a similarity below which captions have little in common, whatever the encoder


def neighbor_mass(graph: SampleGraph) -> Json:
    """The share of a target over *all* nodes that an anchor and its nearest 0, 1, 2, 4, ..., k neighbours hold.

    share: [tau_s][ranks]. Of more than OTHERS nodes, the mass outside the list is that of OTHERS drawn ones, scaled.
    """
    total, k = len(graph), graph.k
    rng = np.random.default_rng(0)
    anchors = np.sort(rng.choice(total, min(ANCHORS, total), replace=False))
    lists, similarities = graph.neighbors(anchors)
    others = np.arange(total) if total <= OTHERS else np.sort(rng.choice(total, OTHERS, replace=False))
    queries = graph.embeddings(anchors)
    outside_sum = np.zeros((len(TAU_S), len(anchors)))
    outside_count = np.zeros(len(anchors), np.int64)
    for begin in range(0, len(others), BLOCK):
        part = others[begin : begin + BLOCK]
        scores = (queries @ graph.embeddings(part).T).astype(np.float64)
        outside = np.ones(scores.shape, bool)
        for row, known in enumerate(np.column_stack([anchors[:, None], lists])):
            outside[row, np.isin(part, known)] = False
        outside_count += outside.sum(1)
        for at, tau in enumerate(TAU_S):
            outside_sum[at] += np.where(outside, np.exp((scores - 1) / tau), 0).sum(1)
    scale = (total - 1 - k) / np.maximum(outside_count, 1)
    ranks = [0, *(2**power for power in range(k.bit_length()) if 2**power < k), k]
    share = []
    for at, tau in enumerate(TAU_S):
        listed = np.exp((similarities.astype(np.float64) - 1) / tau).cumsum(axis=1)
        held = np.column_stack([np.ones(len(anchors)), 1 + listed])
        whole = held[:, -1] + outside_sum[at] * scale
        share.append([float((held[:, rank] / whole).mean()) for rank in ranks])
    return {"anchors": len(anchors), "others": len(others), "tau_s": list(TAU_S), "ranks": ranks, "share": share}


def batch_targets(graph: SampleGraph, batch: int) -> Json:
    """Targets of a random batch [batch]: by tau_s, entropy in nats, its exponential (how many samples share the mass as
    if evenly), and the share that stays on the sample itself."""
    nodes = np.random.default_rng(1).choice(len(graph), batch, replace=False)
    vectors = graph.embeddings(nodes)
    anchors = min(ANCHORS, batch)
    scores = (vectors[:anchors] @ vectors.T).astype(np.float64)
    scores[np.arange(anchors), np.arange(anchors)] = 1
    rows = [softmax(scores / tau, axis=1) for tau in TAU_S]
    entropy = [float(-(target * np.log(np.maximum(target, 1e-300))).sum(1).mean()) for target in rows]
    itself = [float(target[np.arange(anchors), np.arange(anchors)].mean()) for target in rows]
    return {
        "batch": batch,
        "tau_s": list(TAU_S),
        "entropy": entropy,
        "spread": np.exp(entropy).tolist(),
        "self": itself,
    }


def two_views(graph: SampleGraph, batch: int, similar: float) -> list[Json]:
    """X-Sample's targets of a random batch, at tau_s = 0.1 and calibrated to each of ASKED: the median tau_s; the share
    of the other view and its deviation; the perplexity; and of what other images get, the part below `similar`.

    recommended: the smallest share asked for at which at least half of that goes to similarities from there on.
    """
    nodes = np.random.default_rng(1).choice(len(graph), batch, replace=False)
    vectors, anchors = graph.embeddings(nodes), nodes[:ANCHORS]
    others = (vectors[:ANCHORS] @ vectors.T).astype(np.float64)
    np.fill_diagonal(others, -np.inf)
    fields = (anchors, *graph.neighbors(anchors), graph.background(anchors))
    node, neighbors, similarities, background = map(torch.from_numpy, fields)
    stored = BatchEdges(node, neighbors, similarities, background, node_count=len(graph))
    rows: list[Json] = []
    for asked in (None, *ASKED):
        tau = np.full((len(anchors), 1), 0.1)
        if asked is not None:
            tau = calibrated(stored, images=batch, other_view=asked, slots=2)[0].double().numpy()
        each = np.exp((others - 1) / tau)
        share = 1 / (1 + 2 * each.sum(axis=1))
        each *= share[:, None]
        entropy = -share * np.log(share) - 2 * (each * np.log(np.maximum(each, 1e-300))).sum(axis=1)
        low = (each * (others < similar)).sum() / each.sum()
        good = bool(asked is not None and low <= 0.5 and not any(row["recommended"] for row in rows))
        names = ("tau_s", "share", "deviation", "perplexity", "low")
        values = map(float, (np.median(tau), share.mean(), share.std(), np.exp(entropy).mean(), low))
        rows.append({"batch": batch, "asked": asked, "recommended": good, **dict(zip(names, values, strict=True))})
    return rows
