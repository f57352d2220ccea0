"""The epochs of a stream: which shards each rank and worker reads, how many batches they give, where one goes on.

All follows from seed, epoch, ranks and workers, so that every rank knows the others' part too. Counting costs one small
read a sidecar (a pass over a compressed tar), once a process.
"""

from __future__ import annotations

import json
import posixpath
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphbuild.errors import ConfigError, ShardError
from graphbuild.export.sidecar import SidecarHeader, read_columns
from graphbuild.store.remote import READERS
from graphbuild.torch.shards import Shard, count_joined


@dataclass(frozen=True)
class Part:
    """What a worker reads of an epoch: of the batches that these shards give, those from `first` on, before `last`.

    stream: the number of the worker that reads this part in an epoch without interruption.
    """

    stream: int
    shards: list[Shard]
    first: int = 0
    last: int | None = None


@dataclass(eq=False)
class Epochs:
    """The epochs of some shards. batch_size to equal_ranks: as for `graph_webdataset`.

    equal_ranks counts at once: workers then have the counts from this process.
    """

    shards: list[Shard]
    _: KW_ONLY
    batch_size: int
    shuffled: bool
    seed: int
    partial: bool
    equal_ranks: bool

    def __post_init__(self) -> None:
        self._samples: dict[str, int] = {}  # by tar
        if self.equal_ranks:
            self._count(self.shards)

    @cached_property
    def header(self) -> SidecarHeader:
        """The first shard's."""
        return read_columns(self.shards[0].sidecar, [])[0]

    @cached_property
    def tars(self) -> str:
        """How many they are, and a digest of their names in order, without folders."""
        names = [posixpath.basename(shard.tar) for shard in self.shards]
        return f"{len(names)}, {digest(json.dumps(names).encode())}"

    def count_samples(self) -> int:
        """The samples that all shards give in an epoch."""
        return sum(self._count(self.shards))

    def batches(self, epoch: int, rank: int, ranks: int, workers: int) -> list[int]:
        """How many batches each worker of a rank gives in an epoch, [workers].

        Raises:
            ShardError: a shard cannot be counted, or there are fewer shards than ranks.
            ConfigError: with equal_ranks, where a rank has no batch.
        """
        own = self._whole(epoch, rank, ranks, workers)
        if not self.equal_ranks:
            return own
        every = [sum(self._whole(epoch, other, ranks, workers)) for other in range(ranks)]
        if min(every) == 0:
            raise ConfigError(
                f"equal_ranks: with {workers} worker(s) rank {every.index(0)} has no batch of {self.batch_size}"
                f" in epoch {epoch}",
                "use fewer workers, smaller batches, or more and smaller shards",
            )
        taken: list[int] = resume_point(own, min(every))[1].tolist()
        return taken

    def part(self, epoch: int, skip: int, rank: int, ranks: int, worker: int, workers: int) -> Part:
        """What worker `worker` of a rank reads of an epoch, of which the rank has taken `skip` batches.

        Raises:
            ShardError, ConfigError: as `batches`; a ShardError too where the epoch has fewer batches.
        """
        shards = self._dealt(epoch, rank, ranks)
        if not skip and not self.equal_ranks:
            return Part(worker, shards[worker::workers])
        batches = self.batches(epoch, rank, ranks, workers)
        if skip > sum(batches):
            raise ShardError(
                f"skip_batches = {skip}: with {workers} worker(s) epoch {epoch} of rank {rank} has {sum(batches)}",
                "resume with the tars, batch_size, ranks and workers that the run had",
            )
        turn, taken = resume_point(batches, skip)
        stream = (worker + turn) % workers  # the new DataLoader begins with its worker 0
        last = batches[stream] if self.equal_ranks else None
        return Part(stream, shards[stream::workers], int(taken[stream]), last)

    def _dealt(self, epoch: int, rank: int, ranks: int) -> list[Shard]:
        """A rank's shards, in the epoch's order; those of worker w of n are [w::n]."""
        if ranks > len(self.shards):
            raise ShardError(
                f"{len(self.shards)} tar(s) for {ranks} ranks: rank {len(self.shards)} would get none",
                "write smaller shards, at least one for each rank and worker, or use fewer ranks",
            )
        shards = list(self.shards)
        if self.shuffled:
            random.Random(f"shards {self.seed} {epoch}").shuffle(shards)
        return shards[rank::ranks]

    def _whole(self, epoch: int, rank: int, ranks: int, workers: int) -> list[int]:
        """The batches of each worker, [workers], to the end of its shards."""
        samples = self._count(self._dealt(epoch, rank, ranks))
        size = self.batch_size
        return [(sum(samples[w::workers]) + (size - 1 if self.partial else 0)) // size for w in range(workers)]

    def _count(self, shards: Sequence[Shard]) -> list[int]:
        """The samples that each shard gives, [n]."""
        new = [shard for shard in shards if shard.tar not in self._samples]
        if new:
            header = self.header
            with ThreadPoolExecutor(READERS) as pool:
                counts = pool.map(lambda shard: count_joined(shard, expected=header), new)
                self._samples.update(zip((shard.tar for shard in new), counts, strict=True))
        return [self._samples[shard.tar] for shard in shards]


class Position:
    """Where a reader of batches stands: epoch, and how many of its batches the rank has taken.

    What `set` says is in shared memory, also in a copy: workers that live on (persistent_workers) see it change. A
    loaded state is this process's own and holds for one iteration; `set` with the same epoch leaves it, with another
    one drops it.
    """

    def __init__(self) -> None:
        self._numbers = torch.zeros(3, dtype=torch.int64)
        self._numbers.share_memory_()  # type: ignore[no-untyped-call]
        self._loaded: dict[str, Any] | None = None
        self._now: dict[str, Any] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._numbers.share_memory_()  # type: ignore[no-untyped-call]

    def set(self, epoch: int, taken: int) -> None:
        if self._loaded is not None and (taken or epoch != self._loaded["epoch"]):
            self._loaded = None
        self._now = None
        self._numbers.copy_(torch.tensor([epoch, taken, 0]))

    def load(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where a state says."""
        self._loaded, self._now = dict(state), None

    def begin(self, *, in_worker: bool = False) -> dict[str, Any]:
        """The place of an iteration that begins now, by name; who iterates counts `taken` up in it."""
        self._now, self._loaded = self.get(), None
        if in_worker:
            self._numbers[2] = 1
        return self._now

    def get(self) -> dict[str, Any]:
        """Where the next iteration begins, by name: epoch, taken, and what else a loaded state has."""
        epoch, taken, _ = self._numbers.tolist()
        return dict(self._loaded or {"epoch": epoch, "taken": taken})

    def state(self) -> dict[str, Any]:
        """Where the iteration in progress stands, or the next one begins."""
        return dict(self._loaded or self._now or self.get())

    @property
    def workers_read(self) -> bool:
        """Whether workers have begun an iteration since the last `set`."""
        return bool(self._numbers[2])


def check_options(state: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a state that was saved by other options, of those that decide an epoch's order.

    Raises:
        ConfigError: one differs; it names both values.
    """
    for name, value in options.items():
        if state.get(name) != value:
            raise ConfigError(
                f"the state was saved with {name} = {state.get(name)}, and here it is {value}: the epoch would go on"
                " in another order",
                f"resume with {name} = {state.get(name)}, or do not load the state and begin an epoch by set_epoch",
            )


def digest(values: bytes | memoryview) -> str:
    """A short name of some bytes, to compare them by."""
    return sha256(values).hexdigest()[:16]


def resume_point(batches: Sequence[int], taken: int) -> tuple[int, NDArray[np.int64]]:
    """Where a DataLoader's epoch stands after `taken` batches: the worker whose turn it is, and what each has given.

    batches: what each worker gives in the whole epoch. A DataLoader that delivers in order takes one batch of each
    worker in turn and passes over those that have run out. Returns a worker, and int64 [workers].
    """
    worker = np.repeat(np.arange(len(batches)), batches)
    turn = np.concatenate([np.arange(count) for count in batches])
    order = worker[np.lexsort((worker, turn))]
    following = int(order[taken]) if taken < len(order) else 0
    return following, np.bincount(order[:taken], minlength=len(batches))
