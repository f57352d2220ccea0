"""Random views of a whole batch at once, on CPU or GPU, in plain torch; with full_crops the crops by PIL before that.

A view depends on its draws alone: a resumed run sees the same views, and a rank of several the same as one process
with the joint batch. Costs one grid_sample and three more passes over the batch; hue some twenty passes more, and blur
two convolutions. With full_crops the loader cuts both views out of each whole image: two resizes an image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from config import Config, Place
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

DRAWS = 14  # numbers in [0, 1) that a view takes
FIRST_DRAWS = 9  # of them; drawn before the others, so that views without the latter options stay as they were
LUMA = (0.299, 0.587, 0.114)
SIGMAS = (0.1, 2.0)  # of the blur, in pixels


def seed_of(config: Config, *numbers: int) -> int:
    """A seed that depends on the run's and on all of these numbers."""
    return int(np.random.SeedSequence([config.seed, *numbers]).generate_state(1)[0])


def view_draws(config: Config, place: Place, epoch: int, step: int, count: int) -> Tensor:
    """[2, DRAWS, count]: of both views of this rank's images, its part of the draws for the joint batch."""
    generator = torch.Generator().manual_seed(seed_of(config, epoch, step))
    sizes = (FIRST_DRAWS, DRAWS - FIRST_DRAWS)
    drawn = [torch.rand(2, size, place.ranks, count, generator=generator)[:, :, place.rank] for size in sizes]
    return torch.cat(drawn, 1)


def random_view(images: Tensor, draws: Tensor, config: Config) -> Tensor:
    """Random resized crop, flip, saturation or none, contrast, brightness, hue, blur and solarisation, in this order.

    Args:
        images: [B, 3, H, W] float in [-1, 1]; with full_crops what `cut` made for this view.
        draws: [DRAWS, B], uniform in [0, 1), on the CPU.
        config: its options from area_min to full_crops; a crop's aspect lies between 3/4 and 4/3.

    Returns:
        [B, 3, H, W] in [-1, 1], channels last.
    """
    view = images if config.full_crops else _crop_and_flip(images, draws[:5], config.area_min, config.flip)
    colours, (jittered, turn, blurred, sigma, solarised) = (
        part.to(images.device)[:, :, None, None] for part in (draws[5:FIRST_DRAWS], draws[FIRST_DRAWS:])
    )
    is_jittered = jittered < config.jitter_share
    view = _recolour(view, colours, config.jitter * is_jittered, config.grayscale)
    if config.hue:
        view = _turn_hue(view, (config.hue * (2 * turn - 1) * is_jittered)[:, None])
    if config.blur:
        least, most = SIGMAS
        view = _blur(view, (least + (most - least) * sigma).masked_fill(blurred >= config.blur, 1e-3))
    if config.solarise:
        view = torch.where((solarised < config.solarise)[:, None] & (view >= 0), -view, view)
    return view.contiguous(memory_format=torch.channels_last)


def cut(image: Image.Image, draws: Tensor, config: Config) -> NDArray[np.uint8]:
    """The crop of a view, uint8 [P, P, 3]: cut out of the whole image, then shrunk with antialiasing, and flipped.

    draws: [DRAWS] of this view; the crop's share is of the whole image's area.
    """
    ratio = math.sqrt(image.width / image.height)
    width, height = (side.item() for side in _sides(draws, config.area_min, ratio))
    left, top = (1 - width) * draws[3].item(), (1 - height) * draws[4].item()
    right, bottom = min(left + width, 1.0) * image.width, min(top + height, 1.0) * image.height
    box = (left * image.width, top * image.height, right, bottom)
    shrunk = image.resize((config.pixels, config.pixels), Image.Resampling.BICUBIC, box=box)
    is_flipped = config.flip and draws[2] < 0.5
    return np.asarray(shrunk.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else shrunk)


def _sides(draws: Tensor, area_min: float, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Width and height of the crop as shares of the image's; ratio: the root of the image's width over its height."""
    share = area_min + (1 - area_min) * draws[0]
    aspect = torch.exp((2 * draws[1] - 1) * math.log(4 / 3)).sqrt()
    return (share.sqrt() * aspect / ratio).clamp(max=1), (share.sqrt() / aspect * ratio).clamp(max=1)


def _crop_and_flip(images: Tensor, draws: Tensor, area_min: float, flip: bool) -> Tensor:
    width, height = _sides(draws, area_min)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = width * torch.where(draws[2] < 0.5, 1.0, -1.0) if flip else width  # a negative width is a flip
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * draws[3] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * draws[4] - 1)
    grid = affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recolour(images: Tensor, draws: Tensor, jitter: Tensor, grayscale: float) -> Tensor:
    """Saturation, contrast and brightness are linear in the pixels: one 3 x 3 matrix and bias for each image."""
    brightness, contrast, saturation = 1 + jitter * (2 * draws[:3] - 1)
    saturation = saturation.masked_fill(draws[3] < grayscale, 0)
    luma = torch.tensor(LUMA, device=images.device)
    mean = (images.mean(dim=(2, 3)) @ luma).view(-1, 1, 1)
    to_gray = luma.expand(3, 3)
    matrix = brightness * contrast * (saturation * torch.eye(3, device=images.device) + (1 - saturation) * to_gray)
    # In [-1, 1] brightness scales around black, which is -1.
    bias = brightness * ((1 - contrast) * mean + 1) - 1
    return torch.baddbmm(bias, matrix, images.flatten(2)).view_as(images).clamp_(-1, 1)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Images [B, 3, H, W] with the hue of HSV turned by [B, 1, 1, 1] circles; value and saturation stay.

    With hue h in sixths of the circle, value v and chroma c, a channel is v - c max(0, min(k, 4 - k, 1)), where
    k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    scale = chroma.clamp_min(1e-9)
    of_red, of_green, of_blue = (green - blue) / scale, 2 + (blue - red) / scale, 4 + (red - green) / scale
    hue = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))
    channels = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(3, 1, 1)
    k = (channels + hue[:, None] + 6 * turns) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image [3, H, W] under a Gaussian of its own, sigma [B, 1, 1] in pixels, as wide as a tenth of the image."""
    count, channels, height, width = images.shape
    radius = max(min(height, width) // 20, 1)
    steps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (steps / sigma).square())
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(channels, 0)[
        :, None
    ]  # [3 B, 1, 1, 2 radius + 1]
    flat = pad(images.reshape(1, count * channels, height, width), [radius] * 4, mode="reflect")
    flat = conv2d(conv2d(flat, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
    return flat.view_as(images)
