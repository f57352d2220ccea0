"""Stages number, texts and assign: samples get their rows, distinct texts their node ids.

Node ids follow the first appearance of a text in row order, so a shard's new nodes are consecutive, ids do not depend
on worker count, and shards added later never renumber. `number` is one task over the 128-bit hashes alone (memory:
about 150 bytes a sample). `texts` tells by a digest which texts are new in a shard; then they are encoded. With vectors
beside tars (graphbuild.nodes.join) each sample that has one is a node in place of its text. `assign`
leaves out the texts of which the encoder has made no vector, closes the gaps that these leave in the ids, and writes
samples/<shard>.parquet, nodes/<shard>.parquet and, for the samples of such texts, rejected/assign/<shard>.parquet.
Tars that are gone keep their rows and nodes; their samples have no node any more, and count for none.
Two different texts with one hash would become one node: at 1e9 texts the chance is 1.5e-21.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from graphbuild.errors import InputError
from graphbuild.nodes import join
from graphbuild.nodes.samples import COLUMNS, MORE, MORE_TYPE, NO_NODE, write_rejected
from graphbuild.recipe import BESIDE, Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, records, summed
from graphbuild.runner.state import require
from graphbuild.store.layout import NODE_COUNTS, ROW_NODES, SAMPLES, SCANNED, TEXTS, by_number
from graphbuild.store.remote import READERS
from graphbuild.store.shards import PLACES, Shard, is_whole, write_shards
from graphbuild.store.store import Json, Store, Writer

NO_VECTOR = "the encoder gives no vector"
GONE = "gone"  # among what a numbering or an assignment is made of: the shards, or whether it is one, of a tar that is


def plan_number(recipe: Recipe, store: Store) -> list[Task]:
    scans = outputs(scanned(store), "_state/scan/")
    if recipe.embed.source == BESIDE:
        return [join.numbering(recipe.embed, store, scans)]
    gone = store.manifest().get("gone")
    return [Task(stage="number", name="all", built=scans | ({GONE: gone} if gone else {}))]


def scanned(store: Store) -> list[Json]:
    """The records of the scans of all tars that have rows, also of those that are gone."""
    there = {record["task"]: record for record in require(store, "scan", "embed")}
    found = records(store, "scan", "gone") | there
    return [found[name] for name in sorted(found, key=by_number)]


def run_number(task: Task, store: Store, writer: Writer) -> Json:
    paths = [path for path in task.built if path != GONE]
    names, gone = [Path(path).stem for path in paths], set(task.built.get(GONE, []))
    # the third where samples have several captions; the key is for vectors beside tars
    columns = ["key"] if task.settings else ["hash_high", "hash_low", "sample"]
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(lambda path: store.table(path, columns), paths))
    sizes = [table.num_rows for table in tables]
    samples = [sample_places(table)[-1:].sum() + bool(len(table)) for table in tables]
    found: Json = {}
    if task.settings:
        at, found = join.match(task, store, writer, tables)
        nodes = np.where(at >= 0, np.cumsum(at >= 0) - 1, NO_NODE)
        counts = np.ones(int((at >= 0).sum()), np.int64)
    else:
        hashed = pa.concat_tables([table.select(["hash_high", "hash_low"]) for table in tables])
        nodes, counts = number_nodes(pl.from_arrow(hashed))  # type: ignore[arg-type]
        there = nodes[np.repeat([name not in gone for name in names], sizes)]
        counts = np.bincount(there[there >= 0], minlength=len(counts)).astype(np.int64) if gone else counts
    if not counts.any():
        fix = "see rejected/scan/ for the reasons" if sum(sizes) else "give tars that hold samples: these hold none"
        raise InputError(f"no sample of {store.url} has a caption", fix)
    writer.array(ROW_NODES, nodes)
    writer.array(NODE_COUNTS, counts)
    shards: dict[str, Json] = {}
    first_row = first_node = first_text = 0
    for name, size, held in zip(names, sizes, map(int, samples), strict=True):
        mine = nodes[first_text : first_text + size]
        new = max(int(mine.max(initial=NO_NODE)) + 1 - first_node, 0)
        counted = counts[first_node : first_node + new]
        places: Json = dict(zip(PLACES, (first_row, held, first_node, new), strict=True))
        if (first_text, size) != (first_row, held):
            places |= {"first_text": first_text, "texts": size}
        if name in gone:
            places[GONE] = True
        if task.settings:
            places["vectors"] = join.told(task, found, at[first_text : first_text + size])
        shards[name] = {**places, "sha256": hashlib.sha256(mine.tobytes() + counted.tobytes()).hexdigest()}
        first_row += held
        first_node += new
        first_text += size
    counted = {"samples": first_row, "nodes": first_node} | found.pop("counts", {})
    return {"counts": counted, "shards": shards, **found}


def number_nodes(hashes: pl.DataFrame) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Node of each caption by first appearance of its hash, int64 [N] (NO_NODE for hash 0), and captions a node [M]."""
    key = ["hash_high", "hash_low"]
    present = (pl.col("hash_high") != 0) | (pl.col("hash_low") != 0)
    distinct = hashes.filter(present).unique(key, keep="first", maintain_order=True).with_row_index("node")
    joined = hashes.join(distinct, on=key, how="left", maintain_order="left")
    nodes = joined["node"].cast(pl.Int64).fill_null(NO_NODE).to_numpy()
    return nodes, np.bincount(nodes[nodes >= 0], minlength=distinct.height).astype(np.int64)


