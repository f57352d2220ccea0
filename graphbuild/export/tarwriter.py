"""New tars from the samples of others: members copied as they are, under any keys.

A source is read once, from its begin to its end. 512 bytes before a member's content must hold the header of the member
that the store names, so a source that has changed since is refused. Memory: PIECE_BYTES, or a sample that is larger.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.errors import InputError, ShardError
from graphbuild.sources.ranges import TarRanges
from graphbuild.sources.tars import Member, add_member, member_header
from graphbuild.store.sharded import Array

PIECE_BYTES = 16 << 20  # that are read at once
GAP_BYTES = 1 << 20  # that are not read where no sample lies in them
Extra = Callable[[int], tuple[str, bytes] | None]


def write_tar(path: Path, samples: pa.Table, tar: str, extra: Extra) -> None:
    """Write a tar of samples [n] of another, as `copies`, under their old keys. extra: the extension and content of one
    more member of sample i. Dates, owners and modes are left out, so the bytes follow from the contents alone."""
    with tarfile.open(path, "w") as archive:
        keys = samples["key"].to_pylist()
        for i, (copy, _, _) in enumerate(copies(samples, tar, keys)):
            archive.fileobj.write(copy)
            archive.offset += len(copy)
            more = extra(i)
            if more is not None:
                add_member(archive, f"{keys[i]}.{more[0]}", more[1])


def copies(samples: pa.Table, tar: str, keys: Sequence[str]) -> Iterator[tuple[bytes, int, int]]:
    """What samples [n] of a tar are in a new one, under new keys: bytes, and where in them the image begins, and its
    size; -1 where there is none.

    samples: columns key, image_offset and members, as in samples/<shard>.parquet, in the tar's order.

    Raises:
        ShardError: the tar is gone, cannot be read, or has other members there.
    """
    members, ranges = samples["members"].combine_chunks(), TarRanges([tar])
    bounds = np.concatenate([[0], np.cumsum(members.value_lengths().to_numpy())])
    offsets, sizes = (pc.struct_field(members.flatten(), name).to_numpy() for name in ("offset", "size"))
    starts, ends = offsets[bounds[:-1]] - tarfile.BLOCKSIZE, (offsets + sizes)[bounds[1:] - 1]
    for begin, end in pieces(starts, ends):
        piece = ranges.read(np.zeros(1, np.int64), starts[begin : begin + 1], ends[end - 1 : end])[0]
        for row, key in zip(samples.slice(begin, end - begin).to_pylist(), keys[begin:end], strict=True):
            blocks: list[bytes | memoryview] = []
            length, image = 0, (-1, -1)
            for member in (Member(**fields) for fields in row["members"]):
                name, extension = f"{row['key']}.{member.extension}", member.extension
                content = _content(piece, member, int(starts[begin]), name, tar)
                header = member_header(f"{key}.{extension}", member.size)
                if member.offset == row["image_offset"]:
                    image = length + len(header), member.size
                blocks += [header, content, bytes(-member.size % tarfile.BLOCKSIZE)]
                length += sum(map(len, blocks[-3:]))
            yield b"".join(blocks), *image
    ranges.close()


def copied_bytes(samples: pa.Table, key: str) -> Array:
    """The length of what `copies` gives for each of samples [n] under a key as long as that one, int64 [n]."""

    def length(extension: str, offset: int, size: int) -> int:
        return len(member_header(f"{key}.{extension}", size)) + size + -size % tarfile.BLOCKSIZE

    return np.array([sum(length(**one) for one in members) for members in samples["members"].to_pylist()], np.int64)


def pieces(starts: Array, ends: Array) -> Iterator[tuple[int, int]]:
    """(begin, end) of samples that are read at once, whose bytes lie at starts..ends-1 [n], ascending."""
    begin = 0
    for i in range(1, len(starts) + 1):
        if i == len(starts) or ends[i] - starts[begin] > PIECE_BYTES or starts[i] - ends[i - 1] > GAP_BYTES:
            yield begin, i
            begin = i


def check_members(samples: pa.Table, url: str) -> None:
    """Raise an InputError unless the store knows where the members of these samples lie in their tar."""
    if len(samples) and samples["members"].combine_chunks().value_lengths().to_numpy().min() == 0:
        raise InputError(f"{url} is compressed: its members cannot be copied one by one", "unpack it and embed again")


def _content(piece: bytes, member: Member, start: int, name: str, tar: str) -> memoryview:
    """A member's content out of some bytes of its tar, which begin at byte `start`."""
    begin = member.offset - start
    header, content = piece[begin - tarfile.BLOCKSIZE : begin], memoryview(piece)[begin : begin + member.size]
    try:
        found = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        stem, _, extension = found.name.rpartition("/")[2].partition(".")
        told = f"{found.name[: len(found.name) - len(extension)]}{extension.lower()}" if stem else found.name
        # Names that are long or not ASCII stand in headers before this one, which holds a part of them.
        same = found.size == member.size and (told == name or len(name.encode()) > 99 or not name.isascii())
    except tarfile.HeaderError:
        same = False
    if not same or len(content) < member.size:
        raise ShardError(
            f"{tar}: {name!r}, {member.size:,} bytes, does not lie at byte {member.offset:,}",
            "the tar was changed, reordered or swapped after it was embedded: restore it, or embed and index again",
        )
    return content
