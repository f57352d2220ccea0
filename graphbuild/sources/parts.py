"""Where `pack` finds images that lie in no tar: tables whose rows hold an image or its path, and folders of images.

A *part* is a table (parquet, JSONL, CSV, TSV), or a folder of images with .txt and .json files beside them. Its rows
are numbered from 0, in the table's order or by name. To find parts takes a listing, the footers of parquet, and a pass
over other tables; of images in folders a name each is held. A pass over rows holds one batch, BATCH_BYTES or so.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import logging
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from graphbuild.errors import InputError, public
from graphbuild.recipe import Pack
from graphbuild.runner.stage import digest
from graphbuild.sources.paths import expand, folder_of, is_hidden
from graphbuild.sources.tables import TableSpec, read_chunks
from graphbuild.sources.tables.jsonl import json_object
from graphbuild.sources.tables.plain import plain_table, refuse_twice
from graphbuild.sources.tables.spec import NOT_UTF8, select, wrong_type
from graphbuild.sources.tables.text import chomp, read_lines
from graphbuild.sources.tars import IMAGE_FORMATS
from graphbuild.store.files import file_identity, local_file, open_parts
from graphbuild.store.remote import file_system, reaching, version

logger = logging.getLogger(__name__)
METADATA = ("metadata.parquet", "metadata.jsonl", "metadata.csv")  # of a folder of images, as Hugging Face names it
FILE_NAME = "file_name"  # its column of paths
BATCH_BYTES = 16 << 20
BUFFER_BYTES = 1 << 20  # of a column; without it a row group is held whole


@dataclass(frozen=True)
class Part:
    """A table, or a folder whose images these are: by name, with what tells that one or its twins have changed.

    name: its path in the source's folder, which tars and exported columns tell.
    """

    url: str
    name: str
    rows: int
    images: Mapping[str, str] = field(default_factory=dict)
    beside: int = 0  # images in the folder of a table that tells of them

    def identity(self, first: int, count: int) -> str:
        """What tells that those rows are still the same; of a table: all of it."""
        if not self.images:
            return file_identity(self.url)
        return f"{self.name}, {count} images, {digest(list(self.images.items())[first : first + count])}"


class Row(NamedTuple):
    """A row of a part: an image, or the path of one in the part's folder; all its other columns, fit for JSON. fault:
    why it has none."""

    number: int
    image: Any  # bytes, or a buffer of them
    path: str | None
    values: dict[str, Any]
    fault: str = ""


def find_parts(config: Pack) -> list[Part]:
    """The parts of a source, in order of name.

    Raises:
        InputError: there are none, or a table is damaged, or has no such column.
    """
    source = str(config.source)
    try:
        found: list[Part] = []
        with reaching(source):
            folder = file_system(folder_of(source))[1].rstrip("/")
            for url in expand(source):
                fs, path = file_system(url)
                found += _in_folder(url, folder) if fs.isdir(path) else [Part(url, _name(path, folder), 0)]
    except FileNotFoundError as error:
        raise InputError(f"no file matches {error}", "check SOURCE; quote a pattern with * in the shell") from None
    except (ValueError, ImportError) as error:
        raise InputError(f"{source}: {error}", "write it as in 'data/train-{00000..00009}.parquet'") from None
    parts = [part if part.images else replace(part, rows=_count(part.url, config)) for part in found]
    for part in parts:
        if part.beside > part.rows:
            left = part.beside - part.rows
            logger.warning("%-9s %s: at least %d images beside it are in no row, and left out", "pack", part.name, left)
    if not parts:
        raise InputError(
            f"{source} holds no parquet, no metadata.jsonl or .csv and no image", "name a table or a folder of images"
        )
    return sorted(parts, key=lambda part: part.name)


def _name(path: str, folder: str) -> str:
    """A path in a folder, both as their file system spells them; of the folder itself the last part."""
    inside = path.rpartition("/")[2] if path == folder else path.removeprefix(f"{folder}/")
    return public(inside).rpartition("://")[2].strip("/")


def _in_folder(url: str, folder: str) -> list[Part]:
    """Tables, and folders of images that no table tells of; names that begin with a dot, and what lies below, are left
    out."""
    fs, root = file_system(url)
    files: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for path, info in sorted(fs.find(root, detail=True).items()):
        inside = path.removeprefix(root).strip("/")
        if not is_hidden(inside) and not any(name.startswith(".") for name in inside.split("/")):
            files[path.rpartition("/")[0]][path.rpartition("/")[2]] = info
    images = {at: [name for name in names if _is_image(name)] for at, names in files.items()}
    told = [f"{at}/" for at, names in files.items() if not names.keys().isdisjoint(METADATA)]
    # Beside its folder 00000/ of images img2dataset puts 00000.parquet, which has none.
    tables = [
        f"{at}/{name}"
        for at, names in files.items()
        for name in names
        if name in METADATA or (name.endswith(".parquet") and not images.get(f"{at}/{name.removesuffix('.parquet')}"))
    ]

    def full(path: str) -> str:
        return fs.unstrip_protocol(path) if "://" in url else path

    below = {path: sum(len(images[at]) for at in images if f"{at}/".startswith(path)) for path in told}
    parts = [
        Part(full(path), _name(path, folder), 0, beside=below.get(f"{path.rpartition('/')[0]}/", 0)) for path in tables
    ]
    others = [at for at in images if images[at] and not f"{at}/".startswith(tuple(told))]
    if not all(path.endswith(METADATA) for path in tables):  # what lies beside tables of images are no samples
        if others:
            left = ", ".join(map(public, others[:5]))
            logger.info("%-9s images in %s are packed where a row names them", "pack", left)
        return parts
    for at in others:
        told_of: defaultdict[str, list[str]] = defaultdict(list)
        for name, info in files[at].items():
            told_of[name.rpartition(".")[0]].append(f"{name}, {info['size']}, {version(info)}")
        named = {name: "; ".join(told_of[name.rpartition(".")[0]]) for name in images[at]}
        parts.append(Part(full(at), f"{_name(at, folder)}/", len(named), named))
    return parts


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_FORMATS


def _count(url: str, config: Pack) -> int:
    """Rows of a table."""
    name = public(url).lower()
    if name.endswith(".parquet"):
        with open_parts(url) as file, _parquet(url, file) as parquet:
            image_column(url, parquet.schema_arrow, config)
            return int(parquet.metadata.num_rows)
    if name.endswith(".jsonl"):
        with open_parts(url) as file:
            return sum(1 for _ in read_lines(url, file))
    spec = _spec(url, config, config.image_column or FILE_NAME)
    return sum(len(chunk.rows) + len(chunk.rejected) for chunk in read_chunks(spec))


# -- rows


def read_rows(url: str, names: Sequence[str], config: Pack, first: int, count: int) -> Iterator[Row]:
    """Rows first..first+count-1 of a part; names: those rows' images of a folder.

    Raises:
        InputError: the part is damaged, or has fewer rows.
    """
    if names:
        yield from _folder_rows(url, names, first)
        return
    name = public(url).lower()
    read = _parquet_rows if name.endswith(".parquet") else _json_rows if name.endswith(".jsonl") else _text_rows
    found = 0
    for row in read(url, config, first, count):
        found += 1
        yield row
    if found != count:
        raise InputError(f"{url} has {found:,} rows from row {first:,} on, not {count:,}", "fetch or write it again")


def image_column(url: str, schema: pa.Schema, config: Pack) -> str:
    """The column of a parquet file that holds images or paths; the other columns asked for are there too."""
    names, told = schema.names, config.image_column
    select(_spec(url, config, told), names, keep_others=False)  # refuses what is missing or there twice
    refuse_twice(url, names)
    if told is None:
        found = [one.name for one in schema if _holds_images(one.type)] or [name for name in names if name == FILE_NAME]
        if len(found) != 1:
            cause = f"columns {', '.join(map(repr, found))} may" if found else f"none of its columns {names[:50]} can"
            raise InputError(f"{url}: {cause} hold images", "name the one by --image-column")
        told = found[0]
    kind = schema.field(told).type
    if not (_holds_images(kind) or _is_text(kind)):
        raise InputError(f"{url}: column {told!r} is {kind}, and holds no images", "name another with --image-column")
    if config.caption_column is not None and not _is_text(schema.field(config.caption_column).type):
        raise wrong_type(url, "caption", config.caption_column, str(schema.field(config.caption_column).type))
    return told


def _holds_images(kind: pa.DataType) -> bool:
    """Whether it is binary, or Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


