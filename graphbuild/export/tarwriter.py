"""New tars from the samples of others: members copied as they are, in any order of samples, under any keys.

Sources are read by byte range, 512 bytes before a member's content included: they must hold the header of the member
that the store names, so a source that has changed since is refused. Memory: BATCH samples' members.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from graphbuild.errors import InputError, ShardError
from graphbuild.sources.ranges import TarRanges
from graphbuild.sources.tars import Member, add_member
from graphbuild.store.sharded import Array

BATCH = 512
Extra = Callable[[int], tuple[str, bytes] | None]


def write_tar(
    path: Path, samples: pa.Table, tars: Sequence[str], sources: Array, keys: Sequence[str], extra: Extra | None = None
) -> tuple[Array, Array]:
    """Write a tar of samples [n], in their order; returns where their images lie in it, int64 [n] offsets and sizes.

    samples: columns key, image_offset and members, as in samples/<shard>.parquet; sources int64 [n]: the tar of each,
    a number into `tars`; keys: their new names. extra: the extension and content of one more member of sample i. Dates,
    owners and modes are left out, so the bytes follow from the contents alone. An image is -1 where there is none.

    Raises:
        ShardError: a source is gone, cannot be read, or has other members there.
    """
    ranges = TarRanges(tars)
    image_offsets, image_sizes = np.full(len(samples), -1), np.full(len(samples), -1)
    with tarfile.open(path, "w") as archive:
        for begin in range(0, len(samples), BATCH):
            rows = samples.slice(begin, BATCH).to_pylist()
            members = [[Member(**member) for member in row["members"]] for row in rows]
            origin = sources[begin : begin + BATCH]
            starts = np.array([found[0].offset for found in members]) - tarfile.BLOCKSIZE
            ends = np.array([found[-1].offset + found[-1].size for found in members])
            contents = ranges.read(origin, starts, ends)
            for i, (row, found, content) in enumerate(zip(rows, members, contents, strict=True)):
                for member in found:
                    name = f"{row['key']}.{member.extension}"
                    inner = _content(content, member, int(starts[i]), name, tars[origin[i]])
                    offset = add_member(archive, f"{keys[begin + i]}.{member.extension}", inner)
                    if member.offset == row["image_offset"]:
                        image_offsets[begin + i], image_sizes[begin + i] = offset, member.size
                more = extra(begin + i) if extra is not None else None
                if more is not None:
                    add_member(archive, f"{keys[begin + i]}.{more[0]}", more[1])
    ranges.close()
    return image_offsets, image_sizes


def check_members(samples: pa.Table, url: str) -> None:
    """Raise an InputError unless the store knows where the members of these samples lie in their tar."""
    if len(samples) and samples["members"].combine_chunks().value_lengths().to_numpy().min() == 0:
        raise InputError(f"{url} is compressed: its members cannot be copied one by one", "unpack it and embed again")


def _content(sample: bytes, member: Member, start: int, name: str, tar: str) -> bytes:
    """A member's content out of a sample's bytes, which begin at byte `start` of the tar."""
    begin = member.offset - start
    header, content = sample[begin - tarfile.BLOCKSIZE : begin], sample[begin : begin + member.size]
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
