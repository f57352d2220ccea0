"""Backbones and text towers: shapes, sizes, and what they must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from config import Config
from models import Model, TextTower, new_encoder, scaled, word_numbers

from graphbuild.errors import ConfigError

# Torchvision's ResNet-50 has 25,557,032 parameters, of which its classifier has 2,049,000. ViT-S/16 of 224 pixels has
# 22,050,664 (Touvron et al.), its classifier 385,000.
PARAMETERS = {"resnet50": 23_508_032, "vit": 21_665_664}


@pytest.mark.parametrize(("name", "pixels", "features"), [("small", 48, 64), ("resnet50", 64, 2048), ("vit", 64, 384)])
def test_backbones_give_features(name: str, pixels: int, features: int) -> None:
    encoder = new_encoder(Config(store="", backbone=name, pixels=pixels))
    assert encoder.features == features
    assert encoder(torch.randn(2, 3, pixels, pixels)).shape == (2, features)


@pytest.mark.parametrize("name", ["resnet50", "vit"])
def test_large_backbones_are_the_published_ones(name: str) -> None:
    encoder = new_encoder(Config(store="", backbone=name, pixels=224))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == PARAMETERS[name]


def test_timm_backbones_need_timm() -> None:
    config = Config(store="", backbone="timm/resnet18")
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"No module named(.|\n)*pip install timm"):
            new_encoder(config)
    else:
        assert new_encoder(config)(torch.randn(2, 3, 64, 64)).shape == (2, 512)


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet50", 2048), ("vit_tiny_patch16_224", 192), ("densenet121", 1024), ("convnext_atto", 320)],
)
def test_timm_backbones_are_made_for_the_size_of_the_images(name: str, features: int) -> None:
    pytest.importorskip("timm")
    model = Model(Config(store="", backbone=f"timm/{name}", pixels=64))
    assert model.encoder.features == features
    outputs = model(*torch.randn(2, 2, 3, 64, 64))
    assert [output.shape for output in outputs] == [(2, 128)] * 2
    if name == "resnet50":
        assert sum(parameter.numel() for parameter in model.encoder.parameters()) == PARAMETERS[name]
    with pytest.raises(ConfigError, match=r"(?s)has no model 'resnet5000'.*list_models"):
        new_encoder(Config(store="", backbone="timm/resnet5000"))


def test_every_parameter_of_a_model_gets_a_gradient() -> None:
    """Which DistributedDataParallel needs."""
    for options in (
        {"method": "xsample"},
        {"method": "clip"},
        {"method": "clip", "text": "tower"},
        {"method": "clip_soft", "view_weight": 1.0},
        {"backbone": "resnet50"},
        {"backbone": "vit"},
    ):
        config = Config(store="", pixels=32, **options)  # type: ignore[arg-type]
        model = Model(config, text_width=20)
        text: list[Any] = []
        if config.reads_texts:
            text = [word_numbers(["a cat", "two dogs run"]) if config.text == "tower" else torch.randn(2, 20)]
        outputs = model(*torch.randn(2, 2, 3, 32, 32), *text)
        assert [output.shape for output in outputs] == [(2, 128)] * (2 + len(text) + 2 * (config.view_weight > 0))
        sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_further_head_leaves_the_other_initial_weights_as_they_are() -> None:
    states = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        states.append(Model(Config(store="", method="clip", view_weight=weight), text_width=20).state_dict())
    plain, more = states
    assert all(torch.equal(plain[name], more[name]) for name in plain)
    assert {name.split(".")[0] for name in more.keys() - plain.keys()} == {"view_projection"}


def test_a_text_does_not_depend_on_longer_ones_in_its_batch() -> None:
    tower = TextTower().double().eval()
    alone, batched = word_numbers(["a red cross"]), word_numbers(["a red cross", "three striped hearts on sand"])
    assert batched.shape == (2, 5)
    assert torch.allclose(tower(alone)[0], tower(batched)[0], atol=1e-12)
    assert not torch.allclose(tower(alone)[0], tower(word_numbers(["cross a red"]))[0], atol=1e-3)  # order counts


def test_words_are_numbered_whatever_their_case_and_even_where_there_are_none() -> None:
    numbers = word_numbers(["A Red, CROSS!", "a red cross", "", "..."])
    assert torch.equal(numbers[0], numbers[1])
    assert numbers[0].unique().numel() == 3
    assert not numbers[2:].any()
    assert TextTower()(numbers).isfinite().all()
    assert word_numbers(["word " * 100]).shape == (1, 64)


def test_pixels_become_numbers_from_minus_one_to_one() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert torch.allclose(scaled(images)[1, :, 2, 3], torch.tensor([-1.0, -0.6, 1.0]))
