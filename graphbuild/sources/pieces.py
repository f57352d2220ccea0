"""A long URL list in pieces, a task each: row groups of parquet, byte ranges of lines that no quote can run over.

A list of up to PIECE_BYTES is read by one task. CSV, TSV with quoting and compressed text are a piece a file, whatever
its length: only who reads them from their beginning knows where a row begins. Stage `count` tells the rows of each
piece. Then the piece in which a shard's first row lies writes the shard, and for its last rows reads on in the next
ones, so shards and positions are those of one task. What is rejected has files of each piece. Memory: as one task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphbuild.runner.stage import Task, records
from graphbuild.sources.tables import Chunk, TableSpec
from graphbuild.sources.tables.reader import can_be_cut, placed, read_piece
from graphbuild.store.layout import shard_name
from graphbuild.store.store import Json, Store

PIECE_BYTES = 1 << 30
PIECE_CHUNKS = 10_000  # more than a piece has: what is rejected is numbered by piece and chunk
Piece = Sequence[int]  # the number of its file, its own in the file, and how many the file has


def pieces_of(whole: Task, spec: TableSpec, identities: Mapping[str, str], done: Json | None) -> list[Piece]:
    """The pieces of a list; none of one that one task reads, or has read. identities: of its files. done: the record of
    its first task."""
    if done is not None and done["fingerprint"] == whole.fingerprint:
        return list(done["facts"].get("pieces", []))
    told = [identity.rsplit(", ", 2)[1].split(" ")[0] for identity in identities.values()]
    sizes = [int(size) if size.isdecimal() else 0 for size in told]  # which not every web server tells
    found: list[Piece] = []
    for file, (url, size) in enumerate(zip(identities, sizes, strict=True)):
        parts = max(-(-size // PIECE_BYTES), 1)
        parts = parts if parts == 1 or can_be_cut(replace(spec, path=url)) else 1
        found += [[file, part, parts] for part in range(parts)]
    return found if sum(sizes) > PIECE_BYTES and len(found) > 1 else []


def count(task: Task, spec: TableSpec) -> Json:
    """Rows of a piece, and how many of them have a URL."""
    file, part, parts = task.built["piece"]
    spec = replace(spec, path=task.hints["urls"][file])
    rows = urls = 0
    for chunk in read_piece(spec, part, parts, keep_others=spec.name.endswith(".jsonl")):  # where it rejects some
        rows += len(chunk.rows) + len(chunk.rejected)
        urls += len(chunk.rows)
    return {"rows": rows, "urls": urls}


def piece_tasks(whole: Task, pieces: Sequence[Piece], store: Store) -> list[Task]:
    """The tasks of stage urls, the first with the list's own name and inputs. What stage count tells is in hints, as it
    follows from the list, and is gone when all are done."""
    counted, none = records(store, "count"), {"facts": {"rows": 0, "urls": 0}}
    told = [counted.get(shard_name(number), none)["facts"] for number in range(len(pieces))]
    size, tasks = whole.settings["shard_size"], []
    shards = before_file = 0  # shards and rows before a file
    before = urls = total = 0  # rows and URLs of it before a piece, and all its URLs
    for number, (file, part, parts) in enumerate(pieces):
        if part == 0:
            shards, before_file, before, urls = shards + -(-urls // size), before_file + before, 0, 0
            total = sum(facts["urls"] for facts in told[number : number + parts])
        end = urls + told[number]["urls"]
        first, last = -(-urls // size), -(-end // size)
        hints: Json = {
            "pieces": pieces,
            "number": number,
            "rows": [facts["rows"] for facts in told[number : number + parts - part]],
            "before": [before_file, before],
            "skip": first * size - urls,
            "wanted": max(min(last * size, total) - first * size, 0),
            "shards": shards + first,
            "urls": whole.hints["urls"],
            "total": sum(facts["urls"] for facts in told),
        }
        name = whole.name if number == 0 else f"{whole.name}-{shard_name(number)}"
        built = {"built": {"list": whole.fingerprint, "piece": [file, part, parts]}} if number else {}
        read: Json = built or {"inputs": whole.inputs}
        tasks.append(Task(stage=whole.stage, name=name, settings=whole.settings, hints=hints, **read))
        before, urls = before + told[number]["rows"], end
    return tasks


def read_shards(spec: TableSpec, hints: Mapping[str, Any]) -> Iterator[tuple[int, int, Chunk]]:
    """As `read_parts`: the rows of the shards that begin in a piece, and all that is rejected in it."""
    file, part, parts = hints["pieces"][hints["number"]]
    url, (before_file, begin) = hints["urls"][file], hints["before"]
    skip, left = hints["skip"], hints["wanted"]
    for ahead, rows in enumerate(hints["rows"]):
        for chunk in read_piece(replace(spec, path=url), part + ahead, parts, keep_others=True):
            chunk = placed(placed(chunk, begin), before_file, url if len(hints["urls"]) > 1 else "")
            kept = chunk.rows.slice(skip, left)
            skip, left = max(skip - len(chunk.rows), 0), left - len(kept)
            yield file, before_file, Chunk(kept, chunk.rejected.slice(0, 0 if ahead else None))
            if ahead and not left:
                break
        if not left:
            break
        begin += rows
