"""The ranks of DistributedDataParallel as one joint batch: gathering with gradient, checks that fail on every rank.

A loss that averages over this rank's anchors and gathers the rest gives, averaged over ranks as DDP does with
gradients, the loss and gradients of one process on the joint batch. Costs the collectives named below, nothing with
one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphbuild.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """The ranks whose batches form the joint batch; alone by default. Image a of rank r is its image r B + a."""

    count: int = 1
    rank: int = 0

    @classmethod
    def of_process_group(cls) -> Ranks:
        """All ranks of the default process group; this process alone where none is initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_world_size(), dist.get_rank())
        return cls()

    def concatenate(self, own: Tensor, dim: int = 0) -> Tensor:
        """Tensors of equal shape from all ranks, in rank order along `dim`; differentiable. One all-gather; one
        all-reduce in backward."""
        if self.count == 1:
            return own
        gathered: Tensor = _AllGather.apply(own)  # type: ignore[no-untyped-call]
        return torch.cat(gathered.unbind(), dim)

    def average_gradient(self, parameter: Tensor) -> Tensor:
        """The parameter itself; backward gives it the mean of all ranks' gradients, as DDP does with a model's."""
        if self.count == 1:
            return parameter
        averaged: Tensor = _AverageGradient.apply(parameter)  # type: ignore[no-untyped-call]
        return averaged

    def check_same(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """Raise InputError on every rank where ranks differ in a size; one small all-gather, read by the host."""
        if self.count == 1:
            return
        own = torch.tensor([list(sizes.values())], device=device)
        every = self.concatenate(own).tolist()
        if any(row != every[0] for row in every):
            raise InputError(
                f"ranks differ in [{', '.join(sizes)}]: {every}",
                "give every rank the same batch size (`partial=False` in graph_webdataset) and kind of targets",
            )


class _AllGather(torch.autograd.Function):
    """[...] on each rank to [W, ...] on all; backward sums over ranks what reached a rank's own part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


class _AverageGradient(torch.autograd.Function):
    """Identity; backward averages over ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()
