"""From an image's bytes to upright 8-bit RGB: against what was drawn, in every format, mode and orientation."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import ExifTags, Image

from graphbuild.errors import ImageError
from graphbuild.sources.images import FORMATS, upright_rgb
from graphbuild.sources.tars import IMAGE_FORMATS

Pixels = NDArray[np.uint8]
RAMP = np.linspace(0, 65_535, 256).round().astype(np.uint16)  # 0, 257, 514, ...: exact in 8 bits


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def decoded(content: bytes, **options: int) -> Pixels:
    image = upright_rgb(io.BytesIO(content), **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def photo(height: int = 24, width: int = 40) -> Pixels:
    """Red left above, green right above, blue below; smooth enough for lossy formats."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = pixels[: height // 2, width // 2 :, 1] = 230
    pixels[height // 2 :, :, 2] = 230
    return pixels


def near(one: Pixels, other: Pixels, most: int = 6) -> bool:
    """Alike but for the edges between colours."""
    return one.shape == other.shape and bool(np.median(np.abs(one.astype(int) - other)) <= most)


@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "MPO"])
def test_each_format_gives_what_was_drawn(format_: str) -> None:
    assert near(decoded(encoded(Image.fromarray(photo()), format_)), photo())


def test_there_is_one_table_of_formats_and_each_extension_is_of_one() -> None:
    Image.init()
    assert all(Image.EXTENSION[f".{extension}"] == format_ for extension, format_ in IMAGE_FORMATS.items())
    assert set(FORMATS) == {*IMAGE_FORMATS.values(), "MPO"}


def test_a_phones_picture_of_several_frames_is_its_first() -> None:
    first = Image.fromarray(photo())
    content = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", first.size, "white")])
    assert near(decoded(content), photo())
    frames = [Image.fromarray(photo()).quantize(), Image.new("P", first.size)]
    assert near(decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), photo())


