"""Tars and their sidecars: which file belongs to which, and the samples of one pair, read in step.

A pair that does not fit raises a ShardError that names the tar, the position and both keys. One sequential
pass over the tar; memory: its sidecar and one sample.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from webdataset.tariterators import group_by_keys, tar_file_iterator

from graphbuild.errors import ConfigError, ShardError
from graphbuild.export.sidecar import Sidecar, SidecarHeader, read_columns
from graphbuild.graph.select.selection import Selection
from graphbuild.sources.paths import is_hidden
from graphbuild.sources.tars import image_extension, named_tars, tar_stem
from graphbuild.store.remote import file_system, reaching

logger = logging.getLogger(__name__)

ELSEWHERE = "check the path; tars that graphbuild downloaded lie in the store's shards/"
Selected = Selection | str | os.PathLike[str] | None
SHARED_BY_SHARDS = ("encoder", "d", "k", "embeddings", "graph", "chunk", "image_member")


@dataclass(frozen=True)
class Shard:
    """A tar and its sidecar, as paths or URLs, and which of its samples are taken, where not all are."""

    tar: str
    sidecar: str
    selection: Selection | None = field(default=None, compare=False, repr=False)

    def selected(self, samples: pa.Table) -> pa.Table:
        """Rows of the sidecar as `Selection.applied` leaves them."""
        return samples if self.selection is None else self.selection.applied(samples)


@dataclass(frozen=True)
class JoinedSample:
    """A sample still encoded, the sidecar of its tar, and its row there. extra: the wanted members' bytes."""

    tar: str
    sidecar: Sidecar
    position: int
    image: bytes
    extra: dict[str, bytes]

    @property
    def name(self) -> str:
        return f"{self.tar}: sample {self.position}, key {self.sidecar.key[self.position]!r}"


def find_shards(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    sidecars: str | os.PathLike[str] | None,
) -> list[Shard]:
    """Expand braces and globs to tars and pair each with its sidecar; local files must exist.

    Raises:
        ConfigError: no tar, a tar named twice, or a name without a tar's extension.
        ShardError: a local tar or sidecar does not exist. Remote ones are looked for when they are read.
    """
    given = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    tars = [tar for pattern in given for tar in _expand(os.fspath(pattern))]
    if not tars:
        raise ConfigError("no tars were named", "pass a pattern such as out/shards/{00000..00331}.tar")
    if len(set(tars)) < len(tars):
        twice = next(tar for tar in tars if tars.count(tar) > 1)
        raise ConfigError(f"{twice} is named twice", "name each tar once")
    shards = [Shard(tar, _sidecar_of(tar, sidecars)) for tar in tars]
    for shard in shards:
        for url in (shard.tar, shard.sidecar):
            files, path = file_system(url)
            if isinstance(files, LocalFileSystem) and not files.exists(path):
                raise missing(shard, url)
    return shards


def selected_shards(shards: Sequence[Shard], selection: Selected) -> list[Shard]:
    """The shards with what a loader's argument `selection` names; ConfigError where it is of another graph."""
    if selection is None:
        return list(shards)
    graph = read_columns(shards[0].sidecar, [])[0].graph
    opened = Selection.of(selection, graph, shards[0].sidecar)
    return [replace(shard, selection=opened) for shard in shards]


def read_sidecar(shard: Shard, expected: SidecarHeader) -> Sidecar:
    """The whole sidecar of a shard; ShardError as `Sidecar.read`, and where it is not of the expected graph."""
    sidecar = Sidecar.read(shard.sidecar, shard.selection)
    check_same_graph(shard, sidecar.header, expected)
    return sidecar


def check_tar_size(shard: Shard, header: SidecarHeader) -> None:
    """Raise a ShardError unless the tar has as many bytes as the one that the sidecar was written for."""
    files, path = file_system(shard.tar)
    try:
        with reaching(shard.tar, ShardError):
            bytes_found = files.size(path)  # None where a server does not tell; then keys and counts decide
    except FileNotFoundError:
        raise missing(shard, shard.tar) from None
    if header.tar is not None and bytes_found not in (None, header.tar.bytes):
        raise ShardError(
            f"{shard.tar} has {bytes_found} bytes; {shard.sidecar} was written for {header.tar.bytes}",
            "restore that tar, or embed and export again",
        )


