"""`graphbuild select`: rules that leave out rows of a store, and captions of samples that have several.

They hold in a fixed order: lists to keep, lists to drop, the expression, the least degree, the budget. A row that goes
keeps the first rule that took it. Nothing of the store is rewritten. Memory: 20 bytes a row, and a shard's samples.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graphbuild.errors import ConfigError, GraphbuildError, InputError
from graphbuild.graph.lists.derived import DerivedList, Part, publish, slices, texts
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.graph.select.row_lists import read_list, rows_of
from graphbuild.graph.select.sample_columns import SampleColumns, rows_where
from graphbuild.graph.select.selection import CAPTIONS, FOLDER, WHAT
from graphbuild.graph.select.subsets import choose
from graphbuild.sources.images import MAX_PIXELS, upright_rgb
from graphbuild.sources.ranges import TarRanges
from graphbuild.store.files import read_array
from graphbuild.store.layout import SAMPLES
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)

Prefer = Literal["first", "sharpest", "neighbors", "longest"]
NO_CAPTION = "no usable caption, or a tar that is gone"
SHARPNESS_PIXELS = 256
SCHEMA = [("row", pa.int64()), ("keep", pa.bool_()), ("why", pa.dictionary(pa.int8(), pa.string()))]


def select(
    graph: SampleGraph,
    *,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    prefer: Prefer | None = None,
    where: str | None = None,
    min_degree: int = 0,
    budget: float | None = None,
    method: str = "random",
    scores: str | None = None,
    labels: str | None = None,
    seed: int = 0,
) -> DerivedList:
    """Which rows of a store, and which of their captions, are kept, with why each other went.

    keep, drop: lists (row_lists.py), or names of the store's selections; all of keep are joined, and nothing else
    stays. prefer: which one of each group of `mine --what duplicates` stays, in the place of that list's own choice:
    the first row; the sharpest image (variance of the Laplacian of its grey values at 256 pixels); that whose node most
    lists name; that of the longest caption. Other lists to drop are dropped as they are.
    where: an SQL expression over the columns of `SampleColumns`. min_degree: least number of lists that name the node.
    budget: rows to keep, or a share of those left, chosen by `subsets.choose`. scores, labels: for the method, a column
    or a .npy by row.

    Columns: row int64, all rows in order; keep bool; why, null where kept; and in stores where samples have several
    captions `captions`, list<uint8>, the places of those kept, null: all. where and min_degree judge each caption by
    itself, and a sample goes with its last one. Counts: rows, kept, and each reason's rows.

    Raises:
        ConfigError: no rule, an option out of range, an expression that cannot be read or names no column.
        InputError: a list that cannot be read, of another graph, or of which no line names a sample.
    """
    rules: Json = {"keep": list(keep), "drop": list(drop), "prefer": prefer, "where": where}
    rules |= {"min_degree": min_degree or None, "budget": budget}
    if budget is not None:
        rules |= {"method": method, "scores": scores, "labels": labels, "seed": seed}
    rules = {name: value for name, value in rules.items() if value not in (None, [])}
    if not rules:
        raise ConfigError("no rule was given", "give --keep, --drop, --where, --min-degree or --budget")
    if prefer is not None and (prefer not in get_args(Prefer) or not drop):
        raise ConfigError(
            f"prefer = {prefer!r} without a list to drop" if prefer in get_args(Prefer) else f"prefer = {prefer!r}",
            f"use one of {', '.join(get_args(Prefer))}, with --drop and a list of `mine --what duplicates`",
        )
    if budget is not None and not 0 < budget < math.inf:
        raise ConfigError(f"budget = {budget}", "give a share up to 1, or a number of rows")
    if seed < 0:
        raise ConfigError(f"seed = {seed}", "give a whole number from 0 on")
    schema = pa.schema(SCHEMA + [(CAPTIONS, pa.list_(pa.uint8()))] * graph.is_plural)
    choice = _Choice(graph, rules)
    return DerivedList(WHAT, graph, rules, schema, lambda: choice.parts(schema), packed=("row",))


def select_store(store: Store, name: str, rules: Json, out: str | None = None, *, dry_run: bool = False) -> str:
    """Write a selection to STORE/selections/NAME.parquet, or to `out`; returns a line that says where.

    rules: by parameter of `select`. dry_run: only tell what would be read and written.

    Raises:
        ConfigError, InputError: as `select`; the file cannot be written.
    """
    if not re.fullmatch(r"[\w.-]+", name) or name.endswith(".parquet"):
        raise ConfigError(
            f"{name!r} is no name for a selection", "use letters, digits, -, _ and .; or name a file by --out"
        )
    path = f"{FOLDER}/{name}.parquet"
    return publish("select", lambda graph: select(graph, **rules), store, path, out, dry_run=dry_run)


class _Choice:
    """Which rows are still there while the rules go over them, and of plural stores which captions."""

    def __init__(self, graph: SampleGraph, rules: Json) -> None:
        self.graph, self.columns = graph, SampleColumns(graph)
        self.nodes = graph.sample_nodes()
        self.has_groups = False  # of the lists to drop, one at least
        self.why, self.reasons = np.zeros(len(self.nodes), np.int8), [""]
        if graph.is_plural:
            self.text_rows, self.text_nodes = map(np.concatenate, zip(*texts(graph), strict=True))
            self.text_kept = np.ones(len(self.text_rows), bool)
        self._out(self.nodes < 0, NO_CAPTION)
        if "keep" in rules:
            wanted = np.zeros(len(self.nodes), bool)
            for url in rules["keep"]:
                wanted |= self._listed(url, meant=True)
            self._out(~wanted, f"keep: in none of {', '.join(map(_short, rules['keep']))}")
        for url in rules.get("drop", ()):
            self._out(self._listed(url, meant=False, prefer=rules.get("prefer")), f"drop: {_short(url)}")
        if "prefer" in rules and not self.has_groups:
            lists = " and ".join(map(_short, rules["drop"]))
            raise InputError(f"prefer: {lists} without groups", "prefer needs a list of `mine --what duplicates`")
        if "where" in rules:
            kept, of_captions = rows_where(self.columns, rules["where"], plural=graph.is_plural)
            (self._only_captions if of_captions else self._only_rows)(kept, f"where: {rules['where']}")
        if "min_degree" in rules:
            enough, reason = self.graph.in_degrees >= rules["min_degree"], f"min degree: {rules['min_degree']}"
            if graph.is_plural:
                self._only_captions(enough[self.text_nodes], reason)
            else:
                self._out(~enough[self.nodes], reason)
        if "budget" in rules:
            self._only_rows(self._subset(rules), f"budget: {rules['method']}")

    def _out(self, goes: NDArray[np.bool_], reason: str) -> None:
        self.reasons.append(reason)
        self.why[goes & (self.why == 0)] = len(self.reasons) - 1

    def _only_rows(self, rows: NDArray[np.int64], reason: str) -> None:
        goes = np.ones(len(self.why), bool)
        goes[rows] = False
        self._out(goes, reason)

    def _only_captions(self, kept: NDArray[np.bool_], reason: str) -> None:
        self.text_kept &= kept
        self._only_rows(self.text_rows[self.text_kept], reason)

    def _listed(self, url: str, *, meant: bool, prefer: Prefer | None = None) -> NDArray[np.bool_]:
        """The rows that a list means: to be kept or, not meant, to be dropped."""
        store, own = Store(self.graph.url), f"{FOLDER}/{url}.parquet"
        if "/" not in url and not url.endswith((".parquet", ".npy", ".txt")) and store.exists(own):
            url = store.display(own)
        lines = read_list(url, self.graph)
        if prefer is not None and {"group", "row", "node", "caption"} <= set(lines.columns):
            self.has_groups = True
            lines = lines.with_columns(score=pl.Series(self._scores(lines, prefer)))
            best = lines.sort("group", "score", "row", descending=[False, True, False]).unique("group", keep="first")
            lines = lines.with_columns(keep=pl.col("row").is_in(best["row"].implode()))
        if "keep" in lines.columns and lines["keep"].dtype == pl.Boolean:
            lines = lines.filter(pl.col("keep") == meant)
        return rows_of(lines, url, self.graph, self.columns)

    def _scores(self, lines: pl.DataFrame, prefer: Prefer) -> Any:
        """What decides among the samples of a group, the greatest."""
        if prefer == "longest":
            return lines["caption"].str.len_chars()
        if prefer == "neighbors":
            return self.graph.in_degrees[lines["node"].to_numpy()]
        return np.zeros(len(lines)) if prefer == "first" else sharpness(self.graph, lines["row"].to_numpy())

    def _subset(self, rules: Json) -> NDArray[np.int64]:
        within = self.why == 0
        budget, left = rules["budget"], int(within.sum())
        if not left:
            raise ConfigError(
                f"budget = {budget} of no row: the rules before it keep no sample", "loosen them, or leave budget out"
            )
        count = round(budget * left) if budget <= 1 else int(budget)
        if not 0 < count <= left or (budget > 1 and budget != count):
            raise ConfigError(
                f"budget = {budget} of the {left:,} rows left", "give a share up to 1, or a smaller number"
            )
        given: Any = {name: self._by_row(rules[name]) for name in ("scores", "labels") if name in rules}
        return choose(self.graph, count, rules["method"], seed=rules["seed"], within=within, **given)

    def _by_row(self, given: str) -> NDArray[Any]:
        """A .npy [N], or a column by row; null, as a number NaN, where a sample has no value."""
        if given.endswith(".npy"):
            return read_array(given)
        every = pl.concat(self.columns.frames([given]), how="vertical_relaxed")
        rows = pl.DataFrame({"row": np.arange(len(self.nodes))})
        return rows.join(every, on="row", how="left", maintain_order="left")[given].to_numpy()

    def parts(self, schema: pa.Schema) -> Iterator[Part]:
        counts = {"rows": len(self.why), "kept": int((self.why == 0).sum())}
        counts |= {reason: int((self.why == code).sum()) for code, reason in enumerate(self.reasons) if code}
        if not counts["kept"]:
            logger.warning(
                "the selection keeps no sample: the column why of its file says by which rule each of %d rows went",
                len(self.why),
            )
        yield schema.empty_table(), counts
        reasons, captions = pa.array(self.reasons), self._captions() if CAPTIONS in schema.names else None
        for part in slices(len(self.why)):
            why = self.why[part]
            columns = {"row": pa.array(np.arange(part.start, part.stop)), "keep": pa.array(why == 0)}
            columns["why"] = pa.DictionaryArray.from_arrays(pa.array(why, mask=why == 0), reasons)
            if captions is not None:
                columns[CAPTIONS] = captions.slice(part.start, len(why))
            yield pa.table(columns, schema=schema), {}

    def _captions(self) -> pa.Array:
        """The places of the captions kept, of each row of which some are and some are not."""
        first = np.searchsorted(self.text_rows, np.arange(len(self.why) + 1))
        kept = np.bincount(self.text_rows[self.text_kept], minlength=len(self.why))
        partial = (kept > 0) & (kept < np.diff(first)) & (self.why == 0)
        chosen = self.text_kept & partial[self.text_rows]
        places = (np.arange(len(self.text_rows)) - first[self.text_rows])[chosen]
        offsets = np.concatenate([[0], np.cumsum(np.where(partial, kept, 0))])
        return pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(places, pa.uint8()), mask=pa.array(~partial)
        )


def sharpness(graph: SampleGraph, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Variance of the Laplacian of each row's image, grey at 256 pixels, [n]; -1 where no image can be decoded."""
    store = Store(graph.url)
    shards = shards_of(store, store.manifest())
    found = np.full(len(rows), -1.0)
    order = np.argsort(rows)
    ends = np.searchsorted(rows[order], [*shards.column("first_row"), np.iinfo(np.int64).max])
    for number, shard in enumerate(shards):
        own = order[ends[number] : ends[number + 1]]
        if not len(own) or shard.tar is None:
            continue
        table = store.table(SAMPLES.format(shard.name), ["image_offset", "image_size"])
        table = table.take(pa.array(rows[own] - shard.first_row))
        placed = own[table["image_offset"].is_valid().to_numpy()]
        table = table.filter(pc.is_valid(table["image_offset"]))
        starts, sizes = table["image_offset"].to_numpy(), table["image_size"].to_numpy()
        ranges = TarRanges([store.resolve(shard.tar["url"])])
        for at, start, size in zip(placed.tolist(), starts, sizes, strict=True):
            (content,) = ranges.read(np.zeros(1, np.int64), np.array([start]), np.array([start + size]))
            try:
                image = upright_rgb(io.BytesIO(content), max_pixels=MAX_PIXELS, least=SHARPNESS_PIXELS)
            except GraphbuildError:
                continue
            grey = np.asarray(image.convert("L").resize((SHARPNESS_PIXELS, SHARPNESS_PIXELS)), np.float64)
            inner = grey[1:-1, 1:-1]
            laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
            found[at] = laplacian.var()
    return found


def _short(url: str) -> str:
    return url.rpartition("/")[2]
