"""Losses that are written as functions of a graph over the batch's views: G_ij is the weight of edge (i, j).

G is the block of `Targets`, similarities below 0 taken as no edge, lifted to the views: two views have the weight of
their images, the views of one image 1 (`Targets.keep_diagonal`: the block's own), a view and itself none. Labels give
the graph of classes. Other than X-Sample's softmax, these weights are linear in G: small similarities to many images
add up, so pass a graph that is sparse or thresholded. What the losses share, and cost: graphbuild/torch/joint.py.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from graphbuild.errors import ConfigError
from graphbuild.torch.joint import JointBatch, PairLoss, TemperedLoss, cross_entropy, row_normalised


class KernelInfoNCELoss(TemperedLoss):
    """Kernel-InfoNCE (Tan et al., "Contrastive Learning Is Spectral Clustering On Similarity Graph", arXiv 2303.15103).

    The cross entropy between the row-normalised graph and the graph of a kernel of the representation: loss = mean over
    the 2 B views i of - sum over j of (G_ij / sum of G_i) log(k(z_i, z_j) / sum over j' != i of k(z_i, z_j')), with
    k(x, y) = sum over exponents g of exp(-||x - y||^g / tau): Gaussian for 2, Laplacian for 1, and the paper's simple
    sum kernel for (1, 2) at one temperature. With (2,) and only the other view as an edge this is NT-Xent at tau / 2.
    A view without edges contributes 0.

    Args:
        tau: bandwidth of the kernel.
        exponents: powers of the distance, each in (0, 2], where the kernel is positive definite.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a bandwidth that is not above 0, or exponents out of range.
    """

    def __init__(
        self,
        tau: float = 0.2,
        exponents: tuple[float, ...] = (2.0,),
        gather: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(tau, gather, process_group)
        if not exponents or not all(0 < exponent <= 2 for exponent in exponents):
            raise ConfigError(f"exponents = {exponents}", "pass one or more, each above 0 and at most 2")
        self.exponents = exponents

    def of_batch(self, batch: JointBatch) -> Tensor:
        squared = batch.products().mul_(-2).add_(2)
        # Below rounding a distance is noise, and its root has no gradient at 0.
        squared = squared.clamp_min(torch.finfo(squared.dtype).eps)
        kernels = [(squared ** (exponent / 2)).div_(-self.tau) for exponent in self.exponents]
        return cross_entropy(row_normalised(batch.edges()), reduce(torch.logaddexp, kernels), batch.self_columns())


class GraphSimCLRLoss(TemperedLoss):
    """SimCLR as a function of a graph of known positives (Cabannes et al., "Active Self-Supervised Learning", PAL,
    arXiv 2303.15256).

    loss = 1 / (2 B) sum over views i, j of - G_ij log p_ij, p as in `NTXentLoss`. Edges weigh what G says, so a view
    with many positives counts more than under `SupConLoss`; with only the other view as an edge this is NT-Xent. A view
    without edges contributes 0.

    Args:
        tau: temperature of the model.
        gather, process_group: as for `XSampleLoss`.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def of_batch(self, batch: JointBatch) -> Tensor:
        return cross_entropy(batch.edges(), batch.products().div_(self.tau), batch.self_columns())


class GraphVICRegLoss(PairLoss):
    """VICReg as a function of a graph of known positives (Cabannes et al., PAL, arXiv 2303.15256).

    loss = invariance / (2 B p) sum over views i, j of G_ij ||z_i - z_j||^2
         + variance * mean over views v and dimensions of max(0, 1 - sqrt(Var(z^v) + 0.0001))
         + covariance / p sum over views v and dimensions k != l of Cov(z^v)_kl^2,
    with variance and covariance over the joint batch, unbiased. With only the other view as an edge this is VICReg
    (Bardes et al., arXiv 2105.04906), scaled as in its authors' code. z is *not* scaled to unit norm. A view without
    edges adds nothing to the first term.

    Args:
        invariance, variance, covariance: weights of the three terms.
        gather, process_group: as for `XSampleLoss`.
    """

    unit_norm = False

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        gather: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(gather, process_group)
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance

    def of_batch(self, batch: JointBatch) -> Tensor:
        _, images, width = batch.every.shape
        if images < 2:
            raise ConfigError("VICReg has no variance in a batch of one image", "use a larger batch")
        spread = batch.every - batch.every.mean(dim=1, keepdim=True)
        covariances = spread.mT @ spread / (images - 1)  # [2, p, p]
        variances = covariances.diagonal(dim1=1, dim2=2)
        hinge = (1 - (variances + 1e-4).sqrt()).relu().mean()
        redundancy = (covariances.square().sum() - variances.square().sum()) / width
        attraction = _weighted_squared_distances(batch) / width
        return self.invariance * attraction + self.variance * hinge + self.covariance * redundancy


def _weighted_squared_distances(batch: JointBatch) -> Tensor:
    """Mean over own views i of sum over j of G_ij ||z_i - z_j||^2, without a [2 B, 2 N, p] array."""
    centre = batch.every.detach().mean(dim=(0, 1))  # distances do not change, rounding errors shrink
    own, every = (batch.own - centre).flatten(0, 1), (batch.every - centre).flatten(0, 1)
    edges = batch.edges()
    norms = edges.sum(dim=1) * own.square().sum(dim=1) + edges @ every.square().sum(dim=1)
    return (norms - 2 * (own * (edges @ every)).sum(dim=1)).mean()
