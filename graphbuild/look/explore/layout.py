"""A place in the plane for every node, from the lists of its nearest neighbours alone.

The places are those of t-SNE (van der Maaten and Hinton, JMLR 2008) in which the NEAR nearest have equal weights (as in
Boehm et al., arXiv 2007.08902). A node is pulled by what it lists and pushed by all others; the push is read from a
grid (Linderman et al., arXiv 1712.09005; here one convolution with 1 / (1 + r^2), of which it is the slope). Before the
nodes their groups are laid out, and groups of groups; they are those of Louvain's method (Blondel et al., arXiv
0803.0476) over the directed lists, and the coarsest are the map's communities. Nothing is drawn at random, and no sum
depends on the number of threads: one graph has one map.

Cost: 100 to 150 microseconds of one core and up to 530 bytes a node, whatever their number, and at most 0.3 GB for the
grid (`benchmarks/layout.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.fft

from graphbuild.machine.compiled import compiled, inlined
from graphbuild.store.sharded import Array

NEAR = 15
COMMUNITIES = 12  # Louvain's method goes on, at lower resolutions, until there are so few, or no two are joined
SHORTER = 0.5  # of two levels, what the coarser may have of the finer's nodes
ROUNDS = ((30, 4.0), (70, 1.0))  # of a level: steps, and how much stronger the pull is in them
CELL = 0.5  # width of the grid's cells, if the grid then has no more than SIDE
SIDE = 2_048
BLOCK = 65_536
_PASSES = 6  # of Louvain's method over all nodes of a level, at most
GOLDEN = 2.399963  # an angle; points at its multiples, at radii of square roots, fill a disc evenly

Level = tuple[Array, Array, Array, Array]  # offsets, targets, weights of edges, and strength: a node's edges, summed


def lay_out(lists: Array, told: Callable[[float], object] = lambda share: None) -> tuple[Array, list[Array]]:
    """Places float32 [n, 2] of nodes, and their groups, from fine to coarse: each int32, a label for each of the level
    before, the first one for the nodes.

    lists: int32 [n, k], nearest first. told: is called with the share of the work that is done.
    """
    labels, near = hierarchy(lists)
    sizes = [len(level) for level in near]
    starts = [0]  # the levels that are laid out: each has at most SHORTER of the nodes of the one before
    for at, size in enumerate(sizes):
        if size <= SHORTER * sizes[starts[-1]]:
            starts.append(at)
    x, done = sunflower(np.arange(sizes[starts[-1]])), 0.0
    for at, coarser in zip(starts[::-1], [None, *starts[:0:-1]], strict=True):
        if coarser is not None:
            label = joined(labels[at:coarser])
            order, first = members(label, len(x))
            place = np.empty(len(label), np.int64)
            place[order] = np.arange(len(label)) - np.repeat(first[:-1], np.diff(first))
            x = _within(x, 0.3 * np.sqrt(len(label)))[label] + sunflower(place)
        share = len(x) / sum(sizes[one] for one in starts)
        x = settle(x, near[at], told, done, share)
        done += share
    return x, labels


def joined(labels: list[Array]) -> Array:
    """Labels of labels, int32 [n]: the group at the last level of each node of the first."""
    label = labels[0]
    for coarser in labels[1:]:
        label = coarser[label]
    return label


def _within(x: Array, radius: float) -> Array:
    """Places float32 [n, 2] of this median distance from the middle, and at most three times as far away."""
    away = np.hypot(x[:, 0], x[:, 1])
    middle = max(float(np.median(away)), 1e-6)
    return np.asarray(x * (radius / np.maximum(middle, away / 3))[:, None], np.float32)


def sunflower(number: Array) -> Array:
    """Places float32 [n, 2], half a unit apart, of the points of these numbers in a disc."""
    at = number.astype(np.float32)
    radius, angle = np.float32(0.5) * np.sqrt(at + np.float32(0.5)), np.float32(GOLDEN) * at
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


# -- groups, and groups of groups


def hierarchy(lists: Array) -> tuple[list[Array], list[Array]]:
    """Labels of each level, int32; and what pulls in each: the lists of the nodes, then those of the groups of each
    level, int32 [n, NEAR]."""
    n, k = lists.shape
    ones = np.broadcast_to(np.float32(1), n * k)
    level: Level = (np.arange(n + 1) * k, lists.reshape(-1), ones, np.full(n, k, np.float32))
    labels, near, resolution = [], [lists], 1.0
    while resolution > 0.01 and len(level[3]) > COMMUNITIES:
        label, coarse = _coarser(level, n * k, resolution)
        if len(coarse[3]) > 0.9 * len(level[3]):
            resolution /= 2
            continue
        level = coarse
        labels.append(label)
        near.append(strongest(level))
    return labels, near


def members(label: Array, count: int) -> tuple[Array, Array]:
    """The nodes of each of `count` groups, behind each other, and where each group's begin, [count + 1]."""
    order = np.argsort(label, kind="stable").astype(np.int32)
    return order, np.concatenate([[0], np.cumsum(np.bincount(label, minlength=count))])


