"""Images from strangers: a few formats and no others, and one error whatever their bytes do to the decoder.

Pillow reads some 40 formats, and runs a program (Ghostscript) for one of them; here are those that the web shows and
OpenCV reads too. Nothing is decoded before its size in pixels is known. Memory: the decoded image.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import IO

from PIL import Image, UnidentifiedImageError

from graphbuild.errors import ImageError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


@contextlib.contextmanager
def web_image(stream: IO[bytes], max_pixels: int | None = None) -> Iterator[Image.Image]:
    """The image in a stream, of which nothing is decoded yet; whatever fails meanwhile is an ImageError.

    max_pixels: a larger one is refused; without it Pillow's limit holds, 179 million.
    """
    try:
        with Image.open(stream, formats=known_formats()) as image:
            if max_pixels is not None:
                check_size(image, max_pixels)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception as error:  # decoders raise anything at bytes that were made to confuse them
        said = str(error) or type(error).__name__
        raise ImageError(f"broken image: {said}"[:100]) from error


def check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(f"too large: over {max_pixels:,} pixels")


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
