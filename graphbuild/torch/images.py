"""Images decoded for a batch, one way for all loaders: upright and RGB, see graphbuild.sources.images."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate

from graphbuild.errors import ConfigError, ImageError, ShardError
from graphbuild.sources.images import upright_rgb

logger = logging.getLogger(__name__)

BadImages = Literal["raise", "replace"]


@dataclass
class ImageDecoder:
    """From encoded images to what a batch holds of them: RGB, as torch wants it.

    pixels: P: resize and centre-crop to P x P. transform: called with each image (PIL, RGB) in place of that.
    bad_images: what becomes of those that cannot be decoded. replaced: how many of them this process has replaced.
    ConfigError: pixels below 1, pixels and transform both given, or bad_images neither "raise" nor "replace".
    """

    pixels: int | None
    transform: Callable[[Any], Any] | None
    bad_images: BadImages = "raise"
    replaced: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels < 1:
            raise ConfigError(f"image_pixels = {self.pixels}", "image_pixels starts at 1")
        if self.pixels is not None and self.transform is not None:
            raise ConfigError(
                "image_pixels and transform are both set",
                "pass one: a transform decides on the image's size itself",
            )
        if self.bad_images not in get_args(BadImages):
            raise ConfigError(f"bad_images = {self.bad_images!r}", f"use one of {', '.join(get_args(BadImages))}")

    def decode(self, contents: Sequence[bytes], names: Sequence[str]) -> tuple[torch.Tensor | list[Any], list[int]]:
        """Images by their encoded bytes, and for each of the n places the sample that stands there, 0..n-1.

        Images are uint8 [n, 3, P, P], channels last in memory; a list of uint8 [3, H, W] without pixels, or of what
        transform makes of each. Samples stand at their own places, but with "replace" the next good one, cyclically,
        stands at a bad one's too, and a warning names both.

        Raises:
            ShardError: one cannot be decoded, or with "replace" none can; it is named by its place in `names`.
        """
        bad: dict[int, ShardError] = {}
        images = self._good(contents, names, bad)
        if self.transform is not None or self.pixels is None:
            turned = self.transform or (lambda image: torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))
            results = {i: turned(image) for i, image in images}
            places = self._places(names, bad)
            return [results[place] for place in places], places
        pixels = np.empty((len(contents), self.pixels, self.pixels, 3), np.uint8)
        for i, image in images:  # each into its place: new memory costs more than the copy
            pixels[i] = np.asarray(image)
        places = self._places(names, bad)
        for i in bad:
            pixels[i] = pixels[places[i]]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), places

    def collate(self, images: torch.Tensor | list[Any]) -> Any:
        """What a batch holds of them: a list only without pixels; results of transform as `default_collate` does."""
        if isinstance(images, torch.Tensor):
            return images
        if self.transform is not None:
            return default_collate(images)
        return images if self.pixels is None else torch.stack(images)

    def _good(
        self, contents: Sequence[bytes], names: Sequence[str], bad: dict[int, ShardError]
    ) -> Iterator[tuple[int, Image.Image]]:
        """Place and image of those that can be decoded; others are noted in `bad`, or raised."""
        for i, (content, name) in enumerate(zip(contents, names, strict=True)):
            try:
                image = self._open(content, name)
            except ShardError as error:
                if self.bad_images == "raise":
                    raise
                bad[i] = error
            else:
                yield i, image

    def _places(self, names: Sequence[str], bad: dict[int, ShardError]) -> list[int]:
        """The sample that stands at each place."""
        places = list(range(len(names)))
        good = [i for i in places if i not in bad]
        for i, error in bad.items():
            if not good:
                raise ShardError(
                    f"{error.cause}, nor any other of its batch of {len(names)}",
                    "restore the tar; with so few good images, leave the bad ones out of a new one",
                ) from error
            places[i] = next((place for place in good if place > i), good[0])
            self.replaced += 1
            logger.warning(
                "%s; %s takes its place in the batch (%d replaced by this worker so far)",
                error.cause,
                names[places[i]],
                self.replaced,
            )
        return places

    def _open(self, content: bytes, name: str) -> Image.Image:
        try:
            image = upright_rgb(io.BytesIO(content), least=self.pixels or 0)
        except ImageError as error:
            raise ShardError(
                f"{name}: the image cannot be decoded ({error.cause})",
                "replace the image, or leave the sample out: rewrite the tar, then embed and export again; or pass"
                ' bad_images="replace", which puts another sample of the batch in its place',
            ) from error
        if self.pixels is None:
            return image
        return ImageOps.fit(image, (self.pixels, self.pixels), Image.Resampling.BICUBIC)
