"""Gradients from chunks against those of the whole batch at once, in float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from config import Config
from gradcache import backward
from objective import Objective
from torch import Tensor, nn

from graphbuild.torch import Targets

BATCH = 22


class LayerNormModel(nn.Module):
    """Two views and a text to z, every image on its own; smooth, so that float64 compares to the last digits."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 8)
        )
        self.text = nn.Linear(5, 8)

    def forward(self, view1: Tensor, view2: Tensor, *texts: Tensor) -> tuple[Tensor, ...]:
        return *self.image(torch.cat([view1, view2])).chunk(2), *map(self.text, texts)


def inputs(texts: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    widths = (12, 12, 5) if texts else (12, 12)
    return [torch.randn(BATCH, width, generator=generator, dtype=torch.float64) for width in widths]


def gradients(model: nn.Module, loss: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(loss.named_parameters())}
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.parametrize("chunk", [1, 5, 11, 21])
@pytest.mark.parametrize("method", ["simclr", "xsample", "clip_soft"])
def test_chunks_give_the_gradient_of_the_whole_batch(method: Any, chunk: int) -> None:
    torch.manual_seed(0)
    whole = LayerNormModel().double()
    chunked = copy.deepcopy(whole)
    config = Config(store="", method=method)
    given = inputs(config.reads_texts)
    embeddings = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    objectives = [Objective(config).double() for _ in range(2)]
    losses = [partial(objective, targets=Targets(embeddings=embeddings)) for objective in objectives]
    expected = losses[0](*whole(*given))
    expected.backward()
    found = backward(chunked, given, losses[1], chunk=chunk, seed=3)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    wanted = gradients(whole, objectives[0])
    assert len(wanted) == len(list(whole.parameters())) - (0 if config.reads_texts else 2) + config.reads_texts
    for name, gradient in gradients(chunked, objectives[1]).items():
        assert (gradient - wanted.pop(name)).abs().max() < 1e-10
    assert not wanted


def test_both_passes_over_a_chunk_drop_the_same_units() -> None:
    """The gradient is that of the loss reported, by finite differences along it."""
    torch.manual_seed(0)
    model = LayerNormModel(dropout=0.5).double()
    objective = partial(Objective(Config(store="", method="simclr")), targets=Targets())
    step = 1e-5

    def loss_at(shift: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, gradient in zip(moved.image.parameters(), direction, strict=True):
                parameter.add_(gradient, alpha=shift)
        return backward(moved, inputs(texts=False), objective, chunk=6, seed=3).item()

    backward(model, inputs(texts=False), objective, chunk=6, seed=3)
    direction = [parameter.grad for parameter in model.image.parameters()]
    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert slope == pytest.approx(sum(g.square().sum().item() for g in direction), rel=1e-6)


def test_running_statistics_move_once_a_chunk() -> None:
    norm = nn.BatchNorm1d(12, momentum=0.1).double()
    expected = copy.deepcopy(norm)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.norm(x),)

    x = inputs(texts=False)[0]
    backward(Normed(), [x], lambda z: z.square().mean(), chunk=8, seed=0)
    for cut in x.split(8):
        expected(cut)
    assert torch.allclose(norm.running_mean, expected.running_mean, atol=1e-12)
    assert torch.allclose(norm.running_var, expected.running_var, atol=1e-12)
