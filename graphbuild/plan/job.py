"""What a recipe is about to do, in numbers: rows, shards, samples, nodes, tokens, bytes.

Read from what is there: footers of parquet and .npy files, headers of the first tar, a sample of a text list, a store's
manifest. Nothing is read whole. What cannot be known before the job has run is assumed, and said (`Job.assumed`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphbuild.errors import ConfigError, InputError
from graphbuild.plan import lists
from graphbuild.plan.encoder_facts import encoder_facts
from graphbuild.recipe import Recipe
from graphbuild.store import Json, Store, local_file
from graphbuild.tars import expand_shards, open_tar

PUBLISHED = {"cc3m": (3_318_333, 2018), "cc12m": (12_423_374, 2021)}  # rows of the training lists, and their year
TOKENS = {"cc3m": 12.7, "cc12m": 24.0}  # a caption, MiniLM's: cc3m as counted in 4,000 of its validation list, of
# 10.3 words; cc12m by its 20.2 words (Changpinyo et al. 2021, table 2) at as many tokens a word
CHARACTERS = {"cc3m": 54.0, "cc12m": 106.0}  # in the same way
OTHER_TOKENS, OTHER_CHARACTERS = 15.0, 65.0
IMAGE_BYTES = 30_000  # of a JPEG at 256 pixels: img2dataset's page on CC12M has 331 GB for 11M images
JSON_BYTES = 600  # img2dataset's json and txt of a sample; and tar headers are 512 bytes a member


@dataclass(frozen=True)
class Job:
    """source: list, tars, captions, vectors. rows: of the list, or samples. success: share of the URLs that give an
    image. tar_bytes: of all tars. tokens, characters: of a caption. d: of an embedding. layers: weights of the
    encoder's layers (2 FLOP each a token); encoder_bytes: of its files. done: share of each stage that a rerun skips.
    assumed: what was not read but taken to be so."""

    verb: str
    source: str
    rows: int
    samples: int
    nodes: int
    shards: int
    d: int
    k: int
    tokens: float
    characters: float
    tar_bytes: float
    layers: float
    hidden: int = 384
    depth: int = 6
    encoder_bytes: float = 91e6
    encoded: int = 0
    list_bytes: float = 0
    success: float = 1.0
    year: int | None = None
    first_new: int = 0
    done: dict[str, float] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


def job_of(verb: str, recipe: Recipe, store: Store | None = None, rows: int | None = None) -> Job:
    """The job of a verb (`run` or a part) on a recipe; store: where earlier stages' numbers are; rows: of the source,
    instead of what is read.

    Raises:
        ConfigError, InputError: the recipe names no source, or one that cannot be read (unless rows are given or its
            numbers are published).
    """
    manifest = store.manifest() if store else {"stages": {}}
    finished = manifest["stages"].keys()
    encoder = encoder_facts(recipe)
    if verb in ("index", "export") or (verb == "embed" and _from_store(recipe)):
        if store is None:
            raise ConfigError(f"a plan of {verb} needs a STORE", "plan the whole recipe instead")
        if verb == "embed":
            return _after_download(verb, recipe, store, encoder)
        if verb == "index" and not {"encode", "vectors"} & finished:
            raise ConfigError(f"{store.url} has no finished embeddings", f"run `graphbuild embed {store.url}` first")
        if verb == "export" and "certify" not in finished:
            raise ConfigError(f"{store.url} has no finished certify stage", f"run `graphbuild index {store.url}` first")
        return _of_store(verb, recipe, store, encoder)
    source = "list" if verb == "download" or (verb == "run" and recipe.download.urls is not None) else None
    source = source or next((name for name in ("captions", "vectors") if getattr(recipe.embed, name)), "tars")
    made = {"list": _of_list, "captions": _of_captions, "vectors": _of_vectors, "tars": _of_tars}[source]
    return made(verb, recipe, rows, encoder)


def _from_store(recipe: Recipe) -> bool:
    return not (recipe.embed.shards or recipe.embed.captions or recipe.embed.vectors)


# -- sources


def _of_list(verb: str, recipe: Recipe, rows: int | None, encoder: Json) -> Job:
    config = recipe.download
    if config.urls is None:
        raise ConfigError(
            "no URL list given", "name it: `graphbuild download STORE URLS`, or download.urls in the recipe"
        )
    assumed: list[str] = []
    known = lists.look(config.urls, config.preset, {"url": config.url_column, "caption": config.caption_column})
    year = PUBLISHED[config.preset][1] if config.preset else known.year if known else None
    if rows is None:
        if known is not None:
            rows = known.rows
        elif config.preset is not None:
            rows = PUBLISHED[config.preset][0]
            assumed.append(f"{config.urls} is not here: as many rows as the published list")
        else:
            raise InputError(f"{config.urls} does not exist", "check the path of the list, or give --rows")
    success = lists.expected_success(year)
    assumed.append(
        f"{success:.0%} of the URLs give an image, as of a list of {year}"
        if year
        else f"{success:.0%} of the URLs give an image"
    )
    samples = round(rows * success)
    tokens, characters = _caption_length(config.preset, known, encoder, assumed)
    nodes = round(samples * (known.distinct if known else 1.0))
    assumed.append(f"{nodes / max(samples, 1):.0%} of the captions differ (fewer, where the list repeats itself)")
    return _made(
        verb,
        "list",
        recipe,
        encoder,
        rows,
        samples,
        nodes,
        math.ceil(rows / config.shard_size),
        tokens=tokens,
        characters=characters,
        success=success,
        year=year,
        assumed=tuple(assumed),
        list_bytes=known.bytes if known else rows * (characters + 110),
        tar_bytes=samples * (IMAGE_BYTES * (config.image_size / 256) ** 2 + JSON_BYTES + 3 * 1024),
    )


def _of_captions(verb: str, recipe: Recipe, rows: int | None, encoder: Json) -> Job:
    embed, assumed = recipe.embed, []
    assert embed.captions is not None
    known = lists.look(embed.captions, embed.preset, {"caption": embed.caption_column})
    if known is None and rows is None:
        if embed.preset is None:
            raise InputError(f"{embed.captions} does not exist", "check the path of the list, or give --rows")
        rows = PUBLISHED[embed.preset][0]
        assumed.append(f"{embed.captions} is not here: as many rows as the published list")
    samples = rows if rows is not None else known.rows if known else 0
    tokens, characters = _caption_length(embed.preset, known, encoder, assumed)
    nodes = round(samples * (known.distinct if known else 1.0))
    assumed.append(f"{nodes / max(samples, 1):.0%} of the captions differ (fewer, where the list repeats itself)")
    return _made(
        verb,
        "captions",
        recipe,
        encoder,
        samples,
        samples,
        nodes,
        math.ceil(samples / embed.shard_size),
        tokens=tokens,
        characters=characters,
        assumed=tuple(assumed),
        list_bytes=known.bytes if known else samples * characters,
    )


def _of_vectors(verb: str, recipe: Recipe, rows: int | None, encoder: Json) -> Job:
    import numpy as np
    import pyarrow.parquet as pq

    url = recipe.embed.vectors
    assert url is not None
    try:
        with local_file(url) as path:
            if url.endswith(".npy"):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                found, width, size = len(array), array.shape[1], float(path.stat().st_size)
            else:
                file = pq.ParquetFile(path)
                found, size = file.metadata.num_rows, float(path.stat().st_size)
                width = len(next(file.iter_batches(1, columns=[recipe.embed.vector_column]))[0][0])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{url} cannot be read ({error})", "check --vectors") from None
    rows = found if rows is None else rows
    encoder = {**encoder, "d": width}
    return _made(
        verb,
        "vectors",
        recipe,
        encoder,
        rows,
        rows,
        rows,
        math.ceil(rows / recipe.embed.shard_size),
        list_bytes=size * rows / max(found, 1),
        characters=0.0,
    )


def _of_tars(verb: str, recipe: Recipe, rows: int | None, encoder: Json) -> Job:
    shards = recipe.embed.shards
    if shards is None:
        raise ConfigError("the recipe names no source", "give download.urls, or embed.shards, captions or vectors")
    urls = expand_shards(shards)
    sizes = [_bytes(url) for url in urls]
    with open_tar(urls[0]) as tar:
        first = len(tar.samples())
    samples = rows if rows is not None else round(first * sum(sizes) / max(sizes[0], 1))
    assumed = [] if len(urls) == 1 else [f"{samples:,} samples, by those of {urls[0]}"]
    names = recipe.embed.class_names
    if names is not None and Path(names).exists():
        nodes = min(sum(bool(line.strip()) for line in Path(names).read_text().splitlines()), samples)
    else:
        nodes = samples
        assumed.append("every caption differs (fewer nodes, where they repeat)")
    return _made(
        verb,
        "tars",
        recipe,
        encoder,
        samples,
        samples,
        nodes,
        len(urls),
        tar_bytes=float(sum(sizes)),
        assumed=tuple(assumed),
        encoded=nodes,
    )


def _after_download(verb: str, recipe: Recipe, store: Store, encoder: Json) -> Job:
    manifest = store.manifest()
    if "download" not in manifest["stages"]:
        raise ConfigError(f"{store.url} has no finished download stage", f"run `graphbuild download {store.url}` first")
    samples = manifest["stages"]["download"]["counts"]["images"]
    sizes = [size for name, size in store.sizes("shards").items() if name.endswith(".tar")]
    return _made(
        verb,
        "tars",
        recipe,
        encoder,
        samples,
        samples,
        samples,
        len(sizes),
        tar_bytes=float(sum(sizes)),
        assumed=("every caption differs (fewer nodes, where they repeat)",),
    )


def _of_store(verb: str, recipe: Recipe, store: Store, encoder: Json) -> Job:
    from graphbuild import base

    manifest = store.manifest()
    shards = manifest["shards"]
    samples, nodes = sum(one["samples"] for one in shards), sum(one["nodes"] for one in shards)
    k = recipe.index.k if verb == "index" else manifest["graph"]["k"]
    kept = sum(task.built["nodes"] for task in base.plan(recipe, store)) if verb == "index" else 0
    source = "vectors" if "vectors" in manifest["stages"] else "tars" if shards[0]["tar"] else "captions"
    made = _made(
        verb,
        source,
        recipe,
        {**encoder, "d": manifest["embeddings"]["d"]},
        samples,
        samples,
        nodes,
        len(shards),
        tar_bytes=float(sum((one["tar"] or {"bytes": 0})["bytes"] for one in shards)),
    )
    return dataclasses.replace(made, k=k, first_new=kept)


def _made(
    verb: str, source: str, recipe: Recipe, encoder: Json, rows: int, samples: int, nodes: int, shards: int, **more: Any
) -> Job:
    values: dict[str, Any] = {
        "tokens": OTHER_TOKENS,
        "characters": OTHER_CHARACTERS,
        "tar_bytes": 0.0,
        "encoded": nodes,
    }
    values |= {"k": min(recipe.index.k, max(nodes - 1, 1))}
    values |= {name: value for name, value in encoder.items() if name != "folder"} | more
    return Job(verb=verb, source=source, rows=rows, samples=samples, nodes=nodes, shards=max(shards, 1), **values)


# -- captions and encoder


def _caption_length(
    preset: str | None, known: lists.Known | None, encoder: Json, assumed: list[str]
) -> tuple[float, float]:
    if known is not None and known.captions:
        texts = known.captions
        characters = sum(map(len, texts)) / len(texts)
        return lists.tokens_of(texts, encoder.get("folder")), characters
    assumed.append(f"{TOKENS.get(preset or '', OTHER_TOKENS):g} tokens a caption")
    return TOKENS.get(preset or "", OTHER_TOKENS), CHARACTERS.get(preset or "", OTHER_CHARACTERS)


def _bytes(url: str) -> int:
    from graphbuild.remote import file_system, reaching

    files, path = file_system(url)
    with reaching(url):
        return int(files.size(path) or 0)