def count_joined(shard: Shard, *, expected: SidecarHeader) -> int:
    """How many samples `joined_samples` gives: from the sidecar, or from a pass over a tar that is compressed."""
    _, table = read_columns(shard.sidecar, ["row", "node", "image_offset"])
    table = shard.selected(table)
    named, placed = (table.column(name).is_valid().to_numpy() for name in ("node", "image_offset"))
    if named.any() and not placed.any():  # a compressed tar's sidecar does not tell which samples have images
        return sum(1 for _ in joined_samples(shard, expected=expected, extra=()))
    return int((named & placed).sum())


def joined_samples(shard: Shard, *, expected: SidecarHeader, extra: Sequence[str]) -> Iterator[JoinedSample]:
    """The samples of one tar beside their sidecar rows, in tar order, without those that have no node.

    Raises:
        ShardError: the pair does not fit, is damaged, or belongs to another graph than `expected`.
    """
    sidecar = read_sidecar(shard, expected)
    rows, position, without_image = sidecar.header.rows, -1, 0
    placed = bool((sidecar.image_offset >= 0).any())  # not of a compressed tar
    for position, sample in enumerate(_tar_samples(shard, sidecar.header)):
        _check_key(shard, sidecar, position, sample["__key__"])
        if sidecar.node[position] < 0:
            continue
        named = sidecar.image_size[position] if placed else None
        image = None if named == -1 else image_extension(sample, sidecar.header.image_member)
        if placed and named != (-1 if image is None else len(sample[image])):
            raise ShardError(
                f"{shard.tar}: sample {position}, key {sidecar.key[position]!r}, has lost its image, or has another",
                "the tar changed after the export: restore it; or an earlier version chose another of its images: name"
                " one by `graphbuild embed STORE --image-member jpg --force`, then index and export",
            )
        if image is None:
            without_image += 1
            continue
        absent = [name for name in extra if name not in sample]
        if absent:
            raise ShardError(
                f"{shard.tar}: sample {position}, key {sample['__key__']!r}, has no member {absent[0]!r}",
                f"it has {sorted(name for name in sample if not name.startswith('__'))}: correct `extra`",
            )
        yield JoinedSample(shard.tar, sidecar, position, sample[image], {name: sample[name] for name in extra})
    if position + 1 < rows:
        raise ShardError(
            f"{shard.tar} holds {position + 1} samples, {shard.sidecar} {rows} rows: the tar ends before row"
            f" {position + 1}, key {sidecar.key[position + 1]!r}",
            "the tar is cut short or changed after the export: restore it, or embed and export again",
        )
    without_node = int((sidecar.node[:rows] < 0).sum())
    used = rows - without_node - without_image
    logger.log(
        logging.INFO if used or shard.selection else logging.WARNING,
        "%s: %d of %d samples used; %d without a usable caption%s, %d without an image",
        shard.tar,
        used,
        rows,
        without_node,
        " or not selected" if shard.selection else "",
        without_image,
    )


def member_value(sample: JoinedSample, name: str) -> Any:
    """An extra member: json parsed, txt as str, others as bytes.

    Raises:
        ShardError: the member is not valid JSON or UTF-8.
    """
    content, extension = sample.extra[name], name.rsplit(".", 1)[-1]
    try:
        if extension == "json":
            return json.loads(content)
        return content.decode() if extension == "txt" else content
    except ValueError as error:
        raise ShardError(
            f"{sample.name}: member {name!r} is malformed ({error})",
            "correct the member, or drop it from `extra`",
        ) from error


def _tar_samples(shard: Shard, header: SidecarHeader) -> Iterator[dict[str, Any]]:
    """Samples as webdataset and graphbuild.sources.tars group them: members side by side that share a key."""
    check_tar_size(shard, header)
    files, path = file_system(shard.tar)
    try:
        with reaching(shard.tar, ShardError), files.open(path, "rb") as stream:
            files_in_it = tar_file_iterator(stream, skip_meta=None)
            members = ({**member, "__url__": shard.tar} for member in files_in_it if not is_hidden(member["fname"]))
            yield from group_by_keys(members)
    except FileNotFoundError:
        raise missing(shard, shard.tar) from None
    except (tarfile.TarError, EOFError, ValueError) as error:  # ValueError: a member twice in one sample
        reason = error.args[0] if error.args else type(error).__name__
        raise ShardError(
            f"{shard.tar}: {reason}",
            "the tar is damaged or has the same member twice: fetch or write it again",
        ) from error


