"""Which vector beside tars is whose: joined with samples by key, by order, or as members. Part of stage number.

Writes the place of each row's vector, `_state/number/places.npy`, and vectors that no sample has,
`rejected/number/<file>.parquet`. Memory: all keys, and 8 bytes for each vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from graphbuild.errors import InputError, public
from graphbuild.nodes.distinct import scanned
from graphbuild.nodes.samples import REJECTED
from graphbuild.recipe import Embed
from graphbuild.runner.stage import Task, digest, records
from graphbuild.sources.paths import by_numbers, known_first, named_files, part_inputs, parts_of
from graphbuild.sources.tables import ENDING as LIST_ENDING
from graphbuild.sources.tables import TableSpec, read_chunks
from graphbuild.sources.vector_files import ENDING, is_array, shapes_of
from graphbuild.store import layout
from graphbuild.store.files import file_identities
from graphbuild.store.layout import shard_name
from graphbuild.store.store import Json, Store, Writer

Array = np.ndarray[Any, Any]
NO_VECTOR = "no vector has its key"
SHOWN = 3  # keys of a side, where none is in both


class Files(NamedTuple):
    """Files of vectors, and for each the list of its rows' keys; none where they are joined by order."""

    vectors: list[str]
    keys: list[str]


def named(embed: Embed) -> Files:
    """The files that the options name, in order of name.

    Raises:
        InputError: they name none, or another number of files with keys than with vectors.
    """
    vectors = named_files(embed.vectors or "", ENDING, "--vectors")
    keys = []
    if embed.vector_keys is not None:
        keys = named_files(embed.vector_keys, LIST_ENDING, "--vector-keys")
    elif embed.key_column is not None:  # the vectors' own
        keys = [url for url in vectors if not is_array(url)]
    if (keys or embed.key_column is not None) and len(keys) != len(vectors):
        raise InputError(
            f"{len(vectors):,} files of vectors ({public(vectors[0])}, ...), and {len(keys):,} with their keys",
            "name a file of keys for each file of vectors by --vector-keys",
        )
    return Files(vectors, keys)


def numbering(embed: Embed, store: Store, scans: Mapping[str, str]) -> Task:
    """The task that matches vectors with the samples of these files of scan."""
    if embed.vector_member is not None:
        return Task(stage="number", name="all", settings={"joined": "as members"}, built=scans)
    files = named(embed)
    identities = file_identities([*files.vectors, *files.keys])
    done = records(store, "number").get("all", {"inputs": {}})["inputs"]
    vectors = known_first({url: identities[url] for url in files.vectors}, parts_of(done, "vectors"))
    beside = dict(zip(files.vectors, files.keys, strict=True)) if files.keys else {}
    keys = [beside[url] for url in vectors if beside]
    settings = {"joined": "by key" if keys else "by order", "vector_column": embed.vector_column}
    task = Task(
        stage="number",
        name="all",
        settings=settings | ({"key_column": embed.key_column or "key"} if keys else {}),
        inputs=part_inputs("vectors", vectors.values()) | part_inputs("keys", [identities[url] for url in keys]),
        built=scans,
        hints={"files": Files(list(vectors), keys)},
    )
    return task if keys else replace(task, hints={**task.hints, "pairs": _joined(task, store)})


def _joined(task: Task, store: Store) -> dict[int, int]:
    """The file of each tar that has been joined by order, by their numbers: it keeps it, whatever names are added or
    changed, as long as both are what they were."""
    done = records(store, "number").get("all")
    if not done or done["settings"].get("joined") != "by order":
        return {}
    before, now = parts_of(done["inputs"], "vectors"), parts_of(task.inputs, "vectors")
    places = store.array(layout.VECTOR_PLACES)
    pairs: dict[int, int] = {}
    for tar, (path, sha256) in enumerate(task.built.items()):
        shard = done["facts"]["shards"].get(Path(path).stem)
        if shard and shard["samples"] and done["built"].get(path) == sha256:
            file = before[int(file_of(done["facts"]["rows"], places[shard["first_row"]]))]
            pairs |= {tar: now.index(file)} if file in now else {}
    return pairs


def match(task: Task, store: Store, writer: Writer, tables: Sequence[pa.Table]) -> tuple[Array, Json]:
    """The place of each row's vector [N] among all vectors, -1: none; and facts of the stage. tables: of scan, `key`.

    Of members the place is the row: which samples have one shows when they are read.
    """
    sizes = [len(table) for table in tables]
    if "files" not in task.hints:
        return np.arange(sum(sizes)), {"rows": []}
    files: Files = task.hints["files"]
    rows = [rows for rows, _ in shapes_of(files.vectors, task.settings["vector_column"])]
    if not files.keys:
        places, left = _by_order(task, rows, sizes, store), 0
    else:
        places, left = _by_key(task, rows, tables, store, writer)
    writer.array(layout.VECTOR_PLACES, places)
    return places, {"rows": rows, "counts": {"vectors": sum(rows), "vectors_without_sample": left}}


def told(task: Task, facts: Json, places: Array) -> str:
    """A digest of all that decides the vectors of a shard's rows: the files that hold them, and where."""
    if not facts["rows"]:
        return ""
    inputs = parts_of(task.inputs, "vectors")
    held = np.unique(file_of(facts["rows"], places[places >= 0]))
    return digest([[inputs[number] for number in held.tolist()], hashlib.sha256(places.tobytes()).hexdigest()])


def file_of(rows: Sequence[int], places: Array) -> Array:
    return np.searchsorted(np.cumsum(rows), places, side="right")


