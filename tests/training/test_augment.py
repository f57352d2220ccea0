"""Random views: what each option does to an image, and that a view depends on its own draws alone."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch
from augment import DRAWS, cut, random_view, view_draws
from config import Config, Place
from models import scaled
from PIL import Image, ImageOps
from scipy.ndimage import correlate1d
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


def test_hue_turns_in_hsv_and_leaves_value_and_saturation() -> None:
    given, draws = images(4), torch.rand(DRAWS, 4, generator=torch.Generator().manual_seed(3))
    draws[1] = 0.5
    found = view(given, draws, hue=0.5) / 2 + 0.5
    for number in range(4):
        turn = 0.5 * (2 * draws[10, number].item() - 1)
        for row, column in ((0, 0), (3, 7), (11, 11)):
            hue, saturation, value = colorsys.rgb_to_hsv(*(given[number, :, row, column] / 2 + 0.5).tolist())
            wanted = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            assert found[number, :, row, column].tolist() == pytest.approx(wanted, abs=1e-4)


def test_blur_is_a_gaussian_of_a_tenth_of_the_side_for_a_share_of_the_images() -> None:
    given = torch.rand(40, 3, 64, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = torch.rand(DRAWS, 40, generator=torch.Generator().manual_seed(4))
    draws[1] = 0.5
    found = view(given, draws, blur=0.5)
    steps = np.arange(-3, 4)  # of 60 pixels a tenth is 6, or 3 to either side
    for number in range(40):
        wanted = given[number].double().numpy()
        if draws[11, number] < 0.5:
            kernel = np.exp(-0.5 * (steps / (0.1 + 1.9 * draws[12, number].item())) ** 2)
            for axis in (1, 2):
                wanted = correlate1d(wanted, kernel / kernel.sum(), axis=axis, mode="mirror")
        assert np.abs(found[number].numpy() - wanted).max() < 1e-4
    assert 10 < (draws[11] < 0.5).sum() < 30


def test_solarise_is_pillow_s_for_a_share_of_the_images() -> None:
    given = torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(DRAWS, 40, generator=torch.Generator().manual_seed(5))
    draws[1] = 0.5
    found = ((view(scaled(given), draws, solarise=0.3) + 1) * 127.5).round().byte()
    for number in range(40):
        picture = Image.fromarray(given[number].permute(1, 2, 0).numpy())
        wanted = ImageOps.solarize(picture, 128) if draws[13, number] < 0.3 else picture
        assert np.array_equal(found[number].permute(1, 2, 0).numpy(), np.asarray(wanted))
    assert 4 < (draws[13] < 0.3).sum() < 20


def test_colours_change_in_a_share_of_the_images() -> None:
    draws = torch.rand(DRAWS, 64, generator=torch.Generator().manual_seed(6))
    draws[1] = 0.5
    found = view(images(), draws, jitter=0.8, hue=0.2, jitter_share=0.8)
    same = torch.tensor([torch.allclose(a, b, atol=1e-4) for a, b in zip(found, images(), strict=True)])
    assert torch.equal(same, draws[9] >= 0.8)
    assert 2 < same.sum() < 30


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64)])
def test_full_crops_are_cut_from_the_whole_image_before_it_is_shrunk(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    options = STILL | {"area_min": 0.08, "flip": True, "full_crops": True, "cache": False, "pixels": 16}
    config = Config(store="", **options)  # type: ignore[arg-type]
    shares = []
    for draws in torch.rand(60, DRAWS, generator=torch.Generator().manual_seed(1)):
        u = draws.double().numpy()
        area, aspect = (0.08 + 0.92 * u[0]) * size[0] * size[1], (4 / 3) ** (2 * u[1] - 1)
        width, height = min(math.sqrt(area * aspect), size[0]), min(math.sqrt(area / aspect), size[1])
        left, top = (size[0] - width) * u[3], (size[1] - height) * u[4]
        moved = Image.Transform.EXTENT  # an independent way to the same box, without antialiasing
        box = (left, top, left + width, top + height)
        near = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC, box=box)).astype(int)
        wanted = near[:, ::-1] if u[2] < 0.5 else near
        assert np.abs(cut(picture, draws, config).astype(int) - wanted).max() <= 1
        ramp = Image.fromarray(np.linspace(0, 255, size[0])[None].repeat(size[1], 0).astype(np.uint8)).convert("RGB")
        found = cut(ramp, draws, config)[8, :, 0].astype(float)
        plain = np.asarray(ramp.transform((16, 16), moved, box, Image.Resampling.BILINEAR))[8, :, 0].astype(float)
        assert np.abs(found - (plain[::-1] if u[2] < 0.5 else plain))[2:-2].max() < 6
        shares.append(width * height / size[0] / size[1])
    assert min(shares) < 0.2
    assert max(shares) > 0.8


def test_random_views_leave_full_crops_where_they_are() -> None:
    options = {"area_min": 0.1, "flip": True, "full_crops": True, "cache": False}
    assert torch.allclose(view(images(), **options), images(), atol=1e-5)


def test_draws_of_the_options_that_came_first_are_what_they_were() -> None:
    """So that a run of an older trainer goes on with its views; and a rank has its part of the joint batch's."""
    config, cpu = Config(store="", seed=4), torch.device("cpu")
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([4, 2, 7]).generate_state(1)[0]))
    before = torch.rand(2, 9, 2, 5, generator=generator)
    ranks = [view_draws(config, Place(rank, 2, cpu), 2, 7, 5) for rank in (0, 1)]
    assert all(torch.equal(draws[:, :9], before[:, :, rank]) for rank, draws in enumerate(ranks))
    joint = view_draws(config, Place(0, 1, cpu), 2, 7, 10)
    assert torch.equal(torch.cat(ranks, 2), joint)
