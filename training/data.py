"""A run's training samples, and the batches of an epoch: the same for every method, and for any number of ranks.

Images come from the tars by index, or with `cache` from memory, where they lie decoded; nodes say which captions they
have. With full_crops the workers that read the tars also cut out the views.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from augment import cut, view_draws
from config import Config, Place
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.sources.tars import named_tars
from graphbuild.torch import GraphDataset, NeighborBatchSampler

Batch = dict[str, Any]
DECODED_AT_ONCE = 256
FREE_SHARE = 0.8  # of the free memory that cached images may take


def unchanged(given: Any) -> Any:
    """Collation for a data set that gives batches, and a transform that leaves images whole."""
    return given


def split_shards(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tars to train on, or a pattern of them, and the held-out ones; ConfigError where none is left to train on."""
    tars = stored_tars(config.store)
    kept = max(len(tars) - config.held_out, 0)
    if config.train_shards:
        return (os.path.join(config.store, config.train_shards),), tars[kept:]  # noqa: PTH118 - may be a URL
    if not tars:
        SampleGraph.open(config.store)  # there may be no store at all
        fix = "name them with --train-shards and --held-out 0; captions and vectors alone have no images to train on"
        raise ConfigError(f"no tars of {config.store} are at hand", fix)
    if kept == 0:
        raise ConfigError(
            f"{config.store} has {len(tars)} tar(s) and held_out = {config.held_out}",
            "set --held-out so that one is left to train on, or name others with --train-shards",
        )
    return tars[:kept], tars[kept:]


def stored_tars(store: str) -> tuple[str, ...]:
    """The tars of a store on disk, in order: those in its shards/, or else where its recipe says that they lie."""
    found = sorted(map(str, Path(store, "shards").glob("*.tar")))
    recipe = Path(store, "recipe.yaml")
    if not found and recipe.exists():
        pattern = yaml.safe_load(recipe.read_text())["embed"]["shards"] or ""
        with contextlib.suppress(FileNotFoundError):
            found = [tar for tar in named_tars(pattern) if Path(tar).exists()]
    return tuple(found)


def sidecars_of(store: str, tars: Sequence[str]) -> str | None:
    """The folder of the tars' sidecars: the store's own for tars that lie elsewhere; None: beside the tars."""
    inside = os.path.join(store, "")  # noqa: PTH118 - may be a URL
    return None if all(tar.startswith(inside) for tar in tars) else f"{store}/shards"


def training_samples(config: Config) -> TrainingSamples:
    """The samples of a run; a later run in this process that wants the same, of any method, gets the same object.

    ConfigError: one of its tars is held out.
    """
    tars, held_out = split_shards(config)
    pixels = None if config.full_crops else config.pixels
    samples = _training_samples(
        config.store, tars, pixels, config.samples, config.subset_seed, config.selection, config.cache, config.workers
    )
    if both := sorted(set(samples.tars) & set(held_out)):
        raise ConfigError(f"{both[0]} is held out, and among the train shards", "set --held-out or --train-shards")
    return samples


class CutBatch(list[int]):
    """Sample numbers of a batch whose views are cut where its images are read; draws: [2, DRAWS, B] of the views."""

    draws: NDArray[np.float32]  # a Tensor would go to workers by a file that they share, one a batch
    config: Config