def plan_texts(recipe: Recipe, store: Store) -> list[Task]:
    """A task a shard; none where the records of assign tell the same, as they do in stores made without this stage, and
    none of vectors beside tars, which are not of texts."""
    if recipe.embed.source == BESIDE:
        return []
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
    nodes = _nodes(store, shard)
    return list(scan["text"].filter(_first_rows(nodes, shard["first_node"])).to_pylist())


def _nodes(store: Store, shard: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The nodes of a shard's captions, int64 [n]; shard: its facts of stage number."""
    first = shard.get("first_text", shard["first_row"])
    return store.rows(ROW_NODES, first, first + shard.get("texts", shard["samples"]))


def sample_places(scan: pa.Table) -> np.ndarray[Any, Any]:
    """The place in its shard of the sample of each caption [n] of a table of scan."""
    return scan["sample"].to_numpy() if "sample" in scan.column_names else np.arange(len(scan))


def _first_rows(nodes: np.ndarray[Any, Any], first_node: int) -> pa.Array:
    """bool [n]: the rows in which a node from first_node on appears first, of the nodes of a shard's rows [n]."""
    highest = np.maximum.accumulate(np.concatenate([[first_node - 1], nodes]))
    return pa.array(nodes > highest[:-1])


def plan_assign(recipe: Recipe, store: Store) -> list[Task]:
    (numbering,) = require(store, "number", "embed")
    encoded = {record["task"]: record["facts"] for record in require(store, "encode", "embed")}
    gone: list[int] = []  # nodes, as stage number has them, without a vector
    tasks, told = [], ""
    for name, sha in _scans(store).items():
        shard = numbering["facts"]["shards"][name]
        own = [shard["first_node"] + place for place in encoded[name].get("without", [])]
        why = encoded[name].get("why")  # of vectors beside tars alone
        built = {**shard, "scan": sha}
        if gone or own:
            left = {"first_node": shard["first_node"] - len(gone), "nodes": shard["nodes"] - len(own)}
            gone += own
            told = digest([told, own, *([why] if why else [])])
            built |= {**left, "without": told}
        hints = {"first_node": shard["first_node"], "nodes": shard["nodes"], "without": gone}
        hints |= {} if why is None else {"why": dict(zip(own, why, strict=True))}
        tasks.append(Task(stage="assign", name=name, built=built, hints=hints))
    return tasks


def _scans(store: Store) -> dict[str, str]:
    """Shard -> sha256 of what scan wrote of it, in order of number."""
    scans = outputs(scanned(store), "_state/scan/")
    return {Path(path).stem: sha256 for path, sha256 in scans.items()}


def run_assign(task: Task, store: Store, writer: Writer) -> Json:
    first, count, first_node, new = (task.built[place] for place in PLACES)
    begin, numbered, gone = task.hints["first_node"], task.hints["nodes"], np.array(task.hints["without"], np.int64)
    found = _nodes(store, task.built)
    without = np.isin(found, gone)
    nodes = np.where(without | bool(task.built.get(GONE)), NO_NODE, found - np.searchsorted(gone, found))
    scan = store.table(SCANNED.format(task.name))
    writer.table(SAMPLES.format(task.name), _samples(scan, nodes, first))
    texts = scan["text"].filter(_first_rows(found, begin))
    kept = ~np.isin(np.arange(begin, begin + numbered), gone)
    counts = store.rows(NODE_COUNTS, begin, begin + numbered)[kept]
    table = pa.table({"node": np.arange(first_node, first_node + new), "text": texts.filter(kept), "samples": counts})
    writer.table(TEXTS.format(task.name), table)
    counted = {"samples": count, "nodes": new, **({"gone_nodes": lost} if (lost := int((counts == 0).sum())) else {})}
    facts: Json = {"counts": counted, "texts_sha256": digest(texts.to_pylist())}
    why = task.hints.get("why")
    places = np.flatnonzero(without if why is None else nodes == NO_NODE)
    if not len(places):
        return facts
    lost = scan.select(["key", "caption"]).take(places).to_pylist()
    positions = sample_places(scan)[places].tolist()
    reasons = [NO_VECTOR if why is None else why.get(node, join.NO_VECTOR) for node in found[places].tolist()]
    rejected = [
        (at, one["key"], reason, one["caption"]) for at, one, reason in zip(positions, lost, reasons, strict=True)
    ]
    write_rejected("assign", task.name, rejected, writer)
    return {**facts, "counts": {**counted, "rejected": len(lost)}, "reasons": dict(Counter(reasons))}


def _samples(scan: pa.Table, nodes: np.ndarray[Any, Any], first_row: int) -> pa.Table:
    """The table of samples/: a row a sample, with its first caption that has a node, and in MORE what others have one.

    Weights are of the captions with a node, and sum to 1. Where none has a positive one, the first has all.
    """
    captions = scan.append_column("node", pa.array(nodes, mask=nodes == NO_NODE))
    if "sample" not in scan.column_names:
        row = pa.array(np.arange(first_row, first_row + len(scan), dtype=np.int64))
        return captions.append_column("row", row).select(COLUMNS)
    sample = sample_places(scan)
    order = np.lexsort((np.arange(len(scan)), nodes == NO_NODE, sample))  # those with a node before the others
    _, begin = np.unique(sample[order], return_index=True)
    is_first = np.zeros(len(scan), bool)
    is_first[order[begin]] = True
    weight = np.where(nodes == NO_NODE, 0, scan["weight"].to_numpy().astype(np.float64))
    total = np.bincount(sample, weight)
    weight = np.where(total[sample] > 0, weight / np.where(total > 0, total, 1)[sample], is_first & (nodes != NO_NODE))
    captions = captions.set_column(captions.schema.get_field_index("weight"), "weight", pa.array(weight, pa.float32()))
    is_more = ~is_first & (nodes != NO_NODE)
    offsets = np.cumsum([0, *np.bincount(sample[is_more], minlength=len(begin))])
    more = captions.select([field.name for field in MORE_TYPE.value_type]).filter(pa.array(is_more)).to_struct_array()
    own = captions.filter(pa.array(is_first))
    row = pa.array(np.arange(first_row, first_row + len(own), dtype=np.int64))
    behind = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), more.combine_chunks(), type=MORE_TYPE)
    return own.append_column("row", row).select([*COLUMNS, "weight"]).append_column(MORE, behind)


def finish_assign(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    rejected = dict(sorted(summed([*require(store, "scan", "embed"), *done], "reasons").items()))
    return {**write_shards(store, assigned_shards(done, scanned(store))), "rejected": rejected}


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
