"""Losses of two views of each image: X-Sample and its limits, and losses that correct the denominator.

Each is a few lines over `JointBatch` and `cross_entropy`; views z are scaled to unit norm, G is the block of
`Targets`, and the view itself is in no sum. What they share, and cost: graphbuild/torch/joint.py. Which to choose:
docs/reference/losses.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from graphbuild.errors import ConfigError
from graphbuild.torch.calibration import OTHER_VIEW, TauS, check_tau_s
from graphbuild.torch.joint import VIEWS, JointBatch, TemperedLoss, cross_entropy, row_normalised
from graphbuild.torch.targets import softmax_targets, target_facts


class XSampleLoss(TemperedLoss):
    """Cross entropy between caption similarity and image similarity (Sobal et al., arXiv 2407.18134).

    With s the target of `similarity_targets` and p_ij = exp(z_i.z_j / tau) / sum over j' != i of exp(z_i.z_j'
    / tau): loss = mean over the 2 B views i of - sum over j != i of s_ij log p_ij. The self slot is left out
    of both distributions. As tau_s falls to 0 this is SupCon for captions that are class prompts, and NT-Xent
    where all captions differ. A row without edges leaves its mass to the other view and the background. Views and
    embeddings are scaled to unit norm inside.

    Args:
        tau: temperature of the model.
        tau_s: temperature of the target; or "calibrated": for each anchor the one at which its other view keeps
            `other_view` of its target, in the mean over random batches as large as the joint one.
        gather: compare with the views of all ranks, where a process group is initialised; all of them have to call
            the loss. A loss on one rank alone, as in a validation, needs gather=False.
        process_group: the ranks that train together, a torch.distributed group such as DDP has; all by default.
        keep_self: keep the self slot in both distributions, at similarity 1, as some public code does.
        other_view: share in (0, 1) of the target beside the self slot.
        learnable: learn the scale 1 / tau, as `CLIPLoss` does: give `loss.parameters()` to the optimizer.

    Raises:
        ConfigError: a temperature that is not above 0, or a share out of range.
    """

    def __init__(
        self,
        tau: float = 0.1,
        tau_s: TauS = 0.1,
        gather: bool = True,
        keep_self: bool = False,
        process_group: ProcessGroup | None = None,
        *,
        other_view: float = OTHER_VIEW,
        learnable: bool = False,
    ) -> None:
        super().__init__(tau, gather, process_group, learnable=learnable)
        check_tau_s(tau_s, other_view)
        self.tau_s, self.other_view = tau_s, other_view
        self.keep_self = keep_self

    def of_batch(self, batch: JointBatch) -> Tensor:
        block, tau_s = batch.tempered(self.tau_s, self.other_view, slots=VIEWS / (VIEWS - 1))
        soft = softmax_targets(block, first=batch.first, tau_s=tau_s, views=VIEWS, keep_self=self.keep_self)
        del block  # a quarter of a matrix less beside the product below
        self.target_facts = target_facts(soft[: batch.images], batch.other_columns()[: batch.images])
        return cross_entropy(
            soft,
            batch.products().div_(self.tau) if self.log_scale is None else batch.products(self.scale(batch)),
            None if self.keep_self else batch.self_columns(),
        )


class NTXentLoss(TemperedLoss):
    """SimCLR's NT-Xent (Chen et al., arXiv 2002.05709, equation 1).

    loss = mean over the 2 B views i of - log p_i,other(i), with p_ij = exp(z_i.z_j / tau) / sum over j' != i. Reads no
    targets.

    Args:
        tau: temperature of the model.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def of_batch(self, batch: JointBatch) -> Tensor:
        return cross_entropy(batch.other_columns(), batch.products().div_(self.tau), batch.self_columns())


