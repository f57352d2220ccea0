"""WebDataset tars: which samples and members they hold, and where each member's bytes lie.

Groups members into samples as the webdataset package does (key: the path up to the first dot of the file name), and
raises InputError on everything that it would pass over in silence: a cut or damaged archive, data behind its end, a key
that appears twice, a link in place of a file. Names are keys only: nothing is ever unpacked to disk under a member's
name. One pass over the headers; contents are read only where asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from graphbuild.errors import InputError, public
from graphbuild.sources.paths import expand, in_folder, is_hidden
from graphbuild.store.files import local_file
from graphbuild.store.remote import reaching

IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
IMAGE_FORMATS |= {"tif": "TIFF", "tiff": "TIFF", "avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM", "pgm": "PPM"}
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_ENDING = re.compile(r"\.(tar|tgz|tar\.gz)$", re.IGNORECASE)
_META = re.compile(r"__[^/]*__($|/)")
_SURROGATE = re.compile("[\ud800-\udfff]")  # what tarfile makes of bytes that are not UTF-8
_BLOCK = 512
_EMPTY = tarfile.TarInfo().tobuf()  # of no name, and a size of 11 zeros
_EMPTY_SUM = tarfile.calc_chksums(_EMPTY)[0] - sum(b"0" * 11)  # type: ignore[attr-defined]
_PADDING_BYTES = 1 << 20


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

    def image(self, wanted: str | None = None) -> Member | None:
        """The member that `image_extension` names."""
        extension = image_extension([member.extension for member in self.members], wanted)
        return next((member for member in self.members if member.extension == extension), None)


@dataclass(frozen=True, eq=False)
class Tar:
    """An open, uncompressed tar on local disk. url: the name to print; source: the file there, maybe compressed."""

    path: Path
    url: str
    file: IO[bytes]
    source: Path
    compressed: bool  # offsets then have no meaning in the file at `url`

    def read(self, member: Member) -> bytes:
        self.file.seek(member.offset)
        return self.file.read(member.size)

    def samples(self) -> list[TarSample]:
        """All samples in the tar's order. Memory: a few hundred bytes a member."""
        bytes_total = self.path.stat().st_size
        samples: dict[str, TarSample] = {}
        current: TarSample | None = None
        offset = 0
        try:
            archive = tarfile.open(fileobj=self.file, mode="r:")  # noqa: SIM115 the caller's file stays open
            for info in archive:
                self._check(info, bytes_total)
                offset = archive.offset
                name = None if _META.match(info.name) or is_hidden(info.name) else _NAME.match(info.name)
                if name is not None and (info.islnk() or info.issym()):
                    raise self._linked(info)
                if name is None or not info.isreg():
                    continue  # folders, hidden files, and those without an extension are no samples' members
                key, extension = name[1], name[2].lower()
                if current is None or current.key != key:
                    if key in samples:
                        raise InputError(
                            f"{self.url}: key {key!r} appears twice (again at byte {info.offset:,})",
                            "make keys unique and keep a sample's members together: write the tar again",
                        )
                    current = samples[key] = TarSample(key)
                if any(member.extension == extension for member in current.members):
                    raise InputError(
                        f"{self.url}: two members are {f'{key}.{extension}'!r} (again at byte {info.offset:,})",
                        "name each member once: write the tar again",
                    )
                current.members.append(Member(extension, info.offset_data, info.size))
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError) as error:
            raise self._damaged(f"{error} (behind byte {offset:,})") from error
        self._check_end(offset, bytes_total)
        return list(samples.values())

    def _check(self, info: tarfile.TarInfo, bytes_total: int) -> None:
        if info.issparse():
            raise InputError(
                f"{self.url}: member {info.name!r} is stored as a sparse file", "write the tar again without --sparse"
            )
        if info.size < 0 or (info.isreg() and info.offset_data + info.size > bytes_total):
            raise self._damaged(f"it ends inside {info.name!r}")
        if _SURROGATE.search(info.name):
            raise InputError(
                f"{self.url}: the member name {info.name!r} at byte {info.offset:,} is not UTF-8",
                "rename the file and write the tar again",
            )

    def _linked(self, info: tarfile.TarInfo) -> InputError:
        kind = "hard" if info.islnk() else "symbolic"
        return InputError(
            f"{self.url}: member {info.name!r} is a {kind} link to {info.linkname!r}, which readers pass over",
            "write the tar again with the files themselves: tar --dereference --hard-dereference",
        )

    def _check_end(self, offset: int, bytes_total: int) -> None:
        """From `offset` on must be zeros up to the file's end, one block of them or more."""
        self.file.seek(offset)
        if bytes_total < offset + _BLOCK or any(self.file.read(_BLOCK)):
            raise self._damaged(f"no end-of-archive mark, or a damaged header, at byte {offset:,}")
        for begin in range(offset + _BLOCK, bytes_total, _PADDING_BYTES):
            padding = self.file.read(min(_PADDING_BYTES, bytes_total - begin))
            if padding.count(0) != len(padding):
                raise InputError(
                    f"{self.url}: behind the archive's end at byte {offset:,} lies more, which readers pass over",
                    "if tars were joined by cat, use the single ones; else write the tar again",
                )

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.url} is not a whole tar: {what}",
            "the file was cut, damaged or is still being written: fetch or write it again, or leave it out of --shards",
        )


