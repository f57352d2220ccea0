"""Derived lists: near-duplicates, hard negatives, false negatives and positives, by filter over the stored graph.

Nothing is searched again: each list is one pass over the neighbour lists. Memory: 16,384 nodes at a time, of some 40 k
bytes; near-duplicates take more (duplicates.py). Columns, rules, what can be missed: docs/how-to/mining.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists.derived import (
    DerivedList,
    Part,
    blocks,
    check_similarity,
    count_truncated,
    publish,
    reaches,
    slices,
)
from graphbuild.graph.lists.duplicates import near_duplicates
from graphbuild.graph.lists.negatives import hard_negatives, read_positive
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.recipe import flag
from graphbuild.store.store import Json, Store

__all__ = ["false_negative_edges", "false_negatives", "hard_negatives", "mine_store", "near_duplicates"]
__all__ += ["neighbor_positives"]

EDGES = pa.schema([("node", pa.int64()), ("neighbor", pa.int64()), ("rank", pa.int32()), ("similarity", pa.float32())])


def false_negatives(
    graph: SampleGraph, nodes: Any, threshold: float, *, source: Literal["embeddings", "edges"] = "embeddings"
) -> NDArray[np.bool_]:
    """The pairs of a batch that are no negatives: bool [B, B], symmetric, False on the diagonal.

    True where the similarity of nodes[i] and nodes[j] reaches the threshold; equal nodes have 1. From "embeddings" all
    pairs are known (2 B^2 d flop). From "edges" (B k look-ups) a pair is found when either node lists the other, so
    always, unless both are truncated (see `near_duplicates`).

    nodes: integer ids [B]. In a one-hot contrastive loss: `logits.masked_fill(mask, -inf)`.

    Raises:
        ConfigError: threshold outside [-1, 1], or an unknown source.
        InputError: nodes are no integers [B], or one is out of range.
    """
    check_similarity("threshold", threshold)
    ids = np.asarray(nodes)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"nodes are {ids.dtype} {list(ids.shape)}", 'pass node ids [B], as in batch["node"]')
    values, known = graph.block(ids, source=source)
    found = known & reaches(values, threshold)
    found |= found.T
    np.fill_diagonal(found, False)
    return found


def false_negative_edges(graph: SampleGraph, threshold: float) -> DerivedList:
    """All edges whose similarity reaches the threshold: what no batch should take for negatives.

    Columns: node int64, neighbor int64, rank int32 (1: the nearest), similarity float32. By node and rank.
    Counts: edges, nodes_without_any, truncated_nodes (see `near_duplicates`).

    Raises:
        ConfigError: threshold outside [-1, 1].
    """
    check_similarity("threshold", threshold)
    return _edge_list("false-negatives", graph, {"threshold": threshold})


def neighbor_positives(graph: SampleGraph, threshold: float, *, count: int = 10, mutual: bool = False) -> DerivedList:
    """Each node's nearest `count` neighbours whose similarity reaches the threshold, as further positives.

    NN(z, Q) of NNCLR (Dwibedi et al., arXiv 2104.14548) with the whole data set for the support set Q. mutual: only
    neighbours that list the node too. Columns and counts: as of `false_negative_edges`.

    Raises:
        ConfigError: threshold outside [-1, 1], or count below 1.
    """
    check_similarity("threshold", threshold)
    if count < 1:
        raise ConfigError(f"count = {count}", "set count to 1 or more")
    return _edge_list("positives", graph, {"threshold": threshold, "count": count, "mutual": mutual})


LISTS: dict[str, Callable[..., DerivedList]] = {
    "duplicates": near_duplicates,
    "hard-negatives": hard_negatives,
    "false-negatives": false_negative_edges,
    "positives": neighbor_positives,
}


def mine_store(
    store: Store, what: str, options: Mapping[str, Any], out: str | None = None, *, dry_run: bool = False
) -> str:
    """Write one of LISTS to a parquet file, log its counts, and return a line that names the file.

    options: by parameter of the list's function, None where not given; `positive` may be text: a number, captions, or
    the path of a .npy. out: a path or URL; without it STORE/mined/WHAT.parquet. dry_run: only tell what would be read
    and written.

    Raises:
        ConfigError: an option that the list does not take, or lacks; a file that cannot be written.
        GraphbuildError: as the list's function.
    """
    given = {name: value for name, value in options.items() if value is not None}
    takes = [name for name in inspect.signature(LISTS[what]).parameters if name != "graph"]
    for name in given:
        if name not in takes:
            raise ConfigError(f"{flag(name)} has no meaning for {what}", f"it takes {', '.join(map(flag, takes))}")
    if "threshold" in takes and "threshold" not in given:
        raise ConfigError(
            f"{what} needs --threshold", "give a similarity between -1 and 1; how to choose: docs/how-to/mining.md"
        )
    if isinstance(given.get("positive"), str):
        given["positive"] = read_positive(given["positive"])
    return publish(
        "mine", lambda graph: LISTS[what](graph, **given), store, f"mined/{what}.parquet", out, dry_run=dry_run
    )


def _edge_list(what: str, graph: SampleGraph, options: Json) -> DerivedList:
    return DerivedList(what, graph, options, EDGES, lambda: _edges(graph, options))


def _edges(graph: SampleGraph, options: Json) -> Iterator[Part]:
    for first, neighbors, similarities in blocks(graph):
        kept = reaches(similarities, options["threshold"])
        truncated = count_truncated(graph, kept)
        if options.get("mutual"):
            at, place = np.nonzero(kept)
            kept[at, place] = _listed(graph, neighbors[at, place], at + first)
        kept &= np.cumsum(kept, axis=1) <= options.get("count", graph.k)
        at, place = np.nonzero(kept)
        columns = [at + first, neighbors[at, place], place + 1, similarities[at, place].astype(np.float32)]
        without = int((~kept.any(axis=1)).sum())
        counts = {"edges": len(at), "nodes_without_any": without, "truncated_nodes": truncated}
        yield pa.table(dict(zip(EDGES.names, columns, strict=True)), schema=EDGES), counts


def _listed(graph: SampleGraph, nodes: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of nodes [n] lists the one of others [n] in its place, bool [n]."""
    result = np.empty(len(nodes), bool)
    for part in slices(len(nodes)):
        result[part] = (graph.neighbors(nodes[part])[0] == others[part, None]).any(axis=1)
    return result