class TrainingSamples(Dataset[Batch]):
    """Samples numbered 0..n-1, a random subset of those of some tars, in their order; `graph`, and `nodes` int64 [n].

    Asked for many it gives a batch: image uint8 [B, 3, P, P], node int64 [B], caption, a list of B. With pixels None
    images stay whole, and are asked for by a CutBatch: image is then both views, uint8 [2, B, 3, P, P]. With `cache`
    every image is decoded here, once. ConfigError: too many samples are wanted, or too many to cache.
    """

    def __init__(
        self,
        store: str,
        tars: Sequence[str],
        pixels: int | None,
        samples: float,
        subset_seed: int,
        selection: str,
        cache: bool,
        workers: int,
    ) -> None:
        self.graph = SampleGraph.open(store)
        whole = unchanged if pixels is None else None
        self._tars = GraphDataset(
            tars,
            sidecars=sidecars_of(store, tars),
            graph=self.graph,
            image_pixels=pixels,
            transform=whole,
            selection=selection or None,
        )
        self.tars = [shard.tar for shard in self._tars.shards]
        self._items = subset(len(self._tars), samples, subset_seed)
        self.nodes = self._tars.nodes[self._items]
        self._cached: tuple[Tensor, list[str]] | None = None
        if cache and pixels:
            needed = len(self) * 3 * pixels**2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            free = psutil.virtual_memory().available
            if needed > FREE_SHARE * free:
                raise ConfigError(
                    f"{len(self):,} decoded images take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                    "pass --no-cache, and --workers that decode them in every epoch; or lower --pixels",
                )
            self._cached = self._decode(workers)

    def __len__(self) -> int:
        return len(self._items)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        node = torch.from_numpy(self.nodes[numbers])
        if self._cached:
            images, captions = self._cached
            chosen = images.index_select(0, torch.as_tensor(numbers)).permute(0, 3, 1, 2)
            return {"image": chosen, "node": node, "caption": [captions[number] for number in numbers]}
        found = self._tars.__getitems__(self._items[numbers].tolist())
        if isinstance(numbers, CutBatch):
            images = found.fields["image"]
            views = [
                [cut(image, one, numbers.config) for image, one in zip(images, draws.T, strict=True)]
                for draws in torch.from_numpy(numbers.draws)
            ]
            cuts = torch.from_numpy(np.array(views)).permute(0, 1, 4, 2, 3)
            return {"image": cuts, "node": node, "caption": found.fields["caption"]}
        batch = self._tars.collate(found)
        return {"image": batch["image"], "node": node, "caption": batch["caption"]}

    def _decode(self, workers: int) -> tuple[Tensor, list[str]]:
        """Images uint8 [n, P, P, 3], and captions."""
        numbers = list(torch.arange(len(self)).split(DECODED_AT_ONCE))
        loader = DataLoader(
            self, batch_sampler=[part.tolist() for part in numbers], collate_fn=unchanged, num_workers=workers
        )
        images, captions = None, []
        for first, batch in enumerate(loader):
            if images is None:
                _, _, height, width = batch["image"].shape
                images = torch.empty(len(self), height, width, 3, dtype=torch.uint8)
            images[numbers[first]] = batch["image"].permute(0, 2, 3, 1)
            captions += batch["caption"]
        assert images is not None
        return images, captions


_training_samples = lru_cache(maxsize=1)(TrainingSamples)


def subset(count: int, samples: float, seed: int) -> NDArray[np.int64]:
    """A random subset of 0..count-1, ascending: a share up to 1, or a number; a smaller one is part of a larger one."""
    wanted = round(samples * count) if samples <= 1 else round(samples)
    if not 0 < wanted <= count:
        raise ConfigError(f"samples = {samples}: {wanted:,} of {count:,}", "use a share in (0, 1], or a smaller number")
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


class EpochBatches(Sampler[list[int]]):
    """This rank's part of the epoch's batches, as lists of sample numbers; every rank plans the same epoch.

    A step's batch is that of one process: rank r of W takes its r-th part, B / W samples. What does not fill a batch is
    left out, other samples in each epoch. `steps` is the number of batches of an epoch.

    ConfigError: fewer samples than a batch, or a batch that does not divide over the ranks.
    """

    def __init__(self, config: Config, graph: SampleGraph, nodes: NDArray[np.int64], place: Place) -> None:
        size = config.batch_size
        if len(nodes) < size:
            raise ConfigError(f"{len(nodes):,} training samples do not fill a batch of {size}", "lower --batch-size")
        if size % place.ranks:
            raise ConfigError(f"batch_size = {size} on {place.ranks} ranks", "use a multiple of the ranks")
        self.steps = len(nodes) // size
        self._config, self._place, self._samples = config, place, len(nodes)
        self._neighbours = None
        if config.batches != "random":
            self._neighbours = NeighborBatchSampler(
                graph,
                size,
                neighbors=config.batches,
                group=config.group,
                random_share=config.random_share,
                nodes=nodes,
                seed=config.seed,
                drop_last=True,
                rank=0,
                ranks=1,
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and the step to begin with, of iterations that start now."""
        self._epoch, self._first = epoch, first
        if self._neighbours is not None:
            self._neighbours.set_epoch(epoch)

    def report(self) -> dict[str, float]:
        """What the sampler says of the edges in this epoch's batches: nothing where they are random."""
        said = self._neighbours.report() if self._neighbours else {}
        return {name: value for name, value in said.items() if "anchor" in name}

    def __len__(self) -> int:
        return self.steps - self._first

    def __iter__(self) -> Iterator[list[int]]:
        if self._neighbours is None:
            order = np.random.default_rng([self._config.seed, self._epoch]).permutation(self._samples)
        else:
            order = self._neighbours.epoch_order()
        batches = order[: self.steps * self._config.batch_size].reshape(self.steps, self._place.ranks, -1)
        for step, batch in enumerate(batches[self._first :, self._place.rank].tolist(), self._first):
            if not self._config.full_crops:
                yield batch
                continue
            numbers = CutBatch(batch)
            numbers.config = self._config
            numbers.draws = view_draws(self._config, self._place, self._epoch, step, len(batch)).numpy()
            yield numbers