def _coarser(level: Level, total: int, resolution: float) -> tuple[Array, Level]:
    """Groups of a level's nodes, int32 labels, and their graph."""
    offsets, targets, weights, strength = level
    label = np.arange(len(strength), dtype=np.int32)
    _move(offsets, targets, weights, strength, label, strength.astype(np.float64), resolution / total)
    used = np.zeros(len(label), np.int32)
    used[label] = 1
    count, label = int(used.sum()), (np.cumsum(used, dtype=np.int32) - 1)[label]
    order, first = members(label, count)
    into = np.zeros(count + 1, np.int64)
    none = np.empty(0, np.int32), np.empty(0, np.float32)
    _aggregate(offsets, targets, weights, label, order, first, into, *none)  # counts the edges
    edges = np.empty(into[-1], np.int32), np.empty(into[-1], np.float32)
    _aggregate(offsets, targets, weights, label, order, first, into, *edges)
    return label, (into, *edges, np.bincount(label, strength, minlength=count).astype(np.float32))


@compiled()
def _move(offsets: Any, targets: Any, weights: Any, strength: Any, label: Any, size: Any, price: Any) -> None:
    """Node after node joins the group, of those that it has edges to, that adds most to modularity.

    label and size [n]: each node's group and each group's strength, in place. price: of strength, in edges.
    """
    n = len(strength)
    score = np.zeros(n, np.float32)
    seen = np.empty(n, np.int32)
    for _ in range(_PASSES):
        moved = 0
        for i in range(n):
            own, found = label[i], 0
            for e in range(offsets[i], offsets[i + 1]):
                group = label[targets[e]]
                if targets[e] != i:
                    if score[group] == 0:
                        seen[found] = group
                        found += 1
                    score[group] += weights[e]
            size[own] -= strength[i]
            best, most = own, score[own] - price * strength[i] * size[own]
            for at in range(found):
                group = seen[at]
                value = score[group] - price * strength[i] * size[group]
                if value > most or (value == most and group < best):
                    best, most = group, value
                score[group] = 0
            score[own] = 0
            size[best] += strength[i]
            label[i] = best
            moved += best != own
        if moved < 0.02 * n:
            break


@compiled()
def _aggregate(
    offsets: Any, targets: Any, weights: Any, label: Any, order: Any, first: Any, into: Any, groups: Any, sums: Any
) -> None:
    """The edges between groups: their offsets, and where there is room for them, targets and summed weights."""
    place = np.full(len(first) - 1, -1, np.int64)
    n = 0
    for one in range(len(first) - 1):
        begin = n
        for at in range(first[one], first[one + 1]):
            i = order[at]
            for e in range(offsets[i], offsets[i + 1]):
                group = label[targets[e]]
                if place[group] < begin:
                    place[group] = n
                    if len(groups):
                        groups[n] = group
                        sums[n] = 0
                    n += 1
                if len(groups):
                    sums[place[group]] += weights[e]
        into[one + 1] = n


def strongest(level: Level) -> Array:
    """The NEAR strongest edges of each of a level's groups, int32 [n, NEAR]; itself, where it has fewer."""
    offsets, targets, weights, strength = level
    lists = np.repeat(np.arange(len(strength), dtype=np.int32)[:, None], NEAR, axis=1)
    _strongest(offsets, targets, weights, lists)
    return lists


@compiled()
def _strongest(offsets: Any, targets: Any, weights: Any, lists: Any) -> None:
    best = np.empty(lists.shape[1], np.float32)
    for i in range(len(lists)):
        best[:] = 0
        for e in range(offsets[i], offsets[i + 1]):
            at = len(best)
            while at and (best[at - 1] < weights[e] or (best[at - 1] == weights[e] and lists[i, at - 1] > targets[e])):
                at -= 1
                if at + 1 < len(best):
                    best[at + 1], lists[i, at + 1] = best[at], lists[i, at]
            if at < len(best):
                best[at], lists[i, at] = weights[e], targets[e]


# -- places


