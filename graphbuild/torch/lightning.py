"""GraphDataModule: the training batches of a lightning.Trainer, right under DDP and after a resume in mid-epoch.

Every epoch has its own order, every rank equally many batches, and a checkpoint of Lightning holds how many of them
were taken: the resumed run has the batches of the uninterrupted one. Costs what `GraphLoader` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphbuild.errors import ConfigError
from graphbuild.torch.dataset import GraphDataset
from graphbuild.torch.graph_loader import GraphLoader
from graphbuild.torch.loader import GraphWebDataset

try:
    from lightning import LightningDataModule
except ImportError as error:
    raise ConfigError(f"lightning cannot be imported ({error})", "pip install lightning") from error

if TYPE_CHECKING:
    from graphbuild.graph.sample_graph import SampleGraph


class _EpochsByTrainer(GraphLoader):
    """Lightning calls `set_epoch` of a loader's sampler before each epoch."""

    @property
    def sampler(self) -> GraphLoader:
        return self


class GraphDataModule(LightningDataModule):
    """The data of `trainer.fit(module, GraphDataModule(tars, batch_size=256, transform=...))`, on any number of ranks.

    Random batches of the stream; with `graph` batches of neighbours, by GraphDataset and NeighborBatchSampler. For
    validation override `val_dataloader` in a subclass.

    Args:
        urls: as for `graph_webdataset`.
        batch_size: samples of a batch on each rank.
        graph: the SampleGraph of batches of neighbours.
        sampler: options of NeighborBatchSampler, such as {"group": 16}.
        loader: options of DataLoader, such as {"num_workers": 8, "pin_memory": True}.
        collate_fn: as for GraphLoader.
        options: of `graph_webdataset` (by default partial=False and equal_ranks=True), or of GraphDataset.

    Raises:
        ConfigError: sampler without graph. On fit: as `GraphLoader`, also where a checkpoint is of another order.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int,
        graph: SampleGraph | None = None,
        sampler: Mapping[str, Any] | None = None,
        loader: Mapping[str, Any] | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if sampler and graph is None:
            raise ConfigError(f"sampler = {sampler} without graph", "pass graph=SampleGraph.open(...) too")
        self._urls, self._batch_size, self._graph, self._options = urls, batch_size, graph, options
        self._sampler, self._loading, self._collate = sampler or {}, loader or {}, collate_fn
        self._loader: GraphLoader | None = None

    def setup(self, stage: str) -> None:
        """Open the tars, once the ranks are known."""
        if stage != "fit":
            return
        loading = {"persistent_workers": self._loading.get("num_workers", 0) > 0, **self._loading}
        if self._graph is None:
            given = {"partial": False, "equal_ranks": True, **self._options}
            stream = GraphWebDataset(self._urls, batch_size=self._batch_size, **given)
            self._loader = _EpochsByTrainer(stream, collate_fn=self._collate, **loading)
            return
        from graphbuild.torch.samplers import NeighborBatchSampler

        dataset = GraphDataset(self._urls, graph=self._graph, **self._options)
        batches = NeighborBatchSampler(self._graph, self._batch_size, nodes=dataset.nodes, **self._sampler)
        self._loader = _EpochsByTrainer(dataset, batches, collate_fn=self._collate, **loading)

    def train_dataloader(self) -> GraphLoader:
        assert self._loader is not None, "setup('fit') comes first"
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._loader is not None:
            self._loader.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """End the workers."""
        if stage == "fit":
            self._loader = None
