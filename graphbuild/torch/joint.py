"""The joint batch as one rank sees it, and `PairLoss`, the base of all losses, which hands it to them.

Each rank computes the loss of its own anchors against the views of all ranks; the mean over ranks, and the gradients
that DDP averages, equal those of one process on the joint batch. Float32 whatever the autocast state. Costs a few
[2 B, 2 B W] matrices for W ranks, an all-gather of z and of what the targets need, a reduce-scatter of z's gradient,
and two waits of the host for the device (one without other ranks): they pay for a clear error instead of NaN or a
deadlock.

What a loss refuses, it refuses on every rank that calls it: where z and targets do not fit each other, or differ over
ranks in size, kind or dtype, where a value is unusable. An error from outside of it (`Targets(...)` raised, a loader
stopped, the loss itself differs) is that rank's alone, and the others wait until their process group's timeout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import normalize

from graphbuild.errors import GraphbuildError, InputError
from graphbuild.torch.gather import Fact, Ranks
from graphbuild.torch.targets import ALONE, Targets, check_temperature, self_slots

VIEWS = 2
GATHERED = ("embeddings", "similarities", "labels", "class_priors", "node", "sketch")
FACTS = (
    *("batch size", "width of z", "dtype of z"),
    *(f"{fact} of {name}" for name in GATHERED for fact in ("width", "dtype")),
)


@dataclass(frozen=True, eq=False)
class JointBatch:
    """Both views of this rank's B images and of all N, view-major: `own` [2, B, p], `every` [2, N, p], one dtype."""

    own: Tensor
    every: Tensor
    targets: Targets
    ranks: Ranks

    @property
    def images(self) -> int:
        """B, this rank's images."""
        return self.own.shape[1]

    @property
    def first(self) -> int:
        """Number in the joint batch of this rank's first image."""
        return self.ranks.rank * self.images

    def products(self) -> Tensor:
        """z_i.z_j of own views and all views, [2 B, 2 N]."""
        return self.own.flatten(0, 1) @ self.every.flatten(0, 1).T

    def self_slots(self) -> Tensor:
        """bool [2 B, 2 N]: a view and itself."""
        return self_slots(self.images, self.every.shape[1], self.first, VIEWS, self.own.device)

    def other_view_slots(self) -> Tensor:
        """bool [2 B, 2 N]: the two views of one image."""
        return self.self_slots().roll(self.every.shape[1], dims=1)

    def pair_slots(self) -> Tensor:
        """bool [B, N]: an image and itself, or its own text."""
        return self_slots(self.images, self.every.shape[1], self.first, 1, self.own.device)

    def similarities(self) -> Tensor:
        """The targets' block [B, N]."""
        return self.targets.block(self.ranks).to(self.own.dtype)

    def positive_slots(self, threshold: float) -> Tensor:
        """bool [2 B, 2 N]: views of images at least this similar, never the view itself."""
        return (self.similarities() >= threshold).repeat(VIEWS, VIEWS) & ~self.self_slots()

    def edges(self) -> Tensor:
        """Weights [2 B, 2 N] of the graph over views: similarities above 0, else 0; the view itself 0."""
        return self.similarities().clamp_min(0).repeat(VIEWS, VIEWS).masked_fill_(self.self_slots(), 0)


