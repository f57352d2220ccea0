"""The X-Sample contrastive loss, correct under DistributedDataParallel (docs/training.md).

Each rank computes the loss of its own anchors against the views of all ranks; the mean over ranks, and the
gradients that DDP averages, equal those of one process on the joint batch. Float32 whatever the autocast
state. Costs two [V B, V B W] matrices for W ranks, an all-gather of z and of the embeddings, an all-reduce of
z's gradient, and one synchronisation with the host, which pays for a clear error instead of NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from graphbuild.errors import InputError
from graphbuild.torch.targets import (
    check_temperature,
    check_unit,
    self_slots,
    targets_of_anchors,
    unit_embeddings,
)

VIEWS = 2


class XSampleLoss(nn.Module):
    """Cross entropy between caption similarity and image similarity (Sobal et al., arXiv 2407.18134).

    With s the target of `similarity_targets` and p_ij = exp(z_i.z_j / tau) / sum over j' != i of exp(z_i.z_j'
    / tau): loss = mean over the 2 B views i of - sum over j != i of s_ij log p_ij. The self slot is left out
    of both distributions. As tau_s falls to 0 this is SupCon for captions that are class prompts, and NT-Xent
    where all captions differ.

    Args:
        tau: temperature of the model.
        tau_s: temperature of the target.
        gather: compare with the views of all ranks of the default process group, where one is initialised.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(self, tau: float = 0.1, tau_s: float = 0.1, gather: bool = True) -> None:
        super().__init__()
        check_temperature("tau", tau)
        check_temperature("tau_s", tau_s)
        self.tau = tau
        self.tau_s = tau_s
        self.gather = gather

    def forward(self, z1: Tensor, z2: Tensor, embeddings: Tensor) -> Tensor:
        """The mean loss of this rank's anchors, a scalar, float32 (float64 for float64 z).

        Args:
            z1, z2: [B, p] projections of the two views of each image; any norm. NaN in them gives a NaN loss,
                as gradient scalers expect.
            embeddings: [B, d] of the images' captions, any float type or int8; only directions count; no
                gradient.

        Raises:
            InputError: shapes do not fit, ranks have different batch sizes, or an embedding is zero or not
                finite.
        """
        _check_views(z1, z2, embeddings)
        dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
        with torch.autocast(z1.device.type, enabled=False):
            own_z = normalize(torch.stack([z1, z2]).to(dtype), dim=2)  # [2, B, p]
            own_texts = unit_embeddings(embeddings.to(z1.device))
            images, first = len(own_texts), 0
            all_z, all_texts = own_z, own_texts
            if self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                _check_same_on_all_ranks(own_z, own_texts)
                all_z = gather_from_ranks(own_z).transpose(0, 1).flatten(1, 2)  # [W, 2, B, p] to [2, W B, p]
                all_texts = gather_from_ranks(own_texts).flatten(0, 1)
                first = dist.get_rank() * images
            check_unit(all_texts)
            targets = targets_of_anchors(own_texts @ all_texts.T, first=first, tau_s=self.tau_s, views=VIEWS).to(dtype)
            logits = own_z.flatten(0, 1) @ all_z.flatten(0, 1).T / self.tau  # [2 B, 2 B W]
            own_slots = self_slots(images, len(all_texts), first, VIEWS, logits.device)
            normalisers = torch.logsumexp(logits.masked_fill(own_slots, -torch.inf), dim=1)
            return (normalisers - (targets * logits).sum(dim=1)).mean()


class _AllGather(torch.autograd.Function):
    """[...] on each rank to [W, ...] on all; backward sums over ranks what reached a rank's own part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_from_ranks(own: Tensor) -> Tensor:
    """Stack a tensor of equal shape from all ranks: [W, ...], differentiable."""
    gathered: Tensor = _AllGather.apply(own)  # type: ignore[no-untyped-call]
    return gathered


def _check_views(z1: Tensor, z2: Tensor, embeddings: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) == 0:
        raise InputError(
            f"z1 and z2 have shapes {list(z1.shape)} and {list(z2.shape)}",
            "pass two views of one batch: [B, p] each",
        )
    if not (z1.is_floating_point() and z1.dtype == z2.dtype):
        raise InputError(f"z1 and z2 are {z1.dtype} and {z2.dtype}", "pass two float tensors of one dtype")
    if len(embeddings) != len(z1):
        raise InputError(
            f"{len(embeddings)} embeddings for {len(z1)} images", "pass one embedding per image, in z's order"
        )


def _check_same_on_all_ranks(own_z: Tensor, own_texts: Tensor) -> None:
    own = torch.tensor([own_z.shape[1], own_z.shape[2], own_texts.shape[1]], device=own_z.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    sizes = torch.stack(every).tolist()
    if any(size != sizes[0] for size in sizes):
        raise InputError(
            f"ranks differ in [batch size, width of z, width of embeddings]: {sizes}",
            "give every rank the same batch size: `partial=False` in graph_webdataset",
        )
