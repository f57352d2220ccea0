"""Partition engine: approximate search by many small overlapping leaves, and one look at neighbours' neighbours.

A node joins the leaves of its `fan` nearest leaders (`graphbuild.knn.leaders`), and all pairs of a leaf are compared:
the overlapping random partitions of PiPNN (arXiv 2602.21247). Then each list is offered the upper part of the lists of
its best EXPAND, a round of NN-descent (Dong et al., WWW 2011), which halves what is missing. `fan`, and how many
candidates a list holds, follow from the recall asked for, measured on a sample at full N (`calibrate`): where nodes are
many, the nearest are so alike that codes tell them apart badly. Results do not depend on how leaves fall into tasks.
Cost: about 32 fan^2 products a node; memory: codes and lists of one task's nodes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphbuild.knn import kernels, lists, sample
from graphbuild.knn.codes import Codes, encode
from graphbuild.knn.inputs import LEADER_NODES, Inputs, true_neighbors, write_leaders
from graphbuild.knn.leaders import Leaders, floor_leader, leader_count
from graphbuild.knn.products import TILE_ROWS, products, tile_memory
from graphbuild.runner import partly
from graphbuild.store.layout import SCRATCH
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json, Writer

if TYPE_CHECKING:
    from torch import Tensor

FAN = f"{SCRATCH}/fan.npy"
FANS = range(2, 41)
EXPAND = 12
DEPTH = 2 / 3  # of a list is offered to others
MISSING_AFTER_REFINEMENT = 0.55  # of what the leaves miss, with these: 0.45 to 0.55 on captions, less on easier sets
# The fan of partition: on 251,610 captions a share exp(-0.78 - 0.231 fan) of the true neighbours share no leaf, of
# which refinement leaves MISSING_AFTER_REFINEMENT (fans 7 and 14 for recall 0.95 and 0.99, benchmarks/results/
# knn.jsonl). It grows with N: cost grew with exponent 1.2 from 250,000 to 3,000,000 nodes, and goes with fan^2.
MISSED_AT_0, MISSED_BY_FAN, FAN_NODES, FAN_GROWTH = 0.78, 0.231, 250_000, 0.1
TASK_NODES = 65_536
TASKS = 128
OVERLAP = 3  # nodes of a task, in units of its share of all nodes: a node has leaves in several
LEAF_BYTES = 34  # of a node in a leaf, while a task finds which nodes each leaf has
DEEP, LONGEST = 6, 3  # in units of k: sampled nodes that codes put in order, and candidates of a list, at most
BY_CODES = 0.2  # of what may be missed, that may be missed as codes put it too far behind
TIE = 1e-6  # by which float32 similarities of equal pairs may differ
LARGEST_LEAF = 8_192  # a larger one is cut: equal vectors would all meet in one
BLOCK_ROWS = 8_192


@dataclass(frozen=True)
class Partition:
    """The engine; what its methods promise: `graphbuild.knn.engine.Engine`."""

    recall: float
    seed: int
    listed: int | None = None  # candidates of a list, as prepared
    name: str = "partition"
    on_device: bool = False
    ordered: bool = True
    mapped_files: int = 6

    def settings(self) -> Json:
        return {"recall": self.recall, "seed": self.seed}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        leaders, nodes = write_leaders(inputs, self.seed, writer)
        writer.array(LEADER_NODES, nodes, durable=False)
        fan, listed, promised = calibrate(inputs, leaders, k, self.recall, self.seed)
        writer.array(FAN, np.array([fan]), durable=False)
        return {"leaders": len(nodes), "fan": fan, "listed": listed, "promised_recall": round(promised, 4)}

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        leaves, floors = inputs.leaders.leaves(codes.codes, int(inputs.store.array(FAN)[0]), floor_leader(k))
        return {"leaves": leaves, "floors": floors}

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[tuple[int, int, int]]:
        """Ranges of leaves (first, end, first_new); near leaves have near numbers."""
        tasks = max(min(math.ceil(nodes / TASK_NODES), TASKS), math.ceil(OVERLAP * nodes / at_once))
        bounds = np.linspace(0, leader_count(nodes), tasks + 1).astype(int).tolist()
        return [(first, end, first_new) for first, end in itertools.pairwise(bounds)]

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        return OVERLAP * nodes / tasks, OVERLAP

    def length(self, k: int, nodes: int) -> int:
        return self.listed or list_length(k, nodes)

    def beside(self, nodes: int) -> float:
        return LEAF_BYTES * fan_of(self.recall, nodes) / OVERLAP

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        """All pairs of each leaf in a range."""
        import torch

        first, end, first_new = map(int, argument)
        leaves = inputs.of("leaves")
        nodes, numbers = [], []
        for start, block in leaves.blocks(BLOCK_ROWS):
            flat = block.reshape(-1)
            hits = np.flatnonzero((flat >= first) & (flat < end))
            nodes.append((hits // leaves.width + start).astype(np.uint32))
            numbers.append(flat[hits])
        # Nodes ascending, each as often as it has leaves here.
        node, leaf = np.concatenate(nodes), np.concatenate(numbers)
        del nodes, numbers  # at a high recall these rows weigh as much as codes and lists
        fresh = np.zeros(end - first, bool)
        fresh[leaf[node >= first_new] - first] = True
        node, leaf = node[fresh[leaf - first]], leaf[fresh[leaf - first]]
        starts = np.concatenate([[True], node[1:] != node[:-1]])[: len(node)]
        ids, place = node[starts].astype(np.int64), np.cumsum(starts, dtype=np.int32) - 1
        code = torch.from_numpy(inputs.of("codes").take(ids))
        scale = inputs.of("scales").take(ids)[:, 0].copy()
        keys = np.full((len(ids), length), lists.EMPTY, np.int64)
        floors = inputs.of("floors").take(ids)[:, 0].copy()
        memory = tile_memory()
        new_place = int(np.searchsorted(ids, first_new))
        members = place[np.argsort(leaf, kind="stable")]
        ends = np.concatenate([[0], np.cumsum(np.bincount(leaf - first, minlength=end - first))])
        del node, place, leaf
        for begin, stop in itertools.pairwise(ends):
            for cut in range(begin, stop, LARGEST_LEAF):
                leaf_members = members[cut : min(cut + LARGEST_LEAF, stop)].astype(np.int64)
                _join_leaf(leaf_members, new_place, code, ids, scale, floors, keys, memory)
            partly.add((stop - begin) / max(len(members), 1))
        return ids, keys


def fan_of(recall: float, nodes: int) -> float:
    """Leaves that a node must join for that recall, about: see MISSED_AT_0."""
    fan = (-math.log((1 - recall) / MISSING_AFTER_REFINEMENT) - MISSED_AT_0) / MISSED_BY_FAN
    return float(min(max(fan, FANS[0]) * max(nodes / FAN_NODES, 1.0) ** FAN_GROWTH, FANS[-1]))


def list_length(k: int, nodes: int) -> int:
    return min(k + max(4, k // 8), nodes - 1)


def calibrate(inputs: Inputs, leaders: Leaders, k: int, recall: float, seed: int) -> tuple[int, int, float]:
    """The smallest fan and the shortest lists that promise `recall` after refinement, and the recall they promise.

    Measured, at full N, on a sample: how many of their k nearest are among as many candidates by codes, and how many
    share a leaf with them.
    """
    vectors, ids = inputs.few, sample.draw(len(inputs.few), seed)
    scores, near = true_neighbors(inputs, ids, min(DEEP * k, len(vectors) - 1))
    own, theirs = encode(vectors.take(ids)), [encode(vectors.take(some)) for some in near]
    scored = [
        part.codes.astype(np.float64) @ one * part.scales[:, 0] for one, part in zip(own.codes, theirs, strict=True)
    ]
    by_codes = np.argsort(-np.stack(scored), axis=1, kind="stable")
    good = np.take_along_axis(scores >= scores[:, k - 1 : k] - TIE, by_codes, axis=1)  # as near as the k-th, or nearer
    missed = 1 - np.minimum(np.cumsum(good, axis=1), k).mean(axis=0) / k  # by lists of 1, 2, ... candidates
    listed, least = list_length(k, len(vectors)), BY_CODES * (1 - recall)
    most = min(max(LONGEST * k, listed), near.shape[1])
    while missed[listed - 1] > least and listed < most:
        listed = min(listed + max(4, k // 8), most)
    fan = min(FANS[-1], len(leaders.codes))
    leaves, _ = leaders.leaves(own.codes, fan, 1)
    of_true, _ = leaders.leaves(np.concatenate([part.codes[:k] for part in theirs]), fan, 1)
    of_true = of_true.reshape(len(ids), k, fan)
    by_lists = float(missed[listed - 1])
    for tried in range(min(FANS[0], fan), fan + 1):
        together = (leaves[:, None, :tried, None] == of_true[:, :, None, :tried]).any(axis=(2, 3)).mean()
        by_leaves = (1 - float(together)) * MISSING_AFTER_REFINEMENT
        if 1 - by_leaves - min(by_lists, least) >= recall or tried == fan:
            break
    return tried, listed, 1 - by_leaves - by_lists


def _join_leaf(
    members: Array, new_place: int, code: Tensor, ids: Array, scale: Array, floors: Array, keys: Array, memory: Tensor
) -> None:
    """members: places in ids, ascending; of those below `new_place` no pair is compared."""
    import torch

    own = code.index_select(0, torch.from_numpy(members))
    old = int(np.searchsorted(members, new_place))
    tiles = [*_tiles(0, old), *_tiles(old, len(members))]
    for i, a in enumerate(tiles):
        for b in tiles[i:]:
            if b.start >= old:
                tile = products(own[a], own[b], memory, upper=a == b)
                kernels.join_tile(tile.numpy(), members[a], members[b], ids, scale, floors, keys, a == b)


def _tiles(begin: int, end: int) -> list[slice]:
    """Slices of nearly equal length, TILE_ROWS at most, that cover begin..end-1."""
    if begin == end:
        return []
    rows = math.ceil((end - begin) / math.ceil((end - begin) / TILE_ROWS))
    return [slice(first, min(first + rows, end)) for first in range(begin, end, rows)]
