"""Images decoded, one way for all loaders: bytes of a tar in, what a batch holds out."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate

from graphbuild.errors import ConfigError
from graphbuild.images import ImageError, web_image
from graphbuild.sidecar import ShardError


@dataclass(frozen=True)
class ImageDecoder:
    """From encoded images to what a batch holds of them: RGB, as torch wants it.

    pixels: P: resize and centre-crop to P x P. transform: called with each image (PIL, RGB) in place of that.
    ConfigError: pixels below 1, or both given.
    """

    pixels: int | None
    transform: Callable[[Any], Any] | None

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels < 1:
            raise ConfigError(f"image_pixels = {self.pixels}", "image_pixels starts at 1")
        if self.pixels is not None and self.transform is not None:
            raise ConfigError(
                "image_pixels and transform are both set",
                "pass one: a transform decides on the image's size itself",
            )

    def decode(self, contents: Sequence[bytes], names: Sequence[str]) -> torch.Tensor | list[Any]:
        """Images by their encoded bytes: uint8 [n, 3, P, P], channels last in memory; a list of uint8 [3, H, W] without
        pixels, or of what transform makes of each.

        Raises:
            ShardError: one cannot be decoded; it is named by its place in `names`.
        """
        images = (self._open(content, name) for content, name in zip(contents, names, strict=True))
        if self.transform is not None:
            return [self.transform(image) for image in images]
        if self.pixels is None:
            return [torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()) for image in images]
        pixels = np.empty((len(contents), self.pixels, self.pixels, 3), np.uint8)
        for i, image in enumerate(images):  # each into its place: new memory costs more than the copy
            pixels[i] = np.asarray(image)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def collate(self, images: torch.Tensor | list[Any]) -> Any:
        """What a batch holds of them: a list only without pixels; results of transform as `default_collate` does."""
        if isinstance(images, torch.Tensor):
            return images
        if self.transform is not None:
            return default_collate(images)
        return images if self.pixels is None else torch.stack(images)

    def _open(self, content: bytes, name: str) -> Image.Image:
        try:
            with web_image(io.BytesIO(content)) as encoded:
                if self.pixels is None:
                    return encoded.convert("RGB")
                size = (self.pixels, self.pixels)
                encoded.draft("RGB", size)  # JPEG: decode at a fraction of the size, never below it
                image = encoded if encoded.mode == "RGB" else encoded.convert("RGB")
                return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        except ImageError as error:
            raise ShardError(
                f"{name}: the image cannot be decoded ({error.cause})",
                "replace the image, or leave the sample out: rewrite the tar, then embed and export again",
            ) from error
