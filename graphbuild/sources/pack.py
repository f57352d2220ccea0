"""Stage pack: images that lie in parquet or in folders to the store's own tars, byte for byte.

A task is a tar: up to shard_size rows of one part of the source (graphbuild.sources.parts). A sample is KEY.EXT, the
image as it was found and named by what it holds; KEY.txt, its caption; KEY.json, its other columns, with `key` and
`origin`, the part and the row in it. Rows without an image go to `rejected/pack/<shard>.parquet`. Memory: one batch of
rows. Each part is read once; one that fills several tars is opened for each, and text is then read from its beginning.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections import Counter
from typing import Any

from graphbuild.errors import ConfigError, ImageError, InputError, public
from graphbuild.recipe import Pack, Recipe
from graphbuild.runner.stage import Stage, Task, outputs, records, summed, total_counts
from graphbuild.runner.state import require
from graphbuild.sources.parts import Part, Row, find_parts, read_file, read_rows
from graphbuild.sources.tables.spec import rejected
from graphbuild.sources.tars import add_member
from graphbuild.store.layout import REJECTED, by_number, shard_name
from graphbuild.store.store import Json, Store, Writer

CAPTIONS = ("txt", "caption", "text")
OWN = ("key", "origin")  # of a sample's json
_STRICT = json.JSONEncoder(allow_nan=False)
_KEY = re.compile(r"[^./\\\x00-\x1f\x7f\ud800-\udfff]{1,100}")  # readers of tars cut names at dots


def plan(recipe: Recipe, store: Store) -> list[Task]:
    config = recipe.pack
    if config.source is None:
        raise ConfigError("no source given", "name it: `graphbuild pack STORE SOURCE`, or pack.source in the recipe")
    settings = config.model_dump(exclude={"source"})
    ranges = [
        (part, first, min(config.shard_size, part.rows - first))
        for part in find_parts(config)
        for first in range(0, part.rows, config.shard_size)
    ]
    if not ranges:
        raise InputError(f"{config.source} has no rows", "give a source with at least one row")
    tasks = [
        Task(
            stage="pack",
            name=name,
            settings={**settings, "file": part.name, "first_row": first, "rows": count},
            inputs={"images": part.identity(first, count)},
            hints={"url": part.url, "names": list(part.images)[first : first + count]},
        )
        for name, (part, first, count) in zip(_numbers(ranges, settings, store), ranges, strict=True)
    ]
    return sorted(tasks, key=lambda task: by_number(task.name))


def _numbers(ranges: list[tuple[Part, int, int]], settings: Json, store: Store) -> list[str]:
    """The tars of these ranges (part, first row, rows): those that the store has packed so keep theirs, others get the
    next free ones, so that a new part changes no other's, and a run that was stopped ends as one that was not."""
    done = {name: record["settings"] for name, record in records(store, "pack").items()}
    kept = {
        (told["file"], told["first_row"]): name
        for name, told in done.items()
        if {key: told.get(key) for key in settings} == settings
    }
    taken = set(kept.values())
    free = (name for number in itertools.count() if (name := shard_name(number)) not in taken)
    return [kept.get((part.name, first)) or next(free) for part, first, _ in ranges]


def decodes(task: Task) -> bool:
    return task.settings["image_size"] is not None


