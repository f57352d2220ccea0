"""What a trainer imports: batches with their graph, targets and losses. Targets and losses need torch alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphbuild.torch.batch_edges import BatchEdges
from graphbuild.torch.graph_losses import GraphSimCLRLoss, GraphVICRegLoss, KernelInfoNCELoss
from graphbuild.torch.image_text_losses import CLIPLoss, CWCLLoss, SigLIPLoss
from graphbuild.torch.losses import DebiasedLoss, DecoupledLoss, NTXentLoss, SupConLoss, XSampleLoss
from graphbuild.torch.targets import Targets, similarity_targets

if TYPE_CHECKING:
    from graphbuild.torch.dataset import GraphDataset
    from graphbuild.torch.graph_loader import GraphLoader
    from graphbuild.torch.loader import graph_webdataset
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


_LATER = {
    "GraphDataset": "dataset",
    "GraphLoader": "graph_loader",
    "NeighborBatchSampler": "samplers",
    "graph_webdataset": "loader",
}


def __getattr__(name: str) -> Any:  # pyarrow is loaded with what reads shards, numba with the sampler
    if name in _LATER:
        return getattr(import_module(f"graphbuild.torch.{_LATER[name]}"), name)
    raise AttributeError(f"module 'graphbuild.torch' has no attribute {name!r}")
