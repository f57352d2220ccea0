"""Losses of images and their texts: CLIP, with soft targets, repaired false negatives or a margin, CWCL and SigLIP.

z1 are the images, z2 the texts, [B, p] each, scaled to unit norm; G is the block of `Targets`, 1 between an image and
its own text. A learnable scale is a parameter of the loss: give `loss.parameters()` to the optimizer; its gradient is
averaged over the ranks that train together, whether they gather or not, so the loss need not be inside DDP. What the
losses share, and cost: graphbuild/torch/joint.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from graphbuild.errors import ConfigError
from graphbuild.torch.calibration import OTHER_VIEW, TauS, check_tau_s
from graphbuild.torch.joint import JointBatch, PairLoss, TemperedLoss, cross_entropy, row_normalised
from graphbuild.torch.targets import check_temperature, softmax_, target_facts


class _ClipLikeLoss(TemperedLoss):
    """The mean of the image-to-text and the text-to-image cross entropy at one, perhaps learnable, temperature."""

    def __init__(
        self, tau: float = 0.07, learnable: bool = False, gather: bool = True, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(tau, gather, process_group, learnable=learnable)

    def logits(self, batch: JointBatch, scale: Tensor | float) -> Iterator[Tensor]:
        """Of own images to all texts, then of own texts to all images, [B, N]: one lives at a time."""
        (images, texts), (every_image, every_text) = batch.own.unbind(), batch.every.unbind()
        yield scale * images @ every_text.T
        yield scale * texts @ every_image.T


class CLIPLoss(_ClipLikeLoss):
    """CLIP's symmetric cross entropy (Radford et al., arXiv 2103.00020, figure 3), one-hot or with soft targets.

    loss = mean over the B pairs i of -(sum over j of s_ij log p_ij + sum over j of s_ij log q_ij) / 2, with p_ij the
    softmax over texts j of u_i.v_j / tau, q_ij the softmax over images j of v_i.u_j / tau, and s_i the pair alone or,
    with tau_s, the softmax over all j, i included, of G_ij / tau_s, for both directions. As tau_s falls to 0 that is
    one-hot CLIP where all captions differ.

    Args:
        tau: temperature of the model, where training starts if it is learnable.
        tau_s: temperature of the soft target, or "calibrated" as for `XSampleLoss`. At most one of it, mask, positive
            and hard; with none the loss is one-hot, and no targets are read.
        learnable: learn the scale 1 / tau, kept at most 100 as CLIP does.
        gather, process_group: as for `XSampleLoss`.
        mask: similarity G_ij from which another pair is taken for a false negative and left out of both softmaxes.
        positive: similarity from which another pair is a positive as the own one is, all with equal shares: the repair
            of false negatives by FFF (Bulat et al., arXiv 2405.10286), by the graph in place of its own model's scores.
        hard: similarity from which another pair is a hard negative, for fine-tuning: the one-hot loss plus the margin
            loss of HELIP (Wang et al., arXiv 2305.05208), with which no other negative may come nearer than a hard one:
            the mean over the other negatives j of max(0, u_i.v_j - the least u_i.v_h of the hard ones h), in both
            directions. A row without hard negatives adds 0.
        other_view: share in (0, 1) of the target that the own text keeps, for tau_s="calibrated".

    Raises:
        ConfigError: a temperature that is not above 0, a similarity or share out of range, or two of the four.
    """

    def __init__(
        self,
        tau: float = 0.07,
        tau_s: TauS | None = None,
        learnable: bool = False,
        gather: bool = True,
        process_group: ProcessGroup | None = None,
        *,
        mask: float | None = None,
        positive: float | None = None,
        hard: float | None = None,
        other_view: float = OTHER_VIEW,
    ) -> None:
        super().__init__(tau, learnable, gather, process_group)
        if tau_s is not None:
            check_tau_s(tau_s, other_view)
        _check_kinds(tau_s=tau_s, mask=mask, positive=positive, hard=hard)
        self.tau_s, self.mask, self.positive, self.hard = tau_s, mask, positive, hard
        self.other_view = other_view

    def of_batch(self, batch: JointBatch) -> Tensor:
        block = None
        if self.tau_s is not None:
            block, tau_s = batch.tempered(self.tau_s, self.other_view, slots=1)
            block.div_(tau_s)
        elif any(kind is not None for kind in (self.mask, self.positive, self.hard)):
            block = batch.similarities()
        scale = self.scale(batch)
        return self.of_logits(self.logits(batch, scale), batch.pair_columns(), block, scale)

    def of_logits(
        self, logits: Iterator[Tensor], pairs: Tensor, block: Tensor | None, scale: Tensor | float = 1.0
    ) -> Tensor:
        """The loss of logits that are computed elsewhere: [n, m] of images to texts, then of texts to images.

        pairs: int64 [n], the column of each row's own pair. block: the targets' [n, m], over tau_s where that is given,
        which is changed in place; None where no targets are read. scale: the cosines' in the logits, which the margin
        of `hard` needs.
        """
        if block is not None and self.hard is not None:
            hard = like_pairs(block, pairs, self.hard, own=False)
            each = [cross_entropy(pairs, one) + _margin(one, hard, pairs) / scale for one in logits]
            return (each[0] + each[1]) / 2
        weights, dropped = pairs, None
        if block is not None and self.mask is not None:
            dropped = like_pairs(block, pairs, self.mask, own=False)
        elif block is not None and self.positive is not None:
            weights = row_normalised(like_pairs(block, pairs, self.positive, own=True).to(block.dtype))
        elif block is not None and self.tau_s is not None:
            weights = softmax_(block)
        if block is not None and self.mask is None:
            self.target_facts = target_facts(weights, pairs)
        image_to_text = cross_entropy(weights, _without(dropped, next(logits)))
        return (image_to_text + cross_entropy(weights, _without(dropped, next(logits)))) / 2


def like_pairs(block: Tensor, pairs: Tensor, least: float, *, own: bool) -> Tensor:
    """Bool [n, m]: pairs of that similarity or more; a row's own one, in the column of pairs [n], is `own`."""
    return (block >= least).scatter_(1, pairs[:, None], own)