def _check_key(shard: Shard, sidecar: Sidecar, position: int, key: str) -> None:
    if position < len(sidecar.key) and key == sidecar.key[position]:
        return
    earlier = (sidecar.key[:position] == key).nonzero()[0]
    if len(earlier):
        raise ShardError(
            f"{shard.tar}: key {key!r} stands at sample {earlier[0]} and again at sample {position}:"
            " a duplicate key, or one sample whose members are apart",
            "rewrite the tar with each key once and its members side by side, then embed and export again",
        )
    if position >= len(sidecar.key):
        raise ShardError(
            f"{shard.tar} holds more samples than {shard.sidecar} has rows ({len(sidecar.key)}):"
            f" sample {position} has key {key!r}",
            "the tar changed after the export: restore it, or embed and export again",
        )
    raise ShardError(
        f"{shard.tar}: sample {position} has key {key!r}, but {shard.sidecar} has {sidecar.key[position]!r}"
        f" there (row {sidecar.row[position]} of the store)",
        "the sidecar belongs to another tar, or the tar was reordered: restore it, or embed and export again",
    )


def check_same_graph(shard: Shard, header: SidecarHeader, expected: SidecarHeader) -> None:
    """Raise a ShardError unless the sidecars of all shards tell of one graph and store it alike."""
    for name in SHARED_BY_SHARDS:
        found, wanted = getattr(header, name), getattr(expected, name)
        if found != wanted:
            raise ShardError(
                f"{shard.sidecar}: {name} is {found!r}, but the first tar's sidecar has {wanted!r}",
                "batches cannot mix graphs: name tars of one store only, or export the whole store again",
            )


def _expand(pattern: str) -> list[str]:
    try:
        return named_tars(pattern)
    except ValueError:
        raise ConfigError(f"{pattern}: unbalanced braces", "write {00000..00331}, or pass a list") from None
    except FileNotFoundError as error:
        files, path = file_system(str(error))
        without_tars = files.glob(f"{path.rpartition('/')[0]}/*.graph.parquet")
        raise ConfigError(f"{error} matches no file", _own_tars(str(error)) if without_tars else ELSEWHERE) from None


def _sidecar_of(tar: str, sidecars: str | os.PathLike[str] | None) -> str:
    folder, _, file_name = tar.rpartition("/")
    if tar_stem(file_name) == file_name:
        raise ConfigError(f"{tar} does not end in .tar, .tgz or .tar.gz", "name WebDataset tars")
    name = f"{tar_stem(file_name)}.graph.parquet"
    if sidecars is not None:
        folder = os.fspath(sidecars).rstrip("/")
    return f"{folder}/{name}" if folder else name


def missing(shard: Shard, url: str) -> ShardError:
    """The error for a shard's tar or sidecar that is not there."""
    if url == shard.tar:
        beside = url.rpartition("/")[0] == shard.sidecar.rpartition("/")[0] and Path(shard.sidecar).exists()
        return ShardError(f"{url}: there is no such tar", _own_tars(url) if beside else "check the path or pattern")
    cause, fix = f"{url}: {shard.tar} has no sidecar there", "run `graphbuild export` on the store, or name the folder"
    if _has_fields(shard.tar):
        cause += "; `export --layout inline` put the fields inside, for loaders that know nothing of sidecars"
        fix = "give the tars that it was made from, `graphbuild export STORE --layout sidecars`, and name the folder"
    return ShardError(cause, f"{fix} of the sidecars with `sidecars=`")


def _own_tars(url: str) -> str:
    """The next step where the folder holds sidecars, but not the tars that url names there."""
    return f"there are sidecars without tars: give your tars, and sidecars={url.rpartition('/')[0] or '.'!r}"


def _has_fields(tar: str) -> bool:
    """Whether a local tar is one of the layout inline, by its first members."""
    try:
        with tarfile.open(tar) as archive:
            return any(member.name.endswith(".graph.npz") for member in islice(archive, 100))
    except (OSError, tarfile.TarError):
        return False