class _WholeReads(io.BufferedReader):
    """A file whose reads give all that is asked for or raise: at a short one tarfile stops in silence, or hangs."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if len(content) != size:
            raise EOFError("the file ends too early")
        return content


@contextlib.contextmanager
def open_tar(url: str) -> Iterator[Tar]:
    """Open a tar at any URL; a gzip-compressed one is unpacked to a temporary file first."""
    with local_file(url) as source, contextlib.ExitStack() as stack:
        path = source
        with path.open("rb") as probe:
            compressed = probe.read(2) == b"\x1f\x8b"
        if compressed:
            unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "unpacked.tar"
            try:
                with gzip.open(source, "rb") as content, unpacked.open("wb") as target:
                    shutil.copyfileobj(content, target)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{url} cannot be unpacked ({error})", "fetch or write it again") from error
            path = unpacked
        yield Tar(path, url, stack.enter_context(_WholeReads(io.FileIO(path))), source, compressed)


def add_member(archive: tarfile.TarFile, name: str, content: bytes | memoryview) -> int:
    """Append a member, without date, owner and mode of its own; returns where its content begins.

    As `TarFile.addfile`, which remembers every member and takes several times as long for a small one.
    """
    header = member_header(name, len(content))
    begin, padding = archive.offset + len(header), bytes(-len(content) % _BLOCK)
    for block in (header, content, padding):
        archive.fileobj.write(block)  # type: ignore[arg-type]
    archive.offset = begin + len(content) + len(padding)
    return begin


def member_header(name: str, size: int) -> bytes:
    """What tarfile writes before a member; of a plain name without its detours."""
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.DEFAULT_FORMAT, tarfile.ENCODING, "surrogateescape")
    told, digits = name.encode(), b"%011o" % size
    header = bytearray(_EMPTY)
    header[: len(told)] = told
    header[124:135] = digits
    header[148:154] = b"%06o" % (_EMPTY_SUM + sum(told) + sum(digits))  # of all bytes, its own place as blanks
    return bytes(header)


def expand_shards(pattern: str, used: Iterable[str] = ()) -> list[str]:
    """The tars that a path, folder or pattern names (`named_tars`), of different names. used: as for `in_folder`.

    Raises:
        InputError: there are none, a part of the pattern names none, or two have the same name.
    """
    try:
        urls = named_tars(pattern, used)
    except FileNotFoundError as error:
        raise InputError(
            f"no tar matches {error}", "check --shards; quote a pattern with * so that the shell leaves it alone"
        ) from None
    except (ValueError, ImportError) as error:
        raise InputError(f"--shards {pattern}: {error}", "write it as in 'cc3m/{0000..0331}.tar'") from None
    check_names(urls)
    return urls


def named_tars(pattern: str, used: Iterable[str] = ()) -> list[str]:
    """The paths that `paths.expand` finds, and in place of a folder all tars in it, in order of name.

    Raises:
        ValueError: as `expand`. FileNotFoundError: a folder or pattern without a tar; it is named.
    """
    urls: list[str] = []
    with reaching(pattern):
        for path in expand(pattern):
            urls += [path] if _ENDING.search(public(path)) else in_folder(path, _ENDING, "tar", used)
    return urls


def given_urls(pattern: str | None) -> dict[str, str]:
    """Recorded URL -> the one to read it by, of tars that a command was given with queries: no record keeps those."""
    return {} if pattern is None or public(pattern) == pattern else {public(url): url for url in expand_shards(pattern)}


def check_names(urls: Sequence[str]) -> None:
    """Sidecars are named after tars: two tars of one name cannot share a store."""
    seen: dict[str, str] = {}
    for url in urls:
        other = seen.setdefault(tar_stem(url), url)
        if other != url:
            raise InputError(f"{other} and {url} have the same name", "rename one, or use a store for each folder")


def image_extension(extensions: Iterable[str], wanted: str | None = None) -> str | None:
    """Which of a sample's members, by their extensions in the tar's order, is its image; None: none.

    The wanted one, if any is; else the first of those that are an image's and no more, as jpg; else the first that
    ends in one, as depth.png.
    """
    images = [name for name in extensions if (name == wanted if wanted else name.rpartition(".")[2] in IMAGE_FORMATS)]
    return min(images, key=lambda name: "." in name, default=None)


def tar_stem(url: str) -> str:
    """The tar's name without .tar, .tgz or .tar.gz: its sidecar is STEM.graph.parquet."""
    return _ENDING.sub("", public(url).rsplit("/", 1)[-1])