def _margin(logits: Tensor, hard: Tensor, pairs: Tensor) -> Tensor:
    """How far a row's negatives that are not hard, bool [n, m], lie above its lowest hard one: the mean, over rows."""
    least = logits.masked_fill(~hard, torch.inf).amin(dim=1, keepdim=True)
    others = ~hard.scatter(1, pairs[:, None], True)
    excess = (logits - least).clamp_min(0).masked_fill(~others, 0)
    return (excess.sum(dim=1) / others.sum(dim=1).clamp_min(1)).mean()


def _without(dropped: Tensor | None, logits: Tensor) -> Tensor:
    return logits if dropped is None else logits.masked_fill(dropped, torch.finfo(logits.dtype).min / 2)


def _check_kinds(**kinds: TauS | None) -> None:
    """At most one kind of target, by name; mask, positive and hard are similarities."""
    given = {name: value for name, value in kinds.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given", "give one of them: each is a target of its own")
    for name, value in given.items():
        if name in ("mask", "positive", "hard") and not (isinstance(value, float | int) and -1 <= value <= 1):
            raise ConfigError(f"{name} = {value}", f"set {name} in [-1, 1]: a similarity")


class CWCLLoss(_ClipLikeLoss):
    """Continuously weighted contrastive loss (Srinivasa et al., arXiv 2309.14580).

    The rows of z1 are weighted: - sum over j of (w_ij / sum of w_i) log p_ij, with w_ij = (1 + G_ij) / 2 and p as in
    `CLIPLoss`; the rows of z2 have CLIP's one-hot target. The loss is the mean of both (public code adds them: twice
    this). The paper weights the modality whose similarities they are: for G of captions call `loss(texts, images,
    targets)`.

    Args:
        tau: temperature of the model, where training starts if it is learnable.
        learnable: as for `CLIPLoss`.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def of_batch(self, batch: JointBatch) -> Tensor:
        weights = batch.similarities().add_(1).div_(2).clamp_min_(0)
        logits = self.logits(batch, self.scale(batch))
        image_to_text = cross_entropy(row_normalised(weights), next(logits))
        return (image_to_text + cross_entropy(batch.pair_columns(), next(logits))) / 2


class SigLIPLoss(PairLoss):
    """SigLIP's sigmoid loss (Zhai et al., arXiv 2303.15343, section 3.2), one-hot or with soft targets.

    loss = 1 / B sum over images i and texts j of the binary cross entropy between q_ij and sigmoid(l_ij), where l_ij =
    scale u_i.v_j + bias. One-hot: q_ij = 1 for the pair, 0 otherwise. With a threshold: q_ij rises linearly from 0, at
    G_ij = threshold and below, to 1 at G_ij = 1. Rows are not normalised: an absent edge is an ordinary negative.

    Args:
        scale, bias: t and b, where training starts if they are learnable; the paper's values.
        threshold: similarity, in [-1, 1), up to which a pair is a negative. At most one of it, mask and positive; with
            none the loss is one-hot, and no targets are read.
        learnable: learn log t and b.
        gather, process_group: as for `XSampleLoss`.
        mask: similarity G_ij from which another pair is taken for a false negative and left out.
        positive: similarity from which another pair has q_ij = 1 as the own one has: FFF's repair of false negatives
            (Bulat et al., arXiv 2405.10286), by the graph in place of its own model's scores.

    Raises:
        ConfigError: a scale that is not above 0, a similarity out of range, or two of the three.
    """

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        threshold: float | None = None,
        learnable: bool = False,
        gather: bool = True,
        process_group: ProcessGroup | None = None,
        *,
        mask: float | None = None,
        positive: float | None = None,
    ) -> None:
        super().__init__(gather, process_group)
        check_temperature("scale", scale)
        if threshold is not None and not -1 <= threshold < 1:
            raise ConfigError(f"threshold = {threshold}", "set threshold in [-1, 1): a similarity")
        self.scale = scale
        self.bias = bias
        self.log_scale_and_bias = nn.Parameter(torch.tensor([math.log(scale), bias])) if learnable else None
        _check_kinds(threshold=threshold, mask=mask, positive=positive)
        self.threshold, self.mask, self.positive = threshold, mask, positive

    def of_batch(self, batch: JointBatch) -> Tensor:
        scale: Tensor | float = self.scale
        bias: Tensor | float = self.bias
        if self.log_scale_and_bias is not None:
            log_scale, bias = self.ranks().average_gradient(self.log_scale_and_bias.to(batch.own)).unbind()
            scale = log_scale.exp()
        logits = scale * batch.own[0] @ batch.every[1].T + bias
        if self.positive is not None:
            positives = like_pairs(batch.similarities(), batch.pair_columns(), self.positive, own=True)
            attraction = logits.masked_fill(~positives, 0).sum(dim=1)
        elif self.threshold is None:
            attraction = scale * batch.pair_products() + bias
        else:
            probability = batch.similarities().sub_(self.threshold).div_(1 - self.threshold).clamp_(0, 1)
            attraction = (probability * logits).sum(dim=1)
        repulsion = softplus(logits)
        if self.mask is not None:
            dropped = like_pairs(batch.similarities(), batch.pair_columns(), self.mask, own=False)
            repulsion = repulsion.masked_fill(dropped, 0)
        return (repulsion.sum(dim=1) - attraction).mean()
