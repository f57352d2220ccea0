"""The joint batch as one rank sees it, and `PairLoss`, the base of all losses, which hands it to them.

Each rank computes the loss of its own anchors against the views of all ranks; the mean over ranks, and the gradients
that DDP averages, equal those of one process on the joint batch. Float32 whatever the autocast state.

Costs, with N = B W images on W ranks: forward and backward hold at most 3 matrices [2 B, 2 N] at once (DebiasedLoss 2,
DecoupledLoss 5.3, KernelInfoNCELoss 6 with one exponent, GraphVICRegLoss 1.3), those of images and texts 2 to 5
matrices [B, N]; the collectives are an all-gather of z and of what the targets need, and a reduce-scatter of z's
gradient. The host waits for the device once where targets are read, and once more with other ranks: that pays for a
clear error instead of NaN or a deadlock.

What a loss refuses, it refuses on every rank that calls it: where z and targets do not fit each other, or differ over
ranks in size, kind or dtype, where a value is unusable. An error from outside of it (`Targets(...)` raised, a loader
stopped, the loss itself differs) is that rank's alone, and the others wait until their process group's timeout.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import log_softmax, nll_loss, normalize

from graphbuild.errors import GraphbuildError, InputError
from graphbuild.torch.calibration import TauS
from graphbuild.torch.gather import Fact, Ranks
from graphbuild.torch.targets import ALONE, Targets, check_temperature, compute_dtype, self_columns

VIEWS = 2
MAX_SCALE = 100.0  # of one that is learned
GATHERED = ("embeddings", "similarities", "labels", "class_priors", "node", "sketch", "calibration's background")
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

    def products(self, scale: Tensor | float | None = None) -> Tensor:
        """z_i.z_j of own views and all views, [2 B, 2 N], to be changed in place; times a scale where one is given."""
        own = self.own.flatten(0, 1)
        return (own if scale is None else scale * own) @ self.every.flatten(0, 1).T

    def pair_products(self) -> Tensor:
        """z_i.z_j of the two views of each own image, or of an image and its text, [B]."""
        return (self.own[0] * self.own[1]).sum(dim=1)

    def self_columns(self) -> Tensor:
        """int64 [2 B]: of a view, its own column among the 2 N."""
        return self_columns(self.images, self.every.shape[1], self.first, VIEWS, self.own.device)

    def other_columns(self) -> Tensor:
        """int64 [2 B]: the column of the image's other view."""
        return (self.self_columns() + self.every.shape[1]) % (VIEWS * self.every.shape[1])

    def pair_columns(self) -> Tensor:
        """int64 [B]: the column among the N of the image itself, or of its own text."""
        return self_columns(self.images, self.every.shape[1], self.first, 1, self.own.device)

    def similarities(self) -> Tensor:
        """The targets' block [B, N], to be changed in place."""
        return self.targets.block(self.ranks).to(self.own.dtype)

    def tempered(self, tau_s: TauS, other_view: float, slots: float) -> tuple[Tensor, float | Tensor]:
        """The same at a temperature, and that: a number, or calibrated [B, 1]. slots: as for `calibrated`."""
        targets, temperature = self.targets.tempered(tau_s, other_view, self.every.shape[1], slots)
        return replace(self, targets=targets).similarities(), temperature

    def positive_slots(self, threshold: float) -> Tensor:
        """bool [2 B, 2 N]: views of images at least this similar, never the view itself."""
        positives = (self.similarities() >= threshold).repeat(VIEWS, VIEWS)
        return positives.scatter_(1, self.self_columns()[:, None], False)

    def edges(self) -> Tensor:
        """Weights [2 B, 2 N] of the graph over views: similarities above 0, else 0; the view itself 0."""
        weights = self.similarities().clamp_min_(0).repeat(VIEWS, VIEWS)
        return weights.scatter_(1, self.self_columns()[:, None], 0)


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
        self.target_facts: dict[str, Tensor] = {}  # of this rank's last targets, where they are soft: `target_facts`
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
            own = torch.stack([z1, z2]).to(compute_dtype(z1))
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
        tau: temperature of the model, where training starts if it is learnable.
        gather, process_group: as for `PairLoss`.
        learnable: learn the scale 1 / tau, kept at most 100 as CLIP does: a parameter of the loss.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(
        self,
        tau: float = 0.1,
        gather: bool = True,
        process_group: ProcessGroup | None = None,
        *,
        learnable: bool = False,
    ) -> None:
        super().__init__(gather, process_group)
        check_temperature("tau", tau)
        self.tau = tau
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / tau))) if learnable else None

    def scale(self, batch: JointBatch) -> Tensor | float:
        """1 / tau of this batch."""
        if self.log_scale is None:
            return 1 / self.tau
        with torch.no_grad():  # a clamp in the graph would stop the gradient that leads back
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        return self.ranks().average_gradient(self.log_scale.to(batch.own)).exp()


def cross_entropy(weights: Tensor, logits: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Mean over rows i of - sum_j w_ij log p_ij, with p_i the softmax of row i without its column left_out[i].

    Rows whose weights are all 0 contribute 0 and no gradient; they count in the mean. In place: logits.

    Args:
        weights: [n, m], 0 where a column is left out; rows need not sum to 1. Or int64 [n]: the column of weight 1.
        logits: [n, m], finite.
        left_out: int64 [n]; by default nothing is.
    """
    if left_out is not None:  # a finite value, so that a weight of 0 takes nothing of it
        logits = logits.scatter_(1, left_out[:, None], torch.finfo(logits.dtype).min / 2)
    log_p = log_softmax(logits, dim=1)
    del logits  # nothing in backward needs them: a matrix less beside the product below
    return -(weights * log_p).sum(dim=1).mean() if weights.is_floating_point() else nll_loss(log_p, weights)


def row_normalised(weights: Tensor) -> Tensor:
    """Non-negative weights [n, m], in place, so that rows sum to 1; rows of zeros stay zero."""
    return weights.div_(weights.sum(dim=1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).tiny))


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
            several = name == "embeddings" and len(tensor) > len(z1)  # as of a loader with captions="all"
            raise InputError(
                f"{len(tensor)} {name} for {len(z1)} images",
                "pass one row per image, in z's order"
                + '; the loader\'s captions="mean" makes one of several' * several,
            )


def _facts(z: Tensor, targets: Targets) -> dict[str, Fact]:
    """What has to agree over ranks, by FACTS: width (1 of a vector) and dtype of a tensor, 0 and None where none is."""
    given = targets.tensors()
    facts: list[Fact] = [*z.shape, compute_dtype(z)]
    for tensor in (given.get(name) for name in GATHERED):
        facts += [0, None] if tensor is None else [tensor.shape[-1], tensor.dtype]
    return dict(zip(FACTS, facts, strict=True))
