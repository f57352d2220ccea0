"""Vectors beside tars, in place of an encoder: each sample's own, of files (graphbuild.nodes.join) or of a member.

Part of stage encode: a shard's vectors are read, by ranges of rows, checked and scaled. A sample without a vector, or
with one that has no direction, keeps its row and has no node; stage assign names it. Memory: one shard's vectors.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from graphbuild.errors import InputError
from graphbuild.nodes.join import file_of, numbering
from graphbuild.nodes.keys import named
from graphbuild.recipe import Embed
from graphbuild.runner.stage import Task, records
from graphbuild.sources.tars import Member, Tar, given_urls, open_tar
from graphbuild.sources.vector_files import is_number_type, shapes_of, take_rows, unit_or_fault
from graphbuild.store import layout
from graphbuild.store.mapped import read_header
from graphbuild.store.store import Json, Store, Writer

Array = np.ndarray[Any, Any]


def check(embed: Embed) -> None:
    """Raise InputError where files are missing, cannot be read, or hold vectors of different lengths."""
    if embed.vector_member is None:
        shapes_of(named(embed).vectors, embed.vector_column)


def reading(embed: Embed, store: Store, numbered: Json) -> list[Task]:
    """A task a shard; numbered: the record of stage number."""
    shards, given = numbered["facts"]["shards"], given_urls(embed.shards)
    hints: Json = {"device": "cpu"}
    if embed.vector_member is None:
        settings = {"vector_column": embed.vector_column}
        files = numbering(embed, store, {}).hints["files"]
        hints |= {"vectors": files.vectors, "rows": numbered["facts"]["rows"]}
        built = {name: {"vectors": shard["vectors"]} for name, shard in shards.items()}
        places = {name: {"shard": shard} for name, shard in shards.items()}
    else:
        settings = {"vector_member": embed.vector_member}
        tars = {name: record["facts"]["shards"][name]["tar"] for name, record in records(store, "scan").items()}
        built = {name: {"tar": tars[name]["sha256"]} for name in shards}
        places = {name: {"tar": given.get(tars[name]["url"], tars[name]["url"])} for name in shards}
    return [
        Task(stage="encode", name=name, settings=settings, built=built[name], hints=hints | places[name])
        for name in sorted(shards, key=layout.by_number)
    ]


def read(task: Task, store: Store, writer: Writer) -> Json:
    """Write the vectors of a shard's samples, in order of row; a record's facts tell which have none, and why."""
    vectors, faults = _of_member(task, store) if "tar" in task.hints else _of_files(task, store)
    sound = np.isin(np.arange(len(vectors)), list(faults), invert=True)
    writer.array(layout.VECTORS.format(task.name), vectors[sound])
    without = sorted(faults)
    facts = {"without": without, "why": [faults[row] for row in without]}
    return {"counts": {"embeddings": int(sound.sum())}, "d": vectors.shape[1], **facts}


def _of_files(task: Task, store: Store) -> tuple[Array, dict[int, str]]:
    shard, rows = task.hints["shard"], task.hints["rows"]
    first = shard["first_row"]
    places = store.rows(layout.VECTOR_PLACES, first, first + shard["samples"])
    places = places[places >= 0]
    found: Array = np.empty((0, 0), np.float16)
    faults: dict[int, str] = {}
    of = file_of(rows, places)
    for number in np.unique(of).tolist():
        mine = np.flatnonzero(of == number)
        wanted = np.argsort(places[mine], kind="stable")
        in_file = places[mine][wanted] - sum(rows[:number])
        values = take_rows(task.hints["vectors"][number], task.settings["vector_column"], in_file, needed=False)
        unit, wrong = unit_or_fault(values)
        if not values.shape[1]:
            wrong = dict.fromkeys(range(len(values)), "is null")
        elif not found.size:
            found = np.zeros((len(places), unit.shape[1]), np.float16)
        if found.size:
            found[mine[wanted]] = unit if values.shape[1] else 0
        faults |= {int(mine[wanted[row]]): f"its vector {what}" for row, what in wrong.items()}
    return found, faults


def _of_member(task: Task, store: Store) -> tuple[Array, dict[int, str]]:
    wanted = task.settings["vector_member"]
    faults: dict[int, str] = {}
    found: dict[int, Array] = {}
    with open_tar(store.resolve(task.hints["tar"])) as tar:
        samples = tar.samples()
        for row, sample in enumerate(samples):
            member = next((member for member in sample.members if member.extension == wanted), None)
            vector = None if member is None else _vector(tar, member)
            if vector is None:
                faults[row] = f"no member .{wanted}" if member is None else f"its member .{wanted} is no vector"
                continue
            found[row] = vector
            width = len(next(iter(found.values())))
            if len(vector) != width:
                raise InputError(
                    f"{task.hints['tar']}: the vector of {sample.key!r} has {len(vector)} numbers, not {width}",
                    "give vectors of one encoder, all of one length",
                )
    if samples and not found:
        extensions = sorted({repr(f".{member.extension}") for sample in samples for member in sample.members})
        raise InputError(
            f"{task.hints['tar']}: none of its {len(samples):,} samples has a vector (first: {faults[0]}; members: "
            f"{', '.join(extensions[:8])})",
            "name the member that holds it by --vector-member",
        )
    width = len(next(iter(found.values()), ()))
    vectors = np.zeros((len(samples), width), np.float16)
    if found:
        rows = np.array(list(found))
        vectors[rows], wrong = unit_or_fault(np.stack(list(found.values())))
        faults |= {int(rows[row]): f"its vector {what}" for row, what in wrong.items()}
    return vectors, faults


def _vector(tar: Tar, member: Member) -> Array | None:
    """The numbers [d] of a member in .npy's format; None where it is none, or holds no single vector."""
    file = io.BytesIO(tar.read(member))
    try:
        shape, _, dtype = read_header(file)
        values = np.frombuffer(file.read(), dtype) if is_number_type(dtype) else np.empty(0)
    except (ValueError, EOFError):
        return None
    return values if values.size and max(shape, default=0) == values.size == np.prod(shape) else None
