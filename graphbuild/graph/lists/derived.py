"""What derived lists share: how they read a graph in bounded memory, and how they become a table or a parquet file.

A list is made part by part while it is read. Writing takes one row group's memory; a file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graphbuild.errors import ConfigError
from graphbuild.graph.sample_graph import Ids, SampleGraph
from graphbuild.nodes.samples import MORE, write_rejected
from graphbuild.runner.stage import Stage, Task, perform
from graphbuild.store.layout import REJECTED, SAMPLES
from graphbuild.store.lock import writing
from graphbuild.store.remote import reaching
from graphbuild.store.shards import shards_of
from graphbuild.store.store import FORMAT_VERSION, Json, Store, Writer

BLOCK = 16_384  # nodes, samples or pairs at a time
ROW_GROUP = 262_144  # rows
METADATA_KEY = "graphbuild"
OF_CAPTIONS = ("caption", "node", "weight")  # of the columns of samples/

logger = logging.getLogger(__name__)

Part = tuple[pa.Table, dict[str, int]]  # some rows, and what was counted while they were made


class DerivedList:
    """A derived list, made anew whenever it is read: by iteration, `table()` or `save()`.

    what, options: which list, and by what it was filtered. graph: what its ids refer to. schema: of the tables that
    iteration gives, in order. packed: columns of ascending integers, of which the file holds differences.
    inputs: the identity of files outside the store. rejected: rows of `write_rejected`, filled while the list is made.
    """

    def __init__(
        self,
        what: str,
        graph: SampleGraph,
        options: Json,
        schema: pa.Schema,
        parts: Callable[[], Iterator[Part]],
        *,
        packed: Sequence[str] = (),
        inputs: Mapping[str, str] | None = None,
        rejected: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        self.what, self.graph, self.options, self.schema = what, graph, options, schema
        self.inputs, self.rejected = inputs or {}, rejected
        self._parts = parts
        self._encodings = dict.fromkeys(packed, "DELTA_BINARY_PACKED")
        self._counts: dict[str, int] | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        total: Counter[str] = Counter()
        for table, counts in self._parts():
            total.update(counts)
            yield table
        self._counts = dict(total)

    @property
    def counts(self) -> dict[str, int]:
        """What the list's function says it counts; ConfigError before the list was read to its end."""
        if self._counts is None:
            raise ConfigError(f"the counts of {self.what} are known once it is read", "call table() or save() before")
        return self._counts

    def table(self) -> pa.Table:
        """All rows, in memory."""
        return pa.concat_tables([self.schema.empty_table(), *self])

    def save(self, store: Store, name: str) -> int:
        """Write a zstd-compressed parquet file `name` of the store and return its rows.

        Its key-value metadata has the key `graphbuild`, a JSON object: format_version, what, options, counts, rows, and
        graph, the fingerprint of the graph that the ids refer to. A list in a folder of STAGES gets a record of its
        sha256 in `_state/`, by which `graphbuild verify` knows it.
        """
        folder, _, stem = name.removesuffix(".parquet").rpartition("/")
        if folder not in STAGES:
            with store.staged(name) as path:
                return self.write(path)

        options = json.loads(json.dumps(self.options, default=np.generic.item))
        settings, built = {"what": self.what, **options}, {"graph": self.graph.fingerprint}
        stage = STAGES[folder]
        hints = {"list": self, "path": name}
        task = Task(stage=stage.name, name=stem, settings=settings, inputs=self.inputs, built=built, hints=hints)
        store.remove(f"{REJECTED.format(stage.name)}/{stem}.parquet")  # of the list before
        return int(perform(stage, task, store)["facts"]["counts"]["rows"])

    def write(self, path: Path) -> int:
        """Write the parquet file and return its rows."""
        about: Json = {"format_version": FORMAT_VERSION, "what": self.what, "options": self.options, "rows": 0}
        about["graph"] = self.graph.fingerprint
        names = [name for name in self.schema.names if name not in self._encodings]
        with pq.ParquetWriter(
            path,
            self.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=names if self._encodings else True,
            column_encoding=self._encodings or None,
        ) as writer:
            for group in self._row_groups():
                writer.write_table(group, row_group_size=ROW_GROUP)
                about["rows"] += len(group)
            about["counts"] = self.counts
            writer.add_key_value_metadata({METADATA_KEY: json.dumps(about, sort_keys=True, default=np.generic.item)})
        return int(about["rows"])

    def _row_groups(self) -> Iterator[pa.Table]:
        waiting = self.schema.empty_table()
        for part in self:
            waiting = pa.concat_tables([waiting, part])  # copies nothing
            if len(waiting) >= ROW_GROUP:
                yield waiting
                waiting = self.schema.empty_table()
        yield waiting


def _save(task: Task, store: Store, writer: Writer) -> Json:
    made = task.hints["list"]
    with writer.file(task.hints["path"]) as path:
        rows = made.write(path)
    write_rejected(task.stage, task.name, made.rejected, writer)
    return {"counts": {"rows": rows}}


MINE = Stage(name="mine", title="mining", plan=lambda recipe, store: [], run=_save)
SELECT = Stage(name="select", title="selection", plan=lambda recipe, store: [], run=_save)
MATCH = Stage(name="match", title="matching", plan=lambda recipe, store: [], run=_save)
STAGES = {"mined": MINE, "selections": SELECT, "match": MATCH}  # by the folder of their lists


def about(file: Any) -> Json:
    """What the metadata of a list says (`DerivedList.save`), by path or open file; nothing of another parquet file."""
    return dict(json.loads((pq.read_metadata(file).metadata or {}).get(METADATA_KEY.encode(), b"{}")))


