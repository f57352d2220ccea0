"""Pictures that look the same: a 64-bit perceptual hash of each image of tars, and pairs of few different bits.

The hash is pHash as the package imagehash has it (`phash`): grey, 32 x 32, the 8 x 8 lowest coefficients of a cosine
transform, each by whether it is over their median. It survives other sizes and compression, not crops, turns and
mirrors. Cost: each image is decoded once, a JPEG at a fraction of its size; then 64-bit words of all pairs.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from PIL import Image

from graphbuild.errors import ConfigError, ImageError, InputError
from graphbuild.machine.gpus import cores_here
from graphbuild.recipe import resolve
from graphbuild.sources.images import MAX_PIXELS, upright_rgb
from graphbuild.sources.tars import named_tars, open_tar
from graphbuild.store.sharded import Array
from graphbuild.store.shards import present_shards
from graphbuild.store.store import Store

SIDE, KEPT = 32, 8
FLAT = 1.0  # grey levels of deviation: an image of one colour has no hash, or all of them would be the same
ROWS, COLUMNS = 256, 16_384


class Pictures(NamedTuple):
    """Those of some tars that have a hash: rows int64 [n] of their samples; keys [n]; hashes uint64 [n]. left_out: how
    many samples have no image, one that cannot be read, or one of one colour."""

    rows: Array
    keys: list[str]
    hashes: Array
    left_out: int


class Tars(NamedTuple):
    """image_member: the extension of their images, None for the usual ones. first_rows: the row of each one's first
    sample; None where samples are counted from tar to tar."""

    urls: list[str]
    image_member: str | None = None
    first_rows: list[int] | None = None


def tars_of(store: Store) -> Tars:
    """A store's tars in order of row, without those that are gone, whose rows nobody else has."""
    shards = present_shards(store, store.manifest())
    urls = shards.table["tar_url"].to_pylist()
    if not urls or None in urls:
        raise ConfigError(f"{store.url} has no tars, so no pictures", "leave --bits and --images out")
    image_member = resolve(store, "embed", {}).embed.image_member
    return Tars([store.resolve(url) for url in urls], image_member, shards.column("first_row").tolist())


def image_tars(images: str) -> list[str]:
    try:
        return named_tars(images)
    except (FileNotFoundError, ValueError, ImportError) as error:
        raise InputError(f"--images: no tar matches {error}", "check --images; quote a pattern with *") from None


def perceptual_hash(image: Image.Image) -> int | None:
    """The 64 bits, row by row; None of an image of one colour."""
    from scipy.fft import dctn

    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    if grey.std() < FLAT:
        return None
    low = dctn(grey)[:KEPT, :KEPT]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def read_pictures(tars: Tars) -> Pictures:
    """The hash of each sample's image; ShardError, InputError: as of `open_tar`."""
    with ThreadPoolExecutor(cores_here()) as pool:
        read = list(pool.map(partial(_of_tar, image_member=tars.image_member), tars.urls))
    firsts = [0, *accumulate(map(len, read))] if tars.first_rows is None else tars.first_rows
    every = [(row, *pair) for first, pairs in zip(firsts, read, strict=False) for row, pair in enumerate(pairs, first)]
    kept = [one for one in every if one[2] is not None]
    rows, hashes = np.array([row for row, _, _ in kept], np.int64), np.array([value for *_, value in kept], np.uint64)
    return Pictures(rows, [key for _, key, _ in kept], hashes, len(every) - len(kept))


def _of_tar(url: str, image_member: str | None) -> list[tuple[str, int | None]]:
    found: list[tuple[str, int | None]] = []
    with open_tar(url) as tar:
        for sample in tar.samples():
            member, value = sample.image(image_member), None
            if member is not None:
                try:
                    content = io.BytesIO(tar.read(member))
                    value = perceptual_hash(upright_rgb(content, max_pixels=MAX_PIXELS, least=4 * SIDE))
                except ImageError:
                    pass
            found.append((sample.key, value))
    return found


def close_pairs(some: Array, others: Array, bits: int) -> tuple[Array, Array, Array]:
    """Places int64 [p] in hashes uint64 [m] and [n] of all pairs that differ in at most so many bits, and in how many,
    int32 [p]; by place."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))]
    for row in range(0, len(some), ROWS):
        for column in range(0, len(others), COLUMNS):
            apart = np.bitwise_count(some[row : row + ROWS, None] ^ others[None, column : column + COLUMNS])
            at, place = np.nonzero(apart <= bits)
            found.append((at + row, place + column, apart[at, place].astype(np.int32)))
    at, place, apart = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((place, at))
    return at[order], place[order], apart[order]
