"""Where each text appears first, and how often; beyond GROUP captions by the stages split, unique and mark.

Captions are numbered a group of shards at a time. Where all are one group, stage number does it by itself. Else split
(a task a group) finds which texts the group has, and sorts their 128-bit hashes by partition, as many as there are
groups; unique (a task a partition) reads its own of each group by range, and finds where each text is first; mark (a
task a group) tells by that where the text of each row appears first, and marks the first rows, a bit each. A task reads
what is of its group or partition alone, and holds TASK_BYTES a caption of it: as split leaves each text once, no
partition is larger than a group, however often one text comes. Scratch: up to 72 bytes a caption.
Vectors beside tars and samples are joined by their keys in the same way (graphbuild.nodes.keys): mark tells the place
of each sample's vector.

A place is group x 2^32 + row in the group, so places sort as rows do, and no task needs to know how long the groups
before its own are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from graphbuild.nodes import keys
from graphbuild.nodes.samples import NO_NODE, sample_places
from graphbuild.recipe import BESIDE, Embed, Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, records
from graphbuild.runner.state import require
from graphbuild.sources.vector_files import shapes_of
from graphbuild.store.layout import by_number, shard_name
from graphbuild.store.remote import READERS
from graphbuild.store.store import Json, Store, Writer

Array = np.ndarray[Any, Any]
GONE = "gone"  # among what a numbering or an assignment is made of: the shards, or whether it is one, of a tar that is
GROUP = 16_000_000  # captions that a task numbers, at most, unless one shard has more
TASK_BYTES = 90  # held a caption of a task's group or partition
STORE_BYTES = 0.4  # and in stage number for each caption of the store: its bit, and what is counted up to it
GROUP_BITS = 32
BLOCK = 1_000_000  # captions whose temporary arrays are made at a time
LOCAL = "_work_number/split/{}.firsts.npy"  # int64 [n]: row of the group in which each row's text is first, or NO_NODE
SPLIT = "_work_number/split/{}.npy"  # uint64 [m, 4] of each text of a group: hash_high, hash_low, its first row, rows
UNIQUE = "_work_number/unique/{}.npy"  # int64 [m, 2] of rows of SPLIT: place where that text is first, captions with it
FIRSTS = "_work_number/mark/{}.firsts.npy"  # int64 [n]: place where each row's text appears first, or NO_NODE
COUNTS = "_work_number/mark/{}.counts.npy"  # int64 [new]: captions with each text that appears first in the group
BITS = "_work_number/mark/{}.bits.npy"  # uint64 [n // 64 + 1]: bit i % 64 of word i // 64: row i is a first one
PLACES = "_work_number/mark/{}.places.npy"  # int64 [n]: place of each sample's vector among all vectors, or NO_NODE
LEFT = "_work_number/mark/{}.{}.left.parquet"  # of a group and a file of vectors: those that no sample has


# -- what one task does in memory


def first_appearances(hashes: Array, there: Array) -> tuple[Array, Array]:
    """Of hashes uint64 [n, 2] the row in which that of each row appears first, int64 [n], NO_NODE for zeros; and in how
    many rows that of each first one is, int64 [m]. there: how often each row counts, [n], or whether it does."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # equal ones stay in their order, zeros come first
    in_order = hashes[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    has_zeros = bool(len(order)) and not in_order[0].any()
    del in_order
    begins = np.flatnonzero(is_new)
    sizes = np.diff(begins, append=len(order))
    firsts, counts = np.empty(len(order), np.int64), np.zeros(len(order), np.int64)
    firsts[order] = np.repeat(order[begins], sizes)
    counts[order[begins]] = np.add.reduceat(there[order], begins, dtype=np.int64) if len(order) else sizes
    if has_zeros:
        firsts[order[: sizes[0]]] = NO_NODE
    return firsts, counts[are_first(firsts)]


def are_first(firsts: Array, group: int = 0) -> Array:
    """bool [n]: whether the text of a row is first there, of the first places [n] of a group's rows."""
    is_first: Array = firsts == (group << GROUP_BITS) + np.arange(len(firsts))
    return is_first


def as_bits(marks: Array) -> Array:
    """BITS of bools [n]."""
    bits = np.zeros((len(marks) // 64 + 1) * 8, np.uint8)
    packed = np.packbits(marks, bitorder="little")
    bits[: len(packed)] = packed
    return bits.view("<u8")


def nodes_of(firsts: Array, bits: Sequence[Array]) -> tuple[Array, list[int]]:
    """Nodes int64 [n] of the first places [n], each how many texts are first before it; NO_NODE stays. And the first
    node of each group, with the number of all nodes behind. bits: BITS of all groups."""
    begins, words = np.cumsum([0, *map(len, bits)]), np.concatenate(bits)
    before = np.zeros(len(words) + 1, np.int64)
    np.cumsum(np.bitwise_count(words), dtype=np.int64, out=before[1:])
    nodes = np.full(len(firsts), NO_NODE)
    for begin in range(0, len(firsts), BLOCK):
        known = begin + np.flatnonzero(firsts[begin : begin + BLOCK] != NO_NODE)
        places = firsts[known]
        word = begins[places >> GROUP_BITS] + ((places & ((1 << GROUP_BITS) - 1)) >> 6)
        below = words[word] & ((np.uint64(1) << (places & 63).astype(np.uint64)) - np.uint64(1))
        nodes[known] = before[word] + np.bitwise_count(below)
    return nodes, before[begins].tolist()


def read_hashes(store: Store, paths: Sequence[str], gone: Collection[str]) -> tuple[Array, list[list[int]], Array]:
    """Of files of scan behind each other the hash of each caption, uint64 [n, 2], zeros where it is without a text;
    samples and captions of each file; and whether each caption is there, bool [n]. gone: shards of which none is."""
    hashes, sizes, end = np.empty((0, 2), np.uint64), [], 0
    columns = ["hash_high", "hash_low", "sample"]  # the third where samples have several captions
    for first in range(0, len(paths), READERS):
        for table in side_by_side(lambda path: store.table(path, columns), paths[first : first + READERS]):
            begin, end = end, end + len(table)
            if end > len(hashes):  # where it lies: all tables, and then one array of them, would take twice as much
                hashes.resize((max(end, begin + BLOCK), 2), refcheck=False)
            hashes[begin:end, 0], hashes[begin:end, 1] = table["hash_high"], table["hash_low"]
            sizes.append([int(sample_places(table)[-1:].sum()) + bool(len(table)), len(table)])
    return hashes[:end], sizes, np.repeat([Path(path).stem not in gone for path in paths], [size for _, size in sizes])


def side_by_side(read: Callable[..., Any], *of: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, *of))


# -- the stages


def scanned(store: Store) -> list[Json]:
    """The records of the scans of all tars that have rows, also of those that are gone."""
    there = {record["task"]: record for record in require(store, "scan", "embed")}
    found = records(store, "scan", "gone") | there
    return [found[name] for name in sorted(found, key=by_number)]


def groups_of(recipe: Recipe, store: Store) -> list[dict[str, Any]]:
    """What each task of stage number is made of, in order of row: scans, path -> sha256, and GONE, if any are. One task
    does all also with vectors beside tars, and where it has done so before."""
    done, gone = scanned(store), store.manifest().get(GONE, [])
    scans = outputs(done, "_state/scan/")
    if recipe.embed.source == BESIDE:
        return [scans]
    whole, numbered = scans | ({GONE: gone} if gone else {}), records(store, "number").get("all", {})
    if numbered.get("built") == whole and not numbered["settings"]:
        return [whole]
    sizes: dict[str, float] = {}
    for record in done:
        counts = record["facts"]["counts"]
        a_sample = max(counts.get("captions", 0) / max(counts["samples"], 1), 1)
        sizes |= {name: shard["samples"] * a_sample for name, shard in record["facts"]["shards"].items()}
    groups: list[dict[str, Any]] = []
    for paths in keys.grouped(((path, sizes[Path(path).stem]) for path in scans), GROUP):
        own = [name for path in paths if (name := Path(path).stem) in gone]
        groups.append({path: scans[path] for path in paths} | ({GONE: own} if own else {}))
    return groups if len(groups) > 1 else [whole]


def samples_of(store: Store) -> dict[str, int]:
    """File of scan -> its samples, in order of row."""
    done = scanned(store)
    shards = {name: shard["samples"] for record in done for name, shard in record["facts"]["shards"].items()}
    return {path: shards[Path(path).stem] for path in outputs(done, "_state/scan/")}


def key_groups(embed: Embed, store: Store) -> tuple[list[keys.Group], str]:
    """The groups of vectors beside tars and of samples, and a digest of what they are of; none where they are joined
    otherwise, or one task holds all."""
    if embed.vector_member is not None:
        return [], ""
    files, identities = keys.given(embed, store)
    if not files.keys:
        return [], ""
    rows, samples = [count for count, _ in shapes_of(files.vectors, embed.vector_column)], samples_of(store)
    if sum(rows) + sum(samples.values()) <= GROUP:
        return [], ""
    column = embed.key_column or "key"
    groups = keys.in_groups(files, rows, column, samples, GROUP)
    of_files = [identities[url] for urls in files for url in urls]
    told = [column, of_files, outputs(scanned(store), "_state/scan/"), [[one.first, one.rows] for one in groups]]
    return groups, digest(told)


def plan_split(recipe: Recipe, store: Store) -> list[Task]:
    hints: list[Json]
    if recipe.embed.source == BESIDE:
        of_keys, of_all = key_groups(recipe.embed, store)
        hints = [{"group": group, "parts": len(of_keys)} for group in of_keys]
    else:
        groups = groups_of(recipe, store)
        of_all, hints = digest(groups), []
        for group in groups if len(groups) > 1 else ():
            scans = [path for path in group if path != GONE]
            hints.append({"scans": scans, "parts": len(groups), "gone": group.get(GONE, [])})
    built = {"groups": of_all}
    return [Task(stage="split", name=shard_name(n), built=built, hints=own) for n, own in enumerate(hints)]


def run_split(task: Task, store: Store, writer: Writer) -> Json:
    group: keys.Group | None = task.hints.get("group")
    if group is not None:
        hashes, shards, there = group.hashes(store), {}, np.ones(group.rows, bool)
    else:
        hashes, sizes, there = read_hashes(store, task.hints["scans"], task.hints["gone"])
        shards = dict(zip((Path(path).stem for path in task.hints["scans"]), sizes, strict=True))
    firsts, counts = first_appearances(hashes, there)
    writer.array(LOCAL.format(task.name), firsts, durable=False)
    rows = np.flatnonzero(are_first(firsts))
    del firsts
    part = (hashes[rows, 1] % np.uint64(task.hints["parts"])).astype(np.uint16)
    order = np.argsort(part, kind="stable")
    split = np.empty((len(rows), 4), np.uint64)
    split[:, 3] = counts[order]
    if group is not None and group.pieces:
        split[:, 3] *= np.uint64(keys.VECTOR)
    rows = rows[order]
    del counts, order
    split[:, 0], split[:, 1], split[:, 2] = hashes[rows, 0], hashes[rows, 1], rows
    writer.array(SPLIT.format(task.name), split, durable=False)
    return {"shards": shards, "sizes": np.bincount(part, minlength=task.hints["parts"]).tolist()}


def _by_range(stage: str, store: Store, of_groups: bool) -> list[Task]:
    """A task a partition or a group, with its range in the file of each group or partition."""
    split = list(records(store, "split").values())
    sizes = [record["facts"]["sizes"] for record in split]  # by group, then by partition
    ends = [[0, *accumulate(each)] for each in (sizes if of_groups else zip(*sizes, strict=True))]
    return [
        Task(stage=stage, name=record["task"], built=record["built"], hints={"ranges": [e[n : n + 2] for e in ends]})
        for n, record in enumerate(split)
    ]


def run_unique(task: Task, store: Store, writer: Writer) -> Json:
    ranges = task.hints["ranges"]
    ends = [0, *accumulate(end - begin for begin, end in ranges)]
    own = np.empty((ends[-1], 4), np.uint64)

    def read(group: int) -> None:
        rows = own[ends[group] : ends[group + 1]]
        rows[:] = store.rows(SPLIT.format(shard_name(group)), *ranges[group])
        rows[:, 2] += np.uint64(group << GROUP_BITS)

    side_by_side(read, range(len(ranges)))
    counts = np.zeros(len(own), np.int64)
    firsts, of_first = first_appearances(own[:, :2], own[:, 3])
    counts[are_first(firsts)] = of_first
    found = np.stack([own[firsts, 2].astype(np.int64), counts[firsts]], axis=1)
    writer.array(UNIQUE.format(task.name), found, durable=False)
    return {}


def plan_mark(recipe: Recipe, store: Store) -> list[Task]:
    tasks = _by_range("mark", store, False)
    if not tasks or recipe.embed.source != BESIDE:
        return tasks
    groups, _ = key_groups(recipe.embed, store)
    firsts = [group.first for group in groups if group.pieces]
    return [  # of other groups than split had, nothing is asked but whether they are done
        replace(task, hints={**task.hints, "group": group, "firsts": firsts})
        for task, group in zip(tasks, groups, strict=False)
    ]


def run_mark(task: Task, store: Store, writer: Writer) -> Json:
    ranges = task.hints["ranges"]
    paths = [UNIQUE.format(shard_name(part)) for part in range(len(ranges))]
    found = np.concatenate(side_by_side(lambda path, ends: store.rows(path, *ends), paths, ranges))
    local = store.array(LOCAL.format(task.name))
    rows = store.array(SPLIT.format(task.name))[:, 2].astype(np.int64)
    places, counts = np.full(len(local), NO_NODE), np.zeros(len(local), np.int64)
    places[rows], counts[rows] = found[:, 0], found[:, 1]
    del found, rows
    if "group" in task.hints:
        return _mark_keys(task, store, writer, local, places, counts)
    is_first = are_first(places, int(task.name))
    writer.array(FIRSTS.format(task.name), np.where(local == NO_NODE, NO_NODE, places[local]), durable=False)
    writer.array(COUNTS.format(task.name), counts[is_first], durable=False)
    writer.array(BITS.format(task.name), as_bits(is_first), durable=False)
    return {}


def _mark_keys(task: Task, store: Store, writer: Writer, local: Array, places: Array, counts: Array) -> Json:
    """The facts of a group of keys. local: as LOCAL. places, counts: of the first row of each key in the group."""
    group: keys.Group = task.hints["group"]
    counts = np.where(local == NO_NODE, 0, counts[local])
    if group.pieces:
        return group.judge(store, writer, counts, are_first(places, int(task.name)), LEFT.format(task.name, "{}"))
    firsts, vectors = np.array(task.hints["firsts"]), np.full(len(local), NO_NODE)
    for begin in range(0, len(local), BLOCK):
        rows = begin + np.flatnonzero(local[begin : begin + BLOCK] != NO_NODE)
        first = places[local[rows]]
        is_vector = first < len(firsts) << GROUP_BITS
        first = first[is_vector]
        vectors[rows[is_vector]] = firsts[first >> GROUP_BITS] + (first & ((1 << GROUP_BITS) - 1))
    writer.array(PLACES.format(task.name), vectors, durable=False)
    return group.judge(store, writer, counts, vectors, "")


SPLITTING = Stage(name="split", title="splitting", plan=plan_split, run=run_split, scratch=True)
UNIQUES = Stage(
    name="unique", title="uniques", plan=lambda _, store: _by_range("unique", store, True), run=run_unique, scratch=True
)
MARKING = Stage(name="mark", title="first texts", plan=plan_mark, run=run_mark, scratch=True)
