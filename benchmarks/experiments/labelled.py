"""Images with labels, decoded and held in memory, that probes are fitted on and tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphbuild.torch.images import ImageDecoder


@dataclass(frozen=True)
class LabelledImages:
    """images: uint8 [n, 3, H, W]. labels: of each name n values."""

    images: Tensor
    labels: dict[str, list[str]]

    def save(self, path: Path) -> None:
        columns = {f"label {name}": np.array(values) for name, values in self.labels.items()}
        temporary = path.with_name(f"{path.stem}.tmp.npz")
        np.savez(temporary, images=self.images.numpy(), **columns)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> LabelledImages:
        with np.load(path) as file:
            labels = {name.removeprefix("label "): file[name].tolist() for name in file.files if name != "images"}
            return cls(torch.from_numpy(file["images"]), labels)


def decoded(pictures: Sequence[bytes], labels: dict[str, list[str]], pixels: int) -> LabelledImages:
    """Encoded images as the loaders of the training decode them."""
    images, _ = ImageDecoder(pixels, None).decode(pictures, [f"image {number}" for number in range(len(pictures))])
    assert isinstance(images, Tensor)
    return LabelledImages(images.contiguous(), labels)
