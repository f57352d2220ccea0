"""What a recipe is about to do, in numbers (rows, shards, samples, nodes, tokens, bytes), and what a store has of it.

Read from what is there: footers of parquet and .npy files, headers of the first tar, a sample of a text list, a store's
manifest. Nothing is read whole. What cannot be known before the job has run is assumed, and said (`Job.assumed`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphbuild.errors import ConfigError, public
from graphbuild.graph import grow
from graphbuild.graph.certify import require_graph
from graphbuild.graph.tasks import nodes_entry
from graphbuild.job.plan import lists
from graphbuild.job.plan.encoder_facts import NO_ENCODER, EncoderFacts, encoder_facts
from graphbuild.job.steps import Step, steps_of
from graphbuild.job.verbs import is_spared, replaced_by
from graphbuild.nodes.captions import read_class_names
from graphbuild.recipe import BESIDE, Recipe
from graphbuild.runner.stage import records, total_counts
from graphbuild.runner.state import pending, require
from graphbuild.sources.fetched import require_images
from graphbuild.sources.parts import Part, find_parts
from graphbuild.sources.paths import named_files
from graphbuild.sources.tables import CAPTION_ROLES
from graphbuild.sources.tars import expand_shards, open_tar
from graphbuild.sources.vector_files import ENDING, shapes_of
from graphbuild.store.remote import file_system, reaching
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store

IMAGE_BYTES = 30_000  # of a JPEG at 256 pixels: img2dataset's page on CC12M has 331 GB for 11M images
JSON_BYTES = 600  # img2dataset's json and txt of a sample; and tar headers are 512 bytes a member


@dataclass(frozen=True)
class Finished:
    """Tasks of a stage that are done: how many, the seconds of the median one, and the sums of what they counted."""

    tasks: int
    seconds: float
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Job:
    source: str  # list, tars, captions or vectors
    rows: int  # of the source
    samples: int
    nodes: int
    shards: int
    encoder: EncoderFacts = NO_ENCODER
    verb: str = "run"
    k: int = 0
    tokens: float = lists.UNKNOWN.tokens  # of a caption
    characters: float = lists.UNKNOWN.characters
    list_bytes: float = 0.0
    tar_bytes: float = 0.0  # of all tars
    success: float = 1.0  # share of the URLs that give an image
    year: int | None = None  # of the list
    first_new: int = 0  # node of a graph that grows
    done: Mapping[str, float] = field(default_factory=dict)  # share of each stage that a rerun skips
    finished: Mapping[str, Finished] = field(default_factory=dict)  # tasks of the store, by stage
    assumed: tuple[str, ...] = ()  # what was not read but taken to be so

    @property
    def d(self) -> int:
        return self.encoder.d


def job_of(verb: str, recipe: Recipe, store: Store | None = None, rows: int | None = None) -> Job:
    """The job of a verb (`run` or a part) on a recipe; store: where earlier stages' numbers are; rows: of the source,
    instead of what is read.

    Raises:
        ConfigError, InputError: the recipe names no source, or one that cannot be read (unless rows are given or its
            numbers are published).
    """
    embed = recipe.embed
    if verb == "download" or (verb == "run" and recipe.download.urls is not None):
        job = _of_urls(recipe, rows)
    elif verb == "pack" or (verb == "run" and recipe.pack.source is not None):
        job = _of_parts(recipe, rows)
    elif store is not None and verb in ("index", "export"):
        job = _of_embedded(verb, recipe, store)
    elif embed.shards is not None:
        job = _of_tars(recipe, embed.shards, rows)
    elif embed.captions is not None:
        job = _of_captions(recipe, embed.captions, rows)
    elif embed.vectors is not None:
        job = _of_vectors(recipe, embed.vectors, rows)
    elif store is not None and verb == "embed":
        job = _of_own_tars(recipe, store)
    else:
        fix = "give download.urls, pack.source, or embed.shards, captions or vectors"
        raise ConfigError("the recipe names no source", fix)
    k = job.k or min(recipe.index.neighbors(job.nodes), max(job.nodes - 1, 1))
    return replace(job, verb=verb, k=k, shards=max(job.shards, 1))


# -- sources


def _of_urls(recipe: Recipe, rows: int | None) -> Job:
    config, encoder = recipe.download, encoder_facts(recipe)
    assert config.urls is not None
    columns = {"url": config.url_column, "caption": config.caption_column}
    known = lists.look(config.urls, config.preset, columns, rows, encoder.folder)
    success = lists.expected_success(known.year)
    job = _of_list("list", known, round(known.rows * success), config.shard_size, encoder)
    said = f"{success:.0%} of the URLs give an image{f', as of a list of {known.year}' if known.year else ''}"
    tar_bytes = job.samples * (IMAGE_BYTES * (config.image_size / 256) ** 2 + JSON_BYTES + 3 * 1024)
    return replace(job, tar_bytes=tar_bytes, success=success, year=known.year, assumed=(said, *job.assumed))


def _of_parts(recipe: Recipe, rows: int | None) -> Job:
    config = recipe.pack
    assert config.source is not None
    parts = find_parts(config) if rows is None else [Part(config.source, "", rows)]
    held = [part for part in parts if rows is None and part.url.endswith(".parquet")]
    with reaching(config.source):
        total = float(sum(file_system(part.url)[0].size(file_system(part.url)[1]) or 0 for part in held))
    others = sum(part.rows for part in parts if part not in held)
    counted, tars = sum(part.rows for part in parts), sum(math.ceil(part.rows / config.shard_size) for part in parts)
    said = (f"{others:,} images have {IMAGE_BYTES / 1e3:.0f} kB each",) if others else ()
    return _of_samples(recipe, counted, [round((total + others * IMAGE_BYTES) / max(tars, 1))] * tars, said)


def _of_captions(recipe: Recipe, url: str, rows: int | None) -> Job:
    embed, encoder = recipe.embed, encoder_facts(recipe)
    columns = dict(zip(CAPTION_ROLES, embed.caption_sources, strict=False))
    known = lists.look(url, embed.preset, columns, rows, encoder.folder)
    return _of_list("captions", known, known.rows, embed.shard_size, encoder)


def _of_list(source: str, known: lists.Known, samples: int, shard_size: int, encoder: EncoderFacts) -> Job:
    nodes, shards = round(samples * known.captions * known.distinct), math.ceil(known.rows / shard_size)
    said = f"{known.distinct:.0%} of the captions differ (fewer, where the list repeats itself)"
    job = Job(source, known.rows, samples, nodes, shards, encoder, assumed=(*known.assumed, said))
    return replace(job, tokens=known.tokens, characters=known.characters, list_bytes=known.bytes)


def _of_vectors(recipe: Recipe, url: str, rows: int | None) -> Job:
    urls, shapes = _vector_files(recipe, url)
    found, width = sum(rows for rows, _ in shapes), max(width for _, width in shapes)
    rows = found if rows is None else rows
    shards = math.ceil(rows / recipe.embed.shard_size)
    job = Job("vectors", rows, rows, rows, shards, EncoderFacts(d=width), characters=0.0)
    return replace(job, list_bytes=sum(_sizes(urls)) * rows / max(found, 1))


def _vector_files(recipe: Recipe, pattern: str) -> tuple[list[str], list[tuple[int, int]]]:
    urls = named_files(pattern, ENDING, "--vectors")
    return urls, shapes_of(urls, recipe.embed.vector_column)


def _sizes(urls: list[str]) -> list[int]:
    """Bytes of files that lie on one file system."""
    with reaching(urls[0]):
        return [int(size or 0) for size in file_system(urls[0])[0].sizes([file_system(url)[1] for url in urls])]


def _of_tars(recipe: Recipe, shards: str, rows: int | None) -> Job:
    urls = expand_shards(shards, recipe.embed.beside_tars)
    sizes = _sizes(urls)
    with open_tar(urls[0]) as tar:
        first = len(tar.samples())
    samples = rows if rows is not None else round(first * sum(sizes) / max(sizes[0], 1))
    counted = () if len(urls) == 1 else (f"{samples:,} samples, by those of {public(urls[0]).rsplit('/', 1)[-1]}",)
    return _of_samples(recipe, samples, sizes, counted)


def _of_samples(recipe: Recipe, samples: int, sizes: list[int], assumed: tuple[str, ...]) -> Job:
    """Of tars of those sizes."""
    nodes = samples * len(recipe.embed.caption_sources)
    encoder, size = encoder_facts(recipe), float(sum(sizes))
    if recipe.embed.source == BESIDE:
        nodes, assumed = samples, (*assumed, "every sample has a vector")
        if recipe.embed.vectors is not None:
            encoder = EncoderFacts(d=max(width for _, width in _vector_files(recipe, recipe.embed.vectors)[1]))
    elif recipe.embed.class_names is not None:
        nodes = min(len(read_class_names(recipe.embed.class_names)), samples)
    else:
        assumed = (*assumed, "every caption differs (fewer nodes, where they repeat)")
    return Job("tars", samples, samples, nodes, len(sizes), encoder, tar_bytes=size, assumed=assumed)


# -- stores


def _of_own_tars(recipe: Recipe, store: Store) -> Job:
    stages = store.manifest()["stages"]
    if "pack" in stages:
        samples = stages["pack"]["counts"]["samples"]
    else:
        require(store, "download", "download")
        require_images(store)
        samples = stages["download"]["counts"]["images"]
    sizes = [size for name, size in store.sizes("shards").items() if name.endswith(".tar")]
    return _of_samples(recipe, samples, sizes, ())


def _of_embedded(verb: str, recipe: Recipe, store: Store) -> Job:
    if verb == "export":
        require_graph(store)
    manifest = nodes_entry(store)
    shards = shards_of(store, manifest)
    samples, nodes = (int(shards.column(name).sum()) for name in ("samples", "nodes"))
    source = "vectors" if "vectors" in manifest["stages"] else "tars" if shards[0].tar else "captions"
    tar_bytes = float(sum(filter(None, shards.table["tar_bytes"].to_pylist())))
    kept = sum(task.built["nodes"] for task in grow.plan(recipe, store)) if verb == "index" else 0
    job = Job(source, samples, samples, nodes, len(shards), EncoderFacts(d=manifest["embeddings"]["d"]))
    return replace(job, k=manifest["graph"]["k"] if verb == "export" else 0, tar_bytes=tar_bytes, first_new=kept)


# -- what is done


def finished(store: Store, steps: Sequence[Step]) -> dict[str, Finished]:
    """By step, what its finished tasks in a store took, wherever they ran."""
    found = {}
    for step in steps:
        if done := list(records(store, step.name).values()):
            seconds = statistics.median(record["seconds"] for record in done)
            found[step.name] = Finished(len(done), seconds, total_counts(done))
    return found


def shares_done(verb: str, recipe: Recipe, store: Store, *, force: bool = False) -> dict[str, float]:
    """By stage; stages behind the first with something to do count as not done at all.

    Raises what the verb would raise before it runs anything: changed settings (unless force), a missing stage or input.
    """
    steps = steps_of(verb, recipe)
    for step in steps:
        step.stage.check(recipe)
    if replaced_by(steps[0], steps[0].stage.plan(recipe, store), store, force=force):
        return {}
    shares: dict[str, float] = {}
    for step in steps:
        stage = step.stage
        if is_spared(step, recipe, store, force=force):
            shares[stage.name] = 1.0
            continue
        tasks = stage.plan(recipe, store)
        done = records(store, stage.name)
        todo = pending(stage, tasks, done, store, force=force, remove=False)
        shares[stage.name] = 1 - len(todo) / len(tasks) if tasks else 1.0
        if todo:
            break
    return shares
