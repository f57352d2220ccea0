"""Stages urls and download: a URL list to tars, each shard by img2dataset's own downloader inside a task.

urls cuts the list into `_state/urls/<shard>.parquet`; rows without a URL or of a broken line go to
`rejected/urls/<shard>.parquet`. download fetches a shard: shards/<shard>.tar, and img2dataset's <shard>.parquet (every
URL with its status and error) and <shard>_stats.json. What img2dataset does not do is done around it: an image must
decode to its last byte, rows it loses are counted, files appear whole or not at all. Memory: one shard's URLs, and the
images of `threads` requests.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from graphbuild.errors import ConfigError, ImageError, InputError, StageError, install_extra
from graphbuild.recipe import Download, Recipe
from graphbuild.runner import partly
from graphbuild.runner.stage import Stage, Task, outputs, records
from graphbuild.runner.state import require
from graphbuild.sources import fetched
from graphbuild.sources.again import cut_retry
from graphbuild.sources.paths import known_first, named_files, part_inputs, parts_of
from graphbuild.sources.pieces import PIECE_CHUNKS, count, piece_tasks, pieces_of, read_shards
from graphbuild.sources.tables import ENDING, TableSpec, read_parts
from graphbuild.sources.tables.plain import plain_table
from graphbuild.store import layout
from graphbuild.store.files import file_identities
from graphbuild.store.layout import shard_name
from graphbuild.store.store import Json, Store, Writer

RESERVED = (
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "sha256",
    "retry_of",
)
LIST = {"urls", "preset", "url_column", "caption_column"}  # settings that tell what is fetched
# and how, or past which refusals; all others decide what a shard holds
HINTS = {"threads", "host_connections", "allow_private_hosts", "ignore_opt_out", "proxy"}
# Of these a record names what differs from the default: finished shards of versions without them stay what they are.
LATER = {"min_bytes", "min_image_size", "max_aspect_ratio", "user_agent_token", "robots_txt"}


def plan_urls(recipe: Recipe, store: Store) -> list[Task]:
    config = recipe.download
    if config.urls is None:
        raise ConfigError(
            "no URL list given", "name it: `graphbuild download STORE URLS`, or download.urls in the recipe"
        )
    settings = config.model_dump(include={"preset", "url_column", "caption_column", "shard_size"})
    done = records(store, "urls")
    parts = list_parts("urls", config.urls, "URLS", done.get("list"))
    inputs = part_inputs("urls", parts.values())
    whole = Task(stage="urls", name="list", settings=settings, inputs=inputs, hints={"urls": list(parts)})
    again = any(not name.startswith(whole.name) for name in done)
    if again and "list" in done and len(inputs) > len(done["list"]["inputs"]):
        new = len(inputs) - len(done["list"]["inputs"])
        raise ConfigError(
            f"{store.url}: URLs were tried again, and {new:,} files are new in its list",
            "download the new files into another store",
        )
    pieces = pieces_of(whole, _spec(whole), parts, done.get("list"))
    return [*(piece_tasks(whole, pieces, store) if pieces else [whole]), *retries(whole, store)]


def plan_count(recipe: Recipe, store: Store) -> list[Task]:
    whole = plan_urls(recipe, store)[0]
    return [
        Task(
            stage="count",
            name=shard_name(number),
            settings=whole.settings,
            built={"list": whole.fingerprint, "piece": piece},
            hints={"urls": whole.hints["urls"]},
        )
        for number, piece in enumerate(whole.hints.get("pieces", []))
    ]


def run_count(task: Task, store: Store, writer: Writer) -> Json:
    return count(task, _spec(task))


def _spec(task: Task) -> TableSpec:
    columns = {"url": task.settings["url_column"], "caption": task.settings["caption_column"]}
    return TableSpec(path=task.hints["urls"][0], preset=task.settings["preset"], columns=columns)


def list_parts(what: str, pattern: str, option: str, done: Json | None) -> dict[str, str]:
    """The files of a list with their identities: those of the record `done` in its order, then new ones by name. what:
    their name among a task's inputs.

    Raises:
        InputError: there is none.
    """
    known = [] if done is None else parts_of(done["inputs"], what)
    return known_first(file_identities(named_files(pattern, ENDING, option)), known)


def retries(whole: Task, store: Store) -> list[Task]:
    """The lists of URLs tried again (`graphbuild.job.retry`) that were cut from this list of URLs."""
    found = [record for name, record in records(store, "urls").items() if not name.startswith(whole.name)]
    return [
        Task(stage="urls", name=record["task"], settings=record["settings"], built=record["built"])
        for record in found
        if record["built"]["list"] == whole.fingerprint
    ]


def run_urls(task: Task, store: Store, writer: Writer) -> Json:
    if not task.name.startswith("list"):
        return cut_retry(task, store, writer)
    settings, hints, urls = task.settings, task.hints, task.hints["urls"]
    spec, pieces = _spec(task), task.hints.get("pieces", [])
    chunks = read_shards(spec, hints) if pieces else read_parts(spec, urls, keep_others=True)
    waiting: list[pa.Table] = []
    shards, rejected, rows = hints.get("shards", 0), 0, 0

    def cut(size: int) -> None:
        nonlocal waiting, shards
        table = pa.concat_tables(waiting)
        writer.table(layout.URLS.format(shard_name(shards)), table.slice(0, size))
        waiting = [table.slice(size)] if size < len(table) else []
        shards += 1

    before = 0
    for number, (part, _, chunk) in enumerate(chunks, hints.get("number", 0) * PIECE_CHUNKS):
        if part != before:  # no shard is of two files: one that is added changes none
            if sum(map(len, waiting)) > 0:
                cut(settings["shard_size"])
            waiting = []
        before = part
        waiting.append(_renamed(chunk.rows))
        rows += len(chunk.rows)
        if len(chunk.rejected):
            writer.table(f"{layout.REJECTED.format(URLS.name)}/{shard_name(number)}.parquet", chunk.rejected)
            rejected += len(chunk.rejected)
        while sum(map(len, waiting)) >= settings["shard_size"]:
            cut(settings["shard_size"])
    if sum(map(len, waiting)):
        cut(settings["shard_size"])
    if hints.get("total", rows) == 0:
        raise InputError(f"{urls[0]}: no row has a URL ({rejected} rejected)", "check --url-column and --preset")
    return {"counts": {"urls": rows, "rejected": rejected}, **({"pieces": pieces} if task.inputs and pieces else {})}


def plan_download(recipe: Recipe, store: Store) -> list[Task]:
    _check_installed()
    config = recipe.download
    unused = {name for name in LATER if getattr(config, name) == Download.model_fields[name].default}
    return [
        Task(
            stage="download",
            name=Path(path).stem,
            settings=config.model_dump(exclude=LIST | HINTS | unused),
            built={"urls": sha256},
            hints=config.model_dump(include=HINTS),
        )
        for path, sha256 in outputs(require(store, "urls", "download"), "_state/urls/").items()
    ]


def run_download(task: Task, store: Store, writer: Writer) -> Json:
    urls = store.table(layout.URLS.format(task.name))
    plain = plain_table(urls)
    with tempfile.TemporaryDirectory() as folder:
        _img2dataset(task, plain, Path(folder))
        produced = {name: Path(folder) / f"{task.name}{name}" for name in (".tar", ".parquet", "_stats.json")}
        rows = pq.read_table(produced[".parquet"])
        if len(rows) != len(urls):
            raise StageError(
                f"img2dataset lost {len(urls) - len(rows)} of {len(urls)} rows of shard {task.name}",
                "run the command again: the shard will be fetched anew",
            )
        if plain.schema != urls.schema:
            pq.write_table(_typed(rows, urls), produced[".parquet"])
        failures = fetched.failures(pl.DataFrame(rows.select(["status", "error_message"])))
        images = len(urls) - failures.total()
        stats = json.loads(produced["_stats.json"].read_text())
        stats["status_dict"] = {"success": images, **failures}  # img2dataset's messages may hold a URL
        produced["_stats.json"].write_text(json.dumps(stats, indent=4))
        for name, path in produced.items():
            with writer.file(f"shards/{task.name}{name}") as target:
                shutil.copyfile(path, target)
    counts = {"urls": len(urls), "images": images, "failed": failures.total()}
    ignored = {"opt_out_ignored": len(urls)} if task.hints.get("ignore_opt_out") else {}
    return {"counts": counts, "reasons": failures, **ignored}


def finish_download(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    """What became of the list, and how many URLs were fetched whatever their sites say, if any."""
    ignored = sum(record["facts"].get("opt_out_ignored", 0) for record in done)
    retried = {"retried": fetched.retried(store).total()}
    return {"download": {**fetched.told(store), **retried, **({"opt_out_ignored": ignored} if ignored else {})}}


def downloaded_tars(store: Store) -> dict[str, str]:
    """Tar's path in the store -> sha256, of the finished download. StageError when it gave no image."""
    done = require(store, "download", "download")
    fetched.require_images(store)
    return outputs(done, "shards/", ".tar")


