"""NeighborViews: samples whose second view may be the image of a neighbour, as further positives of contrastive losses.

NN(z, Q) of NNCLR (Dwibedi et al., arXiv 2104.14548) with the stored graph in place of a queue: neighbours are those of
the whole data set, and none is searched. Which one is drawn follows from seed, epoch and row alone. Costs a second
image a sample, read and decoded, a look-up of its list, and 24 bytes a node and an item in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from graphbuild.errors import ConfigError
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.torch.captions import uniform
from graphbuild.torch.dataset import GraphDataset, Samples
from graphbuild.torch.epochs import Position


class NeighborViews(Dataset[dict[str, Any]]):
    """A `GraphDataset` with a partner for each sample: with a probability an image of one of its neighbours, else its
    own again.

    Use it as the dataset: `DataLoader(views, batch_sampler=sampler, collate_fn=views.collate)`. Batches also have
    `partner`, images as `image` is, and `partner_row` int64 [B]; with a transform that gives one random view
    `loss(network(batch["image"]), network(batch["partner"]), ...)` takes the place of two views of one image.

    Args:
        dataset: the samples.
        graph: the SampleGraph of its nodes.
        probability: of a neighbour, in [0, 1].
        least: similarity from which a neighbour is a positive; of those that are and have an image in the dataset one
            is drawn, all alike. A sample without any is its own partner.
        seed: of the draws, with the epoch last set.

    Raises:
        ConfigError: a probability or similarity out of range.
    """

    def __init__(
        self, dataset: GraphDataset, graph: SampleGraph, *, probability: float = 0.5, least: float = 0.8, seed: int = 0
    ) -> None:
        if not (0 <= probability <= 1 and -1 <= least <= 1):
            raise ConfigError(
                f"probability = {probability}, least = {least}", "set probability in [0, 1], and least in [-1, 1]"
            )
        self.dataset, self.graph = dataset, graph
        self.probability, self.least, self._seed, self._epoch = probability, least, seed, Position()
        self._items = np.argsort(dataset.nodes, kind="stable")
        self._count = np.bincount(dataset.nodes, minlength=len(graph))
        self._begin = np.cumsum(self._count) - self._count

    def set_epoch(self, epoch: int) -> None:
        """Choose the partners of samples read from now on."""
        self.dataset.set_epoch(epoch)
        self._epoch.set(epoch, 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def partners(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """The item that is the partner of each, int64 [B]."""
        epoch = self._epoch.get()["epoch"]
        drawn, which, image = (
            uniform(items, self._seed, epoch, of=name) for name in ("neighbour", "which", "which image")
        )
        neighbors, similarities = self.graph.neighbors(self.dataset.nodes[items])
        usable = (similarities >= self.least) & (self._count[neighbors] > 0)
        place = (usable.cumsum(axis=1) > (which * usable.sum(axis=1)).astype(np.int64)[:, None]).argmax(axis=1)
        node = neighbors[np.arange(len(items)), place]
        other = self._items[np.minimum(self._begin[node] + (image * self._count[node]).astype(np.int64), len(self) - 1)]
        return np.where(usable.any(axis=1) & (drawn < self.probability), other, items)

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        """Many samples, which is how a DataLoader asks for a batch."""
        own = self.dataset.__getitems__(indices)
        different, place = np.unique(self.partners(np.asarray(indices)), return_inverse=True)
        others = self.dataset.__getitems__(different.tolist()).fields
        partner = {"partner": [others["image"][i] for i in place.tolist()], "partner_row": others["row"][place]}
        return Samples({**own.fields, **partner})

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample."""
        sample: dict[str, Any] = self.__getitems__([index])[0]
        return sample

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of some samples."""
        batch = self.dataset.collate(samples)
        batch["partner"] = self.dataset.collate_images(batch["partner"])
        return batch