def place_of(store: Store, path: str, out: str | None, *, dry_run: bool = False) -> tuple[Store, str]:
    """The folder, and the name in it, of a list's file: `out`, or `path` in the store.

    Raises:
        ConfigError: it cannot be written there, which a dry run does not try.
    """
    folder, name = store, path
    if out is not None:
        parent, name = _split(out)
        try:
            folder = Store(parent)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"--out {out} cannot be opened ({error})", "name a path, or a URL fsspec knows") from None
    with reaching(folder.display(name)):
        is_folder = folder.fs.isdir(folder.path(name))
    if is_folder:
        raise ConfigError(f"{folder.display(name)} is a folder", "name a file by --out")
    if dry_run:
        return folder, name
    try:
        folder.check_writable()
    except ConfigError as error:
        raise ConfigError(f"{folder.display(name)}: {error.cause}", "name a file that you may write by --out") from None
    return folder, name


def _split(out: str) -> tuple[str, str]:
    parent, _, name = out.rpartition("/") if "://" in out else (str(Path(out).parent), "", Path(out).name)
    if not name.endswith(".parquet") or parent.endswith(":/"):
        raise ConfigError(f"--out {out} names no parquet file", "end it with a file's name, such as list.parquet")
    return parent, name


def publish(
    verb: str, make: Callable[[SampleGraph], DerivedList], store: Store, path: str, out: str | None, *, dry_run: bool
) -> str:
    """Write a list of a store to `out`, or to `path` in it; log its counts, and return a line that names the file.

    dry_run: only tell what would be read and written.
    """
    with contextlib.nullcontext() if dry_run or out is not None else writing(store, verb):
        begin = time.monotonic()
        graph = SampleGraph.open(store.url)
        made = make(graph)
        folder, name = place_of(store, path, out, dry_run=dry_run)
        is_there = folder.exists(name)
        if dry_run:
            replaced = ", in place of the list that is there" if is_there else ""
            edges = f"filter {len(graph) * graph.k:,} edges of {len(graph):,} nodes into"
            does = f"compare with {len(graph):,} nodes, into" if verb == MATCH.name else edges
            return f"{verb:<9} would {does} {folder.display(name)}{replaced}"
        rows = made.save(folder, name)
        counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in made.counts.items())
        nothing = "" if rows else "; nothing passed the filter: the file has 0 rows"
        logger.info("%-9s %s in %.1f s: %s%s", verb, made.what, time.monotonic() - begin, counts, nothing)
        replaced = ", in place of the list that was there" if is_there else ""
        return f"{verb:<9} {rows:,} rows, in {folder.display(name)}{replaced}"


def blocks(graph: SampleGraph) -> Iterator[tuple[int, NDArray[np.uint32], NDArray[np.float16]]]:
    """`SampleGraph.edge_blocks` in pieces of at most BLOCK nodes."""
    for first, neighbors, similarities in graph.edge_blocks():
        for part in slices(len(neighbors)):
            yield first + part.start, neighbors[part], similarities[part]


def samples(graph: SampleGraph, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Each shard's name and its samples that have a node; `node` must be one of the columns."""
    store = Store(graph.url)
    for name in shards_of(store, store.manifest()).names:
        table = store.table(SAMPLES.format(name), columns)
        yield name, table.filter(pc.is_valid(table["node"]))


def texts(graph: SampleGraph) -> Iterator[tuple[Ids, Ids]]:
    """A shard's samples that have a node: row and node int64 of each of their captions, by row."""
    for table in captions(Store(graph.url)):
        yield table["row"].to_numpy(), table["node"].to_numpy()


def captions(store: Store, columns: Sequence[str] = ("row", "node")) -> Iterator[pa.Table]:
    """A shard's samples that have a node: a line for each of their captions. columns: of samples/."""
    for name in shards_of(store, store.manifest()).names:
        yield by_caption(store.table(SAMPLES.format(name), [*columns, MORE]))


def by_caption(samples: pa.Table) -> pa.Table:
    """Of samples those that have a node: a line for each of their captions, by row. The columns OF_CAPTIONS are the
    caption's own."""
    columns = [name for name in samples.column_names if name != MORE]
    firsts = samples.filter(pc.is_valid(samples["node"])).select(columns)
    if MORE not in samples.column_names:
        return firsts
    more = samples[MORE].combine_chunks()
    further = samples.select(columns).take(pc.list_parent_indices(more))
    for at, column in enumerate(columns):
        if column in OF_CAPTIONS:
            further = further.set_column(at, column, pc.struct_field(more.flatten(), column))
    both = pa.concat_tables([firsts, further])
    return both.take(np.argsort(both["row"].to_numpy(), kind="stable"))


def slices(count: int) -> Iterator[slice]:
    """0..count-1 in pieces of at most BLOCK."""
    return (slice(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK))


def reaches(similarities: NDArray[Any], least: Any) -> NDArray[np.bool_]:
    """Where similarities, rounded to float16 as the store's are, are at least `least`, a float or float32 array."""
    return np.asarray(similarities.astype(np.float16).astype(np.float32) >= least)


def count_truncated(graph: SampleGraph, close: NDArray[np.bool_]) -> int:
    """Nodes whose whole list, a row of close bool [n, k], is close: others as close may lie beyond its end."""
    return int(close[:, -1].sum()) if graph.k < len(graph) - 1 else 0


def check_similarity(name: str, value: float) -> None:
    """Raise ConfigError unless a value is a cosine."""
    if not -1 <= value <= 1:
        raise ConfigError(f"{name} = {value}", f"set {name} between -1 and 1, as cosines are")
