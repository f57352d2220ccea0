"""A store's shards: which rows, nodes and tar each holds. shards.parquet has a row a shard, in order of row.

The manifest names the table by its sha256, so it does not grow with shards, and the two are noticed where they are of
different states. A process reads the table once while it stays the same: about 60 bytes a shard on disk, 200 in
memory. Stores of format version 1 hold the same facts in the manifest itself, and are read as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphbuild.errors import StageError
from graphbuild.store.layout import SHARDS
from graphbuild.store.remote import reaching
from graphbuild.store.store import TABLE_VERSION, Json, Store, Writer

PLACES = ("first_row", "samples", "first_node", "nodes")
TAR = ("url", "name", "bytes", "sha256")
SCHEMA = pa.schema(
    [("shard", pa.string())]
    + [(name, pa.int64()) for name in PLACES]
    + [(f"tar_{name}", pa.int64() if name == "bytes" else pa.string()) for name in TAR]
)


class Shard(NamedTuple):
    """One shard. name: of its files in samples/, nodes/ and graph/. tar: its url (a relative one lies in the store),
    name, bytes and sha256; None where the samples came from no tar."""

    name: str
    first_row: int
    samples: int
    first_node: int
    nodes: int
    tar: Json | None


@dataclass(frozen=True)
class Shards:
    """All shards, in order of row: one at a time as a `Shard`, or as columns [S]. digest: equal where all is equal."""

    digest: str
    table: pa.Table = field(compare=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, number: int) -> Shard:
        return _shard(*(column[number].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Shard]:
        for batch in self.table.to_batches(max_chunksize=4096):
            yield from map(_shard, *(column.to_pylist() for column in batch.columns))

    def column(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """first_row, samples, first_node or nodes of each, int64 [S]."""
        return np.asarray(self.table[name])

    @cached_property
    def names(self) -> list[str]:
        return list(self.table["shard"].to_pylist())

    @cached_property
    def with_nodes(self) -> Shards:
        """Those that hold a node: only they have files in graph/."""
        return Shards(f"{self.digest} with nodes", self.table.filter(pc.greater(self.table["nodes"], 0)))


def present_shards(store: Store, manifest: Json) -> Shards:
    """`shards_of`, without those of tars that are gone: they keep their rows and nodes, but no sample has a node."""
    shards = shards_of(store, manifest)
    gone = manifest.get("gone", [])
    if not gone:
        return shards
    there = pc.invert(pc.is_in(shards.table["shard"], pa.array(gone)))
    return Shards(f"{shards.digest} without {','.join(gone)}", shards.table.filter(there))


def shards_of(store: Store, manifest: Json) -> Shards:
    """The shards that a manifest tells of; none before samples have their rows.

    Raises:
        StageError: the table is gone, damaged, or of another state than the manifest.
    """
    entry = manifest.get("shards", [])
    if isinstance(entry, dict):
        return _read(store, entry["sha256"])
    return Shards(manifest.get("checksum", ""), _table(entry))  # as format version 1 lists them


def latest_shards(store: Store) -> Iterable[Shard]:
    """The shards for a stage that comes before the table: of a command that was stopped just before it wrote the
    manifest, those of the newer table; none where the table is lost, which is then written anew from the records."""
    manifest = store.manifest()
    if not isinstance(manifest.get("shards"), dict):
        return shards_of(store, manifest)
    try:
        return Shards("", store.table(SHARDS))
    except StageError:
        return ()


def node_count(manifest: Json) -> int:
    """Nodes of the store, M."""
    entry = manifest["shards"]
    return int(entry["nodes"]) if isinstance(entry, dict) else sum(shard["nodes"] for shard in entry)


def write_shards(store: Store, shards: Iterable[Shard]) -> Json:
    """Write the table, before the manifest that names it; returns the manifest's entries for it."""
    rows = [{**shard._asdict(), "shard": shard.name} for shard in shards]
    table = _table(rows)
    writer = Writer(store)
    writer.table(SHARDS, table)
    totals = {name: pc.sum(table[name]).as_py() or 0 for name in ("samples", "nodes")}
    return {"format_version": TABLE_VERSION, "shards": {**writer.outputs[0], "shards": len(table), **totals}}


def is_whole(store: Store, manifest: Json) -> bool:
    """Whether the table that the manifest names is there, in its length; what else may ail it `verify` finds."""
    entry = manifest.get("shards")
    if not isinstance(entry, dict):
        return True
    try:
        with reaching(store.display(SHARDS)):
            return bool(store.fs.size(store.path(SHARDS)) == entry["bytes"])
    except FileNotFoundError:
        return False


@lru_cache(maxsize=4)
def _read(store: Store, sha256: str) -> Shards:
    fix = f"run `graphbuild embed {store.url}` again, which writes it anew from the records"
    try:
        content = store.read_bytes(SHARDS)
    except FileNotFoundError:
        raise StageError(f"{store.display(SHARDS)} is missing", fix) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StageError(
            f"{store.display(SHARDS)} is not the table that manifest.json was made with",
            f"{fix}; if it is damaged, delete it before",
        )
    # Not by pq.read_table: its threads may outlive the interpreter, and abort it while they hold a Python object.
    return Shards(sha256, pq.ParquetFile(pa.BufferReader(content), pre_buffer=False).read(use_threads=False))


def _table(rows: list[Json]) -> pa.Table:
    """Of rows that hold a tar as a dict."""
    tars = [row.get("tar") or {} for row in rows]
    columns = [[row.get(name) for row in rows] for name in ("shard", *PLACES)]
    columns += [[tar.get(name) for tar in tars] for name in TAR]
    return pa.table(columns, schema=SCHEMA)


def _shard(name: str, first_row: int, samples: int, first_node: int, nodes: int, *tar: Any) -> Shard:
    described = None if tar[0] is None else dict(zip(TAR, tar, strict=True))
    return Shard(name, first_row, samples, first_node, nodes, described)
