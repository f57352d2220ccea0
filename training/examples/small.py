"""What the examples share: random views of a picture and small networks. Put your own in their place."""

from __future__ import annotations

import math
import random
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

PIXELS = 32
FEATURES = 64
WORDS = 1_000


def one_view(image: Image.Image) -> Tensor:
    """A random square crop, of 60 to 100% of the shorter side, mirrored or not: float32 [3, PIXELS, PIXELS]."""
    side = min(image.size) * random.uniform(0.6, 1)
    left, top = random.uniform(0, image.width - side), random.uniform(0, image.height - side)
    crop = image.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return torch.from_numpy(pixels[:, :, :: random.choice((1, -1))].copy())


def two_views(image: Image.Image) -> tuple[Tensor, Tensor]:
    """For `graph_webdataset(transform=two_views)`: batch["image"] is then a list of two tensors [B, 3, P, P]."""
    return one_view(image), one_view(image)


def encoder() -> nn.Module:
    """Images [B, 3, P, P] to z [B, FEATURES]."""
    layers: list[nn.Module] = []
    for channels_in, channels in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels_in, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, FEATURES))


class Clip(nn.Module):
    """Images and the words of texts to what open_clip's CLIP returns."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = encoder(), nn.EmbeddingBag(WORDS, FEATURES, padding_idx=0)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        features = {"image_features": self.image(images), "text_features": self.text(texts)}
        return {name: normalize(z) for name, z in features.items()} | {"logit_scale": self.log_scale.exp()}


def hashed_words(captions: list[str]) -> Tensor:
    """int64 [B, words of the longest], 0 behind the shorter ones."""
    words = [[1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in text.split()] for text in captions]
    return pad_sequence([torch.tensor(numbers) for numbers in words], batch_first=True)
