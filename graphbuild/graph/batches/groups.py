"""Groups of samples whose nodes are neighbours: what `NeighborBatchSampler` fills batches with.

Compiled loops over the graph's lists where the shards' files are mapped (`NeighborLists`). A sample is named by its
position among the samples ordered by node: those of node i are positions starts[i]..starts[i + 1] - 1. A group is a
label: labels int32 [n] gives each position's. Memory: about 30 bytes a sample, beside mapped files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numba import carray
from numpy.typing import NDArray

from graphbuild.knn.intrinsics import pointer
from graphbuild.knn.kernels import GUESS_SHIFT, prefetch_row, row_address
from graphbuild.machine.compiled import compiled, inlined

_LOOK = 4  # samples of a neighbour whose groups are looked at
_AHEAD = 4  # anchors whose lists are asked for before they are read
_EDGE_BYTES = 4
_WALKS = 4  # of an anchor, a step each in turn: the next list comes from memory while others step
_STEPS = 4  # of them together, for each sample that a group may have
_OUT = -(1 << 30)  # links of a node that does not join


Window = tuple[tuple[NDArray[Any], NDArray[Any], NDArray[Any], int], int, int]


class StoredGraph(Protocol):
    """What is read of a SampleGraph."""

    k: int

    def __len__(self) -> int: ...
    def edge_blocks(self) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]: ...


class NeighborLists:
    """A graph's lists where their files are mapped. Valid, with its windows, as long as this object lives."""

    def __init__(self, graph: StoredGraph) -> None:
        self._shards = [neighbors for _, neighbors, _ in graph.edge_blocks()]  # kept: the table holds addresses
        lengths = [len(shard) for shard in self._shards]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        every = np.arange(0, starts[-1], 1 << GUESS_SHIFT)
        shard_of = (np.searchsorted(starts, every, side="right") - 1).astype(np.int32)
        addresses = np.array([shard.ctypes.data for shard in self._shards], np.int64)
        self._table = (addresses, starts, shard_of, _EDGE_BYTES * graph.k)
        self.nodes = int(starts[-1])

    def window(self, skip: int, width: int) -> Window:
        """Ranks skip..skip+width-1 of all lists, 0 the nearest, as compiled loops read them."""
        return self._table, skip, width


@inlined
def row_of(window: Any, node: Any) -> Any:
    table, skip, width = window
    return carray(pointer(row_address(table, np.int64(node)) + _EDGE_BYTES * skip), width, np.uint32)


@inlined
def _expect_row(window: Any, node: Any) -> None:
    table, skip, width = window
    prefetch_row(row_address(table, np.int64(node)) + _EDGE_BYTES * skip, _EDGE_BYTES * width)


@inlined
def _contains(row: Any, node: Any) -> Any:
    found = False
    for q in range(row.shape[0]):
        found |= row[q] == node
    return found


@compiled()
def order_by_node(nodes: Any, count: int) -> Any:
    """Samples 0..n-1 ordered by their node, int32 [n], each node's in the order given; and starts int32 [count + 1]."""
    starts = np.zeros(count + 1, np.int32)
    for node in nodes:
        starts[node] += 1
    end = np.int32(0)
    for node in range(count + 1):
        end += starts[node]
        starts[node] = end
    order = np.empty(len(nodes), np.int32)
    for sample in range(len(nodes) - 1, -1, -1):  # from the end, so that starts come down to where they belong
        starts[nodes[sample]] -= 1
        order[starts[nodes[sample]]] = sample
    return order, starts


@inlined
def _random(state: Any) -> Any:
    """31 random bits; state uint64 [1] (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(33))


@inlined
def _joins(other: Any, members: Any, own: Any, window: Any) -> Any:
    """Whether a node is new to a group and its list leads back into it; the first to join must be in the anchor's."""
    node = np.uint32(other)
    if _contains(members, node) or (len(members) == 1 and not _contains(own, node)):
        return False
    row = row_of(window, other)
    linked = False
    for member in members:
        linked = linked or _contains(row, member)
    return linked


@inlined
def _take(node: Any, most: Any, label: Any, left: Any, labels: Any, starts: Any) -> Any:
    """Give a node's next free samples, at most so many, to a group; returns how many."""
    amount = min(most, left[node])
    for _ in range(amount):
        left[node] -= 1
        labels[starts[node] + left[node]] = label
    return amount


