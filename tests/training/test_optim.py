"""LARS against its formula in NumPy, and the learning rate's schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from config import Config
from optim import LARS, new_optimizer, schedule
from torch import nn


def test_lars_is_its_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    decay, momentum, trust = 0.01, 0.9, 0.001
    parameters = [nn.Parameter(torch.from_numpy(value.copy())) for value in (weight, bias)]
    optimizer = LARS([{"params": parameters[:1], "weight_decay": decay}, {"params": parameters[1:], "adapt": False}])
    v = [np.zeros_like(weight), np.zeros_like(bias)]
    for rate in (0.3, 0.2, 0.5, 0.0, 0.1):  # the momentum keeps each step's own
        gradients = [rng.normal(size=weight.shape), rng.normal(size=bias.shape)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        update = gradients[0] + decay * weight
        v[0] = momentum * v[0] + rate * trust * np.linalg.norm(weight) / np.linalg.norm(update) * update
        v[1] = momentum * v[1] + rate * gradients[1]
        weight, bias = weight - v[0], bias - v[1]
        for parameter, value in zip(parameters, (weight, bias), strict=True):
            assert np.abs(parameter.detach().numpy() - value).max() < 1e-12


def test_lars_leaves_weights_and_gradients_of_zero_usable() -> None:
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still], lr=0.5).step()
    assert torch.equal(zero, torch.full((2, 2), -0.5))
    assert torch.equal(still, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_only_matrices_and_kernels_decay(name: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = new_optimizer(Config(store="", optimizer=name, weight_decay=0.3), module)  # type: ignore[arg-type]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {n: decay[id(p)] for n, p in module.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0,
        "1.weight": 0,
        "1.bias": 0,
    }


def test_the_rate_rises_linearly_and_falls_by_half_a_cosine() -> None:
    assert schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == pytest.approx(1)
    assert schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(0.325, 0.1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule(1, 0.1) == pytest.approx(0)
