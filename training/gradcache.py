"""GradCache: the gradient of a loss over a whole batch with the activations of only a part of it in memory.

Gao et al., arXiv 2101.06983. One forward more than plain training, and outputs and their gradients of the whole batch.
The gradient is exact, for a model that treats images on their own. BatchNorm does not: every chunk is normalised
by itself, as a smaller batch would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def backward(
    model: nn.Module,
    inputs: Sequence[Tensor],
    loss: Callable[..., Tensor],
    *,
    chunk: int,
    seed: int,
    autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext(),
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Add the gradient of loss(*model(*inputs)) to the parameters of model and loss; the loss, detached.

    Args:
        model: perhaps a DistributedDataParallel, which then reduces gradients once.
        inputs: tensors [B, ...] that are cut alike along B; model makes of a cut a tuple of [b, ...].
        loss: of the whole batch's outputs, a scalar.
        chunk: images of a cut, at most; 0: the plain way, all at once.
        seed: of the random numbers that layers such as dropout draw, the same for both passes over a chunk.
        autocast: what the model runs under, entered for each cut.
        scale: of the loss, before its gradient is taken, as a GradScaler does it.
    """
    if not chunk or chunk >= len(inputs[0]):
        torch.manual_seed(seed)
        with autocast:
            outputs = model(*inputs)
        value = loss(*outputs)
        scale(value).backward()
        return value.detach()
    chunks = list(zip(*(tensor.split(chunk) for tensor in inputs), strict=True))
    parts = []
    with torch.no_grad(), _statistics_kept(model):
        for number, cut in enumerate(chunks):
            torch.manual_seed(seed + number)
            with autocast:
                parts.append(model(*cut))
    outputs = [torch.cat(tensors).requires_grad_() for tensors in zip(*parts, strict=True)]
    value = loss(*outputs)
    scale(value).backward()
    gradients = zip(*(output.grad.split(chunk) for output in outputs), strict=True)  # type: ignore[union-attr]
    for number, (cut, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        torch.manual_seed(seed + number)
        with _reduction(model, last=number == len(chunks) - 1):
            with autocast:
                recomputed = model(*cut)
            torch.autograd.backward(recomputed, gradient)
    return value.detach()


def _reduction(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients of several backward passes add up on the ranks, and are averaged over them in the last one."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics of norms stay as they are: the second pass moves them, once a chunk."""
    norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
