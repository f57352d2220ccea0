"""Optimizers and the learning rate's schedule. Biases, norms and scales have no weight decay.

LARS keeps one number a weight, AdamW two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from config import Config
from torch import nn
from torch.optim import Optimizer


def new_optimizer(config: Config, *modules: nn.Module) -> Optimizer:
    """The optimizer of all parameters of some modules."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    return LARS(groups) if config.optimizer == "lars" else torch.optim.AdamW(groups, lr=0.0)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888, algorithm 1), as SimCLR takes it.

    With gradient g, weight w, decay b: u = g + b w; r = trust |w| / |u|, or 1 where either norm is 0;
    v = momentum v + lr r u; w = w - v. |u| stands where the paper has |g| + b |w|, as in SimCLR's code and most others.
    Groups with adapt=False have r = 1: biases and norms.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 0.0, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad.add(weight, alpha=group["weight_decay"])
                if group["adapt"]:
                    lengths = weight.norm(), update.norm()
                    ratio = group["trust"] * lengths[0] / lengths[1]
                    update = update * torch.where((lengths[0] > 0) & (lengths[1] > 0), ratio, 1.0)
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                weight.sub_(state["momentum"])


def schedule(done: float, warm_up: float) -> float:
    """Share of the learning rate after the share `done` of the training: linear warm-up, then half a cosine."""
    if done < warm_up:
        return max(done / warm_up, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