@compiled()
def groups_of_anchors(
    visits: Any, starts: Any, window: Any, group: int, same_node: int, restart: float, seed: int
) -> Any:
    """Each anchor that is still free takes free neighbours, until its group has `group` samples.

    visits [n]: the samples' nodes in the order in which they become anchors. restart < 0: candidates are the anchor's
    list in order; else the stops of four walks over lists, 4 x `group` steps in all, that return to the anchor with
    that probability before a step. Returns labels int32 [n] and the number of groups.
    """
    width = window[2]
    steps = width if restart < 0 else _STEPS * group
    left = (starts[1:] - starts[:-1]).astype(np.int32)
    labels = np.empty(len(visits), np.int32)
    members = np.empty(group, np.uint32)
    state = np.full(1, seed, np.uint64)
    stops = np.empty(_WALKS, np.int64)
    label = 0
    for visit in range(len(visits)):
        if visit + _AHEAD < len(visits):
            _expect_row(window, visits[visit + _AHEAD])
        anchor = np.int64(visits[visit])
        if left[anchor] == 0:
            continue
        own = row_of(window, anchor)
        other = anchor
        size = 0
        found = 0
        for step in range(steps + 1):
            if step > 0:
                if restart < 0:
                    other = np.int64(own[step - 1])
                else:
                    walk = step % _WALKS
                    at = anchor if step <= _WALKS or _random(state) < restart * 0x80000000 else stops[walk]
                    other = np.int64(row_of(window, at)[_random(state) % width])
                    stops[walk] = other
                    _expect_row(window, other)
                if left[other] == 0 or not _joins(other, members[:found], own, window):
                    continue
            members[found] = other
            found += 1
            size += _take(other, min(same_node, group - size), label, left, labels, starts)
            if size == group:
                break
        label += 1
    return labels, label


@compiled()
def groups_by_growth(visits: Any, starts: Any, window: Any, group: int, same_node: int) -> Any:
    """Communities grown from anchors that are still free: the free node next that most members have in their lists.

    This is greedy graph growing (Karypis and Kumar, SIAM J. Sci. Comput. 20, 1998) with many small parts. A node whose
    list does not lead back when its turn comes stays out of that group. Arguments, results: `groups_of_anchors`.
    """
    left = (starts[1:] - starts[:-1]).astype(np.int32)
    labels = np.empty(len(visits), np.int32)
    members = np.empty(group, np.uint32)
    links = np.zeros(len(left), np.int32)  # members whose lists have a node
    fringe = np.empty(group * window[2], np.uint32)  # nodes with links
    label = 0
    for visit in range(len(visits)):
        if visit + _AHEAD < len(visits):
            _expect_row(window, visits[visit + _AHEAD])
        if left[visits[visit]] == 0:
            continue
        other = np.int64(visits[visit])
        size, found, reached = 0, 0, 0
        while other >= 0:
            members[found] = other
            found += 1
            size += _take(other, min(same_node, group - size), label, left, labels, starts)
            if size == group:
                break
            for near in row_of(window, other):
                if left[near] > 0:
                    if links[near] == 0:
                        fringe[reached] = near
                        reached += 1
                    links[near] += 1
            own = row_of(window, np.int64(members[0]))
            other, most = _most_linked(fringe[:reached], links)
            while most > 0 and not _joins(other, members[:found], own, window):
                links[other] = _OUT
                other, most = _most_linked(fringe[:reached], links)
        links[fringe[:reached]] = 0
        label += 1
    return labels, label


@inlined
def _most_linked(fringe: Any, links: Any) -> Any:
    """The node with most links, the first of equals, and how many; -1 and 0 where none has any."""
    best, most = np.int64(-1), np.int32(0)
    for node in fringe:
        if links[node] > most:
            best, most = np.int64(node), links[node]
    return best, most


@compiled()
def join_near(
    labels: Any,
    groups: int,
    nodes: Any,
    starts: Any,
    window: Any,
    small: int,
    limit: int,
    least: int,
) -> None:
    """Let each group of at most `small` samples join, whole, the group to which it has most edges; in place.

    nodes [n]: of the positions. The other has `least` samples or more, and both together at most `limit`. Of a
    neighbour with many samples the groups of the first few count. A group that another has joined stays.
    """
    members, first = order_by_node(labels, groups)
    sizes = (first[1:] - first[:-1]).astype(np.int32)
    links = np.zeros(groups, np.int32)
    for group in range(groups):
        size = first[group + 1] - first[group]
        if size == 0 or size > small or sizes[group] != size:
            continue
        best, most = group, 0
        for add in (1, 0):  # count links, then clear the counts
            for position in members[first[group] : first[group + 1]]:
                for other in row_of(window, nodes[position]):
                    for near in range(starts[other], min(starts[other + 1], starts[other] + _LOOK)):
                        label = labels[near]
                        links[label] = add * (links[label] + 1)
                        fits = label != group and sizes[label] >= least and sizes[label] + size <= limit
                        if fits and links[label] > most:
                            best, most = label, links[label]
        if best != group:
            labels[members[first[group] : first[group + 1]]] = best
            sizes[best] += size
            sizes[group] = 0