class SupConLoss(TemperedLoss):
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, equation 2, L_out).

    loss = mean over the 2 B views i of - 1 / |P(i)| sum over j in P(i) of log p_ij, p as in `NTXentLoss`. P(i): the
    other views with similarity of at least `threshold`. A view without any contributes 0.

    Args:
        tau: temperature of the model.
        threshold: similarity from which an image is a positive. Labels say 1 or 0; the default takes equal captions
            from embeddings.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(
        self, tau: float = 0.1, threshold: float = 0.999, gather: bool = True, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(tau, gather, process_group)
        self.threshold = threshold

    def of_batch(self, batch: JointBatch) -> Tensor:
        positives = row_normalised(batch.positive_slots(self.threshold).to(batch.own.dtype))
        self.target_facts = target_facts(positives[: batch.images], batch.other_columns()[: batch.images])
        return cross_entropy(positives, batch.products().div_(self.tau), batch.self_columns())


class DecoupledLoss(TemperedLoss):
    """Decoupled contrastive loss, DCL (Yeh et al., arXiv 2110.06848, equation 6): positives leave the denominator.

    loss = mean over the 2 B views i of - 1 / |P(i)| sum over j in P(i) of z_i.z_j / tau + log sum over j' neither i nor
    in P(i) of exp(z_i.z_j' / tau). As published P(i) is the image's other view; with a threshold it is that of
    `SupConLoss`, so that the graph decides which views are no negatives. A view without positives, or without
    negatives, contributes 0.

    Args:
        tau: temperature of the model.
        threshold: similarity from which an image is a positive; None: the other view alone, no targets are read.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(
        self,
        tau: float = 0.1,
        threshold: float | None = None,
        gather: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(tau, gather, process_group)
        self.threshold = threshold

    def of_batch(self, batch: JointBatch) -> Tensor:
        logits = batch.products().div_(self.tau)
        if self.threshold is None:
            positives = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, batch.other_columns()[:, None], True)
        else:
            positives = batch.positive_slots(self.threshold)
        weights = row_normalised(positives.to(logits.dtype))
        attraction = (weights * logits).sum(dim=1)
        left_out = positives.scatter_(1, batch.self_columns()[:, None], True)
        without = left_out.all(dim=1)  # no negatives: the sum runs over everything and is dropped, as a NaN would stay
        repulsion = logits.masked_fill_(left_out.logical_and_(~without[:, None]), -torch.inf).logsumexp(dim=1)
        return (weights.sum(dim=1) * repulsion - attraction).masked_fill(without, 0).mean()


class DebiasedLoss(TemperedLoss):
    """Debiased contrastive loss (Chuang et al., arXiv 2007.00224, equations 7 and 8, one positive).

    loss = mean over the 2 B views i of - log(e_i / (e_i + N_i)), where e_i = exp(z_i.z_other(i) / tau) and N_i
    estimates the sum over n = 2 B - 2 true negatives from the n views j of other images, of which a share tau_plus are
    of the anchor's class: N_i = max((sum of exp(z_i.z_j / tau) - tau_plus n e_i) / (1 - tau_plus), n exp(-1 / tau)).
    With tau_plus = 0 this is NT-Xent.

    Args:
        tau: temperature of the model.
        tau_plus: class prior in [0, 1) of every anchor; None: each anchor's own, the targets' `class_priors`. With a
            constant no targets are read.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a temperature that is not above 0, or a prior outside [0, 1).
    """

    def __init__(
        self,
        tau: float = 0.5,
        tau_plus: float | None = 0.1,
        gather: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(tau, gather, process_group)
        if tau_plus is not None and not 0 <= tau_plus < 1:
            raise ConfigError(f"tau_plus = {tau_plus}", "set tau_plus in [0, 1), such as 1 / number of classes")
        self.tau_plus = tau_plus

    def of_batch(self, batch: JointBatch) -> Tensor:
        logits = batch.products().div_(self.tau)
        prior = batch.targets.priors(batch.ranks).to(logits).repeat(VIEWS) if self.tau_plus is None else self.tau_plus
        negatives = logits.shape[1] - VIEWS
        # Exponentials are relative to the row's largest: nothing overflows at a small tau.
        attraction = batch.pair_products().repeat(VIEWS) / self.tau
        logits = logits.scatter_(1, torch.stack([batch.other_columns(), batch.self_columns()], dim=1), -torch.inf)
        shift = torch.maximum(attraction, logits.detach().amax(dim=1)).detach()
        own = (attraction - shift).exp()
        others = (logits - shift[:, None]).exp_().sum(dim=1)
        floor = negatives * torch.exp(-1 / self.tau - shift)
        estimate = torch.maximum((others - prior * negatives * own) / (1 - prior), floor)
        return ((own + estimate).log() + shift - attraction).mean()