class PairLoss(nn.Module, ABC):
    """A loss of two views of each image, or of images and their texts, under DDP and autocast.

    Args:
        gather: compare with the images of all ranks, where a process group is initialised; all of them have to call
            the loss. If False, forward communicates nothing: for a loss on one rank alone, as in a validation.
        process_group: the ranks that train together, a torch.distributed group such as DDP has; all by default.
    """

    unit_norm = True

    def __init__(self, gather: bool, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.gather = gather
        self.process_group = process_group

    def forward(self, z1: Tensor, z2: Tensor, targets: Tensor | Targets | None = None) -> Tensor:
        """The mean loss of this rank's anchors, a scalar, float32 (float64 for float64 z).

        Args:
            z1, z2: [B, p] projections of the two views of each image, or of images and their texts; any norm,
                unless the loss says otherwise. NaN in them gives a NaN loss, as gradient scalers expect.
            targets: what the loss is to know of the images; a Tensor means `Targets(embeddings=...)`. For a batch of
                the loaders pass `Targets.from_batch(batch)`.

        Raises:
            ConfigError: the targets lack what the loss reads.
            InputError: shapes or dtypes do not fit, ranks differ in them, or targets hold unusable values.
        """
        ranks = self.ranks() if self.gather else ALONE
        checked, refused = _checked(z1, z2, targets)
        ranks.check_same(_facts(z1, checked) if refused is None else dict.fromkeys(FACTS), refused, z1.device)
        with torch.autocast(z1.device.type, enabled=False):
            own = torch.stack([z1, z2]).to(_compute_dtype(z1))
            own = normalize(own, dim=2) if self.unit_norm else own
            return self.of_batch(JointBatch(own, ranks.concatenate(own, dim=1), checked.to(own.device), ranks))

    def ranks(self) -> Ranks:
        """The ranks that train together; this process alone where no process group is initialised."""
        return Ranks.of_process_group(self.process_group)

    @abstractmethod
    def of_batch(self, batch: JointBatch) -> Tensor:
        """The mean loss of this rank's anchors, a scalar."""


class TemperedLoss(PairLoss):
    """A loss at one temperature.

    Args:
        tau: temperature of the model.
        gather, process_group: as for `PairLoss`.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(self, tau: float = 0.1, gather: bool = True, process_group: ProcessGroup | None = None) -> None:
        super().__init__(gather, process_group)
        check_temperature("tau", tau)
        self.tau = tau


def cross_entropy(weights: Tensor, logits: Tensor, slots: Tensor | None = None) -> Tensor:
    """Mean over rows i of - sum_j w_ij log p_ij, with p_ij = exp(l_ij) / sum of exp(l_ij') over the row's `slots`.

    Rows whose weights are all 0, or that have no slots, contribute 0 and no gradient; they count in the mean.

    Args:
        weights: [n, m]; rows need not sum to 1.
        logits: [n, m], finite.
        slots: bool [n, m], what the denominator sums over; everything by default.
    """
    if slots is None:
        return (weights.sum(dim=1) * logits.logsumexp(dim=1) - (weights * logits).sum(dim=1)).mean()
    empty = ~slots.any(dim=1)  # their sum runs over everything and is dropped: nothing passes through a NaN
    normalisers = logits.masked_fill(~(slots | empty[:, None]), -torch.inf).logsumexp(dim=1)
    losses = weights.sum(dim=1) * normalisers - (weights * logits).sum(dim=1)
    return losses.masked_fill(empty, 0).mean()


def row_normalised(weights: Tensor) -> Tensor:
    """Non-negative weights [n, m] with rows that sum to 1; rows of zeros stay zero."""
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _checked(z1: Tensor, z2: Tensor, given: Tensor | Targets | None) -> tuple[Targets, GraphbuildError | None]:
    """The targets; and what to raise, once the other ranks know."""
    try:
        targets = given if isinstance(given, Targets) else Targets(embeddings=given)
        _check_lengths(z1, z2, targets)
    except GraphbuildError as error:
        return Targets(), error
    return targets, None


def _check_lengths(z1: Tensor, z2: Tensor, targets: Targets) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) == 0:
        raise InputError(
            f"z1 and z2 have shapes {list(z1.shape)} and {list(z2.shape)}",
            "pass two views of one batch: [B, p] each",
        )
    if not (z1.is_floating_point() and z1.dtype == z2.dtype):
        raise InputError(f"z1 and z2 are {z1.dtype} and {z2.dtype}", "pass two float tensors of one dtype")
    for name, tensor in targets.tensors().items():
        if len(tensor) != len(z1):
            raise InputError(f"{len(tensor)} {name} for {len(z1)} images", "pass one row per image, in z's order")


def _facts(z: Tensor, targets: Targets) -> dict[str, Fact]:
    """What has to agree over ranks, by FACTS: width (1 of a vector) and dtype of a tensor, 0 and None where none is."""
    given = targets.tensors()
    facts: list[Fact] = [*z.shape, _compute_dtype(z)]
    for tensor in (given.get(name) for name in GATHERED):
        facts += [0, None] if tensor is None else [tensor.shape[-1], tensor.dtype]
    return dict(zip(FACTS, facts, strict=True))


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32
