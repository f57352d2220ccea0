"""GraphLoader: batches as a training loop takes them, with the epoch and the number taken, to be saved and loaded.

Workers read ahead of the loop, so only the process that takes the batches knows how many it has. A resumed epoch gives
exactly the batches that the uninterrupted one has, or is refused. It costs what `set_epoch(skip_batches)` does: of the
stream a pass over the tars read so far, of a sampler nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError
from graphbuild.torch.dataset import GraphDataset
from graphbuild.torch.epochs import Position, check_options
from graphbuild.torch.loader import GraphWebDataset

if TYPE_CHECKING:
    from graphbuild.torch.samplers import NeighborBatchSampler


class GraphLoader:
    """A DataLoader over the stream, or over a GraphDataset by a NeighborBatchSampler, that knows where it stands.

        loader = GraphLoader(graph_webdataset(tars, batch_size=1024, partial=False), num_workers=8)
        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                ...  # a checkpoint holds loader.state_dict(); load_state_dict goes on behind the last batch taken

    It is no `DataLoader`, so that trainers do not split its batches over ranks once more: graphbuild has split them.

    Args:
        dataset: `graph_webdataset(...)` or a GraphDataset.
        batch_sampler: of a GraphDataset.
        collate_fn: by default GraphDataset's own; of the stream it is called with each batch.
        batches: most batches of an epoch.
        options: as for DataLoader, such as num_workers, pin_memory, persistent_workers.

    Raises:
        ConfigError: a GraphDataset without a sampler, a stream with one, or in_order=False.
    """

    def __init__(
        self,
        dataset: GraphWebDataset | GraphDataset,
        batch_sampler: NeighborBatchSampler | None = None,
        *,
        collate_fn: Callable[[Any], Any] | None = None,
        batches: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(dataset, GraphDataset) != (batch_sampler is not None) or not options.get("in_order", True):
            raise ConfigError(
                f"GraphLoader over {type(dataset).__name__}, batch_sampler = {batch_sampler}, {options}",
                "a GraphDataset needs a NeighborBatchSampler, the stream takes none, and batches come in order",
            )
        self._dataset, self._batches, self._position = dataset, batches, Position()
        self._ordered: Any = dataset if batch_sampler is None else batch_sampler
        self._loader: DataLoader[Any]
        if isinstance(dataset, GraphWebDataset):
            self._loader = DataLoader(dataset, batch_size=None, collate_fn=collate_fn, **options)
        else:
            collate = collate_fn or dataset.collate
            self._loader = DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=collate, **options)

    @property
    def epoch(self) -> int:
        """The epoch in progress, or of the next iteration."""
        return int(self._position.state()["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; a loaded state of the same epoch goes on where it was taken."""
        self._position.set(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches taken, the same on every rank, beside what decides the order; plain values."""
        return {**self._options(), **self._position.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on behind the batches that were taken, of the state's epoch.

        Raises:
            ConfigError: what decides the order differs: of the stream tars, ranks, workers (0 is 1), or an option; of
                a sampler its graph, nodes, ranks or an option, but not the workers.
        """
        check_options(state, self._options())
        self._position.load({"epoch": state["epoch"], "taken": state["taken"]})

    def __len__(self) -> int:
        """Batches of this rank in the whole epoch."""
        if isinstance(self._ordered, GraphWebDataset):
            count = self._ordered.batches_per_epoch(self._loader.num_workers, self.epoch)
        else:
            count = len(self._ordered)
        return count if self._batches is None else min(count, self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the epoch. Where that begins is read with the first batch, not before."""
        place = self._position.begin()
        self._dataset.set_epoch(place["epoch"])
        self._ordered.set_epoch(place["epoch"], place["taken"])
        left = None if self._batches is None else max(self._batches - place["taken"], 0)
        batches = iter(self._loader)
        running = _running.setdefault(self, set())
        running.add(batches)
        try:
            for batch in islice(batches, left):
                place["taken"] += 1
                yield batch
        finally:
            if not self._loader.persistent_workers:
                running.discard(batches)

    def _options(self) -> dict[str, Any]:
        return {**self._ordered.order_options(self._loader.num_workers), "batches_at_most": self._batches}


# The iterators in use of each loader. A trainer that ends leaves circles of references: garbage collection would take
# the queues of an iterator in them before its workers are told to end, and wait five seconds for each worker.
_running: WeakKeyDictionary[GraphLoader, set[Iterator[Any]]] = WeakKeyDictionary()