JPEG_BEGINS = b"\xff\xd8"


class CheckedResizer:
    """img2dataset's resizer, given what Pillow decoded: its own decoder fills a cut image with grey and goes on, turns
    16 bits into white, and knows no orientation. With resize_mode "no" a JPEG's own bytes are kept. What the settings
    refuse of bytes and sides is measured on the file as it came."""

    def __init__(self, resizer: Any, config: Download) -> None:
        self.resizer = resizer
        self.config = config
        self.least = 0 if resizer.skip_reencode else 2 * resizer.image_size  # more of a large JPEG does not show

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:
        from graphbuild.sources.images import upright_rgb

        try:
            if stream.getbuffer().nbytes < self.config.min_bytes:
                raise ImageError(f"too small: under {self.config.min_bytes:,} bytes")
            image = upright_rgb(stream, max_pixels=self.config.max_pixels, least=self.least)
            shorter, longer = sorted(image.info["size"])
            if shorter < self.config.min_image_size:
                raise ImageError(f"too small: a side under {self.config.min_image_size:,} pixels")
            if self.config.max_aspect_ratio is not None and longer > self.config.max_aspect_ratio * shorter:
                raise ImageError(f"too long: sides over {self.config.max_aspect_ratio:g} to 1")
        except ImageError as error:
            return None, None, None, None, None, error.cause
        if self.resizer.skip_reencode and stream.getbuffer()[:2] == JPEG_BEGINS:
            return stream.getvalue(), *image.size, *image.size, None
        decoded, size = io.BytesIO(), image.info["size"]
        image.save(decoded, "PPM")
        del image
        content, width, height, _, _, problem = self.resizer(decoded, boxes)
        return content, width, height, *size, problem


