"""Random views: what each option does to an image, and that a view depends on its own draws alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from augment import DRAWS, random_view
from config import Config
from torch import Tensor

STILL = {"area_min": 1.0, "jitter": 0.0, "grayscale": 0.0, "flip": False}


def images(count: int = 64) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def view(given: Tensor, draws: Tensor | None = None, **more: Any) -> Tensor:
    if draws is None:
        draws = torch.rand(DRAWS, len(given), generator=torch.Generator().manual_seed(1))
        draws[1] = 0.5  # square crops
    return random_view(given, draws, Config(store="", **STILL | more))


def test_without_changes_a_view_is_the_image() -> None:
    assert torch.allclose(view(images()), images(), atol=1e-5)


def test_flips_mirror_half_of_the_images_and_can_be_switched_off() -> None:
    flipped = view(images(), flip=True)
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(flipped, images(), strict=True)]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, images(), strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_crop_shows_a_part_of_the_image_at_its_size() -> None:
    """On a linear ramp: the crop's ramp has the slope of its side's share, and stays inside the image."""
    ramp = (torch.arange(12) / 11 * 2 - 1).expand(64, 3, 12, 12).contiguous()
    slopes = view(ramp, area_min=0.25)[:, 0, 6].diff(dim=1)[:, 4:8].mean(dim=1) / (2 / 11)
    shares = slopes.square()
    assert 0.25 - 1e-3 < shares.min() < 0.35
    assert 0.9 < shares.max() < 1 + 1e-3


def test_grayscale_keeps_the_luma() -> None:
    expected = (images() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(view(images(), grayscale=1.0), expected.expand(-1, 3, -1, -1), atol=1e-5)


def test_jitter_scales_brightness_contrast_and_saturation_around_black_the_mean_and_gray() -> None:
    given, jitter = (images(4) + 1) / 4 + 0.1, 0.4  # in [0.1, 0.6]: nothing is clipped
    draws = torch.rand(DRAWS, 4, generator=torch.Generator().manual_seed(2))
    draws[1] = 0.5
    found = view(given * 2 - 1, draws, jitter=jitter) / 2 + 0.5
    luma = np.array([0.299, 0.587, 0.114])
    for number in range(4):
        brightness, contrast, saturation = 1 + jitter * (2 * draws[5:8, number].double().numpy() - 1)
        pixels = given[number].double().numpy()
        gray = np.tensordot(luma, pixels, 1)
        pixels = saturation * pixels + (1 - saturation) * gray
        pixels = brightness * (contrast * pixels + (1 - contrast) * gray.mean())
        assert found[number].numpy() == pytest.approx(pixels.clip(0, 1), abs=1e-4)


def test_a_view_depends_on_its_own_draws_alone() -> None:
    draws = torch.rand(DRAWS, 64)
    options = {"area_min": 0.3, "jitter": 0.5, "grayscale": 0.2, "flip": True}
    whole = view(images(), draws, **options)
    parts = [view(images()[half], draws[:, half], **options) for half in (slice(0, 32), slice(32, 64))]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
