"""Backbones, and the heads that the loss sees: all methods train the same encoder and the same image head.

`small` is for images of 32 to 96 pixels: with width 16 an image of 64 pixels costs 3.5 million multiply-adds, and
the encoder has 78,000 parameters. The others start from random weights too.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from config import Config
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.rnn import pad_sequence

from graphbuild.errors import ConfigError

PROJECTION = 128
WORDS, LONGEST = 8192, 64  # numbers of words, 0 for none; words read of a caption


class Model(nn.Module):
    """The encoder, whose features are kept, and the projections that only the loss, and zero-shot, use.

    image_projection: features [B, f] to [B, 128], SimCLR's two-layer head. text_projection: for methods with texts,
    what `GraphReader.texts` gives of captions to [B, 128]; otherwise None. view_projection: another such head as the
    image's, for the loss that view_weight adds; otherwise None.
    """

    def __init__(self, config: Config, text_width: int = 0) -> None:
        super().__init__()
        self.encoder = new_encoder(config)
        self.image_projection = projection_head(self.encoder.features)
        self.text_projection: nn.Module | None = None
        if config.reads_texts:
            self.text_projection = TextTower() if config.text == "tower" else nn.Linear(text_width, PROJECTION)
        self.view_projection = projection_head(self.encoder.features) if config.view_weight else None

    def forward(self, view1: Tensor, view2: Tensor, *texts: Tensor) -> tuple[Tensor, ...]:
        """Projections [B, 128] of both views [B, 3, P, P], which are normalised together; of the texts if any; and
        of both views by view_projection."""
        features = self.encoder(torch.cat([view1, view2]))
        projected = [*self.image_projection(features).chunk(2)]
        projected += [self.text_projection(text) for text in texts]  # type: ignore[misc]
        if self.view_projection is not None:
            projected += self.view_projection(features).chunk(2)
        return tuple(projected)


def projection_head(features: int) -> nn.Module:
    """SimCLR's two-layer head, [B, features] to [B, 128]."""
    hidden = min(4 * features, 2048)
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, PROJECTION, bias=False),
    )


def new_encoder(config: Config) -> Any:
    """A backbone with random weights, `features` wide: images [B, 3, P, P] in [-1, 1] to [B, features]."""
    name = config.backbone
    if name == "small":
        return SmallResNet(config.width)
    if name == "resnet50":
        from transformers import ResNetConfig, ResNetModel

        return Pooled(ResNetModel(ResNetConfig()), 2048)
    if name == "vit":  # ViT-S (Touvron et al., arXiv 2012.12877), with patches that leave 64 or more of them
        from transformers import ViTConfig, ViTModel

        patch = next((side for side in (16, 8) if config.pixels >= 8 * side), 4)
        shape = ViTConfig(
            image_size=config.pixels, patch_size=patch, hidden_size=384, num_attention_heads=6, intermediate_size=1536
        )
        return Pooled(ViTModel(shape, add_pooling_layer=False), 384)
    if name.startswith(("timm:", "timm/")):
        try:
            import timm
        except ImportError as error:  # of timm, or of torchvision, which it needs
            fix = "pip install timm, or use small, resnet50 or vit"
            raise ConfigError(f"backbone = {name!r}: {error}", fix) from error
        if not timm.is_model(wanted := name[len("timm:") :]):
            raise ConfigError(
                f"backbone = {name!r}: timm {timm.__version__} has no model {wanted!r}",
                f"find its name: python -c \"import timm; print(timm.list_models('*{wanted[:4]}*'))\"",
            )
        try:  # transformers are made for one size of images
            model = timm.create_model(wanted, pretrained=False, num_classes=0, img_size=config.pixels)
        except TypeError:  # others take any
            model = timm.create_model(wanted, pretrained=False, num_classes=0)
        encoder = nn.Sequential(model) if hasattr(model, "features") else model  # densenets have layers of this name
        with torch.inference_mode():  # some have another width than their num_features
            encoder.features = encoder.eval()(torch.zeros(1, 3, config.pixels, config.pixels)).shape[1]
        return encoder.train()
    raise ConfigError(f"backbone = {name!r}", "use small, resnet50, vit or timm:NAME")


class SmallResNet(nn.Module):
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


def convolution(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels))


class Pooled(nn.Module):
    """A transformers vision model as an encoder: its pooled output, or else its class token."""

    def __init__(self, model: nn.Module, features: int) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images)
        pooled = output.pooler_output
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class TextTower(nn.Module):
    """A transformer of two layers over the words of a caption, [B, n] of `word_numbers` to [B, 128]: their mean."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(LONGEST, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.projection = nn.Linear(width, PROJECTION)

    def forward(self, numbers: Tensor) -> Tensor:
        absent = numbers == 0
        absent[:, 0] = False  # a caption without words is one empty word
        states = self.layers(self.words(numbers) + self.positions[: numbers.shape[1]], src_key_padding_mask=absent)
        present = ~absent[..., None]
        return self.projection((states * present).sum(1) / present.sum(1))


def word_numbers(captions: Sequence[str]) -> Tensor:
    """int64 [B, words of the longest, at most 64]: a hash of each word, 0 behind the shorter captions."""
    found = [re.findall(r"\w+", text.lower())[:LONGEST] or [""] for text in captions]
    numbers = [[1 + zlib.crc32(word.encode()) % (WORDS - 1) if word else 0 for word in words] for words in found]
    return pad_sequence([torch.tensor(row) for row in numbers], batch_first=True)


def scaled(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1], channels last, which convolutions on CPUs prefer."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
