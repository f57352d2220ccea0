"""A WebDataset pipeline that joins the samples of tars with the rows of their sidecars while it reads.

Every sample of every tar is delivered exactly once an epoch, whatever the ranks and workers, beside the
sidecar row that was written for it: key by key, position by position, or a ShardError that names both. Costs
one sequential pass over the tars, and in each worker the memory of `shuffle` still encoded samples and of the sidecars
that these come from.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.utils import pytorch_worker_info

from graphbuild.errors import ConfigError
from graphbuild.export.sidecar import SidecarHeader
from graphbuild.torch.captions import CaptionChoice, check_choice, drawn, gathered
from graphbuild.torch.epochs import Epochs, Position, check_options
from graphbuild.torch.fields import GRAPH_FIELDS, as_in_batch
from graphbuild.torch.images import BadImages, ImageDecoder
from graphbuild.torch.ranks import live_rank
from graphbuild.torch.shards import (
    JoinedSample,
    Selected,
    Shard,
    find_shards,
    joined_samples,
    member_value,
    selected_shards,
)

logger = logging.getLogger(__name__)

OWN = "taken_from_worker"  # in a worker's state: its own batches, behind those that the rank had taken when it began
BATCH_FIELDS = ("image", "caption", "key", "row", "node", "weight", "offsets", *GRAPH_FIELDS)


class GraphWebDataset(IterableDataset[dict[str, Any]]):
    """Batches of images with captions, embeddings and neighbours, from tars and the sidecars beside them.

    Use it as it is or behind `torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=n)`. Shards
    are split over ranks (RANK and WORLD_SIZE, or torch.distributed) and workers. Samples without a usable
    caption are left out.

    Args:
        urls: a folder of tars, a brace pattern, a glob, or a list of these; local paths or fsspec URLs. DIR/NAME.tar
            has its sidecar at DIR/NAME.graph.parquet.
        batch_size: samples of a batch, B. Batches do not span workers.
        sidecars: another folder or URL that holds the NAME.graph.parquet.
        shuffle: samples of the shuffle buffer; 0 reads shards and samples in order. Shards and samples are
            shuffled anew by `set_epoch`; of tars in the clustered layout whole chunks are shuffled, so that neighbours
            come in one batch.
        seed: of the shuffle; the same on all ranks.
        image_pixels: P: resize and centre-crop to P x P.
        transform: called with each image (PIL, RGB) in place of that; its results are collated as torch's
            `default_collate` does.
        bad_images: "replace" puts another sample of the batch, whole, in the place of one whose image cannot be
            decoded (it then stands there twice), and logs a warning with tar, sample and key. Batches keep their
            sizes, and no other changes. "raise" ends with a ShardError, as a batch without any good image does.
        extra: further members of each sample by extension, such as "json" (parsed); "txt" gives str, others
            bytes.
        partial: also deliver a worker's last, smaller batch. Pass False for training.
        equal_ranks: end every rank's epoch after as many batches as the rank that has fewest gives, as DDP needs;
            what the others leave is another part each epoch. Costs one small read a sidecar, here (a pass over a
            compressed tar).
        split_by_rank: False gives every rank all shards, as an evaluation on one rank needs.
        captions: of samples that have several. "first": the first one. "draw": one for each sample and epoch, at random
            by weight, the same whatever the ranks and workers; all fields are those of its text. "all": all, side by
            side: caption is a list of T, the fields of nodes have T rows, weight float32 [T], and offsets int64 [B + 1]
            say where each sample's begin. "mean": of their embeddings, by weight, with all their neighbours
            (`graphbuild.torch.captions.mean`); caption and node are the first one's.
        selection: a file of `graphbuild select`, or a `Selection`: only its samples, and of them only its captions.

    Yields:
        Dicts: image uint8 [B, 3, P, P], a list of [3, H, W] without image_pixels, or the
        collated results of transform; caption and key: lists of B; row and node int64 [B]; embedding float32
        [B, d], unit norm, from int8 unless exported otherwise, so cosines are right to about 0.003 (absent from a store
        exported without); neighbors int64 [B, k], node ids; similarities float32 [B, k], descending (with
        captions="mean" the lists of a sample's captions are merged: both are as wide as the longest of the batch, and
        shorter ones end in -1 and 0); background float32 [B, 2], mean and deviation; node_count
        int64 [B], nodes of the whole graph (absent with sidecars of older versions, and with captions="mean"); and a
        list of B for each name in extra. A node is no class number: nodes are numbered as they are first seen.

    Raises:
        ConfigError: an option out of range, or a pattern that names no tar.
        ShardError: here or while iterating, also out of workers: a tar or sidecar is missing, damaged, of
            another format version or graph, or the two differ in size, number, order or keys of their
            samples.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int,
        sidecars: str | os.PathLike[str] | None = None,
        shuffle: int = 1000,
        seed: int = 0,
        image_pixels: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        bad_images: BadImages = "raise",
        extra: Sequence[str] = (),
        partial: bool = True,
        equal_ranks: bool = False,
        split_by_rank: bool = True,
        captions: CaptionChoice = "first",
        selection: Selected = None,
    ) -> None:
        if batch_size < 1 or shuffle < 0:
            raise ConfigError(f"batch_size = {batch_size}, shuffle = {shuffle}", "batch_size starts at 1, shuffle at 0")
        if isinstance(extra, str) or not set(extra).isdisjoint(BATCH_FIELDS):
            raise ConfigError(
                f"extra = {extra!r}", f'pass a list of extensions, such as ("json",), apart from {BATCH_FIELDS}'
            )
        self.shards = selected_shards(find_shards(urls, sidecars), selection)
        self._decoder = ImageDecoder(image_pixels, transform, bad_images)
        self._shuffle = shuffle
        self._extra = tuple(extra)
        self._split_by_rank = split_by_rank
        self._epochs = Epochs(
            self.shards,
            batch_size=batch_size,
            shuffled=shuffle > 0,
            seed=seed,
            partial=partial,
            equal_ranks=equal_ranks,
        )
        check_choice(captions, self.header if captions == "mean" else None)
        self._captions = captions
        self._position = Position()
        self._known_rank: tuple[int, int] | None = None

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Choose the order of shards and samples for iterations that start now; alike on all ranks.

        skip_batches goes on in the middle of an epoch: the number of its batches that this rank's training loop has
        taken from its DataLoader. What follows is what an epoch without interruption gives, sample by sample, if the
        tars, all options, the ranks and the workers are the same, and the DataLoader delivers in order (its default).
        The stream is replayed without decoding an image: that costs a pass over the tars read so far, and one small
        read a sidecar. It holds for every iteration until the next set_epoch: call that before each epoch.

        Raises:
            ConfigError: a negative number. Too many batches are a ShardError while iterating.
        """
        if epoch < 0 or skip_batches < 0:
            raise ConfigError(f"epoch = {epoch}, skip_batches = {skip_batches}", "both start at 0")
        self._position.set(epoch, skip_batches)

    def batches_per_epoch(self, workers: int, epoch: int | None = None) -> int:
        """This rank's batches in an epoch, by default the one last set; with equal_ranks every rank's.

        workers: the DataLoader's num_workers. One small read a sidecar, once a process.

        Raises:
            ConfigError: workers below 0, or with equal_ranks a rank without a batch.
            ShardError: as `graph_webdataset`.
        """
        if workers < 0:
            raise ConfigError(f"workers = {workers}", "pass the DataLoader's num_workers, 0 or more")
        number = self._position.state()["epoch"] if epoch is None else epoch
        return sum(self._epochs.batches(number, *self._rank_and_ranks(), max(workers, 1)))

    def count_samples(self) -> int:
        """Samples that an epoch delivers, of all ranks together: those with a node and an image, before batches.

        One small read a sidecar, once a process.
        """
        return self._epochs.count_samples()

    @property
    def header(self) -> SidecarHeader:
        """The first shard's header; all shards must share its encoder, d, k, embeddings and graph."""
        return self._epochs.header

    def order_options(self, workers: int) -> dict[str, Any]:
        """All that decides an epoch's order, by name, with so many workers; plain values."""
        epochs = self._epochs
        return {
            "workers": max(workers, 1),
            "ranks": self._rank_and_ranks()[1],
            "batch_size": epochs.batch_size,
            "seed": epochs.seed,
            "shuffle": self._shuffle,
            "partial": epochs.partial,
            "equal_ranks": epochs.equal_ranks,
            "tars": epochs.tars,
            "selection": chosen.fingerprint if (chosen := self.shards[0].selection) else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: epoch and batches taken, beside all options that decide the order.

        torchdata's StatefulDataLoader asks each worker for it. Elsewhere it is for an iteration without workers:
        `GraphLoader` counts what a training loop has taken from workers, which read ahead.

        Raises:
            ConfigError: workers read this epoch, so that this process does not know.
        """
        if get_worker_info() is None and self._position.workers_read:
            raise ConfigError(
                "workers read ahead of the training loop, and the dataset does not know what the loop has taken",
                "take the state of a GraphLoader or of torchdata's StatefulDataLoader",
            )
        return {**self.order_options(pytorch_worker_info()[3]), **self._position.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where the state was taken; `set_epoch` with the same epoch leaves it so.

        Raises:
            ConfigError: when the iteration begins: workers, ranks or an option differ, so that the order would too.
        """
        self._position.load(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _, _, worker, workers = pytorch_worker_info()
        in_worker = get_worker_info() is not None
        place = self._position.begin(in_worker=in_worker)
        if "workers" in place:  # a loaded state
            check_options(place, self.order_options(workers))
        return self._batches(place, OWN if in_worker else "taken", worker, workers)

    def _batches(self, place: dict[str, Any], counted: str, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """What a worker reads; it counts its batches in the place, apart from those that the rank had taken before."""
        (rank, ranks), epoch, skip, own = self._rank_and_ranks(), place["epoch"], place["taken"], place.get(OWN, 0)
        part = self._epochs.part(epoch, skip, rank, ranks, worker, workers)
        given = 0
        for batch in wds.DataPipeline(
            lambda: iter(part.shards),
            self._join,
            *self._shuffled(random.Random(f"samples {self._epochs.seed} {epoch} {rank} {part.stream}")),
            wds.batched(self._epochs.batch_size, collation_fn=None, partial=self._epochs.partial),
            lambda batches: map(partial(self._collate, epoch), islice(batches, part.first + own, part.last)),
        ):
            given += 1
            place[counted] = place.get(counted, 0) + 1
            yield batch
        if not given and not skip and not own and not self._epochs.partial:
            logger.warning(
                f"rank {rank}, worker {worker} of {workers}: no batch. A batch does not span workers, and this one's"
                f" {len(part.shards)} of {len(self.shards)} tars do not fill one of {self._epochs.batch_size} samples:"
                " use fewer workers or a smaller batch_size"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is started afresh (spawn) knows no process group: it takes its rank along, where it has one."""
        return {**self.__dict__, "_known_rank": live_rank() or self._known_rank}

    def _rank_and_ranks(self) -> tuple[int, int]:
        """By which the stream is split. What this process knows goes before what came along."""
        if not self._split_by_rank:
            return 0, 1
        return live_rank() or self._known_rank or (0, 1)

    def _join(self, shards: Iterator[Shard]) -> Iterator[JoinedSample]:
        for shard in shards:
            yield from joined_samples(shard, expected=self.header, extra=self._extra)

    def _shuffled(self, rng: random.Random) -> list[Callable[[Iterator[Any]], Iterator[Any]]]:
        """The steps that shuffle samples, or chunks of them."""
        chunk = self.header.chunk
        if not self._shuffle:
            return []
        if chunk is None:
            return [wds.shuffle(self._shuffle, initial=self._shuffle, rng=rng)]
        chunks = max(self._shuffle // chunk, 1)
        return [
            lambda samples: (list(few) for _, few in groupby(samples, lambda s: (s.tar, s.position // chunk))),
            wds.shuffle(chunks, initial=chunks, rng=rng),
            chain.from_iterable,
        ]

    def _collate(self, epoch: int, samples: list[JoinedSample]) -> dict[str, Any]:
        images, chosen = self._decoder.decode([sample.image for sample in samples], [sample.name for sample in samples])
        samples = [samples[i] for i in chosen]
        rows = np.array([sample.sidecar.row[sample.position] for sample in samples])
        places, offsets = [(sample.sidecar, sample.position) for sample in samples], np.arange(len(samples) + 1)
        if self._captions != "first":
            texts = [sample.sidecar.texts_of(sample.position) for sample in samples]
            places = [(sample.sidecar, i) for sample, own in zip(samples, texts, strict=True) for i in own.tolist()]
            offsets = np.cumsum([0, *map(len, texts)])
        weights = np.array([sidecar.weight[i] for sidecar, i in places], np.float32)
        if self._captions == "draw":
            picked = drawn(rows, weights, offsets, seed=self._epochs.seed, epoch=epoch)
            places = [places[i] for i in picked.tolist()]
        names = [name for name in ("node", *GRAPH_FIELDS) if getattr(places[0][0], name, None) is not None]
        stored = {name: np.stack([getattr(sidecar, name)[i] for sidecar, i in places]) for name in names}
        columns = {"node": stored["node"], **as_in_batch(stored, self.header)}
        captions = [sidecar.caption[i] for sidecar, i in places]
        columns, captions = gathered(self._captions, columns, captions, weights, offsets)
        batch: dict[str, Any] = {
            "image": self._decoder.collate(images),
            "caption": captions,
            "key": [sample.sidecar.key[sample.position] for sample in samples],
            "row": torch.from_numpy(rows),
            **{name: torch.from_numpy(column) for name, column in columns.items()},
        }
        for name in self._extra:
            batch[name] = [member_value(sample, name) for sample in samples]
        return batch


graph_webdataset = GraphWebDataset  # the public name
