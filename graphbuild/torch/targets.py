"""Soft targets from a sample similarity graph: what each view of a batch should find similar.

A target is a row-stochastic matrix over the other views of the batch; the self slot is exactly 0. It is
computed in float32 whatever the autocast state, carries no gradient, and costs one [B, B] product and two
matrices of 4 (V B)^2 bytes. How to choose tau_s: docs/training.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphbuild.errors import ConfigError, InputError


def similarity_targets(
    embeddings: Tensor | None = None,
    *,
    tau_s: float,
    views: int = 2,
    similarities: Tensor | None = None,
) -> Tensor:
    """The X-Sample target of a batch (Sobal et al., arXiv 2407.18134).

    With G_ij the cosine of the captions of views i and j, 1 between views of the same image, the target is
    s_ij = exp(G_ij / tau_s) / sum over j' != i of exp(G_ij' / tau_s), and s_ii = 0. Views are ordered
    view-major: all B of view 1, then all B of view 2, and so on.

    Args:
        embeddings: [B, d], any float type or int8; only directions count.
        tau_s: temperature of the target, above 0.
        views: V, views of each image.
        similarities: [B, B], given instead of embeddings, such as `SampleGraph.block` returns. The diagonal
            is not read.

    Returns:
        [V B, V B] float32 (float64 for float64 input), rows sum to 1, detached, on the input's device.

    Raises:
        ConfigError: tau_s or views out of range, or not exactly one of embeddings and similarities.
        InputError: a wrong shape or dtype, a zero or non-finite embedding, a non-finite similarity.
    """
    if (embeddings is None) == (similarities is None):
        raise ConfigError("similarity_targets needs embeddings or similarities", "pass exactly one of the two")
    check_temperature("tau_s", tau_s)
    if embeddings is not None:
        unit = unit_embeddings(embeddings)
        check_unit(unit)
        with torch.autocast(unit.device.type, enabled=False):
            block = unit @ unit.T
    else:
        assert similarities is not None
        if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1]:
            raise InputError(f"similarities have shape {list(similarities.shape)}", "pass a square block [B, B]")
        block = similarities.detach().to(_compute_dtype(similarities)).clone()
        block.fill_diagonal_(1)
        if not bool(torch.isfinite(block).all()):
            raise InputError(
                "similarities hold NaN or infinity",
                "fill absent edges before the call: see SampleGraph.block",
            )
    return targets_of_anchors(block, first=0, tau_s=tau_s, views=views)


def targets_of_anchors(similarities: Tensor, *, first: int, tau_s: float, views: int) -> Tensor:
    """The rows of the target that belong to A anchors out of a batch of B images.

    Args:
        similarities: [A, B] cosines, detached; anchor a is image `first` + a.

    Returns:
        [V A, V B], columns view-major over the whole batch, rows view-major over the anchors.

    Raises:
        ConfigError: views below 1, or no other view left to find.
    """
    anchors, images = similarities.shape
    if views < 1 or views * images < 2:
        raise ConfigError(
            f"{views} view(s) of {images} image(s) leave an anchor nothing to find",
            "use two or more views, or a larger batch",
        )
    own = torch.arange(anchors, device=similarities.device)
    block = similarities / tau_s
    block[own, own + first] = 1 / tau_s
    logits = block.repeat(views, views)
    return torch.softmax(logits.masked_fill_(self_slots(anchors, images, first, views, logits.device), -torch.inf), 1)


def self_slots(anchors: int, images: int, first: int, views: int, device: torch.device) -> Tensor:
    """bool [V A, V B], True where row and column are the same view of the same image."""
    image = torch.arange(first, first + anchors, device=device)
    view = torch.arange(views, device=device)[:, None]
    own_column = (view * images + image).flatten()
    return own_column[:, None] == torch.arange(views * images, device=device)


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """[B, d] embeddings as detached float32 (float64 stays) of unit norm; zero rows stay zero, NaN stays.

    Raises:
        InputError: not a matrix, or neither floating point nor int8.
    """
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise InputError(f"embeddings have shape {list(embeddings.shape)}", "pass one embedding per image: [B, d]")
    if not (embeddings.is_floating_point() or embeddings.dtype == torch.int8):
        raise InputError(f"embeddings are {embeddings.dtype}", "pass float32, float16, bfloat16 or int8")
    # The largest entry goes first: squares of tiny or huge float16 and int8 values stay in range.
    exact = embeddings.detach().to(_compute_dtype(embeddings))
    exact = exact / exact.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(exact.dtype).tiny)
    return torch.nn.functional.normalize(exact, dim=1)


def check_unit(unit: Tensor) -> None:
    """Raise InputError, naming the rows, where rows [B, d] are not of unit norm: were zero or not finite."""
    usable = (torch.linalg.vector_norm(unit, dim=1) - 1).abs() < 0.01  # False for NaN
    if not bool(usable.all()):
        rows = torch.nonzero(~usable).flatten().tolist()
        raise InputError(
            f"{len(rows)} of the batch's {len(unit)} embeddings are zero or not finite: rows {rows[:5]}",
            "skip samples without a caption (node < 0), and check the store with `graphbuild verify`",
        )


def check_temperature(name: str, value: float) -> None:
    """Raise ConfigError unless a temperature is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {value}", f"set {name} above 0; 0.1 is the published value")


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
