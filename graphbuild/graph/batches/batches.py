"""Batches of an epoch: their bounds for each rank, groups packed into them, and the edges that they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphbuild.errors import ConfigError
from graphbuild.graph.batches.groups import row_of
from graphbuild.machine.compiled import compiled, inlined


def batch_bounds(samples: int, batch_size: int, ranks: int, drop_last: bool) -> NDArray[np.int64]:
    """Where the batches of an epoch begin and end in its order, int64 [batches + 1]; batches divide by ranks.

    What does not fill a batch on every rank is dropped, or dealt out evenly (`NeighborBatchSampler`, drop_last).
    """
    whole, rest = divmod(samples, batch_size * ranks)
    smaller = 0 if drop_last or rest == 0 else ranks
    if 0 < rest < smaller and whole > 0:  # too few for all ranks: they share two rounds
        whole, rest, smaller = whole - 1, rest + batch_size * ranks, 2 * ranks
    if whole == 0 and (smaller == 0 or rest < ranks):
        raise ConfigError(
            f"{samples} samples make no batch of {batch_size} for each of {ranks} rank(s), drop_last = {drop_last}",
            "use smaller batches or fewer ranks, or check that the items have nodes (not -1)",
        )
    sizes = [batch_size] * (whole * ranks) + [rest // smaller + (i < rest % smaller) for i in range(smaller)]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@inlined
def _waiting(size: Any, top: Any, behind: Any, start_of: Any) -> Any:
    """A group of that size that has no place yet, or -1."""
    while top[size] >= 0 and start_of[top[size]] >= 0:
        top[size] = behind[top[size]]
    return top[size]


@inlined
def _largest(room: Any, top: Any, behind: Any, start_of: Any) -> Any:
    """The largest waiting groups: that fills the room, alone, with a second or with several; and that fits; or -1."""
    fits = np.int64(-1)
    for size in range(min(room, len(top) - 1), 0, -1):
        group = _waiting(size, top, behind, start_of)
        if group >= 0:
            fits = group if fits < 0 else fits
            rest = room - size
            if rest == 0 or rest >= len(top) or _waiting(rest, top, behind, start_of) >= 0:
                return group, fits
    return np.int64(-1), fits


@compiled()
def pack(labels: Any, shuffled: Any, batch_size: int) -> Any:
    """Positions int32 [n], group by group, in the order `shuffled` of groups; how many groups have samples, are cut.

    Near a batch's end a group waits while another one fills the batch, alone or with a second; where none does, the
    largest that fits goes first; where none fits, the batch's end cuts the group. None is larger than a batch.
    """
    groups = len(shuffled)
    sizes = np.zeros(groups, np.int64)
    largest: Any = 0
    for label in labels:
        sizes[label] += 1
        largest = max(largest, sizes[label])
    behind = np.full(groups, -1, np.int64)  # stacks of equal sizes, the last of the order on top
    top = np.full(largest + 1, -1, np.int64)
    for label in shuffled:
        behind[label] = top[sizes[label]]
        top[sizes[label]] = label
    start_of = np.full(groups, -1, np.int64)
    filled, cuts, end = 0, 0, 0
    for label in shuffled:
        filled += sizes[label] > 0
        while start_of[label] < 0:
            room = batch_size - end % batch_size
            rest = room - sizes[label]
            chosen = label
            if rest < 0 or (0 < rest <= largest and _waiting(rest, top, behind, start_of) < 0):
                fills, fits = _largest(room, top, behind, start_of)
                if fills >= 0:
                    chosen = fills
                elif rest < 0 and fits >= 0:
                    chosen = fits
            cuts += sizes[chosen] > room
            start_of[chosen] = end
            end += sizes[chosen]
    order = np.empty(len(labels), np.int32)
    for position in range(len(labels)):
        order[start_of[labels[position]]] = position
        start_of[labels[position]] += 1
    return order, filled, cuts


@compiled()
def edges_in_batches(nodes: Any, starts: Any, ends: Any, window: Any, count: int) -> Any:
    """Edges within batches, and the samples that have one: two totals.

    nodes [n]: of the samples in the epoch's order; batch b is places starts[b]..ends[b]-1. A sample's edge counts once
    for each sample of the neighbour in its batch. count: nodes of the graph.
    """
    present = np.zeros(count, np.int32)
    edges, covered = 0, 0
    for batch in range(len(starts)):
        own = nodes[starts[batch] : ends[batch]]
        for node in own:
            present[node] += 1
        for node in own:
            found = 0
            for other in row_of(window, node):
                found += present[other]
            edges += found
            covered += found > 0
        for node in own:
            present[node] = 0
    return edges, covered
