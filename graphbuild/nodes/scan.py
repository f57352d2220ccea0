"""Stage scan: reads captions from tars or from a caption list and normalises them; shards get their numbers here.

One task a tar, or one for a list, which it cuts into shards. Writes `_state/scan/<shard>.parquet` (SCHEMA, a row a
caption; PLURAL where a sample has several) and, for captions that cannot become nodes, `rejected/scan/<shard>.parquet`
(REJECTED). A tar's sample without a usable caption keeps its row, with text null, so that sidecars stay 1:1 with tars;
a list's row without one is left out. With vectors beside tars captions only travel along, and none is rejected. One
pass over the input; memory: one shard's captions.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from graphbuild.errors import ConfigError, InputError, public
from graphbuild.nodes.caption_rows import CaptionRows
from graphbuild.nodes.captions import (
    NO_WEIGHTS,
    Found,
    fill_fields,
    fill_template,
    is_number,
    is_of_lines,
    kept_apart,
    read_class_names,
    sample_captions,
    template_fields,
    weighted,
)
from graphbuild.nodes.samples import write_rejected
from graphbuild.recipe import BESIDE, Recipe
from graphbuild.runner.stage import Stage, Task, records, same_input, summed, total_counts
from graphbuild.sources.download import downloaded_tars, list_parts
from graphbuild.sources.pack import packed_tars
from graphbuild.sources.paths import part_inputs
from graphbuild.sources.tables import CAPTION_ROLES, FIELD_ROLE, WEIGHTS_ROLE, TableSpec, read_parts, with_place
from graphbuild.sources.tars import expand_shards, open_tar, tar_stem
from graphbuild.store.checksum import file_sha256
from graphbuild.store.files import file_identities
from graphbuild.store.layout import by_number, shard_name
from graphbuild.store.shards import latest_shards
from graphbuild.store.store import Json, Store, Writer

logger = logging.getLogger(__name__)


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    settings: dict[str, Any] = {"template": embed.template}
    if embed.caption_weights is not None:
        settings["caption_weights"] = embed.weights
    if embed.captions is not None:
        settings |= embed.model_dump(include={"preset", "caption_column", "key_column", "shard_size"})
        parts = list_parts("captions", embed.captions, "--captions", records(store, "scan").get("list"))
        spec = _spec(embed.captions, settings)
        next(read_parts(spec, list(parts), chunk_rows=1), None)  # refuses a bad list before a file is written
        inputs = part_inputs("captions", parts.values())
        return [Task(stage="scan", name="list", settings=settings, inputs=inputs, hints={"urls": list(parts)})]
    settings["caption_member"] = embed.caption_member
    if embed.source == BESIDE:
        settings["with_vectors"] = True  # captions only travel along
    if embed.image_member is not None:
        settings["image_member"] = embed.image_member
    if embed.class_names is not None:
        settings["class_names"] = kept_apart(read_class_names(embed.class_names))
    if embed.shards is not None:
        identities = file_identities(expand_shards(embed.shards, embed.beside_tars))
        numbers = _shard_numbers(identities, store, anew=embed.source != BESIDE)
        return [
            Task(stage="scan", name=name, settings=settings, inputs={"tar": identities[url]}, hints={"url": url})
            for url, name in sorted(numbers.items(), key=lambda item: by_number(item[1]))
        ]
    own = {"download": downloaded_tars, "pack": packed_tars}
    made = [read for stage, read in own.items() if stage in store.manifest()["stages"]]
    if not made:
        raise ConfigError(
            f"{store.url} has no captions to embed: no source is named, and no download is finished there",
            "name the source by --shards, --captions or --vectors (in a recipe, embed.shards and so on), "
            f"or run `graphbuild download {store.url} URLS` or `graphbuild pack {store.url} SOURCE` first",
        )
    return [
        Task(stage="scan", name=tar_stem(url), settings=settings, built={"tar": sha256}, hints={"url": url})
        for url, sha256 in made[0](store).items()
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    if task.name == "list":
        return _scan_list(task.hints["urls"], task.settings, writer)
    return _scan_tar(task.name, task.hints["url"], task.settings, writer)


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    counts = total_counts(done)
    captions, of_lines = counts["captions"], counts.get("of_several_lines", 0)
    if of_lines:
        logger.warning(
            "%-9s %s are texts of several lines, each one caption: if lines are captions, --caption-member txt:lines",
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
    gone = list(records(store, "scan", "gone"))
    if gone:
        logger.info(
            "%-9s rows without a node, for their tars are gone or changed: shards %s",
            "captions",
            ", ".join(gone[:5]) + " ..." * (len(gone) > 5),
        )
    told = {"gone": gone} if gone or "gone" in store.manifest() else {}
    return {"rejected": dict(sorted(rejected.items())), **told}


def _keeps(record: Json) -> bool:
    """Rows and nodes of a tar that is gone keep their numbers; vectors beside tars may be gone with it."""
    return "tar" in record["inputs"] and "with_vectors" not in record["settings"]


STAGE = Stage(
    name="scan", title="captions", plan=plan, run=run, finish=finish, entries=("rejected", "gone"), keeps=_keeps
)


def _scan_tar(shard: str, url: str, settings: Mapping[str, Any], writer: Writer) -> Json:
    full_url = writer.store.resolve(url)
    with open_tar(full_url) as tar:
        samples = tar.samples()
        keys = [sample.key for sample in samples]
        found = (sample_captions(tar, sample, settings) for sample in samples)
        usable = CaptionRows()
        rejected = usable.add(found, keys, range(len(keys)), every=True)
        found_images = [sample.image(settings.get("image_member")) for sample in samples]
        images = [None if tar.compressed else image for image in found_images]
        members = [[] if tar.compressed else [vars(member) for member in sample.members] for sample in samples]
        identity = {
            "url": public(url),
            "name": public(url).rsplit("/", 1)[-1],
            "bytes": tar.source.stat().st_size,
            "sha256": file_sha256(tar.source),
        }
    with_vectors = settings.get("with_vectors", False)
    if with_vectors:
        usable, rejected = usable.firsts(), []
    captions = [caption for caption, text in zip(usable.captions, usable.texts, strict=True) if text is not None]
    if samples and not captions and not with_vectors:
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
    usable.write(shard, places, writer, of_classes="class_names" in settings)
    write_rejected(STAGE.name, shard, rejected, writer)
    counts = {"samples": len(samples), "captions": len(captions), "rejected": len(rejected)}
    firsts = usable.firsts().captions
    of_lines = sum(is_of_lines(first, sample, settings) for first, sample in zip(firsts, samples, strict=True))
    of_lines, nodes = (0, []) if with_vectors else (of_lines, captions)
    counts |= {"without_image": found_images.count(None)} | ({"of_several_lines": of_lines} if of_lines else {})
    return {
        "counts": counts,
        "numbers": sum(is_number(caption, settings["template"]) for caption in nodes),
        "reasons": _reasons(rejected),
        "shards": {shard: {"samples": len(samples), "tar": identity}},
    }


def _spec(url: str, settings: Mapping[str, Any]) -> TableSpec:
    fields = template_fields(settings["template"])
    named = settings["caption_column"].split(";")
    columns = {f"{FIELD_ROLE}{name}": name for name in fields} or dict(zip(CAPTION_ROLES, named, strict=False))
    if settings["key_column"] is not None:
        columns["key"] = settings["key_column"]
    if isinstance(settings.get("caption_weights"), str):
        columns[WEIGHTS_ROLE] = settings["caption_weights"]
    return TableSpec(path=url, preset=settings["preset"], columns=columns, plural=True)


def _scan_list(urls: Sequence[str], settings: Mapping[str, Any], writer: Writer) -> Json:
    spec = _spec(urls[0], settings)
    shards: dict[str, Json] = {}
    reasons: Counter[str] = Counter()
    rejected_rows = numbers = captions = 0
    usable = CaptionRows()

    def cut(size: int) -> None:
        shard = shard_name(len(shards))
        usable.cut(size).write(shard, {}, writer, of_classes=False)
        shards[shard] = {"samples": size, "tar": None}

    file = 0
    for number, (part, begin, chunk) in enumerate(read_parts(spec, urls)):
        if part != file and usable.keys:  # no shard is of two files: one that is added changes none
            cut(len(usable.keys))
        file = part
        rejected = [(row["position"], None, row["reason"], row["content"]) for row in chunk.rejected.to_pylist()]
        positions = chunk.rows["position"].to_pylist()
        row_keys = chunk.rows["key"].to_pylist() if "key" in spec.columns else map(str, positions)
        before = len(usable.captions)
        unusable = usable.add(_found(chunk.rows, settings), row_keys, positions, every=False)
        if len(urls) > 1:
            unusable = [(at, key, with_place(why, urls[part], at - begin), text) for at, key, why, text in unusable]
        rejected += unusable
        captions += len(usable.captions) - before
        numbers += sum(is_number(caption, settings["template"]) for caption in usable.captions[before:])
        while len(usable.keys) >= settings["shard_size"]:
            cut(settings["shard_size"])
        write_rejected(STAGE.name, shard_name(number), rejected, writer)
        rejected_rows += len(rejected)
        reasons.update(_reasons(rejected))
    if usable.keys:
        cut(len(usable.keys))
    samples = sum(shard["samples"] for shard in shards.values())
    if samples == 0:
        why = "; ".join(f"{count:,} rejected: {reason}" for reason, count in reasons.items())
        option = "--caption-weights" if any(NO_WEIGHTS in reason for reason in reasons) else "--caption-column"
        raise InputError(f"{urls[0]}: no row has a caption ({why})", f"check {option}")
    counts = {"samples": samples, "captions": captions, "rejected": rejected_rows}
    return {"counts": counts, "numbers": numbers, "reasons": reasons, "shards": shards}


def _found(rows: pa.Table, settings: Mapping[str, Any]) -> Iterator[list[Found]]:
    """The captions of each row."""
    template = settings["template"]
    fields = template_fields(template)
    if fields:
        named = [rows[f"{FIELD_ROLE}{name}"].to_pylist() for name in fields]
        for row in zip(*named, strict=True):
            yield [Found(*fill_fields(template, dict(zip(fields, row, strict=True))))]
        return
    columns = [rows[role].to_pylist() for role in CAPTION_ROLES if role in rows.column_names]
    weights = settings.get("caption_weights")
    if len(columns) == 1 and weights is None and not pa.types.is_large_list(rows["caption"].type):
        yield from ([Found(fill_template(template, text))] for text in columns[0])
        return
    each = rows[WEIGHTS_ROLE].to_pylist() if isinstance(weights, str) else [None] * len(rows)
    names = settings["caption_column"].split(";")
    for *values, own in zip(*columns, each, strict=True):
        sources = [_column_texts(name, value, template) for name, value in zip(names, values, strict=True)]
        yield weighted(sources, each=own or "") if isinstance(weights, str) else weighted(sources, weights)


def _column_texts(column: str, value: str | list[str] | None, template: str) -> list[tuple[str | None, str | None]]:
    """(caption, None) of each that a column holds in a row, or (what stands there, why it holds none)."""
    if value == []:
        return [("[]", f"column {column!r} is an empty list")]
    return [(fill_template(template, text), None) for text in (value if isinstance(value, list) else [value])]


def _reasons(rejected: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    """Rows a reason; what a reason says of one row alone, behind its colon, is left to rejected/."""
    return dict(Counter(row[2].partition(": ")[0] for row in rejected))


def _shard_numbers(identities: Mapping[str, str], store: Store, *, anew: bool) -> dict[str, str]:
    """Tar -> shard: those the store knows keep their number, new ones get the next free ones, in order of name.

    anew: a tar that has changed since its rows were numbered is a new one, and its old rows are of one that is gone,
    unless all have changed. Numbers up to the last that has its rows are never given anew; behind it, those of tars
    whose scan failed or was stopped are free, so that a job ends with the same numbers whatever happened on the way.
    """
    gone, done = records(store, "scan", "gone"), records(store, "scan")
    numbered = {name for record in records(store, "number").values() for name in record["facts"]["shards"]}
    read = {
        (tar["url"], record["inputs"].get("tar")): name
        for record in (gone | done).values()
        for name, shard in record["facts"]["shards"].items()
        if (tar := shard["tar"]) is not None
    }
    shards = [(shard.name, shard.tar) for shard in latest_shards(store) if shard.name not in gone]
    for record in done.values():
        shards += [(name, shard["tar"]) for name, shard in record["facts"]["shards"].items()]
    known = {public(tar["url"]): name for name, tar in shards if tar is not None}

    found = {url: read.get((public(url), now)) or known.get(public(url)) for url, now in identities.items()}

    def is_changed(url: str) -> bool:
        record = done.get(found[url] or "")
        return record is not None and not same_input(record["inputs"].get("tar"), identities[url])

    changed = {url for url in identities if found[url] in numbered and is_changed(url)} if anew else set()
    if changed < {url for url in identities if found[url] in numbered}:
        found |= dict.fromkeys(changed)
    first = 1 + max(map(int, numbered), default=-1)
    taken = {*known.values(), *found.values()}
    free = (name for number in itertools.count(first) if (name := shard_name(number)) not in taken)
    return {url: name or next(free) for url, name in found.items()}
