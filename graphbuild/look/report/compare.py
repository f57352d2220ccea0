"""What two stores' graphs say of the same captions: `graphbuild report A B`.

Nodes are matched by caption, or by key where nodes are samples. Cost: a pass over the captions of both, the lists
of SAMPLED nodes, and the targets of ANCHORS nodes of a random batch. Memory: 40 bytes a node.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.compute as pc
import torch

from graphbuild.errors import ConfigError
from graphbuild.graph.recall.interval import interval
from graphbuild.look.catalog import Catalog
from graphbuild.look.report.targets import ANCHORS, TAU_S
from graphbuild.store.layout import SAMPLES, TEXTS
from graphbuild.store.sharded import Array
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json

SAMPLED = 5_000
BATCH = 1_024
P = 0.9  # of rank-biased overlap: the nearest ten have 86% of the weight
SHOWN, NEAREST = 10, 5  # captions that disagree most, and neighbours of each
LACKING = 0.05  # share of listed neighbours that are not in both stores, from which a comparison is warned of


def compare(first: Catalog, second: Catalog) -> Json:
    """Everything that the page of two stores shows. ConfigError: they have no captions or keys in common.

    overlap [k]: share of the nearest d of the one that are among the nearest d of the other, d = 1 to k, the smaller of
    both stores' k. rbo: rank-biased overlap, extrapolated from depth k (RBO_EXT of Webber, Moffat and Zobel 2010, ACM
    TOIS 28(4)). Means over nodes drawn at random, each with its 95% interval (recall/interval.py). kl: `divergences`.
    lacking: share of listed neighbours that the other store does not have; they count as differences. warns: one of
    the stores has more than LACKING of them.

    both: the same without such neighbours, of nodes that list any others: a node's lists are as deep as the shorter one
    is then, `depth` in the mean; without such nodes overlap and rbo are None. The disagreements are of these lists;
    `both` of a neighbour tells whether both stores have it.
    """
    by, ours, theirs = matched(first, second)
    total, k = len(ours), min(first.graph.k, second.graph.k)
    drawn = np.random.default_rng(0).permutation(total)[:SAMPLED]
    sides = ((first, ours), (second, theirs))
    lists = []
    for (catalog, nodes), missing in zip(sides, (-1, -2), strict=True):  # two that lack a match are not the same
        common = np.full(len(catalog.graph), missing)
        common[nodes] = np.arange(total)
        lists.append(common[catalog.graph.neighbors(nodes[drawn])[0][:, :k]])
    shared, lacking = in_common(*lists), [float((one < 0).mean()) for one in lists]
    overlap, rbo = shared / np.arange(1, k + 1), rank_biased_overlap(shared, np.full(len(drawn), k), P)
    packed = [np.take_along_axis(one, np.argsort(one < 0, axis=1, kind="stable"), axis=1) for one in lists]
    depth = np.minimum(*((one >= 0).sum(axis=1) for one in lists))
    agreed = in_common(*packed)
    both_rbo = rank_biased_overlap(agreed, depth, P)
    both = agreed[np.arange(len(drawn)), depth - 1] / np.maximum(depth, 1)
    compared = depth > 0
    batch = drawn[:BATCH]
    vectors = [catalog.graph.embeddings(nodes[batch]) for catalog, nodes in sides]
    nearest = first.graph.neighbors(ours[drawn])[1][:, 0]  # of equal ones those whose neighbours are nearer
    worst = np.lexsort((ours[drawn], -nearest, -depth, both_rbo))
    worst = worst[compared[worst]][:SHOWN]
    return {
        "stores": [_about(catalog) for catalog, _ in sides],
        "matched": {"by": by, "nodes": total, "lacking": lacking, "warns": max(lacking) > LACKING},
        "k": k,
        "sampled": len(drawn),
        "overlap": overlap.mean(axis=0).tolist(),
        "overlap_at_k": _mean(overlap[:, -1], total),
        "both": {
            "depth": float(depth[compared].mean()) if compared.any() else 0.0,
            "overlap": _mean(both[compared], total),
            "rbo": _mean(both_rbo[compared], total),
        },
        "histogram": np.histogram(both[compared], np.linspace(0, 1, 11))[0].tolist(),
        "p": P,
        "rbo": _mean(rbo, total),
        "batch": len(batch),
        "kl": divergences(*vectors),
        "disagreements": [
            {
                "nodes": [int(nodes[drawn[at]]) for _, nodes in sides],
                "text": first.describe([ours[drawn[at]]], [1])[0].text,
                "depth": int(depth[at]),
                "overlap": float(both[at]),
                "rbo": float(both_rbo[at]),
                "nearest": [
                    [
                        {**vars(near), "both": bool(other >= 0)}
                        for near, other in zip(
                            catalog.neighbors(int(nodes[drawn[at]]), min(NEAREST, k)), one[at], strict=False
                        )
                    ]
                    for (catalog, nodes), one in zip(sides, lists, strict=True)
                ],
            }
            for at in worst
        ],
    }


def _about(catalog: Catalog) -> Json:
    graph = catalog.graph
    return {
        "store": graph.url,
        "encoder": graph.encoder,
        "d": graph.d,
        "k": graph.k,
        "nodes": int((~graph.gone).sum()),
        "recall": graph.certificate["recall"],
    }


def _mean(values: Array, total: int) -> Json | None:
    if not len(values):
        return None
    low, high = interval(np.clip(values, 0, 1), total)
    return {"mean": float(values.mean()), "low": low, "high": high}


# -- which node is which


def matched(first: Catalog, second: Catalog) -> tuple[str, Array, Array]:
    """How nodes of two stores were matched (caption, key or row), and the nodes of each, in the same order, int64."""
    both = (first, second)
    if all(_has_captions(catalog) for catalog in both):
        by = "caption"
    elif any(catalog.has_samples for catalog in both):
        by = "key"
    else:
        by = "row"  # of the files of ready vectors
    living = [np.flatnonzero(~catalog.graph.gone) for catalog in both]
    names = [_names(catalog, by)[nodes] for catalog, nodes in zip(both, living, strict=True)]
    _, *places = np.intersect1d(names[0], names[1], return_indices=True)
    if len(places[0]) < 2:
        raise ConfigError(
            f"{first.store.url} and {second.store.url} have {len(places[0])} {by}s in common",
            "compare stores that were made of the same captions or samples",
        )
    ours, theirs = (nodes[at] for nodes, at in zip(living, places, strict=True))
    return by, ours, theirs


def _has_captions(catalog: Catalog) -> bool:
    """Whether nodes are distinct captions, not samples with vectors of their own."""
    manifest = catalog.store.manifest()
    return "assign" in manifest["stages"] and "joined" not in manifest["embeddings"]


def _names(catalog: Catalog, by: str) -> Array:
    """What a node is known by, a 64-bit hash: of its caption, of its first sample's key; or its number."""
    store, count = catalog.store, len(catalog.graph)
    shards = shards_of(store, store.manifest())
    if by == "caption":
        texts = (store.table(TEXTS.format(name), ["text"])["text"] for name in shards.with_nodes.names)
        return np.concatenate([pl.Series(text).hash().to_numpy() for text in texts])
    names = np.arange(count, dtype=np.uint64)
    if by == "key" and catalog.has_samples:
        for name in reversed(shards.names):
            table = store.table(SAMPLES.format(name), ["key", "node"])
            table = table.filter(pc.is_valid(table["node"]))
            hashes = pl.Series(table["key"]).hash().to_numpy()
            names[table["node"].to_numpy()[::-1]] = hashes[::-1]  # the first sample's stays
    return names


