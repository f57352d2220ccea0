"""Stages number and assign: samples get their rows, distinct texts their node ids.

Node ids follow the first appearance of a text in row order, so a shard's new nodes are consecutive, ids do not depend
on worker count, and shards added later never renumber. `number` is one task over the 128-bit hashes alone (memory:
about 150 bytes a sample); `assign` is one task a shard and writes samples/<shard>.parquet and nodes/<shard>.parquet.
Two different texts with one hash would become one node: at 1e9 texts the chance is 1.5e-21.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from graphbuild.errors import InputError
from graphbuild.nodes.samples import COLUMNS, NO_NODE
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs
from graphbuild.runner.state import require
from graphbuild.store.layout import NODE_COUNTS, ROW_NODES, SAMPLES, SCANNED, TEXTS, by_number
from graphbuild.store.remote import READERS
from graphbuild.store.shards import PLACES, Shard, is_whole, write_shards
from graphbuild.store.store import Json, Store, Writer


def plan_number(recipe: Recipe, store: Store) -> list[Task]:
    scans = outputs(require(store, "scan", "embed"), "_state/scan/")
    return [Task(stage="number", name="all", built=scans)]


def run_number(task: Task, store: Store, writer: Writer) -> Json:
    names = [Path(path).stem for path in task.built]
    columns = ["hash_high", "hash_low"]
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(lambda path: store.table(path, columns), task.built))
    sizes = [table.num_rows for table in tables]
    nodes, counts = number_nodes(pl.from_arrow(pa.concat_tables(tables)))  # type: ignore[arg-type]
    if not len(counts):
        fix = "see rejected/scan/ for the reasons" if sum(sizes) else "give tars that hold samples: these hold none"
        raise InputError(f"no sample of {store.url} has a caption", fix)
    writer.array(ROW_NODES, nodes)
    writer.array(NODE_COUNTS, counts)
    shards: dict[str, Json] = {}
    first_row = first_node = 0
    for name, size in zip(names, sizes, strict=True):
        mine = nodes[first_row : first_row + size]
        new = max(int(mine.max(initial=NO_NODE)) + 1 - first_node, 0)
        counted = counts[first_node : first_node + new]
        places = dict(zip(PLACES, (first_row, size, first_node, new), strict=True))
        shards[name] = {**places, "sha256": hashlib.sha256(mine.tobytes() + counted.tobytes()).hexdigest()}
        first_row += size
        first_node += new
    return {"counts": {"samples": first_row, "nodes": first_node}, "shards": shards}


def number_nodes(hashes: pl.DataFrame) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Node of each row by first appearance of its hash, int64 [N] (NO_NODE for hash 0), and rows a node, int64 [M]."""
    key = ["hash_high", "hash_low"]
    present = (pl.col("hash_high") != 0) | (pl.col("hash_low") != 0)
    distinct = hashes.filter(present).unique(key, keep="first", maintain_order=True).with_row_index("node")
    joined = hashes.join(distinct, on=key, how="left", maintain_order="left")
    nodes = joined["node"].cast(pl.Int64).fill_null(NO_NODE).to_numpy()
    return nodes, np.bincount(nodes[nodes >= 0], minlength=distinct.height).astype(np.int64)


def plan_assign(recipe: Recipe, store: Store) -> list[Task]:
    scans = outputs(require(store, "scan", "embed"), "_state/scan/")
    (numbering,) = require(store, "number", "embed")
    shards = numbering["facts"]["shards"]
    names = {Path(path).stem: sha256 for path, sha256 in scans.items()}
    return [Task(stage="assign", name=name, built={**shards[name], "scan": names[name]}) for name in names]


def run_assign(task: Task, store: Store, writer: Writer) -> Json:
    shard = task.built
    first, count, first_node, new = (shard[place] for place in PLACES)
    nodes = store.rows(ROW_NODES, first, first + count)
    scan = store.table(SCANNED.format(task.name))
    row = pa.array(np.arange(first, first + count, dtype=np.int64))
    samples = scan.append_column("row", row).append_column("node", pa.array(nodes, mask=nodes == NO_NODE))
    writer.table(SAMPLES.format(task.name), samples.select(COLUMNS))
    ids, places = np.unique(nodes, return_index=True)
    texts = scan["text"].take(pa.array(places[ids >= first_node]))
    counts = store.rows(NODE_COUNTS, first_node, first_node + new)
    table = pa.table({"node": np.arange(first_node, first_node + new), "text": texts, "samples": counts})
    writer.table(TEXTS.format(task.name), table)
    return {"counts": {"samples": count, "nodes": new}, "texts_sha256": digest(texts.to_pylist())}


def finish_assign(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    return write_shards(store, assigned_shards(done, require(store, "scan", "embed")))


def assigned_shards(assigned: Iterable[Json], scanned: Iterable[Json]) -> list[Shard]:
    """The shards of the records of these stages, in order of row."""
    tars = {name: shard["tar"] for record in scanned for name, shard in record["facts"]["shards"].items()}
    found = [
        Shard(name=record["task"], tar=tars[record["task"]], **{place: record["built"][place] for place in PLACES})
        for record in assigned
    ]
    return sorted(found, key=lambda shard: (shard.first_row, by_number(shard.name)))


NUMBER = Stage(name="number", title="numbering", plan=plan_number, run=run_number)
ASSIGN = Stage(
    name="assign",
    title="nodes",
    plan=plan_assign,
    run=run_assign,
    finish=finish_assign,
    entries=("shards",),
    whole=is_whole,
)
