"""What a trainer imports: batches with their graph, targets and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphbuild.torch.batch_edges import BatchEdges
from graphbuild.torch.dataset import GraphDataset
from graphbuild.torch.graph_loader import GraphLoader
from graphbuild.torch.graph_losses import GraphSimCLRLoss, GraphVICRegLoss, KernelInfoNCELoss
from graphbuild.torch.image_text_losses import CLIPLoss, CWCLLoss, SigLIPLoss
from graphbuild.torch.loader import graph_webdataset
from graphbuild.torch.losses import DebiasedLoss, DecoupledLoss, NTXentLoss, SupConLoss, XSampleLoss
from graphbuild.torch.targets import Targets, similarity_targets

if TYPE_CHECKING:
    from graphbuild.torch.samplers import NeighborBatchSampler

__all__ = [
    "BatchEdges",
    "CLIPLoss",
    "CWCLLoss",
    "DebiasedLoss",
    "DecoupledLoss",
    "GraphDataset",
    "GraphLoader",
    "GraphSimCLRLoss",
    "GraphVICRegLoss",
    "KernelInfoNCELoss",
    "NTXentLoss",
    "NeighborBatchSampler",
    "SigLIPLoss",
    "SupConLoss",
    "Targets",
    "XSampleLoss",
    "graph_webdataset",
    "similarity_targets",
]


def __getattr__(name: str) -> Any:  # the others need no compiled loops: numba is loaded with the sampler
    if name == "NeighborBatchSampler":
        from graphbuild.torch.samplers import NeighborBatchSampler

        return NeighborBatchSampler
    raise AttributeError(f"module 'graphbuild.torch' has no attribute {name!r}")
