"""The map of a store's nodes: their places (layout.py), communities, and what they are coloured by.

Made once, and kept in STORE/explore/ for as long as the graph has the same fingerprint: places.npy, uint16 [M, 2],
communities.npy, uint8 [M], and map.json (docs/reference/format.md). Pages draw *points*: point p is node p x stride mod
M, so that the first points are spread evenly over all nodes. Memory, beside that of the layout: 10 bytes a node; the
lists that it is made from, 60 bytes a node, lie in a temporary file.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists.derived import about, texts
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.graph.select.rules import select_store
from graphbuild.graph.select.sample_columns import SampleColumns
from graphbuild.graph.select.selection import FOLDER as SELECTIONS
from graphbuild.look.catalog import Catalog
from graphbuild.look.explore.layout import COMMUNITIES, NEAR, joined, lay_out
from graphbuild.machine.compiled import compiled
from graphbuild.store.remote import reaching
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json, Store, Writer

FOLDER = "explore"
MADE = f"{FOLDER}/map.json"
VERSION = 1
POINTS = 1 << 24  # most that a page draws
CORNER = 65_535  # places are 0..65534; both numbers CORNER: a node that no sample has any more
NONE = 255  # the code of what has no value
MOST_VALUES = 100_000
COMMUNITY = "community"
CENTRAL = 256  # members among which a community's most central one is looked for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeMap:
    """about: what map.json says. places: uint16 [M, 2]. codes: uint8 [M], each node's community, or COMMUNITIES."""

    about: Json
    places: Array
    codes: Array
    drawn: Array | None = None  # the nodes of the points, where they follow no stride

    def nodes_of_points(self, begin: int = 0, count: int = POINTS) -> Array:
        if self.drawn is not None:
            return self.drawn[begin : begin + count]
        points = np.arange(begin, min(begin + count, self.about["points"]))
        return np.asarray(points * self.about["stride"] % self.about["nodes"])


def node_map(catalog: Catalog, told: Callable[[float], object] = lambda share: None) -> NodeMap:
    """The store's map, made if it is not there yet. A store that cannot be written is left alone, with a warning."""
    store, names = catalog.store, [f"{FOLDER}/places.npy", f"{FOLDER}/communities.npy"]
    found = store.read_json(MADE)
    if found and (found["graph"], found["version"]) == (catalog.graph.fingerprint, VERSION):
        return NodeMap(found, *map(store.array, names))
    made = _made(catalog, told)
    if writable(store):
        for name, array in zip(names, (made.places, made.codes), strict=True):
            Writer(store).array(name, array)
        store.write_json(MADE, made.about)
    return made


def writable(store: Store) -> bool:
    try:
        store.check_writable()
    except ConfigError as error:
        logger.warning("what the map took is not kept: %s", error.cause)
        return False
    return True


def _made(catalog: Catalog, told: Callable[[float], object]) -> NodeMap:
    graph, nodes = catalog.graph, len(catalog.graph)
    lists = _near_lists(graph)
    x, labels = lay_out(lists, told)
    stride = next(one for one in range(int(0.618 * min(nodes, 1 << 29)) or 1, nodes + 2) if math.gcd(one, nodes) == 1)
    says: Json = {"version": VERSION, "graph": graph.fingerprint, "nodes": nodes, "points": min(nodes, POINTS)}
    says |= {"stride": stride, "near": lists.shape[1], "kept": round(kept(x, lists), 4)}
    label = joined(labels) if labels else np.arange(nodes)
    sizes = np.bincount(label[~graph.gone])
    shown = np.argsort(-sizes, kind="stable")[: min(COMMUNITIES, int((sizes > 0).sum()))]
    number = np.full(len(sizes) + 1, COMMUNITIES, np.uint8)
    number[shown] = np.arange(len(shown))
    codes = np.where(graph.gone, np.uint8(NONE), number[np.minimum(label, len(sizes))])
    low, high = (edge(x[~graph.gone], axis=0) for edge in (np.min, np.max))
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6)
    places = np.clip((x - middle) / half * 32_700 + 32_767, 0, CORNER - 1).astype(np.uint16)
    places[graph.gone] = CORNER
    seen = places[~graph.gone]
    says["box"] = [int(edge) for edge in (*seen.min(axis=0), *seen.max(axis=0))]
    says["communities"] = [_community(catalog, np.flatnonzero(codes == one), places) for one in range(len(shown))]
    if rest := int((codes == COMMUNITIES).sum()):
        says["communities"].append({"name": "smaller ones", "size": rest})
    return NodeMap(says, places, codes)