def run(task: Task, store: Store, writer: Writer) -> Json:
    settings: Any = task.settings
    config = Pack(**{name: settings[name] for name in Pack.model_fields if name in settings})
    first, count = settings["first_row"], settings["rows"]
    folder = task.hints["url"] if task.hints["names"] else task.hints["url"].rpartition("/")[0]
    turned_away: list[tuple[int, str, bytes]] = []
    seen: set[str] = set()
    with (
        writer.file(f"shards/{task.name}.tar") as path,
        tarfile.open(path, "w") as archive,
    ):
        for row in read_rows(task.hints["url"], task.hints["names"], config, first, count):
            try:
                if row.fault:
                    raise _RowError(_fault(row))
                key = _key(row, config, f"{task.name}{row.number - first:06d}", seen)
                caption, text = _caption(row, config)
                image, ending = _image(row, config, folder)
            except (_RowError, ImageError) as error:
                reason = error.cause if isinstance(error, ImageError) else str(error)
                turned_away.append((row.number, reason, _json(row.values)[:50_000]))
                continue
            seen.add(key)
            values = {name: value for name, value in row.values.items() if name != caption}
            origin = {"file": settings["file"], "row": row.number}
            add_member(archive, f"{key}.{ending}", image)
            if text is not None:
                add_member(archive, f"{key}.txt", text)
            add_member(archive, f"{key}.json", _json({"key": key, "origin": origin, **_renamed(values)}))
    if turned_away:
        writer.table(f"{REJECTED.format('pack')}/{task.name}.parquet", rejected(turned_away))
    counts = {"samples": len(seen), "rejected": len(turned_away), "rows": count}
    return {"counts": counts, "reasons": dict(Counter(reason.partition(": ")[0] for _, reason, _ in turned_away))}


class _RowError(Exception):
    """Why a row becomes no sample."""


def _fault(row: Row) -> str:
    """Why a row cannot be read; of the file beside an image the same text for all up to its colon."""
    beside = f"{str(row.path).rpartition('.')[0]}.json: "
    return f"its .json cannot be read: {row.fault}" if row.fault.startswith(beside) else row.fault


def _key(row: Row, config: Pack, number: str, seen: set[str]) -> str:
    if config.key_column is None:
        return number
    value = row.values.get(config.key_column)
    if not isinstance(value, str | int) or not _KEY.fullmatch(key := str(value)):
        raise _RowError(f"no key for a tar's members: {value!r}"[:200])
    if key in seen:
        raise _RowError(f"a key that an earlier row has: {key}")
    return key


def _caption(row: Row, config: Pack) -> tuple[str | None, bytes | None]:
    """The name of its column, and its bytes; None: it has none."""
    named = [name for name in CAPTIONS if isinstance(row.values.get(name, 0), str | None)]
    named.sort(key=lambda name: not row.values[name])  # those of a row that hold text go first
    column = config.caption_column or next(iter(named), None)
    value = row.values.get(column) if column else None
    if not isinstance(value, str | None):
        raise _RowError("the caption is not text")
    return column, None if value is None else value.encode(errors="surrogatepass")


def _image(row: Row, config: Pack, folder: str) -> tuple[memoryview, str]:
    """An image's bytes and what they are."""
    from graphbuild.sources.images import fitted, image_format

    image = row.image
    if image is None and row.path is not None:
        image = read_file(folder, row.path)
    if image is None:
        raise _RowError("no image" if row.path is None else f"no such file beside it: {row.path}")
    if config.image_size is not None:
        image = fitted(bytes(image), config.image_size)
    image = memoryview(image)
    ending = image_format(image)
    if ending is None:
        raise _RowError("not an image")
    return image, ending


def _renamed(values: Json) -> Json:
    """Columns that are named as a sample's own get a suffix, as often as it takes."""
    for name in OWN:
        if name in values:
            other = name
            while other in values:
                other = f"{other}_in_source"
            values[other] = values.pop(name)
    return values


def _json(values: Json) -> bytes:
    """JSON, in which a NaN or an infinity is null."""
    try:
        return _STRICT.encode(values).encode()
    except ValueError:
        return json.dumps(json.loads(json.dumps(values), parse_constant=lambda _: None)).encode()


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    reasons = dict(summed(done, "reasons").most_common())
    if not total_counts(done)["samples"]:
        why = "; ".join(f"{count:,} rejected: {reason}" for reason, count in reasons.items())
        raise InputError(f"{public(str(recipe.pack.source))}: no row has an image ({why})", "check --image-column")
    return {"pack": {"rejected": reasons}}


def packed_tars(store: Store) -> dict[str, str]:
    """Tar's path in the store -> sha256, of the finished packing."""
    return outputs(require(store, "pack", "pack"), "shards/", ".tar")


STAGE = Stage(
    name="pack",
    title="pack",
    plan=plan,
    run=run,
    finish=finish,
    entries=("pack",),
    in_process=lambda tasks: not decodes(tasks[0]),
    may_crash=decodes,
)
