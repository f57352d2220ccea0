"""What is known of a store's samples, by column, shard after shard: for expressions over them, and to find some again.

Columns are those of samples/, of the graph (degree, nearest, samples), of the table that img2dataset writes beside a
tar (NAME.parquet: width, height, similarity, ...), and the fields of the samples' JSON members, which also stand in for
a table that is missing beside a tar. Only what is asked for is read; JSON members are read one by one, where they lie
in the tars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphbuild.errors import ConfigError
from graphbuild.graph.lists.derived import OF_CAPTIONS, by_caption
from graphbuild.graph.sample_graph import Ids, SampleGraph
from graphbuild.nodes.samples import MORE
from graphbuild.sources.ranges import TarRanges
from graphbuild.sources.tars import tar_stem
from graphbuild.store.files import is_there, open_parts
from graphbuild.store.layout import SAMPLES
from graphbuild.store.shards import Shard, shards_of
from graphbuild.store.store import Store

OWN = ("row", "key", "shard", "image_size")
OF_GRAPH = ("degree", "nearest", "samples")
EXPLAINED = (
    "degree: lists that name the node; nearest: similarity of its nearest neighbour; samples: samples of the node"
)


class SampleColumns:
    """Columns of the samples that have a node, in order of row."""

    def __init__(self, graph: SampleGraph) -> None:
        self._graph, self._store = graph, Store(graph.url)
        self._shards = shards_of(self._store, self._store.manifest())

    def frames(self, names: Sequence[str], *, of_captions: bool = False) -> Iterator[pl.DataFrame]:
        """A frame a shard, with `row` and these columns; null where a sample has no value. of_captions: a line for each
        caption of a sample, in the order of `graphbuild.graph.lists.derived.texts`.

        Raises:
            ConfigError: no sample has such a column; it names those that there are.
        """
        places: dict[str, Callable[[Shard, pa.Table, list[str]], pl.DataFrame]] = {}
        types: dict[str, pl.DataType] = {}  # of columns that tables have, for shards where all is null
        for shard in self._shards:
            table = self._samples_of(shard, [*OWN, *OF_CAPTIONS, MORE])
            if not len(table):
                continue
            frame = self._lines(shard, table, of_captions=of_captions)
            for name in names:
                if name not in (*frame.columns, *OF_GRAPH, *places):
                    places[name] = self._place(shard, name, types)
            for read in dict.fromkeys(places.values()):
                wanted = [name for name, place in places.items() if place == read]
                frame = frame.join(read(shard, table, wanted), on="row", how="left", maintain_order="left")
            empty = [name for name in types if frame[name].dtype == pl.Null]
            frame = frame.with_columns(pl.col(name).cast(types[name]) for name in empty)
            nodes = frame["node"].to_numpy()
            graph = [pl.Series(name, self._of_nodes(name, nodes)) for name in OF_GRAPH if name in names]
            yield frame.with_columns(graph).select(list(dict.fromkeys(["row", *names])))

    def _samples_of(self, shard: Shard, columns: Sequence[str]) -> pa.Table:
        table = self._store.table(SAMPLES.format(shard.name), list(dict.fromkeys(["node", *columns])))
        return table.filter(pc.is_valid(table["node"]))

    def _lines(self, shard: Shard, table: pa.Table, *, of_captions: bool) -> pl.DataFrame:
        """What samples/ says, a line a sample or caption."""
        lines = by_caption(table) if of_captions else table
        frame = pl.DataFrame(lines.select([name for name in lines.column_names if name in (*OWN, *OF_CAPTIONS)]))
        weight = pl.col("weight").fill_null(1) if "weight" in frame.columns else pl.lit(1, pl.Float32)
        return frame.with_columns(weight=weight, shard=pl.lit(shard.tar["name"] if shard.tar else shard.name))

    def _place(
        self, shard: Shard, name: str, types: dict[str, pl.DataType]
    ) -> Callable[[Shard, pa.Table, list[str]], pl.DataFrame]:
        listed = self._table_beside(shard)
        if name not in listed.columns:
            if any(name in one for one in self._json(shard, 1_000)):
                return self._members
            if not len(listed.columns):  # a later tar may have a table
                listed = next((one for one in map(self._table_beside, self._shards) if len(one.columns)), listed)
        if name in listed.columns:
            types[name] = listed[name].dtype
            return self._listed
        raise ConfigError(
            f"no sample of {shard.name} of {self._store.url} has a column {name!r}",
            f"use one of {', '.join(self.names(shard))} ({EXPLAINED})",
        )

    def names(self, shard: Shard | None = None) -> list[str]:
        """The columns that samples of a shard have, or of the first one."""
        shard = shard or self._shards[0]
        beside, fields = self._table_beside(shard).columns, self._json(shard, 1_000)
        return list(dict.fromkeys([*OWN, *OF_CAPTIONS, *OF_GRAPH, *beside, *(key for one in fields for key in one)]))

    def _table_beside(self, shard: Shard) -> pl.DataFrame:
        """The table that img2dataset wrote beside a tar, a line a key; without columns where there is none."""
        if shard.tar is None:
            return pl.DataFrame()
        tar = self._store.resolve(shard.tar["url"])
        url = f"{tar.rpartition('/')[0]}/{tar_stem(tar)}.parquet"
        if not is_there(url):
            return pl.DataFrame()
        with open_parts(url) as stream:
            frame = pl.DataFrame(pq.ParquetFile(stream, pre_buffer=False).read(use_threads=False))
        return frame.unique("key", keep="first") if "key" in frame.columns else pl.DataFrame()

    def _listed(self, shard: Shard, table: pa.Table, names: list[str]) -> pl.DataFrame:
        beside = self._table_beside(shard)
        if not set(names) <= set(beside.columns):
            return self._members(shard, table, names)
        keys = pl.DataFrame({name: table[name].to_numpy() for name in ("row", "key")})
        return keys.join(beside.select("key", *names), on="key", how="left").drop("key")

    def _members(self, shard: Shard, table: pa.Table, names: list[str]) -> pl.DataFrame:
        found = self._json(shard)
        columns = {name: pl.Series(name, [one.get(name) for one in found], strict=False) for name in names}
        return pl.DataFrame({"row": table["row"].to_numpy(), **columns})

    def _json(self, shard: Shard, first: int | None = None) -> list[dict[str, Any]]:
        """The JSON members of a shard's samples, or of the first ones, each as a dict; an empty one where there is none
        that can be read."""
        table = self._samples_of(shard, ["members"]).slice(0, first)
        found: list[dict[str, Any]] = [{} for _ in range(len(table))]
        if shard.tar is None:
            return found
        members = pl.Series(table["members"]).to_frame("member").with_row_index("at").explode("member")
        places = members.unnest("member").filter(pl.col("extension").str.split(".").list.last() == "json")
        places = places.unique("at", keep="first", maintain_order=True)
        starts = places["offset"].to_numpy()
        tars, ends = np.zeros(len(places), np.int64), starts + places["size"].to_numpy()
        ranges = TarRanges([self._store.resolve(shard.tar["url"])])
        for at, content in zip(places["at"].to_list(), ranges.read(tars, starts, ends), strict=True):
            try:
                value = json.loads(content)
            except ValueError:
                continue
            found[at] = value if isinstance(value, dict) else {}
        return found

    def _of_nodes(self, name: str, nodes: Ids) -> Any:
        if name == "samples":
            return self._samples[nodes]
        return (self._graph.in_degrees if name == "degree" else self._graph.nearest_similarities)[nodes]

    @cached_property
    def _samples(self) -> Ids:
        nodes = self._graph.sample_nodes()
        return np.bincount(nodes[nodes >= 0], minlength=len(self._graph))


def rows_where(columns: SampleColumns, expression: str, *, plural: bool) -> tuple[Any, bool]:
    """Rows int64, or a bool for each caption, that an SQL expression is true of; and whether it is of captions.

    It is of captions where samples have several and it names one of their columns. Null is not true.

    Raises:
        ConfigError: no SQL expression, of columns that are not there, not true or false, or not of one sample alone.
    """
    fix = 'write an expression such as "width >= 200 AND similarity > 0.28", with text in single quotes'
    try:
        asked = pl.sql_expr(expression)
        names = list(dict.fromkeys(asked.meta.root_names()))
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise ConfigError(f"--where {expression!r} cannot be read ({error})", fix) from None

    def judged(part: pl.DataFrame) -> pl.Series:
        mask = part.select(asked.alias("asked"))["asked"]
        return mask.new_from_index(0, len(part)) if not names and len(mask) == 1 else mask  # as 1 = 1

    of_captions = plural and not set(names).isdisjoint((*OF_CAPTIONS, *OF_GRAPH))
    found: list[Any] = []
    for frame in columns.frames(names, of_captions=of_captions):
        try:
            mask, half = judged(frame), len(frame) // 2
            alone = [judged(part) for part in (frame[:half], frame[half:]) if half]
        except pl.exceptions.PolarsError as error:
            raise ConfigError(f"--where {expression!r} fails ({error})", fix) from None
        whole = len(mask) == len(frame) and (not alone or pl.concat(alone).equals(mask))
        if mask.dtype != pl.Boolean or not whole:
            said = (
                "looks at more than one sample" if mask.dtype == pl.Boolean else f"is {mask.dtype}, not true or false"
            )
            raise ConfigError(f"--where {expression!r} {said}", fix)
        kept = mask.fill_null(False).to_numpy()
        found.append(kept if of_captions else frame["row"].to_numpy()[kept])
    return np.concatenate(found) if found else np.empty(0, np.int64), of_captions
