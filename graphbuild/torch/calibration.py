"""Targets that mean the same at every batch size: each anchor's temperature at which its other view keeps a share.

Beside the other view's mass 1 the other images of a random batch of B have, in expectation,

    slots (B - 1) / (M - 1) * (sum over the k stored g of exp((g - 1) / tau_s) + sum outside of exp((G - 1) / tau_s)).

Outside the list the graph stores mean and deviation of G. Its distribution is taken for a shifted lognormal one,
mirrored where the longer tail lies below, with the mean and deviation of all M - 1 similarities and their k-th largest
where the list ends: three stored facts for three parameters. The logarithm of that mass is convex in 1 / tau_s, so
Newton's steps from 0 come near from one side. How far shares are from what was asked: docs/explanation/targets.md.

Costs ROUNDS exponentials of [B, k + POINTS] values, on the tensors' device, no communication and no wait of the host.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from graphbuild.errors import ConfigError
from graphbuild.torch.batch_edges import BatchEdges

TauS = float | Literal["calibrated"]
OTHER_VIEW = 0.6  # share of the target, by default
LEAST, MOST = 0.01, 100.0  # of a calibrated temperature
ROUNDS = 6
LOWEST = -5.0  # deviations below the median at which integration begins
POINTS = 48
SHAPES = -1.5, 1.0, 501  # deviations of the logarithm that are tried, and how many; below 0 mirrored


@torch.no_grad()
def calibrated(stored: BatchEdges, *, images: int, other_view: float, slots: float) -> tuple[Tensor, Tensor]:
    """Of each anchor the target's temperature, and what stands for a similarity outside its list; [B, 1] both.

    stored: of the B anchors, with node_count. images: of the joint batch, over all ranks. other_view: share in (0, 1)
    of the target beside the view itself. slots: those of another image in the target for each of the own: V / (V - 1)
    with V views, 1 with texts. An anchor with so many equals that the share cannot be kept has LEAST. ConfigError: so
    small a share that even equal similarities leave more of so few images.
    """
    others = slots * (images - 1)
    if images > 1 and (1 + others) * other_view <= 1:
        raise ConfigError(
            f"other_view = {other_view} in a batch of {images} images: equal parts are {1 / (1 + others):.3f}",
            "ask for a larger share, or use a larger batch",
        )
    near = stored.similarities.to(torch.promote_types(stored.similarities.dtype, torch.float32))
    count = torch.as_tensor(stored.node_count, device=near.device).reshape(-1, 1)[:1].to(near) - 1
    outside, weights = _outside(near, stored.background.to(near), count)
    rest = (1 - near.shape[1] / count).clamp_min(0)  # of all nodes are outside
    gaps = (1 - torch.cat([near, outside], dim=1)).clamp_min_(0)
    masses = others * torch.cat([(1 / count).expand_as(near), rest * weights.expand_as(outside)], dim=1)
    log_odds, tiny = math.log(1 / other_view - 1), torch.finfo(near.dtype).tiny
    inverse = near.new_zeros(len(near), 1)
    for _ in range(ROUNDS):
        terms = masses * torch.exp(-inverse * gaps)
        mass = terms.sum(dim=1, keepdim=True).clamp_min_(tiny)
        slope = (terms * gaps).sum(dim=1, keepdim=True).div_(mass).clamp_min_(1e-6)
        inverse = (inverse + (mass.log() - log_odds) / slope).clamp_(1 / MOST, 1 / LEAST)
    mean = (weights * torch.exp(-inverse * (1 - outside))).sum(dim=1, keepdim=True)
    return 1 / inverse, (1 + mean.clamp_min_(tiny).log_() / inverse).clamp_(max=1)


def _outside(near: Tensor, background: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities [B, POINTS] that stand for those outside the lists, and their weights [1, POINTS]."""
    grid = torch.linspace(*SHAPES, device=near.device, dtype=near.dtype)
    mean, deviation = background[:, :1], background[:, 1:]
    listed = near.shape[1] / count
    mean_of_all = mean + listed * (near.mean(dim=1, keepdim=True) - mean)
    square = deviation**2 + mean**2
    square = square + listed * (near.square().mean(dim=1, keepdim=True) - square)
    deviation_of_all = (square - mean_of_all**2).clamp_min(1e-12).sqrt()
    # Where the list ends: what a standard normal and the anchor's own similarities exceed as often.
    end = -torch.special.ndtri(((near.shape[1] + 0.5) / count).clamp(max=0.5))
    ends = _lognormal(grid, end)[0].cummax(dim=0).values
    wanted = (near[:, -1:] - mean_of_all) / deviation_of_all
    shape = grid[torch.searchsorted(ends, wanted).clamp_(max=len(grid) - 1)]
    steps = torch.arange(0.5, POINTS, device=near.device, dtype=near.dtype) / POINTS  # the middles of as many parts
    normal = LOWEST + (end - LOWEST) * steps
    weights = torch.exp(-(normal**2) / 2)
    outside = mean_of_all + deviation_of_all * _lognormal(shape, normal)
    return torch.minimum(outside, near[:, -1:]), weights / weights.sum(dim=1, keepdim=True)


def _lognormal(shape: Tensor, normal: Tensor) -> Tensor:
    """Of a standard normal value the equally frequent one of a lognormal variable, of mean 0 and deviation 1."""
    sign, width = torch.where(shape < 0, -1.0, 1.0), shape.abs().clamp_min(1e-3)
    spread = (torch.expm1(width**2) * torch.exp(width**2)).sqrt()
    return sign * (torch.expm1(sign * width * normal) - torch.expm1(width**2 / 2)) / spread


def check_tau_s(tau_s: TauS, other_view: float) -> None:
    """Raise ConfigError unless a temperature is above 0 and finite, or calibrated to a share within (0, 1)."""
    if tau_s == "calibrated":
        if not 0 < other_view < 1:
            raise ConfigError(f"other_view = {other_view}", "set other_view between 0 and 1: a share of the target")
    elif not (isinstance(tau_s, float | int) and 0 < tau_s < float("inf")):
        raise ConfigError(f"tau_s = {tau_s!r}", 'set tau_s above 0, or "calibrated"')
