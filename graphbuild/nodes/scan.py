"""Stage scan: reads captions from tars or from a caption list and normalises them; shards get their numbers here.

One task a tar, or one for a list, which it cuts into shards. Writes `_state/scan/<shard>.parquet` (SCHEMA) and, where
captions cannot become nodes, `rejected/scan/<shard>.parquet` (REJECTED). A tar's sample without a usable caption keeps
its row, with text null, so that sidecars stay 1:1 with tars; a list's row without one is left out. One pass over the
input; memory: one shard's captions.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from graphbuild.errors import ConfigError, InputError, public
from graphbuild.nodes.captions import (
    fill_fields,
    fill_template,
    hashes,
    is_number,
    is_of_lines,
    read_class_names,
    sample_caption,
    template_fields,
    usable_text,
)
from graphbuild.nodes.samples import SCHEMA, write_rejected
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records, summed, total_counts
from graphbuild.sources.download import downloaded_tars
from graphbuild.sources.tables import FIELD_ROLE, TableSpec, read_chunks
from graphbuild.sources.tars import expand_shards, open_tar, tar_stem
from graphbuild.store.checksum import file_sha256
from graphbuild.store.files import file_identities, file_identity
from graphbuild.store.layout import SCANNED, by_number, shard_name
from graphbuild.store.shards import latest_shards
from graphbuild.store.store import Json, Store, Writer

logger = logging.getLogger(__name__)


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    settings: dict[str, Any] = {"template": embed.template}
    if embed.captions is not None:
        settings |= embed.model_dump(include={"preset", "caption_column", "key_column", "shard_size"})
        next(read_chunks(_spec(embed.captions, settings), chunk_rows=1))  # refuses a bad list before a file is written
        identity = {"captions": file_identity(embed.captions)}
        return [Task(stage="scan", name="list", settings=settings, inputs=identity, hints={"url": embed.captions})]
    settings["caption_member"] = embed.caption_member
    if embed.image_member is not None:
        settings["image_member"] = embed.image_member
    if embed.class_names is not None:
        settings["class_names"] = read_class_names(embed.class_names)
    if embed.shards is not None:
        identities = file_identities(expand_shards(embed.shards))
        numbers = _shard_numbers(list(identities), store)
        return [
            Task(stage="scan", name=name, settings=settings, inputs={"tar": identities[url]}, hints={"url": url})
            for url, name in sorted(numbers.items(), key=lambda item: by_number(item[1]))
        ]
    if "download" not in store.manifest()["stages"]:
        raise ConfigError(
            f"{store.url} has no captions to embed: no source is named, and no download is finished there",
            "name the source by --shards, --captions or --vectors (in a recipe, embed.shards and so on), "
            f"or run `graphbuild download {store.url} URLS` first",
        )
    return [
        Task(stage="scan", name=tar_stem(url), settings=settings, built={"tar": sha256}, hints={"url": url})
        for url, sha256 in downloaded_tars(store).items()
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    if task.name == "list":
        return _scan_list(task.hints["url"], task.settings, writer)
    return _scan_tar(task.name, task.hints["url"], task.settings, writer)


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    counts = total_counts(done)
    captions, of_lines = counts["captions"], counts.get("of_several_lines", 0)
    if of_lines:
        logger.warning(
            "%-9s %s are texts of several lines, and each is one caption: were they several, keep one line of each",
            "captions",
            f"{of_lines:,}",
        )
    numbers = sum(record["facts"].get("numbers", 0) for record in done)
    if captions and captions == numbers and recipe.embed.class_names is None:
        logger.warning(
            "%-9s all are numbers, and embedded as such: class numbers? Then %s, and embed with --force",
            "captions",
            "name the classes by --class-names" if recipe.embed.captions is None else "list the classes' names instead",
        )
    rejected = summed([*done, *records(store, "assign").values()], "reasons")  # stage assign does the same when it ends
    return {"rejected": dict(sorted(rejected.items()))}


STAGE = Stage(name="scan", title="captions", plan=plan, run=run, finish=finish, entries=("rejected",))


def _scan_tar(shard: str, url: str, settings: Mapping[str, Any], writer: Writer) -> Json:
    full_url = writer.store.resolve(url)
    with open_tar(full_url) as tar:
        samples = tar.samples()
        keys = [sample.key for sample in samples]
        found = [sample_caption(tar, sample, settings) for sample in samples]
        found_images = [sample.image(settings.get("image_member")) for sample in samples]
        images = [None if tar.compressed else image for image in found_images]
        members = [[] if tar.compressed else [vars(member) for member in sample.members] for sample in samples]
        identity = {
            "url": public(url),
            "name": public(url).rsplit("/", 1)[-1],
            "bytes": tar.source.stat().st_size,
            "sha256": file_sha256(tar.source),
        }
    captions = [content if reason is None else None for content, reason in found]
    usable = [usable_text(content) if reason is None else (None, reason) for content, reason in found]
    texts = [text for text, _ in usable]
    rejected = [
        (position, keys[position], reason, found[position][0])
        for position, (_, reason) in enumerate(usable)
        if reason is not None
    ]
    if samples and len(rejected) == len(samples):
        extensions = sorted({repr(f".{member.extension}") for sample in samples for member in sample.members})
        raise InputError(
            f"{full_url}: none of its {len(samples):,} samples has a caption "
            f"(first: {rejected[0][2]}; members: {', '.join(extensions[:8])})",
            "name the member that holds it by --caption-member, as in txt, cls or json:FIELD",
        )
    places: dict[str, Sequence[Any]] = {
        "image_offset": [image and image.offset for image in images],
        "image_size": [image and image.size for image in images],
        "members": members,
    }
    _write_shard(shard, keys, captions, texts, places, writer)
    write_rejected(STAGE.name, shard, rejected, writer)
    counts = {"samples": len(samples), "captions": len(samples) - len(rejected), "rejected": len(rejected)}
    of_lines = sum(is_of_lines(caption, sample, settings) for caption, sample in zip(captions, samples, strict=True))
    counts |= {"without_image": found_images.count(None)} | ({"of_several_lines": of_lines} if of_lines else {})
    return {
        "counts": counts,
        "numbers": sum(is_number(caption, settings["template"]) for caption in captions),
        "reasons": _reasons(rejected),
        "shards": {shard: {"samples": len(samples), "tar": identity}},
    }


def _spec(url: str, settings: Mapping[str, Any]) -> TableSpec:
    fields = template_fields(settings["template"])
    columns = {f"{FIELD_ROLE}{name}": name for name in fields} or {"caption": settings["caption_column"]}
    if settings["key_column"] is not None:
        columns["key"] = settings["key_column"]
    return TableSpec(path=url, preset=settings["preset"], columns=columns)


def _scan_list(url: str, settings: Mapping[str, Any], writer: Writer) -> Json:
    spec = _spec(url, settings)
    shards: dict[str, Json] = {}
    reasons: Counter[str] = Counter()
    rejected_rows = numbers = 0
    keys: list[str] = []
    captions: list[str | None] = []
    texts: list[str] = []

    def cut(size: int) -> None:
        shard = shard_name(len(shards))
        _write_shard(shard, keys[:size], captions[:size], texts[:size], {}, writer)
        shards[shard] = {"samples": len(keys[:size]), "tar": None}
        del keys[:size], captions[:size], texts[:size]

    for number, chunk in enumerate(read_chunks(spec)):
        rejected = [(row["position"], None, row["reason"], row["content"]) for row in chunk.rejected.to_pylist()]
        positions = chunk.rows["position"].to_pylist()
        row_keys = chunk.rows["key"].to_pylist() if "key" in spec.columns else [str(position) for position in positions]
        filled = _filled(chunk.rows, settings["template"])
        for position, key, (caption, missing) in zip(positions, row_keys, filled, strict=True):
            text, reason = usable_text(caption)
            if text is None or key is None:
                rejected.append((position, key, missing or reason or "no key", caption))
            else:
                keys.append(key)
                captions.append(caption)
                texts.append(text)
                numbers += is_number(caption, settings["template"])
        while len(keys) >= settings["shard_size"]:
            cut(settings["shard_size"])
        write_rejected(STAGE.name, shard_name(number), rejected, writer)
        rejected_rows += len(rejected)
        reasons.update(_reasons(rejected))
    if keys:
        cut(len(keys))
    samples = sum(shard["samples"] for shard in shards.values())
    if samples == 0:
        why = "; ".join(f"{count:,} rejected: {reason}" for reason, count in reasons.items())
        raise InputError(f"{url}: no row has a caption ({why})", "check --caption-column")
    counts = {"samples": samples, "captions": samples, "rejected": rejected_rows}
    return {"counts": counts, "numbers": numbers, "reasons": reasons, "shards": shards}


def _filled(rows: pa.Table, template: str) -> Iterator[tuple[str | None, str | None]]:
    """(caption, None), or (None, what is missing), of each row."""
    fields = template_fields(template)
    if not fields:
        for caption in rows["caption"].to_pylist():
            yield fill_template(template, caption), None
        return
    columns = [rows[f"{FIELD_ROLE}{name}"].to_pylist() for name in fields]
    for values in zip(*columns, strict=True):
        yield fill_fields(template, dict(zip(fields, values, strict=True)))


def _write_shard(
    shard: str,
    keys: Sequence[str],
    captions: Sequence[str | None],
    texts: Sequence[str | None],
    places: Mapping[str, Sequence[Any]],
    writer: Writer,
) -> None:
    hashed = hashes(texts)
    columns: dict[str, Any] = {
        "key": keys,
        "caption": captions,
        "text": texts,
        "hash_high": hashed[:, 0],
        "hash_low": hashed[:, 1],
    }
    columns |= {name: places.get(name, [None] * len(keys)) for name in ("image_offset", "image_size", "members")}
    writer.table(SCANNED.format(shard), pa.table(columns, schema=SCHEMA))


def _reasons(rejected: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    """Rows a reason; what a reason says of one row alone, behind its colon, is left to rejected/."""
    return dict(Counter(row[2].partition(": ")[0] for row in rejected))


def _shard_numbers(urls: Sequence[str], store: Store) -> dict[str, str]:
    """Tar -> shard: those the store knows keep their number, new ones get the next free ones, in order of name.

    Numbers up to the last that has its rows are never given anew; behind it, those of tars whose scan failed or was
    stopped are free, so that a job ends with the same numbers whatever happened on the way.
    """
    shards = [(shard.name, shard.tar) for shard in latest_shards(store)]
    for record in records(store, "scan").values():
        shards += [(name, shard["tar"]) for name, shard in record["facts"]["shards"].items()]
    known = {public(tar["url"]): name for name, tar in shards if tar is not None}
    numbered = [name for record in records(store, "number").values() for name in record["facts"]["shards"]]
    first = 1 + max(map(int, numbered), default=-1)
    taken = {*known.values()}
    free = (name for number in itertools.count(first) if (name := shard_name(number)) not in taken)
    return {url: known.get(public(url)) or next(free) for url in urls}
