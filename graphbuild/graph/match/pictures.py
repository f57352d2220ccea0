"""Pictures that look the same: a 64-bit perceptual hash of each image of tars, and pairs of few different bits.

The hash is pHash as the package imagehash has it (`phash`): grey, 32 x 32, the 8 x 8 lowest coefficients of a cosine
transform, each by whether it is over their median. It survives other sizes and compression, not crops, turns and
mirrors. Cost: each image is decoded once, a JPEG at a fraction of its size; then 64-bit words of all pairs.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    """Those of some tars that have a hash: places int64 [n] of their samples, counted over all tars; keys [n]; hashes
    uint64 [n]. left_out: samples without an image, with one that cannot be read, or of one colour."""

    places: Array
    keys: list[str]
    hashes: Array
    left_out: int


def tars_of(store: Store) -> tuple[list[str], str | None]:
    """A store's tars in order of row, and the extension of their images, None for the usual ones."""
    urls = present_shards(store, store.manifest()).table["tar_url"].to_pylist()
    if not urls or None in urls:
        raise ConfigError(f"{store.url} has no tars, so no pictures", "leave --bits and --images out")
    return [store.resolve(url) for url in urls], resolve(store, "embed", {}).embed.image_member


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


def read_pictures(urls: Sequence[str], image_member: str | None) -> Pictures:
    """The hash of each sample's image, of tars one after the other; ShardError, InputError: as of `open_tar`."""
    with ThreadPoolExecutor(cores_here()) as pool:
        tars = list(pool.map(partial(_of_tar, image_member=image_member), urls))
    every = [pair for tar in tars for pair in tar]
    kept = [place for place, (_, value) in enumerate(every) if value is not None]
    hashes = np.array([every[place][1] for place in kept], np.uint64)
    return Pictures(np.array(kept, np.int64), [every[place][0] for place in kept], hashes, len(every) - len(kept))


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
