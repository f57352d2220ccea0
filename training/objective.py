"""What a method learns from: its loss, and what the loss is told of a batch by the graph.

SimCLR, SupCon and X-Sample compare the two views of an image; CLIP compares each of the two with the text, and has the
mean of both losses: so every method sees the same images, and so does SigLIP. What these two learn beside the model,
the temperature and SigLIP's bias, is learned, as published. With a
view_weight SimCLR's loss of another head is added, as SLIP does it for CLIP (Mu et al., arXiv 2112.12750).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from config import Config
from data import Batch
from models import word_numbers
from numpy.typing import NDArray
from torch import Tensor, nn

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.torch import BatchEdges, CLIPLoss, NTXentLoss, SigLIPLoss, SupConLoss, Targets, XSampleLoss
from graphbuild.torch.joint import PairLoss

PERMUTATION_SEED = 0


class Objective(nn.Module):
    """The loss of a method, a scalar, from what Model returns."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.loss: PairLoss
        soft: dict[str, Any] = {"tau_s": config.tau_s}
        if config.targets == "uniform" and config.is_soft:
            soft = {"tau_s": uniform_tau_s(config)}
        elif config.other_view:
            soft = {"tau_s": "calibrated", "other_view": config.other_view}
        match config.method:
            case "simclr":
                self.loss = NTXentLoss(config.tau)
            case "supcon":
                self.loss = SupConLoss(config.tau)
            case "xsample":
                self.loss = XSampleLoss(config.tau, **soft, learnable=config.learn_tau)
            case "clip":
                self.loss = CLIPLoss(config.tau, learnable=True)
            case "clip_soft":
                self.loss = CLIPLoss(config.tau, **soft, learnable=True)
            case "siglip":
                self.loss = SigLIPLoss(1 / config.tau, learnable=True)
            case "siglip_mask" | "siglip_positive" | "siglip_soft":
                kind = {"siglip_mask": "mask", "siglip_positive": "positive", "siglip_soft": "threshold"}[config.method]
                self.loss = SigLIPLoss(1 / config.tau, learnable=True, **{kind: config.similar})
        self.reads_texts, self.view_weight = config.reads_texts, config.view_weight
        self.of_views = NTXentLoss(config.tau)

    def forward(self, view1: Tensor, view2: Tensor, *others: Tensor, targets: Targets) -> Tensor:
        if self.reads_texts:
            text, *others = others
            loss = (self.loss(view1, text, targets) + self.loss(view2, text, targets)) / 2
        else:
            loss = self.loss(view1, view2, targets)
        return loss + self.view_weight * self.of_views(*others) if self.view_weight else loss

    def learned(self) -> dict[str, float]:
        """The temperature, where it is learned, and SigLIP's bias."""
        if isinstance(self.loss, SigLIPLoss) and self.loss.log_scale_and_bias is not None:
            log_scale, bias = self.loss.log_scale_and_bias.unbind()
            return {"tau": math.exp(-log_scale.item()), "bias": bias.item()}
        scale = getattr(self.loss, "log_scale", None)
        return {} if scale is None else {"tau": math.exp(-scale.item())}

    def target_facts(self, like: Tensor) -> dict[str, Tensor]:
        """Of this rank's last targets, means over its views: the share of the other view, or of the own caption, and
        the perplexity. Both are 1 where targets are one-hot."""
        one = torch.ones_like(like)
        return {"other_view": one, "perplexity": one, **self.loss.target_facts}


def uniform_tau_s(config: Config) -> float:
    """The temperature at which other_view of the target is the other view's, where all others have similarity 0.

    ConfigError: equal parts leave it more.
    """
    others = (1 if config.reads_texts else 2) * (config.batch_size - 1)
    odds = others * config.other_view / (1 - config.other_view)
    if odds <= 1:
        raise ConfigError(
            f"other_view = {config.other_view} with targets 'uniform' in batches of {config.batch_size}",
            f"ask for more than {1 / (1 + others):.3g}, which equal parts leave",
        )
    return 1 / math.log(odds)


class GraphReader:
    """What a method reads of the graph for the images of a batch: nothing for SimCLR."""

    def __init__(self, config: Config, graph: SampleGraph) -> None:
        self._config, self._graph = config, graph

    @cached_property
    def _permutation(self) -> NDArray[np.int64]:
        return np.random.default_rng(PERMUTATION_SEED).permutation(len(self._graph))

    def graph_nodes(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The nodes of the graph that are read for some nodes: the same, or in the control another one for each."""
        return self._permutation[nodes] if self._config.permute_graph else nodes

    def targets(self, batch: Batch) -> Targets:
        """What the loss is told of the batch's B images."""
        config, graph = self._config, self._graph
        if config.method in ("simclr", "clip", "siglip"):
            return Targets()
        if config.method == "supcon" or config.targets == "labels":
            return Targets(labels=batch["node"])
        if not config.reads_similarities:  # uniform
            return Targets(similarities=torch.zeros(len(batch["node"]), config.batch_size))
        nodes = self.graph_nodes(batch["node"].numpy())
        dense = torch.from_numpy(graph.embeddings(nodes)) if config.targets == "dense" else None
        if dense is not None and not config.other_view:
            return Targets(embeddings=dense)
        stored = map(torch.from_numpy, (nodes, *graph.neighbors(nodes), graph.background(nodes)))
        sketch = torch.from_numpy(graph.sketches(nodes)) if config.targets == "sketch" else None
        edges = BatchEdges(*stored, sketch, config.tau_s, len(graph))
        return Targets(edges=edges) if dense is None else Targets(embeddings=dense, calibration=edges)

    def texts(self, batch: Batch) -> tuple[Tensor, ...]:
        """The input [B, ...] of the text side, of each image's own caption, also in the control; none without one."""
        if not self._config.reads_texts:
            return ()
        if self._config.text == "tower":
            return (word_numbers(batch["caption"]),)
        return (torch.from_numpy(self._graph.embeddings(batch["node"].numpy())),)