# What the viewer shows of stored pixels [H, W, 3], by the orientation's number: the EXIF standard's rows and columns.
SHOWN: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored[::-1].transpose(1, 0, 2),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: stored[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("number", SHOWN)
def test_an_image_is_turned_upright_once(format_: str, number: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    content = encoded(Image.fromarray(photo()), format_, exif=exif.tobytes() if format_ != "TIFF" else exif)
    assert near(decoded(content), SHOWN[number](photo()))
    if format_ == "JPEG":
        assert near(decoded(content, least=8)[:8, :8], SHOWN[number](photo())[:8, :8], most=80)
    image = upright_rgb(io.BytesIO(content))
    assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1, "who gets it would turn it again"


@given(st.binary(max_size=60))
def test_damaged_tags_leave_an_image_as_it_is(tags: bytes) -> None:
    content = encoded(Image.fromarray(photo()), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    assert decoded(content).shape in (photo().shape, photo().transpose(1, 0, 2).shape)


def test_an_orientation_out_of_range_is_none() -> None:
    exif = Image.Exif()
    for value in (0, 9, 65_535):
        exif[ExifTags.Base.Orientation] = value
        assert near(decoded(encoded(Image.fromarray(photo()), "JPEG", exif=exif.tobytes())), photo())


# -- 16 bits


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel, written here: Pillow writes grey ones alone. pixels [H, W, 1 to 4]."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen_bits() -> dict[str, bytes]:
    ramp = np.tile(RAMP, (4, 1))
    opaque = np.full_like(ramp, 65_535)
    grey = Image.fromarray(ramp)
    colours = np.stack([ramp] * 3, axis=2)
    ppm, pgm = (
        f"{kind}\n256 4\n65535\n".encode() + values.astype(">u2").tobytes()
        for kind, values in (("P6", colours), ("P5", ramp))
    )
    return {
        "PNG grey": png16(ramp[:, :, None]),
        "PNG grey and alpha": png16(np.stack([ramp, opaque], axis=2)),
        "PNG RGB": png16(colours),
        "PNG RGBA": png16(np.dstack([colours, opaque])),
        "TIFF grey": encoded(grey, "TIFF"),
        "TIFF grey, big-endian": encoded(Image.frombytes("I;16B", (256, 4), ramp.astype(">u2").tobytes()), "TIFF"),
        "PPM": ppm,
        "PGM": pgm,
        "JPEG 2000": encoded(grey, "JPEG2000"),
    }


@pytest.mark.parametrize("kind", sixteen_bits())
def test_sixteen_bits_are_scaled_to_eight_and_not_cut_at_white(kind: str) -> None:
    found = decoded(sixteen_bits()[kind])
    assert np.abs(found.astype(int) - np.arange(256)[None, :, None]).max() <= 1
    assert np.array_equal(found[0, [0, 255]], [[0] * 3, [255] * 3])


@given(arrays(np.uint16, (3, 5)))
def test_a_grey_of_sixteen_bits_is_the_nearest_of_eight(values: NDArray[np.uint16]) -> None:
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(decoded(png16(values[:, :, None])), np.dstack([expected] * 3))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_whose_white_nobody_knows_are_refused(dtype: type) -> None:
    image = Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(dtype))
    with pytest.raises(ImageError, match="32-bit numbers"):
        upright_rgb(io.BytesIO(encoded(image, "TIFF")))


# -- modes


def test_what_is_transparent_is_white() -> None:
    colour = Image.fromarray(photo())
    mask = Image.fromarray(np.tile(np.uint8([0, 255]), (24, 20)))
    expected = np.where(np.asarray(mask)[:, :, None] == 255, photo(), 255)
    layered = colour.copy()
    layered.putalpha(mask)
    grey = colour.convert("L")
    grey_layered = Image.merge("LA", (grey, mask))
    assert np.array_equal(decoded(encoded(layered, "PNG")), expected)
    assert np.array_equal(decoded(encoded(layered, "WEBP", lossless=True)), expected)
    assert np.array_equal(decoded(encoded(layered, "TIFF")), expected)
    expected_grey = np.where(np.asarray(mask) == 255, np.asarray(grey), 255)
    assert np.array_equal(decoded(encoded(grey_layered, "PNG"))[:, :, 1], expected_grey)
    palette = colour.quantize(16)
    corner = palette.getpixel((0, 0))
    seen = decoded(encoded(palette, "GIF", transparency=corner))
    assert (seen[0, 0] == 255).all()
    assert near(seen[12:], photo()[12:])
    keyed = decoded(encoded(colour, "PNG", transparency=(230, 0, 0)))
    assert (keyed[:12, :20] == 255).all()
    assert np.array_equal(keyed[12:], photo()[12:])
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert np.abs(decoded(encoded(half, "PNG")).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_are_shown_in_their_colours(mode: str) -> None:
    colour = Image.fromarray(photo()).convert(mode)
    format_ = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert near(decoded(encoded(colour, format_)), np.asarray(colour.convert("RGB")))


# -- strangers' bytes


def test_sizes_are_refused_before_a_pixel_is_decoded() -> None:
    content = encoded(Image.fromarray(photo()), "PNG")
    assert decoded(content, max_pixels=24 * 40).shape == (24, 40, 3)
    with pytest.raises(ImageError, match="too large: over 959 pixels"):
        upright_rgb(io.BytesIO(content), max_pixels=959)


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_said_so(content: bytes) -> None:
    with pytest.raises(ImageError, match="not an image"):
        upright_rgb(io.BytesIO(content))


@given(st.data(), st.sampled_from(sorted(set(FORMATS) - {"MPO"})))
def test_bytes_changed_or_cut_anywhere_give_an_image_or_that_error(data: st.DataObject, format_: str) -> None:
    content = bytearray(encoded(Image.fromarray(photo()), format_))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        found = upright_rgb(io.BytesIO(bytes(content[:cut])), max_pixels=1_000_000)
    except ImageError:
        return
    assert found.mode == "RGB"


def test_a_jpeg_may_be_decoded_smaller_but_not_below_what_is_needed() -> None:
    content = encoded(Image.fromarray(photo(400, 800)), "JPEG")
    assert decoded(content, least=100).shape == (100, 200, 3)
    assert decoded(content, least=101).shape == (200, 400, 3)
    assert decoded(content).shape == (400, 800, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    turned = encoded(Image.fromarray(photo(400, 803)), "JPEG", exif=exif.tobytes())
    found = upright_rgb(io.BytesIO(turned), least=100)
    assert (found.size, found.info["size"]) == ((100, 201), (400, 803))
