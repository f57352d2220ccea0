"""Stage number with vectors beside tars: joined with samples by key, by order, or as members.

A sample with a vector is a node. Writes nodes and counts as for captions (graphbuild.nodes.number), the place of each
row's vector among all, `_state/number/places.npy`, and vectors that no sample has, `rejected/number/<file>.parquet`,
a shard after the other. Memory: of up to GROUP keys TASK_BYTES each (graphbuild.nodes.distinct); beyond, the stages
split, unique and mark have joined them, and one group's places are held. Without keys: a shard's places.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graphbuild.errors import InputError, public
from graphbuild.nodes import distinct
from graphbuild.nodes.distinct import BLOCK, scanned
from graphbuild.nodes.keys import VECTOR, Files, Group, given, in_groups, move_left
from graphbuild.nodes.samples import NO_NODE
from graphbuild.recipe import Embed
from graphbuild.runner.stage import Task, digest, records
from graphbuild.sources.paths import by_numbers, part_inputs, parts_of
from graphbuild.sources.vector_files import shapes_of
from graphbuild.store import layout
from graphbuild.store.layout import shard_name
from graphbuild.store.shards import PLACES
from graphbuild.store.store import Json, Store, Writer

Array = np.ndarray[Any, Any]
NO_VECTOR = "no vector has its key"
SHOWN = 3  # keys of a side, where none is in both
LEFT = f"{layout.REJECTED.format('number')}/{{}}.parquet"


def numbering(embed: Embed, store: Store, scans: Mapping[str, str]) -> Task:
    """The task that matches vectors with the samples of these files of scan."""
    held = distinct.samples_of(store) if scans else {}
    hints: Json = {"samples": [held[path] for path in scans]}
    if embed.vector_member is not None:
        return Task(stage="number", name="all", settings={"joined": "as members"}, built=scans, hints=hints)
    files, identities = given(embed, store)
    vectors, keys = ([identities[url] for url in urls] for urls in files)
    settings = {"joined": "by key" if keys else "by order", "vector_column": embed.vector_column}
    task = Task(
        stage="number",
        name="all",
        settings=settings | ({"key_column": embed.key_column or "key"} if keys else {}),
        inputs=part_inputs("vectors", vectors) | part_inputs("keys", keys),
        built=scans,
        hints=hints | {"files": files, "marked": list(records(store, "mark"))},
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


@dataclass(frozen=True)
class Matched:
    """The place of each row's vector among all vectors, -1: none, a shard [n] after the other; and of how many there is
    one. rows: of each file of vectors; none where they are members, whose place is the row. counts: of the stage."""

    places: Iterable[Array]
    total: int
    rows: Sequence[int] = ()
    counts: Json = field(default_factory=dict)


def number(task: Task, store: Store, writer: Writer) -> Json:
    """Number the samples that have a vector, a shard after the other; the facts of stage number.

    Raises:
        InputError: no order or key joins vectors and samples, a key is there twice, or there is no sample.
    """
    sizes: list[int] = task.hints["samples"]
    matched, samples = _match(task, sizes, store, writer), sum(sizes)
    if not matched.total:
        raise InputError(f"no sample of {store.url} has a caption", "give tars that hold samples: these hold none")
    inputs = parts_of(task.inputs, "vectors")
    shards: dict[str, Json] = {}
    first_row = first_node = 0
    with ExitStack() as files:
        write_nodes = files.enter_context(writer.growing(layout.ROW_NODES.format(""), samples))
        write_places = files.enter_context(writer.growing(layout.VECTOR_PLACES, samples)) if matched.rows else None
        for path, size, places in zip(task.built, sizes, matched.places, strict=True):
            nodes = np.where(places >= 0, first_node - 1 + np.cumsum(places >= 0), NO_NODE)
            new = int((places >= 0).sum())
            write_nodes(nodes)
            if write_places:
                write_places(places)
            sha256 = hashlib.sha256(nodes.tobytes() + np.ones(new, np.int64).tobytes()).hexdigest()
            told = {"vectors": _told(inputs, matched.rows, places), "sha256": sha256}
            shards[Path(path).stem] = dict(zip(PLACES, (first_row, size, first_node, new), strict=True)) | told
            first_row, first_node = first_row + size, first_node + new
    with writer.growing(layout.NODE_COUNTS.format(""), first_node) as write:
        for begin in range(0, first_node, BLOCK):
            write(np.ones(min(BLOCK, first_node - begin), np.int64))
    counts = {"samples": first_row, "nodes": first_node} | matched.counts
    return {"counts": counts, "shards": shards, "rows": list(matched.rows)}


def _match(task: Task, sizes: Sequence[int], store: Store, writer: Writer) -> Matched:
    """sizes: samples of each shard. A member's place is its row: which samples have one shows when they are read."""
    begins = np.cumsum([0, *sizes]).tolist()
    if "files" not in task.hints:
        return Matched(_ranges(begins, sizes), begins[-1])
    files: Files = task.hints["files"]
    rows = [rows for rows, _ in shapes_of(files.vectors, task.settings["vector_column"])]
    counts = {"vectors": sum(rows), "vectors_without_sample": 0}
    if not files.keys:
        return Matched(_ranges(_by_order(task, rows, sizes, store), sizes), begins[-1], rows, counts)
    scans, column = dict(zip(task.built, sizes, strict=True)), task.settings["key_column"]
    groups = in_groups(files, rows, column, scans, max(1, sum(rows), begins[-1]))
    if names := task.hints["marked"]:
        done = records(store, "mark")
        facts = [done[name]["facts"] for name in names]
        marked = [name for name, one in zip(names, facts, strict=True) if "joined" in one]
        places: Iterable[Array] = (store.array(distinct.PLACES.format(name)) for name in marked)
    else:
        facts, places = _by_key(groups, store, writer)
    _refuse(files, rows, sizes, groups, facts, store)
    if names:
        moved: defaultdict[str, list[str]] = defaultdict(list)
        for name, one in zip(names, facts, strict=True):
            for file, _ in one.get("left", ()):
                moved[LEFT.format(shard_name(file))].append(distinct.LEFT.format(name, shard_name(file)))
        move_left(moved, store, writer)
    counts["vectors_without_sample"] = sum(count for one in facts for _, count in one.get("left", ()))
    return Matched(_cut(places, sizes), sum(one.get("joined", 0) for one in facts), rows, counts)


