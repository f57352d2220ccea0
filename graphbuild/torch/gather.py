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
from torch.distributed import ProcessGroup

from graphbuild.errors import ConfigError, GraphbuildError, InputError

Fact = int | torch.dtype | None
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True)
class Ranks:
    """The ranks whose batches form the joint batch; alone by default. Image a of rank r is its image r B + a."""

    count: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def of_process_group(cls, group: ProcessGroup | None = None) -> Ranks:
        """All ranks of a torch.distributed group, by default of the whole; this process alone without one.

        ConfigError: this process is not in the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if dist.get_rank(group) < 0:
            raise ConfigError("this process is not in process_group", "pass a group that it is in, or gather=False")
        return cls(dist.get_world_size(group), dist.get_rank(group), group)

    def concatenate(self, own: Tensor, dim: int = 0) -> Tensor:
        """Tensors of equal shape [n, ...] from all ranks, in rank order along `dim`; differentiable. One all-gather;
        one reduce-scatter in backward."""
        if self.count == 1:
            return own
        gathered: Tensor = _AllGather.apply(own, self)  # type: ignore[no-untyped-call]
        return gathered if dim == 0 else torch.cat(gathered.chunk(self.count), dim)

    def average_gradient(self, parameter: Tensor) -> Tensor:
        """The parameter itself; backward gives it the mean of all ranks' gradients, as DDP does with a model's."""
        if self.count == 1:
            return parameter
        averaged: Tensor = _AverageGradient.apply(parameter, self)  # type: ignore[no-untyped-call]
        return averaged

    def check_same(self, facts: Mapping[str, Fact], refused: GraphbuildError | None, device: torch.device) -> None:
        """Raise on every rank where one has `refused` its batch, or ranks differ in a fact.

        One small all-gather, for which the host waits. The same facts' names on all ranks.
        """
        if self.count > 1:
            own = torch.tensor([[int(refused is not None), *map(_code, facts.values())]], device=device)
            refusals, *columns = zip(*self.concatenate(own).tolist(), strict=True)
            differing = {name: codes for name, codes in zip(facts, columns, strict=True) if len(set(codes)) > 1}
            if refused is None and any(refusals):
                ranks = [rank for rank, refusal in enumerate(refusals) if refusal]
                refused = InputError(f"rank(s) {ranks} refused their batch", "see what they raised")
            elif refused is None and differing:
                refused = InputError(
                    f"ranks differ in {'; '.join(_shown(*item) for item in differing.items())}",
                    "give every rank targets of one kind, and as many images (`partial=False` in graph_webdataset)",
                )
        if refused is not None:
            raise refused


def _code(fact: Fact) -> int:
    """A number for a fact, the same on every rank; dtypes that no batch has share one."""
    if isinstance(fact, int):
        return fact
    return DTYPES.index(fact) + 1 if fact in DTYPES else -(fact is not None)


def _shown(name: str, codes: tuple[int, ...]) -> str:
    values = [DTYPES[code - 1] if code > 0 else None for code in codes] if name.startswith("dtype") else list(codes)
    return f"{name}: {values}"


def _collective(*names: str) -> Any:
    """The first of these that this torch has: newer ones have other names for the same."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


class _AllGather(torch.autograd.Function):
    """[n, ...] on each rank to [W n, ...] on all; backward sums over ranks what reached a rank's own part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        every = own.new_empty((ranks.count * own.shape[0], *own.shape[1:]))
        _collective("all_gather_single", "all_gather_into_tensor")(every, own.contiguous(), group=ranks.group)
        return every

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        every = gradients[0].contiguous()
        own = every.new_empty((every.shape[0] // ctx.ranks.count, *every.shape[1:]))
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, every, group=ctx.ranks.group)
        return own, None


class _AverageGradient(torch.autograd.Function):
    """Identity; backward averages over ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.ranks.group)
        return total / ctx.ranks.count, None
