"""WebDataset tars: which samples and members they hold, and where each member's bytes lie.

Groups members into samples as the webdataset package does (key: the path up to the first dot of the file name), and
raises InputError on everything that it would pass over in silence: a cut or damaged archive, a key that appears twice,
two members of one name. One pass over the headers; contents are read only where asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import fsspec

from graphbuild.errors import InputError
from graphbuild.store import local_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One file of a sample: its extension (lower case, all after the first dot), and its bytes' place in the tar."""

    extension: str
    offset: int
    size: int


@dataclass
class TarSample:
    key: str
    members: list[Member] = field(default_factory=list)

    @property
    def image(self) -> Member | None:
        """The first member whose last extension is an image's."""
        return next((m for m in self.members if m.extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS), None)


class Tar:
    """An open, uncompressed tar on local disk. `url` is the name to print."""

    def __init__(self, path: Path, url: str, file: IO[bytes], *, compressed: bool) -> None:
        self.path = path
        self.url = url
        self.file = file
        self.compressed = compressed  # offsets then have no meaning in the file at `url`

    def read(self, member: Member) -> bytes:
        self.file.seek(member.offset)
        return self.file.read(member.size)

    def samples(self) -> list[TarSample]:
        """All samples in the tar's order. Memory: a few hundred bytes a member."""
        bytes_total = self.path.stat().st_size
        samples: dict[str, TarSample] = {}
        current: TarSample | None = None
        end = 0
        try:
            archive = tarfile.open(fileobj=self.file, mode="r:")  # noqa: SIM115 the caller's file stays open
            for info in archive:
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK if info.isreg() else info.offset_data
                if info.isreg() and info.offset_data + info.size > bytes_total:
                    raise self._damaged(f"ends inside {info.name!r}")
                name = _NAME.match(info.name) if info.isreg() else None
                if name is None or ("/" not in info.name and info.name.startswith("__") and info.name.endswith("__")):
                    continue  # folders, links, and files without an extension are no samples' members
                key, extension = name[1], name[2].lower()
                if current is None or current.key != key:
                    if key in samples:
                        raise InputError(
                            f"{self.url}: key {key!r} appears twice (again at byte {info.offset})",
                            "make keys unique and keep a sample's members together: write the tar again",
                        )
                    current = samples[key] = TarSample(key)
                if any(member.extension == extension for member in current.members):
                    raise InputError(
                        f"{self.url}: sample {key!r} has two members .{extension} (again at byte {info.offset})",
                        "make keys unique, for instance by writing the tar again",
                    )
                current.members.append(Member(extension, info.offset_data, info.size))
        except (tarfile.TarError, EOFError, OSError) as error:
            raise self._damaged(str(error)) from error
        self.file.seek(end)
        if self.file.read(_BLOCK) != bytes(_BLOCK):
            raise self._damaged(f"no end-of-archive mark or a damaged header at byte {end:,}")
        return list(samples.values())

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.url} is not a whole tar: {what}",
            "the file was cut, damaged or is still being written: fetch or write it again, or leave it out of --shards",
        )


@contextlib.contextmanager
def open_tar(url: str) -> Iterator[Tar]:
    """Open a tar at any URL; a gzip-compressed one is unpacked to a temporary file first."""
    with local_file(url) as path, contextlib.ExitStack() as stack:
        with path.open("rb") as probe:
            compressed = probe.read(2) == b"\x1f\x8b"
        if compressed:
            unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "unpacked.tar"
            try:
                with gzip.open(path, "rb") as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (OSError, EOFError) as error:
                raise InputError(f"{url} cannot be unpacked ({error})", "fetch or write it again") from error
            path = unpacked
        yield Tar(path, url, stack.enter_context(path.open("rb")), compressed=compressed)


def expand_shards(pattern: str) -> list[str]:
    """The tars that a path with braces ({000..331}), * or ? names, in order of name; InputError when there are none."""
    import braceexpand

    urls: list[str] = []
    for part in braceexpand.braceexpand(pattern):
        fs, path = fsspec.core.url_to_fs(part)
        if fs.isdir(path):
            part, path = f"{part.rstrip('/')}/*.tar", f"{path.rstrip('/')}/*.tar"
        if any(mark in path for mark in "*?["):
            urls += [fs.unstrip_protocol(found) if "://" in part else found for found in sorted(fs.glob(path))]
        else:
            urls.append(part)
    if not urls:
        raise InputError(
            f"no tar matches {pattern}",
            "check --shards; quote a pattern with * so that the shell leaves it alone",
        )
    check_names(urls)
    return urls


def check_names(urls: Sequence[str]) -> None:
    """Sidecars are named after tars: two tars of one name cannot share a store."""
    seen: dict[str, str] = {}
    for url in urls:
        other = seen.setdefault(tar_stem(url), url)
        if other != url:
            raise InputError(f"{other} and {url} have the same name", "rename one, or use a store for each folder")


def tar_stem(url: str) -> str:
    """The tar's name without .tar, .tgz or .tar.gz: its sidecar is STEM.graph.parquet."""
    return re.sub(r"\.(tar|tgz|tar\.gz)$", "", url.rsplit("/", 1)[-1])
