"""What transformers.Trainer takes: GraphCollator, and GraphTrainerMixin for `class T(GraphTrainerMixin, Trainer)`.

The Trainer trains on graphbuild's batches as they are, which no one splits over ranks a second time; each epoch has its
own order, and `resume_from_checkpoint` goes on with the batches of the uninterrupted run, or is refused. Costs what
`GraphLoader` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, default_data_collator
from transformers.trainer_callback import ExportableState

from graphbuild.errors import ConfigError
from graphbuild.torch.dataset import GraphDataset
from graphbuild.torch.graph_loader import GraphLoader
from graphbuild.torch.loader import GraphWebDataset
from graphbuild.torch.targets import Targets

if find_spec("accelerate") is None:
    raise ConfigError("Trainer needs accelerate, which is not installed", "pip install accelerate")

Tokenizer = Callable[..., Mapping[str, Any]]


class GraphCollator:
    """Collates samples of a GraphDataset, or takes a batch of the stream, and adds what a tokenizer makes of captions.

    Args:
        dataset: the GraphDataset; None for the stream, whose batches come collated.
        tokenizer: called with the list of captions; its tensors, such as input_ids [B, L], join the batch.
        options: of the tokenizer, in place of padding=True, truncation=True, return_tensors="pt".
    """

    def __init__(self, dataset: GraphDataset | None = None, tokenizer: Tokenizer | None = None, **options: Any) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer
        self._options = {"padding": True, "truncation": True, "return_tensors": "pt", **options}

    def __call__(self, samples: Sequence[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
        if isinstance(samples, dict):
            batch = samples
        elif self._dataset is None:
            raise ConfigError("GraphCollator got samples, and no dataset", "pass it the GraphDataset")
        else:
            batch = self._dataset.collate(samples)
        return batch | dict(self._tokenizer(batch["caption"], **self._options)) if self._tokenizer else batch


class GraphTrainerMixin:
    """Write `class T(GraphTrainerMixin, Trainer)` with a `graph_loss`, and train by graphbuild's batches.

    train_dataset is `graph_webdataset(...)`, for which the Trainer asks for max_steps, or a GraphDataset; that has its
    batch_sampler=NeighborBatchSampler(...) beside it. data_collator is by default GraphCollator's, without a tokenizer.
    The dataloader_* options of TrainingArguments hold; the batch size is the dataset's or sampler's own. Every epoch
    has as many batches as the one that has fewest of those that are trained.
    """

    def __init__(self, *args: Any, batch_sampler: Any = None, **options: Any) -> None:
        self._batch_sampler = batch_sampler
        super().__init__(*args, **options)
        self.add_callback(GraphPlace())  # type: ignore[attr-defined]

    def graph_loss(self, model: nn.Module, batch: dict[str, Any], targets: Targets) -> Any:
        """The loss of a batch, or (loss, outputs): to be written."""
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's hook: `graph_loss` with the batch's Targets."""
        found = self.graph_loss(model, inputs, Targets.from_batch(inputs))
        loss, outputs = found if isinstance(found, tuple) else (found, {})
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """The Trainer's hook: batches as they are, of an epoch or the rest of one.

        Raises:
            ConfigError: a dataset of another kind, or ranks with unequally many batches.
        """
        trainer: Any = self
        dataset, arguments = trainer.train_dataset, trainer.args
        workers, fewest = arguments.dataloader_num_workers, None
        collate = None if trainer.data_collator is default_data_collator else trainer.data_collator
        if isinstance(dataset, GraphWebDataset):
            if arguments.world_size > 1 and not dataset.order_options(workers)["equal_ranks"]:
                raise ConfigError("equal_ranks=False on several ranks", "pass graph_webdataset(..., equal_ranks=True)")
            fewest = fewest_batches(dataset, workers, arguments.max_steps * arguments.gradient_accumulation_steps)
        elif not isinstance(dataset, GraphDataset):
            raise ConfigError(f"train_dataset is {type(dataset)}", "pass graph_webdataset(...) or a GraphDataset")
        loader = GraphLoader(
            dataset,
            self._batch_sampler,
            collate_fn=collate,
            batches=fewest,
            num_workers=workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
        )
        return _TrainerLoader(loader)


def fewest_batches(stream: GraphWebDataset, workers: int, total: int) -> int:
    """The batches of the epoch that has fewest, of as many epochs as `total` batches take.

    Raises:
        ConfigError: an epoch has none.
    """
    fewest, epochs = stream.batches_per_epoch(workers, 0), 1
    while epochs * fewest < total:
        if not fewest:
            raise ConfigError(f"epoch {epochs - 1} has no batch", "use fewer workers or a smaller batch_size")
        fewest, epochs = min(fewest, stream.batches_per_epoch(workers, epochs)), epochs + 1
    return fewest


class _TrainerLoader(IterableDataset[dict[str, Any]]):
    """A GraphLoader as the Trainer takes it.

    After a resume accelerate's skip_first_batches wraps `dataset`, and throws away as many batches as the epoch had
    taken: it gets empty ones in their place, so that none is read.
    """

    batch_size, drop_last, prefetch_factor = None, False, None

    def __init__(self, loader: GraphLoader) -> None:
        self.loader = loader
        self.skipped = 0
        self.dataset = self

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({} for _ in range(self.skipped))
        yield from self.loader


class GraphPlace(TrainerCallback, ExportableState):
    """Puts the loader where the Trainer stands, and keeps in its checkpoints what decides the order of batches."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": self.saved}}

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: _TrainerLoader | None = None, **_: Any
    ) -> None:
        assert train_dataloader is not None
        loader, accumulated = train_dataloader.loader, args.gradient_accumulation_steps
        epoch, steps = divmod(state.global_step, math.ceil(len(loader) / accumulated))
        taken = 0 if args.ignore_data_skip else steps * accumulated
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        saved = stored["attributes"]["saved"] or loader.state_dict()
        loader.load_state_dict({**saved, "epoch": epoch, "taken": taken})
        self.saved, train_dataloader.skipped = loader.state_dict(), taken
