"""NeighborBatchSampler: batches of random anchors and their graph neighbours, for a map-style dataset.

An epoch is one permutation of the samples, the same on every rank, and batches are its consecutive parts: so every
sample comes exactly once. It is planned when an iteration begins, on one core, in some 30 bytes a sample beside the
mapped graph. What it is good for, and figures: docs/how-to/batches.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from graphbuild.errors import ConfigError
from graphbuild.graph.batches.groups import StoredGraph
from graphbuild.graph.batches.order import Epoch, NeighborOrder, Samples, Way
from graphbuild.graph.select.selection import Selection
from graphbuild.torch.epochs import Position, check_options, digest
from graphbuild.torch.ranks import live_rank
from graphbuild.torch.shards import Selected


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
        selection: a file of `graphbuild select`, or a `Selection`: only its samples, where item i is the store's row i.
            A GraphDataset takes it itself, and gives the nodes of what is left.

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
        neighbors: Way = "window",
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
        selection: Selected = None,
    ) -> None:
        opened = Selection.of(selection, getattr(graph, "fingerprint", ""), "the sampler")
        nodes = nodes if opened is None else opened.nodes(nodes)
        known_rank, known_ranks = live_rank() or (0, 1)
        self.rank = known_rank if rank is None else rank
        self.ranks = known_ranks if ranks is None else ranks
        self._given = rank is not None, ranks is not None
        self._position = Position()
        if not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank = {self.rank} of ranks = {self.ranks}", "ranks are numbered from 0 to ranks - 1")
        self._order = NeighborOrder(
            graph,
            batch_size,
            nodes=nodes,
            neighbors=neighbors,
            group=group,
            skip=skip,
            width=width,
            restart=restart,
            same_node=same_node,
            random_share=random_share,
            seed=seed,
            drop_last=self.ranks > 1 if drop_last is None else drop_last,
            ranks=self.ranks,
        )
        numbers = np.ascontiguousarray(nodes, np.int64)
        self._nodes = f"{len(numbers)}, {digest(numbers.data)}"

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
        self._position.set(epoch, skip_batches)

    @property
    def epoch(self) -> int:
        """The epoch in progress, or of the next iteration."""
        return int(self._position.state()["epoch"])

    def order_options(self, workers: int = 0) -> dict[str, Any]:
        """All that decides an epoch's order, by name; plain values. The number of workers does not."""
        order = self._order
        return {
            **{field.name: getattr(order, field.name) for field in fields(order) if field.name != "graph"},
            "ranks": self.ranks,
            "batches": len(self),
            "nodes": self._nodes,
            "graph": getattr(order.graph, "fingerprint", None),  # a SampleGraph's
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: epoch and batches taken from this sampler, beside what decides the order.

        A DataLoader's workers draw ahead of the training loop: `GraphLoader` and torchdata's StatefulDataLoader save
        what the loop has taken. Any number of workers may go on from it.
        """
        return {**self.order_options(), **self._position.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where the state was taken; `set_epoch` with the same epoch leaves it so.

        Raises:
            ConfigError: an option, the nodes or the ranks differ, so that the order would too.
        """
        check_options(state, self.order_options())
        self._position.load(state)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch; the same on all ranks and in all epochs."""
        return (len(self._order.bounds) - 1) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self._position.begin())

    def _batches(self, place: dict[str, Any]) -> Iterator[list[int]]:
        order = self._plan(place["epoch"]).order
        for batch in range(self.rank + place["taken"] * self.ranks, len(self._order.bounds) - 1, self.ranks):
            place["taken"] += 1
            yield self._order.items[order[self._order.bounds[batch] : self._order.bounds[batch + 1]]].tolist()

    def epoch_order(self) -> Samples:
        """All items with a node in this epoch's order, int32 [n]: batch after batch, of all ranks."""
        return self._order.items[self._plan(self.epoch).order]

    def report(self, batches: int = 1_000) -> dict[str, int | float]:
        """What this epoch's batches hold, beside random ones of the same sizes, on all ranks.

        anchors: the samples of a batch. edges_per_anchor: stored edges i -> j (any of the k) to other samples j of
        i's batch; anchors_with_edge: the share that has one or more; random_...: the same of random batches. All are
        of batches_measured batches, evenly spaced: all of them, or at most `batches`. dropped: samples left out by
        drop_last; groups_cut: those that a batch's end divides.
        """
        self._check_rank()
        return self._order.report(self.epoch, batches)

    def _plan(self, epoch: int) -> Epoch:
        self._check_rank()
        return self._order.epoch(epoch)

    def _check_rank(self) -> None:
        """ConfigError where ranks became known, or others, after this was made: all would yield the same batches."""
        live, own = live_rank() or (self.rank, self.ranks), (self.rank, self.ranks)
        if any(now != then for now, then, given in zip(live, own, self._given, strict=True) if not given):
            raise ConfigError(
                f"the sampler was made as rank {own[0]} of {own[1]}, but this is rank {live[0]} of {live[1]}",
                "make it after the process group (init_process_group), or pass rank= and ranks=",
            )
