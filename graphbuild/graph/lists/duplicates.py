"""Near-duplicates: groups of samples that edges of high similarity connect, and the sample of each group to keep.

One pass over the neighbour lists, then one over the samples. Memory: some 80 bytes a node with its sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphbuild.graph.lists.derived import (
    DerivedList,
    Part,
    blocks,
    check_similarity,
    count_truncated,
    reaches,
    samples,
    slices,
)
from graphbuild.graph.sample_graph import Ids, SampleGraph
from graphbuild.machine.compiled import compiled
from graphbuild.nodes.samples import MORE

DUPLICATES = pa.schema(
    [
        ("group", pa.int64()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("node", pa.int64()),
        ("caption", pa.string()),
        ("keep", pa.bool_()),
        ("similarity", pa.float32()),
    ]
)


def near_duplicates(graph: SampleGraph, threshold: float) -> DerivedList:
    """The samples of every group of near-duplicates, one of each group to keep.

    A group is a connected component over the edges whose similarity reaches the threshold, with two or more samples;
    samples of one node are duplicates at similarity 1. Of several captions a sample's first is compared. It is what
    SemDeDup seeks (Abbas et al., arXiv 2303.09540), but compared across the borders of its k-means clusters. To keep:
    the first sample of the node whose edges within the group sum to the largest similarity (of equal ones the smallest
    node); where all pairs of the group are edges, that is the node nearest the group's mean.

    Columns: group int64, the smallest node of the group; row int64, key, shard, node int64 and caption of the sample;
    keep bool; similarity float32 to the kept node; where samples have several, more_captions, those behind the first.
    By row.

    Counts: groups; truncated_nodes, whose k-th neighbour still reaches the threshold: a pair is missed only where both
    its nodes are truncated; samples; samples_to_drop; chained_samples, whose similarity to the kept node is below the
    threshold.

    Raises:
        ConfigError: threshold outside [-1, 1].
    """
    check_similarity("threshold", threshold)
    schema = DUPLICATES.append(pa.field(MORE, pa.list_(pa.string()))) if graph.is_plural else DUPLICATES
    return DerivedList(
        "duplicates", graph, {"threshold": threshold}, schema, lambda: _samples_of_groups(graph, threshold, schema)
    )


def _samples_of_groups(graph: SampleGraph, threshold: float, schema: pa.Schema) -> Iterator[Part]:
    group, strength, truncated = components(graph, threshold)
    sample_nodes = graph.sample_nodes()
    backwards = np.flatnonzero(sample_nodes >= 0)[::-1]
    first_row = np.full(len(graph), -1)
    first_row[sample_nodes[backwards]] = backwards  # of several values for one place, the last assigned stays
    kept = _strongest(group, np.where(first_row >= 0, strength, -1))  # not a text that is only a further caption
    size = np.bincount(group[sample_nodes[backwards]], minlength=len(graph))
    yield schema.empty_table(), {"groups": int((size > 1).sum()), "truncated_nodes": truncated}
    for shard, table in samples(graph, ["row", "key", "node", "caption", f"{MORE}.list.element.caption"]):
        table = table.filter(pa.array(size[group[table["node"].to_numpy()]] > 1))
        node = table["node"].to_numpy()
        keep = table["row"].to_numpy() == first_row[kept[node]]
        similarity = similarities(graph, node, kept[node])
        chained = int((~reaches(similarity, threshold)).sum())
        counts = {"samples": len(table), "samples_to_drop": int((~keep).sum()), "chained_samples": chained}
        made = {"group": group[node], "shard": pa.repeat(shard, len(node)), "keep": keep, "similarity": similarity}
        stored = {name: table[name] for name in table.column_names}
        if MORE in schema.names:
            stored[MORE] = _captions(table)
        yield pa.table({name: (made | stored)[name] for name in schema.names}, schema=schema), counts


def _captions(table: pa.Table) -> list[list[str]]:
    """The further captions of each row."""
    more = table[MORE].to_pylist() if MORE in table.column_names else [None] * len(table)
    return [[one["caption"] for one in each or ()] for each in more]


def components(graph: SampleGraph, threshold: float) -> tuple[Ids, NDArray[np.float64], int]:
    """Each node's component, named by its smallest node, int64 [M]; the sum of each node's edges [M], in and out; and
    how many nodes are truncated."""
    parent, strength, truncated = np.arange(len(graph)), np.zeros(len(graph)), 0
    for first, neighbors, similarities in blocks(graph):
        close = reaches(similarities, threshold)
        truncated += count_truncated(graph, close)
        at, place = np.nonzero(close)
        nodes, others = at + first, neighbors[at, place].astype(np.int64)
        unite(parent, nodes, others)
        values = similarities[at, place].astype(np.float64)  # float16 values sum exactly: any order gives the same
        np.add.at(strength, nodes, values)
        np.add.at(strength, others, values)
    return flattened(parent), strength, truncated


def flattened(parent: Ids) -> Ids:
    """The root of each node's tree, its smallest node, int64 [M]."""
    while ((above := parent[parent]) != parent).any():
        parent = above
    return parent


@compiled()
def unite(parent: Any, nodes: Any, others: Any) -> None:
    """Union-find: joins the trees of each pair under the smaller root, and halves the paths that it walks."""
    for e in range(len(nodes)):
        a, b = nodes[e], others[e]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        parent[max(a, b)] = min(a, b)


def _strongest(group: Ids, strength: NDArray[np.float64]) -> Ids:
    """The node of greatest strength in each node's group, of equal ones the smallest: int64 [M]."""
    members = np.flatnonzero(np.bincount(group, minlength=len(group))[group] > 1)
    ordered = members[np.lexsort((members, -strength[members], group[members]))]
    groups, first = np.unique(group[ordered], return_index=True)
    strongest = np.arange(len(group))
    strongest[groups] = ordered[first]
    return np.asarray(strongest[group])


def similarities(graph: SampleGraph, nodes: Ids, others: Ids) -> NDArray[np.float32]:
    """Similarity float32 [n] of each of nodes [n] to the one of others [n] in its place; exactly 1 to itself."""
    result = np.ones(len(nodes), np.float32)
    apart = np.flatnonzero(nodes != others)
    for part in slices(len(apart)):
        at = apart[part]
        result[at] = np.einsum("id,id->i", graph.embeddings(nodes[at]), graph.embeddings(others[at]))
    return np.clip(result, -1, 1)
