"""NeighborBatchSampler: batches of random anchors and their graph neighbours, for a map-style dataset.

An epoch is one permutation of the samples, the same on every rank, and batches are its consecutive parts: so every
sample comes exactly once. It is planned when an iteration begins, on one core, in some 30 bytes a sample beside the
mapped graph. What it is good for, and figures: docs/training.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph import groups
from graphbuild.graph.batches import batch_bounds, edges_in_batches, pack
from graphbuild.graph.groups import NeighborLists, StoredGraph
from graphbuild.torch.ranks import live_rank

Samples = NDArray[np.int32]
MOST_ITEMS = 2**31 - 1
WAYS = ("window", "walk", "communities")


@dataclass(frozen=True)
class Epoch:
    """One epoch's permutation of the samples, int32 [n], and how many groups it has and cuts."""

    number: int
    order: Samples
    groups: int
    groups_cut: int


class NeighborBatchSampler(Sampler[list[int]]):
    """Batches of random groups of neighbours, for `DataLoader(dataset, batch_sampler=...)`; each sample once an epoch.

    A batch of 1,024 holds some 100 groups from all over the graph, so that a sample finds neighbours in its batch and
    strangers too. Groups of an epoch are made first, by one of three ways:

    - window: a random anchor takes the nearest samples that are still free, of ranks skip..skip+width-1.
    - walk: it takes those that random walks with restart meet (Yang et al., BatchSampler, arXiv 2306.03355).
    - communities: it grows to a community, always by the free node that most of its members list over these ranks
      (greedy graph growing, Karypis and Kumar 1998), as B3 packs communities (Thirukovalluru et al., arXiv 2505.11293).

    A node joins only when its own list leads back into the group, so that all members have an edge. Groups that stay
    small then join the group to which they have most edges, up to 2 x `group` samples. Batches are packed with whole
    groups, in random order; one is cut only where no other fits.

    Args:
        graph: the SampleGraph.
        batch_size: B, samples of a batch on each rank.
        nodes: the node of each item of the dataset, int64 [n], such as GraphDataset's `nodes`; items of node -1 are
            left out. `graph.sample_nodes()` is right where item i is the store's row i.
        neighbors: the way to choose them.
        group: samples of a group, 2..B.
        skip, width: use the neighbours of ranks skip..skip+width-1 of each list, 0 the nearest; by default all k.
            skip > 0 leaves out near-duplicates.
        restart: walk's probability, before each step, to go back to the anchor.
        same_node: most samples of one node (one caption) that a group takes. 1 spreads them over groups. Soft targets
            are right either way; with many, a batch has fewer different captions.
        random_share: share of the batches that are plain random ones, of samples chosen at random each epoch.
        seed: with the epoch it determines all; the same on all ranks.
        drop_last: drop the samples that do not fill a batch on every rank (fewer than B x ranks; others each epoch;
            counted in the report). False deals them out evenly: each rank's last batch is smaller (its last two,
            where there are fewer such samples than ranks), sizes differ by at most 1 between ranks, and none comes
            twice. By default True with several ranks, for losses that compare views across ranks (XSampleLoss) need
            equal sizes, and False with one.
        rank, ranks: which part of the epoch to yield; by default RANK and WORLD_SIZE, or torch.distributed, which
            must be known here. Step t of rank r is batch t x ranks + r of the epoch, so full batches are the same for
            any number of ranks.

    Raises:
        ConfigError: an option out of range, no batch for each rank, or on planning an epoch, that rank or ranks were
            not given and are others by now.
        InputError: an item's node is not in the graph.
    """

    def __init__(
        self,
        graph: StoredGraph,
        batch_size: int,
        *,
        nodes: ArrayLike,
        neighbors: Literal["window", "walk", "communities"] = "window",
        group: int = 8,
        skip: int = 0,
        width: int | None = None,
        restart: float = 0.15,
        same_node: int = 1,
        random_share: float = 0.0,
        seed: int = 0,
        drop_last: bool | None = None,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        known_rank, known_ranks = live_rank() or (0, 1)
        self.graph = graph
        self.batch_size = batch_size
        self.neighbors = neighbors
        self.group = group
        self.skip = skip
        self.width = graph.k - skip if width is None else width
        self.restart = restart
        self.same_node = same_node
        self.random_share = random_share
        self.seed = seed
        self.rank = known_rank if rank is None else rank
        self.ranks = known_ranks if ranks is None else ranks
        self._given = rank is not None, ranks is not None
        self.epoch = 0
        self._skip = 0
        self._check_options()
        self._items, self._nodes = _items_with_nodes(graph, nodes)
        self._bounds = batch_bounds(
            len(self._items), batch_size, self.ranks, self.ranks > 1 if drop_last is None else drop_last
        )
        self._planned: Epoch | None = None

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Choose the groups and batches of iterations that start now; call it alike on all ranks.

        skip_batches goes on in the middle of an epoch: the number of its batches that each rank has taken. It holds
        until the next set_epoch: call that before each epoch.

        Raises:
            ConfigError: a negative number, or more batches than an epoch has.
        """
        if epoch < 0 or not 0 <= skip_batches <= len(self):
            raise ConfigError(
                f"epoch = {epoch}, skip_batches = {skip_batches}; an epoch has {len(self)} batches a rank",
                "both start at 0; resume with the nodes, batch_size, drop_last and ranks that the run had",
            )
        self.epoch, self._skip = epoch, skip_batches

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch; the same on all ranks and in all epochs."""
        return (len(self._bounds) - 1) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        order = self._plan().order
        for batch in range(self.rank + self._skip * self.ranks, len(self._bounds) - 1, self.ranks):
            yield self._items[order[self._bounds[batch] : self._bounds[batch + 1]]].tolist()

    def epoch_order(self) -> Samples:
        """All items with a node in this epoch's order, int32 [n]: batch after batch, of all ranks."""
        return self._items[self._plan().order]

    def report(self, batches: int = 1_000) -> dict[str, int | float]:
        """What this epoch's batches hold, beside random ones of the same sizes, on all ranks.

        anchors: the samples of a batch. edges_per_anchor: stored edges i -> j (any of the k) to other samples j of
        i's batch; anchors_with_edge: the share that has one or more; random_...: the same of random batches. All are
        of batches_measured batches, evenly spaced: all of them, or at most `batches`. dropped: samples left out by
        drop_last; groups_cut: those that a batch's end divides.
        """
        plan = self._plan()
        total = len(self._bounds) - 1
        chosen = np.unique(np.linspace(0, total - 1, min(batches, total)).astype(np.int64))
        starts, ends = self._bounds[chosen], self._bounds[chosen + 1]
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
            "samples": len(self._items),
            "dropped": len(self._items) - int(self._bounds[-1]),
            "batches": total,
            "batches_measured": len(chosen),
            "groups": plan.groups,
            "groups_cut": plan.groups_cut,
            **rates,
        }

    def _plan(self) -> Epoch:
        self._check_rank()
        if self._planned is None or self._planned.number != self.epoch:
            self._planned = None  # the old order goes before the new one comes
            self._planned = self._new_plan(self.epoch)
        return self._planned

    def _new_plan(self, number: int) -> Epoch:
        rng = np.random.default_rng([self.seed, number])
        count, size = len(self._items), self.batch_size
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
        window = lists.window(self.skip, self.width)
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

    def _check_rank(self) -> None:
        """ConfigError where ranks became known, or others, after this was made: all would yield the same batches."""
        live, own = live_rank() or (self.rank, self.ranks), (self.rank, self.ranks)
        if any(now != then for now, then, given in zip(live, own, self._given, strict=True) if not given):
            raise ConfigError(
                f"the sampler was made as rank {own[0]} of {own[1]}, but this is rank {live[0]} of {live[1]}",
                "make it after the process group (init_process_group), or pass rank= and ranks=",
            )

    def _check_options(self) -> None:
        size, k = self.batch_size, self.graph.k
        for wrong, cause, fix in (
            (size < 2, f"batch_size = {size}", "use 2 or more: a sample needs a neighbour in its batch"),
            (self.neighbors not in WAYS, f"neighbors = {self.neighbors!r}", f"use one of {', '.join(WAYS)}"),
            (not 2 <= self.group <= size, f"group = {self.group}", f"use 2..{size}, at most a batch"),
            (
                self.skip < 0 or self.width < 1 or self.skip + self.width > k,
                f"skip = {self.skip}, width = {self.width}: the graph has k = {k} neighbours a node",
                "use skip >= 0 and width >= 1 with skip + width <= k, or index with a larger --k",
            ),
            (not 0 <= self.restart <= 1, f"restart = {self.restart}", "use a probability, such as 0.15"),
            (
                not 1 <= self.same_node <= self.group,
                f"same_node = {self.same_node}",
                f"use 1..{self.group}, at most a group",
            ),
            (not 0 <= self.random_share <= 1, f"random_share = {self.random_share}", "use a share from 0 to 1"),
            (
                not 0 <= self.rank < self.ranks,
                f"rank = {self.rank} of ranks = {self.ranks}",
                "ranks are numbered from 0 to ranks - 1",
            ),
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