def _by_order(task: Task, rows: Sequence[int], sizes: Sequence[int], store: Store) -> Array:
    """The place of each row's vector [N]: of files and tars that are not joined yet, both in order of name with numbers
    as numbers, the i-th belong together. InputError where they are not as many, or do not hold as many."""
    tars, urls, pairs = _tars(store), task.hints["files"].vectors, task.hints["pairs"]
    fix = "name the keys of the vectors by --vector-keys, or give a file for each tar, with a vector for each sample"
    if len(rows) != len(sizes):
        raise InputError(f"{len(rows):,} files of vectors, and {len(sizes):,} tars: no order joins them", fix)
    begins, places = np.cumsum([0, *rows]), [np.empty(0, np.int64)] * len(sizes)
    others = [[n for n in _ranked(names) if n not in known] for names, known in ((tars, pairs), (urls, pairs.values()))]
    for tar, file in [*pairs.items(), *zip(*others, strict=True)]:
        if rows[file] != sizes[tar]:
            raise InputError(
                f"{public(urls[file])} has {rows[file]:,} vectors, and {tars[tar]} {sizes[tar]:,} samples: no order "
                "joins them",
                fix,
            )
        places[tar] = np.arange(begins[file], begins[file + 1])
    return np.concatenate(places)


def _ranked(names: Sequence[str]) -> list[int]:
    return sorted(range(len(names)), key=lambda number: by_numbers(names[number]))


def _tars(store: Store) -> list[str]:
    return [shard["tar"]["name"] for record in scanned(store) for shard in record["facts"]["shards"].values()]


def _by_key(
    task: Task, rows: Sequence[int], tables: Sequence[pa.Table], store: Store, writer: Writer
) -> tuple[Array, int]:
    files: Files = task.hints["files"]
    begins = [0, *np.cumsum(rows).tolist()]
    frames = [
        _keys(url, task.settings["key_column"], count, begin, public(vectors))
        for url, vectors, count, begin in zip(files.keys, files.vectors, rows, begins, strict=False)
    ]
    theirs = pl.concat(frames)
    own = pl.concat([_keys_frame(table) for table in tables])
    own = own.with_row_index("row")
    twice = theirs.filter(pl.col("key").is_duplicated() & pl.col("key").is_not_null()).sort("key", "place")
    if len(twice):
        at = [int(place) for place in twice["place"][:2]]
        of = [public(files.keys[number]) for number in file_of(rows, np.array(at)).tolist()]
        raise InputError(
            f"two vectors have the key {twice['key'][0]!r}, in {of[0]} and {of[1]} "
            f"({twice['key'].n_unique():,} keys are there more than once)",
            "keep one vector for each key",
        )
    joined = own.join(theirs, on="key", how="left", maintain_order="left")
    twice = joined.filter(pl.col("key").is_duplicated() & pl.col("place").is_not_null()).sort("key", "row")
    if len(twice):
        at = file_of([len(table) for table in tables], twice["row"][:2].to_numpy()).tolist()
        raise InputError(
            f"two samples have the key {twice['key'][0]!r}, in {_tars(store)[at[0]]} and {_tars(store)[at[1]]}",
            "join vectors and tars by their order (--vector-keys none --key-column none), or give keys that differ",
        )
    if joined["place"].null_count() == len(joined):
        raise InputError(
            f"no key of {public(files.keys[0])} ... is a sample's. Keys of vectors: "
            f"{_some(theirs)}; of samples: {_some(own)}",
            "name the column with the tars' keys by --key-column",
        )
    left = theirs.join(own, on="key", how="anti", maintain_order="left")
    _reject(left, files, rows, writer)
    return joined["place"].fill_null(-1).to_numpy(), len(left)


def _keys(url: str, column: str, count: int, begin: int, vectors: str) -> pl.DataFrame:
    """The key and place of each vector of a file; null where its row has none."""
    chunks = list(read_chunks(TableSpec(path=url, columns={"key": column})))
    found = sum(len(chunk.rows) + len(chunk.rejected) for chunk in chunks)
    if found != count:
        raise InputError(
            f"{vectors} has {count:,} vectors, and {public(url)} {found:,} keys", "give a key for each vector, in order"
        )
    table = pa.concat_tables([chunk.rows for chunk in chunks])
    named = _keys_frame(table).with_columns(place=table["position"].to_numpy() + begin)
    every = pl.DataFrame({"place": np.arange(begin, begin + count)})
    return every.join(named, on="place", how="left", maintain_order="left")


def _keys_frame(table: pa.Table) -> pl.DataFrame:
    return pl.DataFrame(table.select(["key"])).cast(pl.String)


def _some(frame: pl.DataFrame) -> str:
    return ", ".join(repr(key) for key in frame["key"].drop_nulls()[:SHOWN])


def _reject(left: pl.DataFrame, files: Files, rows: Sequence[int], writer: Writer) -> None:
    """Keep which vectors no sample has: position in their file, key, and the file's name."""
    place, key = pl.col("place"), pl.col("key")
    reason = pl.when(key.is_null()).then(pl.lit("no key")).otherwise(pl.lit("no sample has its key"))
    for number, (begin, end) in enumerate(pairwise(np.cumsum([0, *rows]).tolist())):
        mine = left.filter(place.is_between(begin, end, closed="left"))
        if len(mine):
            name = public(files.vectors[number]).rsplit("/", 1)[-1]
            told = mine.select(place - begin, key, reason.alias("reason"), pl.lit(name).alias("content")).rechunk()
            table = told.to_arrow(compat_level=pl.CompatLevel.oldest()).rename_columns(REJECTED.names).cast(REJECTED)
            writer.table(f"{layout.REJECTED.format('number')}/{shard_name(number)}.parquet", table)
