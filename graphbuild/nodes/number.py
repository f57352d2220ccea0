"""Stages number, texts and assign: samples get their rows, distinct texts their node ids.

Node ids follow the first appearance of a text in row order, so a shard's new nodes are consecutive, ids do not depend
on worker count, and shards added later never renumber. `number` reads the 128-bit hashes alone, in one task, or beyond
16 million captions in tasks of as many (graphbuild.nodes.distinct, which tells their memory). `texts` tells by a digest
which texts are new in a shard; then they are encoded. With vectors beside tars (graphbuild.nodes.join) each sample that
has one is a node in place of its text. `assign` leaves out the texts of which the encoder has made no vector, closes
the gaps that these leave in the ids, and writes samples/<shard>.parquet, nodes/<shard>.parquet and, for the samples of
such texts, rejected/assign/<shard>.parquet. Tars that are gone keep their rows and nodes; their samples have no node
any more, and count for none.
Two different texts with one hash would become one node: at 1e9 texts the chance is 1.5e-21.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from graphbuild.errors import InputError
from graphbuild.nodes import distinct, join
from graphbuild.nodes.distinct import GONE, scanned
from graphbuild.nodes.samples import COLUMNS, MORE, MORE_TYPE, NO_NODE, sample_places, write_rejected
from graphbuild.recipe import BESIDE, Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, records, summed
from graphbuild.runner.state import require
from graphbuild.store.layout import (
    NODE_COUNTS,
    ROW_NODES,
    SAMPLES,
    SCANNED,
    TEXTS,
    TEXTS_OPTIONS,
    by_number,
    shard_name,
)
from graphbuild.store.shards import PLACES, Shard, is_whole, write_shards
from graphbuild.store.store import Json, Store, Writer

Array = np.ndarray[Any, Any]
NO_VECTOR = "the encoder gives no vector"


def plan_number(recipe: Recipe, store: Store) -> list[Task]:
    groups = distinct.groups_of(recipe, store)
    if recipe.embed.source == BESIDE:
        return [join.numbering(recipe.embed, store, groups[0])]
    if len(groups) == 1:
        return [Task(stage="number", name="all", built=groups[0])]
    split, of_all = records(store, "split"), digest(groups)  # no records once all is numbered: no hint is needed then
    tasks, before = [], [0, 0]
    for name, group in zip(map(shard_name, range(len(groups))), groups, strict=True):
        sizes = split[name]["facts"]["shards"] if name in split else {}
        hints = {"groups": len(groups), "sizes": sizes, "before": before}
        tasks.append(Task(stage="number", name=name, built={**group, "groups": of_all}, hints=hints))
        before = [sum(one) for one in zip(before, *sizes.values(), strict=True)]
    return tasks


def run_number(task: Task, store: Store, writer: Writer) -> Json:
    paths = [path for path in task.built if path not in (GONE, "groups")]
    names, gone = [Path(path).stem for path in paths], set(task.built.get(GONE, []))
    found: Json = {}
    of, first_row, first_text, first_node = "", 0, 0, 0
    if task.settings:
        return join.number(task, store, writer)
    if "groups" in task.hints:
        of, (first_row, first_text) = f"{task.name}.", task.hints["before"]
        sizes = [task.hints["sizes"][name] for name in names]
        bits = [store.array(distinct.BITS.format(shard_name(number))) for number in range(task.hints["groups"])]
        nodes, ends = distinct.nodes_of(store.array(distinct.FIRSTS.format(task.name)), bits)
        counts, first_node, total = store.array(distinct.COUNTS.format(task.name)), ends[int(task.name)], ends[-1]
        found = {"first_text": first_text, "first_node": first_node}
    else:
        hashes, sizes, there = distinct.read_hashes(store, paths, gone)
        nodes, counts = number_nodes(hashes, there)
        total = int(counts.sum())
    if not total:
        fix = "see rejected/scan/ for the reasons" if len(nodes) else "give tars that hold samples: these hold none"
        raise InputError(f"no sample of {store.url} has a caption", fix)
    writer.array(ROW_NODES.format(of), nodes)
    writer.array(NODE_COUNTS.format(of), counts)
    shards: dict[str, Json] = {}
    rows, texts, new_nodes = first_row, first_text, first_node  # before a shard
    for name, (held, size) in zip(names, sizes, strict=True):
        place = texts - first_text
        mine = nodes[place : place + size]
        new = max(int(mine.max(initial=NO_NODE)) + 1 - new_nodes, 0)
        counted = counts[new_nodes - first_node : new_nodes - first_node + new]
        places: Json = dict(zip(PLACES, (rows, held, new_nodes, new), strict=True))
        if (texts, size) != (rows, held):
            places |= {"first_text": texts, "texts": size}
        if name in gone:
            places[GONE] = True
        shards[name] = {**places, "sha256": hashlib.sha256(mine.tobytes() + counted.tobytes()).hexdigest()}
        rows += held
        texts += size
        new_nodes += new
    numbered = {"samples": rows - first_row, "nodes": new_nodes - first_node}
    return {"counts": numbered, "shards": shards, **found}


def number_nodes(hashes: Array, there: Array) -> tuple[Array, Array]:
    """Node of each caption by first appearance of its hash, int64 [N] (NO_NODE for hash 0), and captions a node [M], of
    those that are there. hashes: uint64 [N, 2]. there: bool [N]."""
    firsts, counts = distinct.first_appearances(hashes, there)
    return distinct.nodes_of(firsts, [distinct.as_bits(distinct.are_first(firsts))])[0], counts


def numbered(store: Store) -> dict[str, tuple[Json, Json]]:
    """Shard -> its facts of stage number, and where its group lies: the beginning of its files' names, and the first
    caption and node in them."""
    found: dict[str, tuple[Json, Json]] = {}
    for record in require(store, "number", "embed"):
        of, facts = "" if record["task"] == "all" else f"{record['task']}.", record["facts"]
        group = {"of": of, **{first: facts.get(first, 0) for first in ("first_text", "first_node")}}
        found |= {name: (shard, group) for name, shard in facts["shards"].items()}
    return found


def plan_texts(recipe: Recipe, store: Store) -> list[Task]:
    """A task a shard; none where the records of assign tell the same, as they do in stores made without this stage, and
    none of vectors beside tars, which are not of texts."""
    if recipe.embed.source == BESIDE:
        return []
    scans = _scans(store)
    told = {name: record["built"]["scan"] for name, record in records(store, "assign").items()}
    if told.items() >= scans.items() and not records(store, "texts"):
        return []
    shards = numbered(store)
    return [
        Task(stage="texts", name=name, built={**shards[name][0], "scan": sha}, hints={"group": shards[name][1]})
        for name, sha in scans.items()
    ]


def run_texts(task: Task, store: Store, writer: Writer) -> Json:
    texts = new_texts(store, task.name, task.built, task.hints["group"])
    return {"counts": {"texts": len(texts)}, "texts_sha256": digest(texts)}


def new_texts(store: Store, name: str, shard: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """The texts that appear in a shard first, in order of node; shard and group: as `numbered` tells."""
    scan = store.table(SCANNED.format(name), ["text"])
    nodes = _nodes(store, shard, group)
    return list(scan["text"].filter(_first_rows(nodes, shard["first_node"])).to_pylist())


def _nodes(store: Store, shard: Mapping[str, Any], group: Mapping[str, Any]) -> Array:
    """The nodes of a shard's captions, int64 [n]; shard and group: as `numbered` tells."""
    first = shard.get("first_text", shard["first_row"]) - group["first_text"]
    return store.rows(ROW_NODES.format(group["of"]), first, first + shard.get("texts", shard["samples"]))