def _img2dataset(task: Task, urls: pa.Table, folder: Path) -> None:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import waits for the network otherwise
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(task.settings["max_pixels"])  # read when OpenCV is imported
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    from graphbuild.sources.fetch import Policy, fetching

    given = {**task.settings, **task.hints}
    config = Download(**{name: given[name] for name in Download.model_fields if name in given})

    def writing(*given: Any) -> Any:
        writer = WebDatasetSampleWriter(*given)
        write = writer.write

        def told(*row: Any) -> None:  # of each URL, also of one that failed
            write(*row)
            partly.add(1 / len(urls))

        writer.write = told
        return writer

    source = folder / "urls.arrow"
    with pa.OSFile(str(source), "wb") as file, pa.ipc.new_file(file, urls.schema) as batches:
        batches.write_table(urls)
    resizer = Resizer(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_quality=config.encode_quality,
        skip_reencode=config.resize_mode == "no",
    )
    downloader = Downloader(
        sample_writer_class=writing,
        resizer=CheckedResizer(resizer, config),
        thread_count=config.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=urls.column_names,
        timeout=config.timeout_seconds,
        number_sample_per_shard=max(config.shard_size, 2),
        oom_shard_count=len(task.name),
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,  # `fetch` tells errors that may pass from others
        user_agent_token=None,
        disallowed_header_directives=None,  # `fetch` looks at them, and at more
    )
    policy = Policy(**{setting.name: getattr(config, setting.name) for setting in fields(Policy)})
    with fetching(policy):
        downloader.download_shard((int(task.name), str(source)))


def _typed(rows: pa.Table, urls: pa.Table) -> pa.Table:
    """img2dataset's rows, which come in any order with keys in the list's, with the list's own columns."""
    places = rows["key"].to_numpy().argsort(kind="stable").argsort()
    for index, field in enumerate(urls.schema):
        rows = rows.set_column(index, field, urls[field.name].take(pa.array(places)))
    return rows


def _renamed(rows: pa.Table) -> pa.Table:
    """Columns that would collide with img2dataset's own get a suffix, as often as it takes."""
    names, taken = rows.column_names, {*RESERVED, *rows.column_names}
    for index, name in enumerate(names):
        if name in RESERVED:
            while name in taken:
                name = f"{name}_in_list"
            taken.add(name)
            names[index] = name
    return rows.rename_columns(names)


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("img2dataset") is None:
        raise ConfigError("downloading needs img2dataset, which is not installed", install_extra("download"))


COUNT = Stage(name="count", title="rows", plan=plan_count, run=run_count, scratch=True)
URLS = Stage(name="urls", title="URL list", plan=plan_urls, run=run_urls)
DOWNLOAD = Stage(
    name="download",
    title="download",
    plan=plan_download,
    run=run_download,
    finish=finish_download,
    entries=("download",),
    counts=fetched.counts,
    in_process=lambda tasks: len(tasks) == 1,  # most of the time they wait
    may_crash=lambda task: True,  # the web may send what ends a decoder
)
