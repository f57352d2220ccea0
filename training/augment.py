"""Random views of a whole batch at once, on CPU or GPU, in plain torch.

Every draw comes from the generator that is passed in, so a view depends on its seed alone: a resumed run sees
the same views. Costs one grid_sample and three more passes over the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

LUMA = (0.299, 0.587, 0.114)


def random_view(
    images: Tensor,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.6, 1.0),
    jitter: float = 0.3,
    grayscale: float = 0.05,
) -> Tensor:
    """Random resized crop, flip, brightness, contrast, saturation and grayscale, drawn for each image.

    Args:
        images: [B, 3, H, W] float in [-1, 1].
        generator: on the CPU, whatever the images' device.
        area: range of the crop's share of the image; its aspect lies between 3/4 and 4/3.
        jitter: largest relative change of brightness, contrast and saturation.
        grayscale: probability of losing all colour.

    Returns:
        [B, 3, H, W] in [-1, 1].
    """
    view = _recolour(_crop_and_flip(images, generator, area), generator, jitter, grayscale)
    return view.contiguous(memory_format=torch.channels_last)


def _crop_and_flip(images: Tensor, generator: torch.Generator, area: tuple[float, float]) -> Tensor:
    draws = torch.rand(5, len(images), generator=generator)
    share = area[0] + (area[1] - area[0]) * draws[0]
    aspect = torch.exp((2 * draws[1] - 1) * math.log(4 / 3)).sqrt()
    height, width = (share.sqrt() / aspect).clamp(max=1), (share.sqrt() * aspect).clamp(max=1)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = width * torch.where(draws[2] < 0.5, 1.0, -1.0)  # a negative width is a flip
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * draws[3] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * draws[4] - 1)
    grid = affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recolour(images: Tensor, generator: torch.Generator, jitter: float, grayscale: float) -> Tensor:
    """Saturation, contrast and brightness are linear in the pixels: one 3 x 3 matrix and bias for each
    image."""
    draws = torch.rand(4, len(images), 1, 1, generator=generator).to(images.device)
    brightness, contrast, saturation = 1 + jitter * (2 * draws[:3] - 1)
    saturation = saturation.masked_fill(draws[3] < grayscale, 0)
    luma = torch.tensor(LUMA, device=images.device)
    mean = (images.mean(dim=(2, 3)) @ luma).view(-1, 1, 1)
    to_gray = luma.expand(3, 3)
    matrix = brightness * contrast * (saturation * torch.eye(3, device=images.device) + (1 - saturation) * to_gray)
    # In [-1, 1] brightness scales around black, which is -1.
    bias = brightness * ((1 - contrast) * mean + 1) - 1
    return torch.baddbmm(bias, matrix, images.flatten(2)).view_as(images).clamp_(-1, 1)
