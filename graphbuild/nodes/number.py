"""Stages number, texts and assign: samples get their rows, distinct texts their node ids.

Node ids follow the first appearance of a text in row order, so a shard's new nodes are consecutive, ids do not depend
on worker count, and shards added later never renumber. `number` is one task over the 128-bit hashes alone (memory:
about 150 bytes a sample). `texts` tells by a digest which texts are new in a shard; then they are encoded. `assign`
leaves out the texts of which the encoder has made no vector, closes the gaps that these leave in the ids, and writes
samples/<shard>.parquet, nodes/<shard>.parquet and, for the samples of such texts, rejected/assign/<shard>.parquet.
Two different texts with one hash would become one node: at 1e9 texts the chance is 1.5e-21.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from graphbuild.errors import InputError
from graphbuild.nodes.samples import COLUMNS, NO_NODE, write_rejected
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, records, summed
from graphbuild.runner.state import require
from graphbuild.store.layout import NODE_COUNTS, ROW_NODES, SAMPLES, SCANNED, TEXTS, by_number
from graphbuild.store.remote import READERS
from graphbuild.store.shards import PLACES, Shard, is_whole, write_shards
from graphbuild.store.store import Json, Store, Writer

NO_VECTOR = "the encoder gives no vector"


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


def plan_texts(recipe: Recipe, store: Store) -> list[Task]:
    """A task a shard; none where the records of assign tell the same, as they do in stores made without this stage."""
    scans = _scans(store)
    (numbering,) = require(store, "number", "embed")
    told = {name: record["built"]["scan"] for name, record in records(store, "assign").items()}
    if told.items() >= scans.items() and not records(store, "texts"):
        return []
    shards = numbering["facts"]["shards"]
    return [Task(stage="texts", name=name, built={**shards[name], "scan": sha}) for name, sha in scans.items()]


def run_texts(task: Task, store: Store, writer: Writer) -> Json:
    texts = new_texts(store, task.name, task.built)
    return {"counts": {"texts": len(texts)}, "texts_sha256": digest(texts)}


def new_texts(store: Store, name: str, shard: Mapping[str, Any]) -> list[str]:
    """The texts that appear in a shard first, in order of node; shard: its facts of stage number."""
    scan = store.table(SCANNED.format(name), ["text"])
    nodes = store.rows(ROW_NODES, shard["first_row"], shard["first_row"] + shard["samples"])
    return list(scan["text"].filter(_first_rows(nodes, shard["first_node"])).to_pylist())


def _first_rows(nodes: np.ndarray[Any, Any], first_node: int) -> pa.Array:
    """bool [n]: the rows in which a node from first_node on appears first, of the nodes of a shard's rows [n]."""
    highest = np.maximum.accumulate(np.concatenate([[first_node - 1], nodes]))
    return pa.array(nodes > highest[:-1])


def plan_assign(recipe: Recipe, store: Store) -> list[Task]:
    (numbering,) = require(store, "number", "embed")
    encoded = {record["task"]: record["facts"].get("without", []) for record in require(store, "encode", "embed")}
    gone: list[int] = []  # nodes, as stage number has them, without a vector
    tasks, told = [], ""
    for name, sha in _scans(store).items():
        shard = numbering["facts"]["shards"][name]
        own = [shard["first_node"] + place for place in encoded[name]]
        built = {**shard, "scan": sha}
        if gone or own:
            left = {"first_node": shard["first_node"] - len(gone), "nodes": shard["nodes"] - len(own)}
            gone += own
            told = digest([told, own])
            built |= {**left, "without": told}
        hints = {"first_node": shard["first_node"], "nodes": shard["nodes"], "without": gone}
        tasks.append(Task(stage="assign", name=name, built=built, hints=hints))
    return tasks


def _scans(store: Store) -> dict[str, str]:
    """Shard -> sha256 of what scan wrote of it, in order of number."""
    scans = outputs(require(store, "scan", "embed"), "_state/scan/")
    return {Path(path).stem: sha256 for path, sha256 in scans.items()}


def run_assign(task: Task, store: Store, writer: Writer) -> Json:
    first, count, first_node, new = (task.built[place] for place in PLACES)
    begin, numbered, gone = task.hints["first_node"], task.hints["nodes"], np.array(task.hints["without"], np.int64)
    found = store.rows(ROW_NODES, first, first + count)
    without = np.isin(found, gone)
    nodes = np.where(without, NO_NODE, found - np.searchsorted(gone, found))
    scan = store.table(SCANNED.format(task.name))
    row = pa.array(np.arange(first, first + count, dtype=np.int64))
    samples = scan.append_column("row", row).append_column("node", pa.array(nodes, mask=nodes == NO_NODE))
    writer.table(SAMPLES.format(task.name), samples.select(COLUMNS))
    texts = scan["text"].filter(_first_rows(found, begin))
    kept = ~np.isin(np.arange(begin, begin + numbered), gone)
    counts = store.rows(NODE_COUNTS, begin, begin + numbered)[kept]
    table = pa.table({"node": np.arange(first_node, first_node + new), "text": texts.filter(kept), "samples": counts})
    writer.table(TEXTS.format(task.name), table)
    counted = {"samples": count, "nodes": new}
    facts: Json = {"counts": counted, "texts_sha256": digest(texts.to_pylist())}
    if not without.any():
        return facts
    places = np.flatnonzero(without)
    lost = scan.select(["key", "caption"]).take(places).to_pylist()
    rejected = [(at, one["key"], NO_VECTOR, one["caption"]) for at, one in zip(places.tolist(), lost, strict=True)]
    write_rejected("assign", task.name, rejected, writer)
    return {**facts, "counts": {**counted, "rejected": len(lost)}, "reasons": {NO_VECTOR: len(lost)}}


def finish_assign(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    scanned = require(store, "scan", "embed")
    rejected = dict(sorted(summed([*scanned, *done], "reasons").items()))
    return {**write_shards(store, assigned_shards(done, scanned)), "rejected": rejected}


def assigned_shards(assigned: Iterable[Json], scanned: Iterable[Json]) -> list[Shard]:
    """The shards of the records of these stages, in order of row."""
    tars = {name: shard["tar"] for record in scanned for name, shard in record["facts"]["shards"].items()}
    found = [
        Shard(name=record["task"], tar=tars[record["task"]], **{place: record["built"][place] for place in PLACES})
        for record in assigned
    ]
    return sorted(found, key=lambda shard: (shard.first_row, by_number(shard.name)))


NUMBER = Stage(name="number", title="numbering", plan=plan_number, run=run_number)
NEW_TEXTS = Stage(name="texts", title="texts", plan=plan_texts, run=run_texts)
ASSIGN = Stage(
    name="assign",
    title="nodes",
    plan=plan_assign,
    run=run_assign,
    finish=finish_assign,
    entries=("shards",),
    whole=is_whole,
)