def _ranges(begins: Sequence[int], sizes: Sequence[int]) -> Iterator[Array]:
    return (np.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=False))


def _cut(arrays: Iterable[Array], sizes: Sequence[int]) -> Iterator[Array]:
    """Arrays cut at these sizes, which none of their ends is between."""
    arrays, held = iter(arrays), np.empty(0, np.int64)
    for size in sizes:
        while len(held) < size:
            held = next(arrays)
        yield held[:size]
        held = held[size:]


def _told(inputs: Sequence[str], rows: Sequence[int], places: Array) -> str:
    """A digest of all that decides the vectors of a shard's rows: the files that hold them, and where."""
    if not rows:
        return ""
    held = np.unique(file_of(rows, places[places >= 0]))
    return digest([[inputs[number] for number in held.tolist()], hashlib.sha256(places.tobytes()).hexdigest()])


def file_of(rows: Sequence[int], places: Array) -> Array:
    return np.searchsorted(np.cumsum(rows), places, side="right")


def _by_order(task: Task, rows: Sequence[int], sizes: Sequence[int], store: Store) -> list[int]:
    """The place of the first vector of each tar: of files and tars that are not joined yet, both in order of name with
    numbers as numbers, the i-th belong together. InputError where they are not as many, or do not hold as many."""
    tars, urls, pairs = _tars(store), task.hints["files"].vectors, task.hints["pairs"]
    fix = "name the keys of the vectors by --vector-keys, or give a file for each tar, with a vector for each sample"
    if len(rows) != len(sizes):
        raise InputError(f"{len(rows):,} files of vectors, and {len(sizes):,} tars: no order joins them", fix)
    begins, places = np.cumsum([0, *rows]).tolist(), [0] * len(sizes)
    others = [[n for n in _ranked(names) if n not in known] for names, known in ((tars, pairs), (urls, pairs.values()))]
    for tar, file in [*pairs.items(), *zip(*others, strict=True)]:
        if rows[file] != sizes[tar]:
            raise InputError(
                f"{public(urls[file])} has {rows[file]:,} vectors, and {tars[tar]} {sizes[tar]:,} samples: no order "
                "joins them",
                fix,
            )
        places[tar] = begins[file]
    return places


