"""What the examples share: random views of a picture, small networks, a command line. Put your own in their place."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

TARS = "tars with sidecars beside them: a glob or brace pattern"
PIXELS = 32
FEATURES = 64


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


def small_model(texts: list[str]) -> SentenceTransformer:
    """The mean of learned word vectors; put any SentenceTransformer in its place."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=FEATURES)], device="cpu")


def run(main: Callable[..., object], data: str) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", help=data)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    main(given.data, given.steps, given.batch_size)