# -- how alike


def in_common(first: Array, second: Array) -> Array:
    """How many of the first d of a list are among the first d of the other, d = 1 to k: int64 [n, k] of lists [n, k].

    No list names one twice. Cost: n k^2 comparisons.
    """
    found = np.zeros(first.shape, np.int64)
    for at in range(first.shape[1]):
        rows, places = np.nonzero(first == second[:, at : at + 1])
        found[rows, np.maximum(places, at)] += 1  # from that depth on both have it; a row comes once
    return np.asarray(found.cumsum(axis=1))


def rank_biased_overlap(shared: Array, depth: Array, p: float) -> Array:
    """RBO_ext [n] of two lists of a length of depth [n] each, that have shared[:, d - 1] in common at depth d: int
    [n, k]. Of depth 0 it is 0."""
    depths = np.arange(1, shared.shape[1] + 1)
    agreement = np.where(depths <= depth[:, None], shared / depths, 0)
    last = agreement[np.arange(len(depth)), depth - 1]
    return np.asarray(last * p**depth + (1 - p) / p * (agreement * p**depths).sum(axis=1))


def divergences(first: Array, second: Array) -> list[Json]:
    """How far apart the targets of a batch are, of its vectors [n, d] in both: by tau_s the mean Kullback-Leibler
    divergences in nats over the first ANCHORS, each with half the width of its 95% interval (normal).

    forward: sum of p log(p / q), p the target of the first and q that of the second; backward: the other way. matching:
    the tau_s of the table at which q comes nearest to p, and forward there.
    """
    scores = [(one[:ANCHORS] @ one.T).astype(np.float64) for one in (first, second)]
    for one in scores:
        np.fill_diagonal(one, 1)
    logs = [[torch.log_softmax(torch.from_numpy(one / tau), dim=1).numpy() for tau in TAU_S] for one in scores]
    rows = []
    for tau, p, q in zip(TAU_S, *logs, strict=True):
        forward, backward = (np.exp(p) * (p - q)).sum(axis=1), (np.exp(q) * (q - p)).sum(axis=1)
        each = [float((np.exp(p) * (p - other)).sum(axis=1).mean()) for other in logs[1]]
        best = int(np.argmin(each))
        row: Json = {"tau_s": tau, "matching": TAU_S[best], "matching_kl": each[best]}
        for name, values in (("forward", forward), ("backward", backward)):
            row |= {name: float(values.mean()), f"{name}_error": float(1.96 * values.std() / len(values) ** 0.5)}
        rows.append(row)
    return rows
