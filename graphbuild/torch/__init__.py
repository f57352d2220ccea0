"""What a trainer imports: batches with their graph, targets and losses."""

from graphbuild.torch.loader import graph_webdataset
from graphbuild.torch.losses import XSampleLoss
from graphbuild.torch.targets import similarity_targets

__all__ = ["XSampleLoss", "graph_webdataset", "similarity_targets"]