def _ranked(names: Sequence[str]) -> list[int]:
    return sorted(range(len(names)), key=lambda number: by_numbers(names[number]))


def _tars(store: Store) -> list[str]:
    return [shard["tar"]["name"] for record in scanned(store) for shard in record["facts"]["shards"].values()]


def _by_key(groups: Sequence[Group], store: Store, writer: Writer) -> tuple[list[Json], list[Array]]:
    """The facts of two groups, vectors and samples, and the place of each sample's vector."""
    vectors, samples = groups
    count = vectors.rows
    hashes = np.concatenate([group.hashes(store) for group in groups])
    firsts, of_first = distinct.first_appearances(hashes, np.repeat([VECTOR, 1], [count, samples.rows]))
    del hashes
    is_first = distinct.are_first(firsts)
    of_row = np.zeros(len(firsts), np.int64)
    of_row[is_first] = of_first
    of_row = np.where(firsts == NO_NODE, 0, of_row[firsts])
    places = np.where(firsts[count:] < count, firsts[count:], NO_NODE)
    facts = [vectors.judge(store, writer, of_row[:count], is_first[:count], LEFT)]
    return [*facts, samples.judge(store, writer, of_row[count:], places, "")], [places]


def _refuse(
    files: Files,
    rows: Sequence[int],
    sizes: Sequence[int],
    groups: Sequence[Group],
    facts: Sequence[Json],
    store: Store,
) -> None:
    """InputError where a key is of two vectors, or of two samples and a vector, or none is of both."""
    vectors, samples = ([one for one in facts if kind in one] for kind in ("left", "joined"))
    if twice := sum(one["twice"] for one in vectors):
        key, places = _least(vectors)
        of = [public(files.keys[number]) for number in file_of(rows, places).tolist()]
        raise InputError(
            f"two vectors have the key {key!r}, in {of[0]} and {of[1]} ({twice:,} keys are there more than once)",
            "keep one vector for each key",
        )
    if any("least" in one for one in samples):
        key, places = _least(samples)
        tars = [_tars(store)[number] for number in file_of(sizes, places).tolist()]
        raise InputError(
            f"two samples have the key {key!r}, in {tars[0]} and {tars[1]}",
            "join vectors and tars by their order (--vector-keys none --key-column none), or give keys that differ",
        )
    if not any(one["joined"] for one in samples):
        theirs, own = (_some(key for some in group.keys(store) for key in some) for group in groups)
        raise InputError(
            f"no key of {public(files.keys[0])} ... is a sample's. Keys of vectors: {theirs}; of samples: {own}",
            "name the column with the tars' keys by --key-column",
        )


def _least(facts: Sequence[Json]) -> tuple[str, Array]:
    """The first key in order of text of those that facts tell, and its first two places."""
    told = [one["least"] for one in facts if "least" in one]
    least = min(key for key, _ in told)
    return least, np.array([place for key, places in told if key == least for place in places][:2])


def _some(keys: Iterable[str | None]) -> str:
    return ", ".join(map(repr, islice((key for key in keys if key is not None), SHOWN)))
