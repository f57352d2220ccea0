"""One way from an image's bytes to what is trained on and looked at: upright 8-bit RGB. All who decode come here.

Turned as its EXIF orientation says; transparency laid on white; of an animation the first frame; 16 bits a channel
divided by 257, as viewers do, so that white stays white; grey, palettes, CMYK and others as Pillow converts them.
Pixels of 32 bits or floats are refused: nothing says which number is white.

Images come from strangers: a few formats and no others (Pillow reads some 40, and runs a program for one of them), no
pixel is decoded before their number is known, and there is one error whatever the bytes do to the decoder. Memory:
twice the decoded image.
"""

from __future__ import annotations

import functools
import io
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from graphbuild.errors import ImageError
from graphbuild.sources.tars import IMAGE_FORMATS

MAX_PIXELS = 100_000_000  # of an image that is decoded to be looked at
FORMATS = ("MPO", *dict.fromkeys(IMAGE_FORMATS.values()))  # MPO: what a camera calls .jpg
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {turn for number, turn in _UPRIGHT.items() if number >= 5}


def upright_rgb(stream: IO[bytes], *, max_pixels: int | None = None, least: int = 0) -> Image.Image:
    """The image in a stream, decoded to its last byte: mode RGB, upright; info["size"]: its own width and height.

    max_pixels: a larger one is refused, with transparency one of more than a quarter; without it Pillow's limit holds,
    179 million. least: a JPEG may be decoded at a fraction of its size, with sides of at least so many pixels; 0:
    at its size.

    Raises:
        ImageError: not an image, too large, damaged, or of pixels without a known white.
    """
    try:
        with Image.open(stream, formats=known_formats()) as image:
            if max_pixels is not None:  # to lay it on white takes the memory of several images
                most = max_pixels // 4 if image.has_transparency_data else max_pixels
                if image.width * image.height > most:
                    raise ImageError(f"too large: over {most:,} pixels")
            size = image.size
            if least:
                image.draft("RGB", (least, least))
            image.load()
            turn = _turn(image)
            rgb = _rgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
            rgb.info.clear()  # tags that whoever gets it may obey again
        rgb.info["size"] = size[::-1] if turn in _SIDEWAYS else size
        return rgb
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception as error:  # decoders raise anything at bytes that were made to confuse them
        said = str(error) or type(error).__name__
        raise ImageError(f"broken image: {said}"[:100]) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("its pixels are 32-bit numbers, of no known white")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes it upright; damaged tags say nothing."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 as many kinds as there are damages
        return None


def image_format(content: memoryview) -> str | None:
    """The ending of a file with an image, of IMAGE_FORMATS, as Pillow tells formats apart by how they begin; None: it
    is none. Nothing is decoded."""
    begin = bytes(content[:32]).ljust(32, b"\0")
    found = (name for name in known_formats() if (accept := Image.OPEN[name][1]) is not None and accept(begin) is True)
    name = next(found, None)
    if name in ("BMP", "PPM"):  # texts may begin so, too
        try:
            Image.open(io.BytesIO(content), formats=[name]).close()
        except Exception:  # noqa: BLE001 decoders raise anything at bytes that were made to confuse them
            return None
    return next((ending for ending, one in IMAGE_FORMATS.items() if one == name), None)


def fitted(content: bytes, size: int) -> bytes:
    """The image with a shorter side of `size` pixels, a JPEG of quality 95; as it is, where it is no larger.

    Raises:
        ImageError: as `upright_rgb`.
    """
    image = upright_rgb(io.BytesIO(content), least=2 * size)
    width, height = image.info["size"]
    if min(width, height) <= size:
        return content
    scale, made = size / min(width, height), io.BytesIO()
    image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS).save(made, "JPEG", quality=95)
    return made.getvalue()


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
