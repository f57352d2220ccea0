"""BatchNorm over the joint batch of all ranks, so that a distributed run equals one process with that batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from config import Place
from torch import Tensor, nn


def over_ranks(model: nn.Module, place: Place) -> nn.Module:
    """The model with its BatchNorms over all ranks: torch's SyncBatchNorm on GPUs, which refuses tensors on CPUs, and
    `JointBatchNorm` there."""
    if place.ranks == 1:
        return model
    if place.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, JointBatchNorm.like(child))
    return model


class JointBatchNorm(nn.BatchNorm2d):
    """BatchNorm of [B, C, ...] by the mean and variance over all ranks' batches; two small all-reduces each way."""

    @classmethod
    def like(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> JointBatchNorm:
        """With the same weights and statistics."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, dtype=norm.weight.dtype)
        made.load_state_dict(norm.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        given, shape = x.dtype, [1, -1, *[1] * (x.ndim - 2)]
        x = x.to(self.weight.dtype)  # under autocast x may be bfloat16
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            others = [axis for axis in range(x.ndim) if axis != 1]
            count = x.numel() // x.shape[1] * dist.get_world_size()
            mean = _AllReduce.apply(x.sum(others)) / count
            variance = _AllReduce.apply((x - mean.view(shape)).square().sum(others)) / count
            if self.track_running_stats:
                with torch.no_grad():
                    self.num_batches_tracked.add_(1)
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps)
        x = (x - mean.view(shape)) * scale.view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(given)


class _AllReduce(torch.autograd.Function):
    """The sum over ranks, in backward too: what one rank puts in reaches the outputs of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total