def _near_lists(graph: SampleGraph) -> Array:
    """The NEAR nearest nodes of each, int32 [M, <= NEAR], in a temporary file and mapped; of a node that is gone,
    itself."""
    near = min(NEAR, graph.k)
    with reaching("the map's lists"), tempfile.TemporaryFile(prefix="graphbuild-") as file:
        for first, neighbors, _ in graph.edge_blocks():
            block = neighbors[:, :near].astype(np.int32)
            gone = np.flatnonzero(graph.gone[first : first + len(block)])
            block[gone] = first + gone[:, None]
            file.write(block.tobytes())
        file.flush()
        return np.asarray(np.memmap(file, np.int32, "r+", shape=(len(graph), near)))


def _community(catalog: Catalog, members: Array, places: Array) -> Json:
    """Its name, the text of the most central of some members; its size, and where it lies."""
    some = members[np.linspace(0, len(members) - 1, min(CENTRAL, len(members))).astype(np.int64)]
    vectors = catalog.graph.embeddings(some)
    central = catalog.describe([some[int((vectors @ vectors.sum(axis=0)).argmax())]], [1.0])[0]
    x, y = np.median(places[some], axis=0).astype(int).tolist()
    return {"name": (central.text or f"node {central.node}")[:200], "size": len(members), "x": x, "y": y}


def kept(x: Array, lists: Array) -> float:
    """Of the nodes that the lists [n, k] name, the share that is among the k nearest in the plane, x [n, 2]; measured
    on some nodes, spread evenly."""
    n, k = lists.shape
    if n <= k + 1:
        return 1.0
    some = np.linspace(0, n - 1, int(np.clip(1e9 / n, 100, min(2_000, n)))).astype(np.int64)
    found = 0
    for node in some.tolist():
        away = np.square(x - x[node]).sum(axis=1)
        found += int((away[lists[node]] <= np.partition(away, k)[k]).sum())  # itself is the nearest
    return float(found / (len(some) * k))


# -- colours and filters


def columns_of(catalog: Catalog) -> list[str]:
    """What `codes_by` takes, but for longer expressions."""
    known = SampleColumns(catalog.graph).names()
    return list(dict.fromkeys([COMMUNITY, "shard", "LENGTH(caption)", "degree", "nearest", *known]))


def codes_by(catalog: Catalog, made: NodeMap, by: str) -> tuple[Json, bytes]:
    """A legend, and a byte for each point: the code of its colour, NONE where it has no value.

    by: "community", or an SQL expression over the columns of `SampleColumns`; a node has the value of the first sample
    that has one, of all the samples of which it is a caption. Numbers are coded by rank, 0..254, and the legend has
    their least, quartiles and greatest; of other values the most frequent have a code and a name of their own. none:
    how many nodes have no value.

    Raises:
        ConfigError: no expression, of columns that are not there, of more than MOST_VALUES texts.
    """
    points = made.nodes_of_points()
    if by == COMMUNITY:
        return {"kind": "names", "names": made.about["communities"], "none": 0}, made.codes[points].tobytes()
    values, names = _values(catalog.graph, by)
    codes = np.full(len(values), NONE, np.uint8)
    known = ~np.isnan(values)
    legend: Json = {"kind": "numbers", "ticks": [], "none": int((~known & ~catalog.graph.gone).sum())}
    if names is None:
        if not known.any():
            return legend, codes[points].tobytes()
        ranks = np.quantile(values[known], np.linspace(0, 1, 256))
        codes[known] = np.minimum(np.searchsorted(ranks, values[known]), 254)
        return legend | {"ticks": ranks[[0, 64, 128, 191, 255]].tolist()}, codes[points].tobytes()
    sizes = np.bincount(values[known].astype(np.int64), minlength=len(names))
    truth = names == ["false", "true"]
    order = np.arange(2) if truth else np.argsort(-sizes, kind="stable")
    number = np.full(len(names), COMMUNITIES, np.uint8)
    number[order[:COMMUNITIES]] = np.arange(len(order[:COMMUNITIES]))
    codes[known] = number[values[known].astype(np.int64)]
    told = [{"name": names[at], "size": int(sizes[at])} for at in order[:COMMUNITIES].tolist()]
    if len(names) > COMMUNITIES:
        told.append({"name": "all others", "size": int(sizes[order[COMMUNITIES:]].sum())})
    return legend | {"kind": "truth" if truth else "names", "names": told}, codes[points].tobytes()


