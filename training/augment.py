"""Random views of a whole batch at once, on CPU or GPU, in plain torch.

A view depends on its draws alone: a resumed run sees the same views, and a rank of several the same as one process
with the joint batch. Costs one grid_sample and three more passes over the batch.
"""

from __future__ import annotations

import math

import torch
from config import Config
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

DRAWS = 9  # numbers in [0, 1) that a view takes
LUMA = (0.299, 0.587, 0.114)


def random_view(images: Tensor, draws: Tensor, config: Config) -> Tensor:
    """Random resized crop, flip, brightness, contrast, saturation and grayscale, each image by its own draws.

    Args:
        images: [B, 3, H, W] float in [-1, 1].
        draws: [9, B], uniform in [0, 1), on the CPU.
        config: its area_min, jitter, grayscale and flip; a crop's aspect lies between 3/4 and 4/3.

    Returns:
        [B, 3, H, W] in [-1, 1], channels last.
    """
    view = _crop_and_flip(images, draws[:5], config.area_min, config.flip)
    view = _recolour(view, draws[5:].to(images.device)[:, :, None, None], config.jitter, config.grayscale)
    return view.contiguous(memory_format=torch.channels_last)


def _crop_and_flip(images: Tensor, draws: Tensor, area_min: float, flip: bool) -> Tensor:
    share = area_min + (1 - area_min) * draws[0]
    aspect = torch.exp((2 * draws[1] - 1) * math.log(4 / 3)).sqrt()
    height, width = (share.sqrt() / aspect).clamp(max=1), (share.sqrt() * aspect).clamp(max=1)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = width * torch.where(draws[2] < 0.5, 1.0, -1.0) if flip else width  # a negative width is a flip
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * draws[3] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * draws[4] - 1)
    grid = affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recolour(images: Tensor, draws: Tensor, jitter: float, grayscale: float) -> Tensor:
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
