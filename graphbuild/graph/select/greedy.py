"""Greedy choice over edges: takes the node of greatest value again and again, and changes its neighbours' values.

A binary heap in compiled code that knows each node's place in it: a changed value moves one node. Time: (count x edges
of a node) changes, most of them a cache miss; memory: 24 bytes a node beside the edges and the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphbuild.machine.compiled import compiled, inlined

CUT, MESSAGE, CENTER = 0, 1, 2


@inlined
def _weight(similarity: Any, gamma: Any) -> Any:
    """exp(-gamma d^2) of two unit vectors: d^2 = 2 - 2 cos."""
    return np.exp(-gamma * (2 - 2 * np.float64(similarity)))


@inlined
def _changed(value: Any, similarity: Any, taken: Any, kind: Any, gamma: Any) -> Any:
    """What a value becomes when a node of this similarity is taken at the value `taken`."""
    if kind == CUT:
        return value - 2 * np.float64(similarity)
    if kind == MESSAGE:
        return value - _weight(similarity, gamma) * taken
    return min(value, 1 - np.float64(similarity))


@compiled()
def gathered(offsets: Any, neighbors: Any, similarities: Any, amounts: Any, group: Any, gamma: float) -> Any:
    """The sum of each node's neighbours' amounts, float64 [M], weighted by similarity, or by exp(-gamma d^2) where
    gamma >= 0. Edges between groups do not count."""
    sums = np.zeros(len(amounts), np.float64)
    for i in range(len(sums)):
        for e in range(offsets[i], offsets[i + 1]):
            j = neighbors[e]
            if group[i] == group[j]:
                weight = np.float64(similarities[e]) if gamma < 0 else _weight(similarities[e], gamma)
                sums[i] += weight * amounts[j]
    return sums


@compiled()
def take_greatest(
    offsets: Any,
    neighbors: Any,
    similarities: Any,
    values: Any,
    left: Any,
    group: Any,
    quota: Any,
    kind: int,
    gamma: float,
) -> Any:
    """How often each node is taken, int64 [M]: quota[g] times one of group g, the greatest value first, then the
    smallest id.

    values float64 [M], changed in place; left int64 [M]: how often a node may be taken. To a node taken again it has
    itself similarity 1. kind: CUT takes 2 s from the values of neighbours in the group, MESSAGE exp(-gamma d^2) times
    the value at which the node was taken, CENTER leaves at most the distance 1 - s.
    """
    heap = np.flatnonzero(left)
    size = len(heap)
    place = np.full(len(values), -1, np.int64)
    place[heap] = np.arange(size)
    for i in range(size // 2 - 1, -1, -1):
        _sink(heap, place, values, i, size)
    taken = np.zeros(len(values), np.int64)
    missing = quota.sum()
    while missing > 0:
        top = heap[0]
        full = quota[group[top]] == 0
        value = values[top]
        if not full:
            taken[top] += 1
            quota[group[top]] -= 1
            missing -= 1
            values[top] = _changed(value, 1.0, value, kind, gamma)
        if full or taken[top] == left[top]:
            size -= 1
            heap[0] = heap[size]
            place[heap[0]] = 0
            place[top] = -1
        _sink(heap, place, values, 0, size)
        if full:
            continue
        for e in range(offsets[top], offsets[top + 1]):
            node = neighbors[e]
            if place[node] < 0 or group[node] != group[top]:
                continue
            before = values[node]
            values[node] = _changed(before, similarities[e], value, kind, gamma)
            if values[node] < before:
                _sink(heap, place, values, place[node], size)
            else:
                _swim(heap, place, values, place[node])
    return taken


@inlined
def _precedes(values: Any, a: Any, b: Any) -> Any:
    return values[a] > values[b] or (values[a] == values[b] and a < b)


@compiled()
def _sink(heap: Any, place: Any, values: Any, at: Any, size: Any) -> None:
    """Move what stands at a place down until it precedes both below it."""
    if at >= size:
        return
    node = heap[at]
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _precedes(values, heap[below + 1], heap[below]):
            below += 1
        if not _precedes(values, heap[below], node):
            break
        heap[at] = heap[below]
        place[heap[at]] = at
        at = below
    heap[at] = node
    place[node] = at


@compiled()
def _swim(heap: Any, place: Any, values: Any, at: Any) -> None:
    """Move what stands at a place up until what stands above precedes it."""
    node = heap[at]
    while at > 0 and _precedes(values, node, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        place[heap[at]] = at
        at = (at - 1) // 2
    heap[at] = node
    place[node] = at
