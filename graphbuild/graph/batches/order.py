"""NeighborOrder: the order of an epoch, in which graph neighbours come in one batch. No torch: exports use it too.

An epoch is one permutation of the samples, and batches are its consecutive parts, so every sample comes exactly once.
It is planned on one core, in some 30 bytes a sample beside the mapped graph.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.batches import groups
from graphbuild.graph.batches.batches import batch_bounds, edges_in_batches, pack
from graphbuild.graph.batches.groups import NeighborLists, StoredGraph

Samples = NDArray[np.int32]
Way = Literal["window", "walk", "communities"]
MOST_ITEMS = 2**31 - 1
WAYS = get_args(Way)


@dataclass(frozen=True)
class Epoch:
    """One epoch's permutation of the samples, int32 [n], and how many groups it has and cuts."""

    number: int
    order: Samples
    groups: int
    groups_cut: int


@dataclass(eq=False)
class NeighborOrder:
    """Plans epochs; `graphbuild.torch.NeighborBatchSampler` says what its arguments mean.

    items: those with a node, int32 [n]. bounds: where the batches of an epoch begin and end, int64 [batches + 1].

    Raises:
        ConfigError: an option out of range, or no batch for each rank. InputError: a node that is not in the graph.
    """

    graph: StoredGraph
    batch_size: int
    _: KW_ONLY
    nodes: InitVar[ArrayLike]
    neighbors: Way = "window"
    group: int = 8
    skip: int = 0
    width: int | None = None
    restart: float = 0.15
    same_node: int = 1
    random_share: float = 0.0
    seed: int = 0
    drop_last: InitVar[bool] = False
    ranks: InitVar[int] = 1

    def __post_init__(self, nodes: ArrayLike, drop_last: bool, ranks: int) -> None:
        self._width = self.graph.k - self.skip if self.width is None else self.width
        self._check_options()
        self.items, self._nodes = _items_with_nodes(self.graph, nodes)
        self.bounds = batch_bounds(len(self.items), self.batch_size, ranks, drop_last)
        self._planned: Epoch | None = None

    def epoch(self, number: int) -> Epoch:
        """An epoch's plan; the last one is kept."""
        if self._planned is None or self._planned.number != number:
            self._planned = None  # the old order goes before the new one comes
            self._planned = self._new_plan(number)
        return self._planned

    def report(self, number: int, batches: int = 1_000) -> dict[str, int | float]:
        """What an epoch's batches hold, beside random ones: `graphbuild.torch.NeighborBatchSampler.report`."""
        plan = self.epoch(number)
        total = len(self.bounds) - 1
        chosen = np.unique(np.linspace(0, total - 1, min(batches, total)).astype(np.int64))
        starts, ends = self.bounds[chosen], self.bounds[chosen + 1]
        shuffled = np.random.default_rng([self.seed, plan.number, 1]).permutation(plan.order)
        lists = NeighborLists(self.graph)
        window = lists.window(0, self.graph.k)
        rates = {}
        for name, order in (("", plan.order), ("random_", shuffled)):
            edges, covered = edges_in_batches(self._nodes[order], starts, ends, window, lists.nodes)
            rates[f"{name}edges_per_anchor"] = edges / int((ends - starts).sum())
            rates[f"{name}anchors_with_edge"] = covered / int((ends - starts).sum())
        return {
            "epoch": plan.number,
            "samples": len(self.items),
            "dropped": len(self.items) - int(self.bounds[-1]),
            "batches": total,
            "batches_measured": len(chosen),
            "groups": plan.groups,
            "groups_cut": plan.groups_cut,
            **rates,
        }

    def _new_plan(self, number: int) -> Epoch:
        rng = np.random.default_rng([self.seed, number])
        count, size = len(self.items), self.batch_size
        samples = rng.permutation(np.arange(count, dtype=np.int32))
        plain = round(self.random_share * (count // size)) * size
        grouped, made, cut = self._in_groups(samples[plain:], rng)
        order = np.concatenate([samples[:plain], grouped])
        whole = order[: count // size * size].reshape(-1, size)
        whole[:] = whole[rng.permutation(len(whole))]
        seen = np.zeros(count, bool)
        seen[order] = True
        assert len(order) == np.count_nonzero(seen) == count, "an epoch holds every sample exactly once"
        return Epoch(number, order, made, cut)

    def _in_groups(self, samples: Samples, rng: np.random.Generator) -> tuple[Samples, int, int]:
        """These samples, in random order, as groups packed into batches; the number of groups, and of those cut."""
        by_node, labels, count = self._labels(self._nodes[samples], rng)
        positions, made, cut = pack(labels, rng.permutation(count), self.batch_size)
        return samples[by_node[positions]], made, cut

    def _labels(self, nodes: NDArray[np.uint32], rng: np.random.Generator) -> tuple[Samples, Samples, int]:
        """Samples of nodes [n] ordered by node, the group of each, and how many labels there are."""
        lists = NeighborLists(self.graph)
        window = lists.window(self.skip, self._width)
        by_node, starts = groups.order_by_node(nodes, lists.nodes)
        if self.neighbors == "communities":
            labels, count = groups.groups_by_growth(nodes, starts, window, self.group, self.same_node)
        else:
            restart = self.restart if self.neighbors == "walk" else -1.0
            seed = int(rng.integers(2**62))
            labels, count = groups.groups_of_anchors(nodes, starts, window, self.group, self.same_node, restart, seed)
        nodes.sort()  # now of by_node
        small, limit = max(self.group // 2, self.same_node), min(2 * self.group, self.batch_size)
        for least in (2, 1):  # to groups that hold together first, then single samples to each other
            groups.join_near(labels, count, nodes, starts, window, small, limit, least)
        return by_node, labels, count

    def _check_options(self) -> None:
        size, k = self.batch_size, self.graph.k
        for wrong, cause, fix in (
            (size < 2, f"batch_size = {size}", "use 2 or more: a sample needs a neighbour in its batch"),
            (self.neighbors not in WAYS, f"neighbors = {self.neighbors!r}", f"use one of {', '.join(WAYS)}"),
            (not 2 <= self.group <= size, f"group = {self.group}", f"use 2..{size}, at most a batch"),
            (
                self.skip < 0 or self._width < 1 or self.skip + self._width > k,
                f"skip = {self.skip}, width = {self._width}: the graph has k = {k} neighbours a node",
                "use skip >= 0 and width >= 1 with skip + width <= k, or index with a larger --k",
            ),
            (not 0 <= self.restart <= 1, f"restart = {self.restart}", "use a probability, such as 0.15"),
            (
                not 1 <= self.same_node <= self.group,
                f"same_node = {self.same_node}",
                f"use 1..{self.group}, at most a group",
            ),
            (not 0 <= self.random_share <= 1, f"random_share = {self.random_share}", "use a share from 0 to 1"),
        ):
            if wrong:
                raise ConfigError(cause, fix)


def _items_with_nodes(graph: StoredGraph, nodes: ArrayLike) -> tuple[Samples, NDArray[np.uint32]]:
    """The items that have a node, int32 [n], and their nodes, uint32 [n]."""
    given = np.asarray(nodes)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise InputError(f"nodes are {given.dtype} {list(given.shape)}", "pass one node id an item: int64 [n]")
    wrong = np.flatnonzero((given < -1) | (given >= len(graph)))
    if len(wrong):
        raise InputError(
            f"item {wrong[0]} has node {given[wrong[0]]}; the graph has nodes 0..{len(graph) - 1}",
            "pass nodes of this graph, and -1 for an item without one",
        )
    if len(given) > MOST_ITEMS:
        raise InputError(f"{len(given):,} items", f"split the data set: a sampler takes {MOST_ITEMS:,}")
    items = np.flatnonzero(given >= 0).astype(np.int32)
    return items, given[items].astype(np.uint32)