def _values(graph: SampleGraph, by: str) -> tuple[Array, list[str] | None]:
    """Each node's value, float64 [M], NaN for none: a number, or a place in the names that come with it."""
    if by in ("degree", "nearest"):
        of_graph = graph.in_degrees if by == "degree" else graph.nearest_similarities
        return np.where(graph.gone, np.nan, of_graph), None
    fix = "write an expression such as width, LENGTH(caption) or \"caption LIKE '%dog%'\""
    try:
        asked = pl.sql_expr(by).alias("asked")
        columns = list(dict.fromkeys([*asked.meta.root_names(), "node"]))
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise ConfigError(f"{by!r} cannot be read ({error})", fix) from None
    values, places, numeric = np.full(len(graph), np.nan), {}, None
    for frame in SampleColumns(graph).frames(columns, of_captions=graph.is_plural):
        try:
            found = frame.select(asked)["asked"]
        except pl.exceptions.PolarsError as error:
            raise ConfigError(f"{by!r} fails ({error})", fix) from None
        if len(found) != len(frame):
            raise ConfigError(f"{by!r} looks at more than one sample", fix)
        if numeric is None and found.dtype != pl.Null:
            numeric = found.dtype.is_numeric()
            places = {"false": 0, "true": 1} if found.dtype == pl.Boolean else {}
        if not numeric and found.dtype.is_nested():
            found = pl.Series([None if one is None else str(one) for one in found.to_list()], dtype=pl.String)
        elif not numeric:
            found = found.cast(pl.String, strict=False).str.slice(0, 80)
        if not numeric:
            distinct = found.drop_nulls().unique(maintain_order=True).to_list()
            numbers = [places.setdefault(one, len(places)) for one in distinct]
            found = found.replace_strict(distinct, numbers, default=None, return_dtype=pl.Float64)
        if len(places) > MOST_VALUES:
            raise ConfigError(f"{by!r} has more than {MOST_VALUES:,} different values", fix)
        nodes, found = frame["node"].to_numpy(), found.cast(pl.Float64, strict=False).to_numpy()
        new = np.flatnonzero(np.isnan(values[nodes]) & ~np.isnan(found))[::-1]  # the first is assigned last, and stays
        values[nodes[new]] = found[new]
    return values, None if numeric else list(places)


# -- selections


def free_name(store: Store) -> str:
    """A name that no selection of the store has."""
    names = ("from-map" + f"-{at}" * (at > 1) for at in count(1))
    return next(name for name in names if not store.exists(f"{SELECTIONS}/{name}.parquet"))


def select_on_map(catalog: Catalog, made: NodeMap, asked: Json) -> Json:
    """Write the selection that `asked` describes, and tell of it: name; where: an SQL expression or None; polygon: the
    corners of a lasso, [[x, y], ...] in places, or None.

    A sample is in the lasso if one of its captions is. Otherwise as `graphbuild select`.
    """
    store, name = catalog.store, str(asked.get("name"))
    rules: Json = {"where": str(asked["where"])} if asked.get("where") else {}
    with tempfile.TemporaryDirectory(prefix="graphbuild-") as folder:
        if asked.get("polygon"):
            try:
                corners = np.array(asked["polygon"], np.float64).reshape(-1, 2)
            except (TypeError, ValueError):
                raise InputError("the lasso is no list of corners", "draw it again") from None
            inside = _inside(made.places, corners)
            rows = [row[inside[node]] for row, node in texts(catalog.graph)]
            rules["keep"] = [str(Path(folder) / "lasso.npy")]
            np.save(rules["keep"][0], np.unique(np.concatenate(rows)))
        if not rules:
            raise InputError("nothing is selected", "draw a lasso, or give a filter")
        file = f"{SELECTIONS}/{name}.parquet"
        replaced = store.exists(file)
        select_store(store, name, rules)
        with store.fs.open(store.path(file), "rb") as stream:
            kept = about(stream)["counts"]["kept"]
        return {"file": store.display(file), "kept": kept, "replaced": replaced, "free_name": free_name(store)}


@compiled()
def _inside(places: Any, corners: Any) -> Any:
    """Which places lie in a polygon, by the even-odd rule; select.js makes the same comparisons."""
    found = np.zeros(len(places), np.bool_)
    left, right = corners[:, 0].min() - 1, corners[:, 0].max() + 1  # a crossing may be rounded beyond its edge
    top, bottom = corners[:, 1].min(), corners[:, 1].max()
    for i in range(len(places)):
        x, y = float(places[i, 0]), float(places[i, 1])
        if x < left or x > right or y < top or y > bottom:
            continue
        for a in range(len(corners)):
            b = a - 1
            if (corners[a, 1] > y) != (corners[b, 1] > y):
                along = (y - corners[a, 1]) / (corners[b, 1] - corners[a, 1])
                if x < corners[a, 0] + along * (corners[b, 0] - corners[a, 0]):
                    found[i] = not found[i]
    return found