def settle(x: Array, lists: Array, told: Callable[[float], object], done: float, part: float) -> Array:
    """Places float32 [n, 2] after the steps of ROUNDS from places x, which are overwritten. told: is called with
    `done`, and more, up to `part` more."""
    speed, share = np.zeros_like(x), 0.0
    slowing = [(pull, 4 - 3.6 * step / steps) for steps, pull in ROUNDS for step in range(steps)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at, (pull, rate) in enumerate([(0.0, 0.0), *slowing]):  # the first step only measures `share`
            strengths = np.float32(rate * pull), np.float32(rate / max(share, 1e-3))
            rest = (x, lists, speed, *_field(x), *strengths)
            shares = pool.map(lambda begin, rest=rest: _pushed(begin, *rest), range(0, len(x), BLOCK))
            share = sum(shares) / len(x)  # the mean over nodes of the sum of 1 / (1 + r^2) to all others
            x += speed
            x -= x.mean(axis=0, dtype=np.float64).astype(np.float32)
            told(done + part * at / len(slowing))
    return x


def _field(x: Array) -> tuple[Array, Array, np.float32]:
    """On a grid over the places, the sum over all nodes of 1 / (1 + r^2); its corner, and the width of a cell."""
    low = x.min(axis=0)
    span = float((x.max(axis=0) - low).max())
    cell = max(CELL, span / min(SIDE, 64 + 4 * np.sqrt(len(x))))
    side = scipy.fft.next_fast_len(int(span / cell) + 8, real=True)
    corner = (low - 3 * cell).astype(np.float32)
    grid = np.zeros((side, side), np.float32)
    _spread(x, corner, np.float32(cell), grid)
    away = np.minimum(np.arange(2 * side), np.arange(2 * side, 0, -1)).astype(np.float32) * np.float32(cell)
    softer = np.float32(1 + max(cell**2 - 1, 0) / 2)  # in wide cells the peak would count for a whole cell
    reach = scipy.fft.rfft2(1 / (softer + away[:, None] ** 2 + away**2), workers=os.cpu_count())
    reach *= scipy.fft.rfft2(grid, (2 * side, 2 * side), workers=os.cpu_count())
    field = scipy.fft.irfft2(reach, (2 * side, 2 * side), overwrite_x=True, workers=os.cpu_count())
    return np.ascontiguousarray(field[:side, :side]), corner, np.float32(cell)


@inlined
def _weights(place: Any, low: Any, cell: Any) -> Any:
    """The grid point nearest to a place, and the quadratic spline's weights of it and the two beside it, and slopes."""
    u = (place - low) / cell
    nearest = int(u + np.float32(0.5))
    d = u - np.float32(nearest)
    half = np.float32(0.5)
    weights = half * (half - d) * (half - d), np.float32(0.75) - d * d, half * (half + d) * (half + d)
    return nearest - 1, weights, (d - half, np.float32(-2) * d, half + d)


@compiled()
def _spread(x: Any, corner: Any, cell: Any, grid: Any) -> None:
    """Adds each node, as a weight of 1, to the nine grid points about it."""
    for i in range(len(x)):
        row, across, _ = _weights(x[i, 0], corner[0], cell)
        column, along, _ = _weights(x[i, 1], corner[1], cell)
        for p in range(3):
            for q in range(3):
                grid[row + p, column + q] += across[p] * along[q]


@compiled(fastmath=True)
def _pushed(
    begin: Any, x: Any, lists: Any, speed: Any, field: Any, corner: Any, cell: Any, pull: Any, push: Any
) -> Any:
    """New speeds of BLOCK nodes; returns the sum of the field at their places, less each node's own part."""
    total = 0.0
    for i in range(begin, min(begin + BLOCK, len(x))):
        row, across, slope_across = _weights(x[i, 0], corner[0], cell)
        column, along, slope_along = _weights(x[i, 1], corner[1], cell)
        here = slope_x = slope_y = np.float32(0)
        for p in range(3):
            for q in range(3):
                value = field[row + p, column + q]
                here += across[p] * along[q] * value
                slope_x += slope_across[p] * along[q] * value
                slope_y += across[p] * slope_along[q] * value
        total += max(float(here - 1), 0.0)
        pull_x = pull_y = np.float32(0)
        for q in range(lists.shape[1]):
            dx, dy = x[lists[i, q], 0] - x[i, 0], x[lists[i, q], 1] - x[i, 1]
            near = 1 / (1 + dx * dx + dy * dy)
            pull_x += near * dx
            pull_y += near * dy
        pulls, pushes = pull / max(lists.shape[1], 1), push * np.float32(0.5) / cell
        speed[i, 0] = _kept(np.float32(0.8) * speed[i, 0] + pulls * pull_x - pushes * slope_x)
        speed[i, 1] = _kept(np.float32(0.8) * speed[i, 1] + pulls * pull_y - pushes * slope_y)
    return total


@inlined
def _kept(speed: Any) -> Any:
    return min(max(speed, np.float32(-5)), np.float32(5))