def _first_rows(nodes: Array, first_node: int) -> pa.Array:
    """bool [n]: the rows in which a node from first_node on appears first, of the nodes of a shard's rows [n]."""
    highest = np.maximum.accumulate(np.concatenate([[first_node - 1], nodes]))
    return pa.array(nodes > highest[:-1])


def plan_assign(recipe: Recipe, store: Store) -> list[Task]:
    shards = numbered(store)
    encoded = {record["task"]: record["facts"] for record in require(store, "encode", "embed")}
    gone: list[int] = []  # nodes, as stage number has them, without a vector
    tasks, told = [], ""
    for name, sha in _scans(store).items():
        shard, group = shards[name]
        own = [shard["first_node"] + place for place in encoded[name].get("without", [])]
        why = encoded[name].get("why")  # of vectors beside tars alone
        built = {**shard, "scan": sha}
        if gone or own:
            left = {"first_node": shard["first_node"] - len(gone), "nodes": shard["nodes"] - len(own)}
            gone += own
            told = digest([told, own, *([why] if why else [])])
            built |= {**left, "without": told}
        hints = {"first_node": shard["first_node"], "nodes": shard["nodes"], "without": gone, "group": group}
        hints |= {} if why is None else {"why": dict(zip(own, why, strict=True))}
        tasks.append(Task(stage="assign", name=name, built=built, hints=hints))
    return tasks


def _scans(store: Store) -> dict[str, str]:
    """Shard -> sha256 of what scan wrote of it, in order of number."""
    scans = outputs(scanned(store), "_state/scan/")
    return {Path(path).stem: sha256 for path, sha256 in scans.items()}


def run_assign(task: Task, store: Store, writer: Writer) -> Json:
    first, count, first_node, new = (task.built[place] for place in PLACES)
    begin, ids, gone = task.hints["first_node"], task.hints["nodes"], np.array(task.hints["without"], np.int64)
    group = task.hints["group"]
    found = _nodes(store, task.built, group)
    without = np.isin(found, gone)
    nodes = np.where(without | bool(task.built.get(GONE)), NO_NODE, found - np.searchsorted(gone, found))
    scan = store.table(SCANNED.format(task.name))
    writer.table(SAMPLES.format(task.name), _samples(scan, nodes, first))
    texts = scan["text"].filter(_first_rows(found, begin))
    kept = ~np.isin(np.arange(begin, begin + ids), gone)
    first_count = begin - group["first_node"]
    counts = store.rows(NODE_COUNTS.format(group["of"]), first_count, first_count + ids)[kept]
    table = pa.table({"node": np.arange(first_node, first_node + new), "text": texts.filter(kept), "samples": counts})
    writer.table(TEXTS.format(task.name), table, **TEXTS_OPTIONS)
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


def _samples(scan: pa.Table, nodes: Array, first_row: int) -> pa.Table:
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
