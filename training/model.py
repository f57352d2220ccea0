"""A small residual network for images of 32 to 96 pixels, and the projector that the loss sees.

With width 16 an image of 64 pixels costs 3.5 million multiply-adds; the encoder has 78,000 parameters.
BatchNorm learns fastest at this size: each rank of a distributed run normalises its own batch, and all keep
rank 0's running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(channels_in, channels, stride)
        self.second = convolution(channels, channels)
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class Encoder(nn.Module):
    """Images [B, 3, H, W] float to features [B, features].

    The stem quarters the resolution, each stage after the first halves it. Features are maxima over the
    positions: in small pictures of things that may lie anywhere these tell shapes apart better than means.

    width: channels of the first stage, doubled by each further stage. blocks: blocks of each stage.
    """

    def __init__(self, width: int, blocks: Sequence[int] = (1, 1, 1)) -> None:
        super().__init__()
        layers = [convolution(3, width // 2, 2), nn.ReLU(), convolution(width // 2, width, 2), nn.ReLU()]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Block(channels, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                channels = width * 2**stage
        self.layers = nn.Sequential(*layers)
        self.features = channels

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).amax(dim=(2, 3))


class Model(nn.Module):
    """The encoder, whose features are kept, and the projector, which only training uses."""

    def __init__(self, width: int, projection: int = 128) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        hidden = 4 * self.encoder.features
        self.projector = nn.Sequential(
            nn.Linear(self.encoder.features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, projection, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))


def convolution(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels))


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1], channels last, which convolutions on CPUs prefer."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