@contextlib.contextmanager
def _parquet(url: str, source: Path | IO[bytes]) -> Iterator[pq.ParquetFile]:
    """A parquet file that is opened; what ails it is named."""
    options = {"pre_buffer": False, "buffer_size": BUFFER_BYTES, "page_checksum_verification": True}
    try:
        with pq.ParquetFile(source, **options) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        cause = f"{url}: not parquet, truncated or damaged: {error}"
        raise InputError(cause, "fetch or write the file again") from error


def _parquet_rows(url: str, config: Pack, first: int, count: int) -> Iterator[Row]:
    with local_file(url) as path, _parquet(url, path) as parquet:  # a remote one is copied for the while
        column = image_column(url, parquet.schema_arrow, config)
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        groups = [n for n, end in enumerate(ends) if end > first and end - sizes[n] < first + count]
        number = ends[groups[0]] - sizes[groups[0]] if groups else 0
        batch_rows = min(max(BATCH_BYTES * parquet.metadata.num_rows // path.stat().st_size, 1), 1_000)
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, use_threads=False):
            begin, end = max(first - number, 0), min(first + count - number, batch.num_rows)
            if begin < end:
                yield from _batch_rows(batch.slice(begin, end - begin), column, number + begin)
            number += batch.num_rows


def _batch_rows(batch: pa.RecordBatch, column: str, first: int) -> Iterator[Row]:
    images, paths = batch.column(column), pa.nulls(batch.num_rows, pa.string())
    is_path, others = _is_text(images.type), batch
    if is_path:
        images, paths = None, images
    else:
        others = batch.drop_columns([column])
        if pa.types.is_struct(images.type):
            inner = dict(zip((one.name for one in images.type), images.flatten(), strict=True))
            images, paths = inner.get("bytes"), inner.get("path", paths)
    values = _values(plain_table(pa.table(others)))
    for i, (told, path) in enumerate(zip(values, _values(pa.table({"path": paths})), strict=True)):
        if told is None or path is None:
            yield Row(first + i, None, None, {}, NOT_UTF8)
            continue
        image = images[i].as_buffer() if images is not None and images[i].is_valid else None
        named = {} if is_path or path["path"] is None else {FILE_NAME: path["path"]}
        yield Row(first + i, image, path["path"], {**named, **told})


def _values(table: pa.Table) -> list[dict[str, Any] | None]:
    """Its rows; None for one that is not UTF-8."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        return [None] if len(table) == 1 else [row for i in range(len(table)) for row in _values(table.slice(i, 1))]


def _spec(url: str, config: Pack, image: str | None) -> TableSpec:
    roles = {"image": image, "caption": config.caption_column, "key": config.key_column}
    return TableSpec(path=url, columns={role: name for role, name in roles.items() if name is not None})


def _text_rows(url: str, config: Pack, first: int, count: int) -> Iterator[Row]:
    spec = _spec(url, config, config.image_column or FILE_NAME)
    for chunk in read_chunks(spec, keep_others=True):
        names = [spec.columns.get(name, name) for name in chunk.rows.column_names]
        rows = [(row["position"], row, "") for row in chunk.rows.rename_columns(names).to_pylist()]
        rows += [(row["position"], {"line": row["content"]}, row["reason"]) for row in chunk.rejected.to_pylist()]
        for number, values, fault in sorted(rows, key=lambda row: row[0]):
            if number >= first + count:
                return
            if number >= first:
                values.pop("position", None)
                yield Row(number, None, values.get(spec.columns["image"]), values, fault)


def _json_rows(url: str, config: Pack, first: int, count: int) -> Iterator[Row]:
    with open_parts(url) as file:
        for number, line in enumerate(itertools.islice(read_lines(url, file), first, first + count), first):
            values = json_object(chomp(line.removeprefix(codecs.BOM_UTF8) if number == 0 else line))
            if isinstance(values, str):
                yield Row(number, None, None, {"line": line.decode(errors="replace")}, values)
                continue
            path = values.get(config.image_column or FILE_NAME)
            fault = "" if isinstance(path, str | None) else "the image's path is not text"
            yield Row(number, None, path, values, fault)


def _folder_rows(url: str, names: Sequence[str], first: int) -> Iterator[Row]:
    for number, name in enumerate(names, first):
        stem, values = name.rpartition(".")[0], {FILE_NAME: name}
        try:
            content = _beside(url, stem, "json")
            told = {} if content is None else json_object(content.removeprefix(codecs.BOM_UTF8))
            if isinstance(told, str):
                yield Row(number, None, name, values, f"{stem}.json: {told}")
                continue
            text = _beside(url, stem, "txt")
            yield Row(number, None, name, values | ({} if text is None else {"txt": text.decode()}) | told)
        except UnicodeDecodeError:
            yield Row(number, None, name, values, NOT_UTF8)


def _beside(url: str, stem: str, kind: str) -> bytes | None:
    """What a file of that ending beside an image holds, in small letters or in capitals."""
    contents = (read_file(url, f"{stem}.{ending}") for ending in (kind, kind.upper()))
    return next((content for content in contents if content is not None), None)


def read_file(folder: str, path: str) -> bytes | None:
    """A file's bytes in a folder; None: there is none, or it lies elsewhere."""
    inside = posixpath.normpath(path)
    if inside.startswith(("/", "..")) or "\0" in path:
        return None
    fs, root = file_system(folder)
    with reaching(folder):
        return bytes(fs.cat_file(f"{root}/{inside}")) if fs.isfile(f"{root}/{inside}") else None
