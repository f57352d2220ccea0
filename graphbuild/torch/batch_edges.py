"""BatchEdges: a batch's similarities from what the graph stores, without its embeddings, for trainers that gather.

The edges among the images of the joint batch, listed by either end, have their stored similarities; what is absent
there is *not* similarity 0: it is the product of two sketches, or the node's background value. How near the targets
come: docs/explanation/targets.md. Costs with sketches one [B, N] product, and at most 3.3 matrices of that size at
once, on the tensors' device; with other ranks an all-gather of the lists, 12 k bytes an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphbuild.errors import InputError
from graphbuild.torch.gather import Ranks


@dataclass(frozen=True, eq=False)
class BatchEdges:
    """What `graph_webdataset` and `GraphDataset` yield of a batch's B images, tensors on one device.

    Args:
        node: int64 [B].
        neighbors, similarities: [B, k], int64 ids and float.
        background: float [B, 2], mean and deviation of a node's similarity to nodes outside its list.
        sketch: float [B, b], taken instead of background; products of two approximate similarities.
        tau_s: the target's temperature. An absent edge without sketches counts as mean + deviation^2 / (2 tau_s), the
            value whose exponential is the mean exponential of normally distributed similarities.
        node_count: M, the nodes of the graph; or int64 [B], all the same. Needed where the temperature is calibrated.
        absent: float [B], what an absent edge then counts as.

    Raises:
        InputError: what is no Tensor, or a wrong shape.
    """

    node: Tensor
    neighbors: Tensor
    similarities: Tensor
    background: Tensor
    sketch: Tensor | None = None
    tau_s: float = 0.1
    node_count: Tensor | int | None = None
    absent: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("node", "neighbors", "similarities", "background", "sketch"):
            value: Any = getattr(self, name)
            if not isinstance(value, Tensor | None):
                raise InputError(f"{name} is a {type(value).__name__}, not a Tensor", "pass torch.from_numpy(array)")
        count, k = len(self.node), self.neighbors.shape[-1]
        for name, shape in (("node", [count]), ("neighbors", [count, k]), ("similarities", [count, k])):
            if list(getattr(self, name).shape) != shape:
                raise InputError(
                    f"{name} have shape {list(getattr(self, name).shape)}, not {shape}", "pass a loader's batch"
                )
        if list(self.background.shape) != [count, 2] or (self.sketch is not None and len(self.sketch) != count):
            raise InputError(f"background or sketch are not of {count} images", "pass a loader's batch")

    def tensors(self) -> dict[str, Tensor]:
        """The given tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> BatchEdges:
        """The same on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    @torch.no_grad()
    def block(self, ranks: Ranks) -> Tensor:
        """Similarities float32 [B, N] of this rank's images to those of all ranks, 1 between equal nodes.

        Raises:
            InputError: a node below 0, on every rank and naming rows of the joint batch.
        """
        nodes = ranks.concatenate(self.node)
        if bool((nodes < 0).any()):
            rows = torch.nonzero(nodes < 0).flatten().tolist()
            raise InputError(
                f"{len(rows)} of the batch's {len(nodes)} images have no node: rows {rows[:5]}",
                "skip samples without a caption (node < 0)",
            )
        stored = _stored(self.node, self.neighbors, self.similarities, nodes)
        back = stored
        if ranks.count > 1:
            neighbors, similarities = map(ranks.concatenate, (self.neighbors, self.similarities))
            back = _stored(nodes, neighbors, similarities, self.node)
        stored = torch.where(stored.isnan(), back.T, stored)
        del back
        if self.sketch is not None:
            sketch = self.sketch.float()
            values = (sketch @ ranks.concatenate(sketch).T).clamp_(-1, 1)
        elif self.absent is not None:
            values = self.absent.float()[:, None]
        else:
            mean, deviation = self.background.float().unbind(dim=1)
            values = (mean + deviation**2 / (2 * self.tau_s)).clamp(max=1)[:, None]
        return torch.where(stored.isnan(), values, stored, out=stored)


def _stored(node: Tensor, neighbors: Tensor, similarities: Tensor, nodes: Tensor) -> Tensor:
    """What the lists [B, k] of node [B] say of nodes [N]: [B, N], 1 of the same node, NaN where they say nothing."""
    ordered = nodes.sort().values  # a node's slot is its first place in there
    last = len(nodes)  # the slot of what is not among them
    slot = torch.searchsorted(ordered, neighbors.to(nodes.dtype))
    slot = torch.where(ordered[slot.clamp(max=last - 1)] == neighbors, slot, last)
    edges = torch.full((len(node), last + 1), torch.nan, device=nodes.device)
    edges.scatter_(1, slot, similarities.float())
    own = torch.searchsorted(ordered, node)
    same = ordered[own.clamp(max=last - 1)] == node
    edges.scatter_(1, torch.where(same, own, last)[:, None], 1)
    return edges.index_select(1, torch.searchsorted(ordered, nodes))
