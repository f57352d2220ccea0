"""Saved and loaded in the middle of an epoch: the rest is what the uninterrupted epoch has, or the state is refused."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import pickle
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError
from graphbuild.torch import GraphDataset, NeighborBatchSampler, graph_webdataset
from graphbuild.torch.graph_loader import GraphLoader
from tests.torch.test_loader import SAMPLES, SHARDS, K, members_of, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
Keys = list[list[str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 10, 3, 7, 1, 9 and 5 samples: workers run out at different times."""
    folder = tmp_path_factory.mktemp("store")
    for number, samples in enumerate([10, 3, 7, 1, 9, 5]):
        write_shard(folder, number, members_of, samples=samples)
    return folder


class Ring:
    """A graph of which node i's neighbours are i+1..i+K."""

    k = K

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes

    def __len__(self) -> int:
        return self._nodes

    def edge_blocks(self) -> Iterator[tuple[int, Any, Any]]:
        yield 0, *self._edges()

    def _edges(self) -> tuple[Any, Any]:
        if not hasattr(self, "_kept"):
            neighbors = (np.arange(self._nodes)[:, None] + np.arange(1, K + 1)) % self._nodes
            self._kept = neighbors.astype(np.uint32), np.ones(neighbors.shape, np.float16)
        return self._kept


# One of its workers once waited for ever, in a whole run of the suite; alone these tests pass.
TORCHDATA = pytest.mark.slow

RING = Ring(1000 + SHARDS * SAMPLES)


def stream_of(store: Path, **options: Any) -> Any:
    return graph_webdataset(f"{store}/*.tar", **{"batch_size": 2, "shuffle": 6, **options})


def sampled(store: Path, **options: Any) -> tuple[GraphDataset, NeighborBatchSampler]:
    dataset = GraphDataset(f"{store}/*.tar")
    return dataset, NeighborBatchSampler(RING, options.pop("batch_size", 4), nodes=dataset.nodes, group=2, **options)


def loader_of(store: Path, kind: str, workers: int, **options: Any) -> GraphLoader:
    parts = (stream_of(store, **options),) if kind == "stream" else sampled(store, **options)
    return GraphLoader(*parts, num_workers=workers, persistent_workers=workers > 0)


def keys_of(batches: Any) -> Keys:
    return [batch["key"] for batch in batches]


def run(loader: Any, epochs: int, set_epoch: Callable[[int], Any] | None = None) -> list[Keys]:
    """The batches of whole epochs."""
    read = []
    for epoch in range(epochs):
        (set_epoch or loader.set_epoch)(epoch)
        read.append(keys_of(loader))
    return read


def refusal(loader: Any) -> str:
    """The ConfigError of reading it. No traceback keeps the loader alive: its workers end at once."""
    try:
        list(loader)
    except ConfigError as error:
        error.__traceback__ = None
        return str(error)
    pytest.fail("no error was raised")


# GraphLoader


@pytest.mark.parametrize(
    ("kind", "workers", "later"), [("stream", 0, 1), ("stream", 3, 3), ("sampler", 0, 2), ("sampler", 2, 0)]
)
@pytest.mark.parametrize("taken", [1, 5, None])
def test_a_loader_goes_on_with_what_the_uninterrupted_run_has(
    store: Path, kind: str, workers: int, later: int, taken: int | None
) -> None:
    whole = run(loader_of(store, kind, workers), 3)
    assert len({json.dumps(keys) for keys in whole}) == 3  # an order of its own for each epoch
    first = loader_of(store, kind, workers)
    first.set_epoch(0)
    assert keys_of(first) == whole[0]
    first.set_epoch(1)
    count = len(whole[1]) if taken is None else taken
    assert len(first) == len(whole[1])
    batches = iter(first)
    assert keys_of(islice(batches, count)) == whole[1][:count]
    state = json.loads(json.dumps(first.state_dict()))
    second = loader_of(store, kind, later)
    second.load_state_dict(state)
    assert second.state_dict() == {**state, **({"workers": max(later, 1)} if kind == "stream" else {})}
    read = []
    for epoch in range(second.epoch, 3):
        second.set_epoch(epoch)
        read.append(keys_of(second))
    assert read == [whole[1][count:], whole[2]]


def test_a_state_holds_once_and_another_epoch_drops_it(store: Path) -> None:
    whole = run(loader_of(store, "stream", 0), 2)
    loader = loader_of(store, "stream", 0)
    state = {**loader.state_dict(), "epoch": 1, "taken": 3}
    loader.load_state_dict(state)
    assert keys_of(loader) == whole[1][3:]
    loader.set_epoch(1)
    assert keys_of(loader) == whole[1]
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert keys_of(loader) == whole[0]


@pytest.mark.parametrize(
    ("kind", "changed", "named"),
    [
        ("stream", {"batch_size": 3}, "batch_size = 2, and here it is 3"),
        ("stream", {"seed": 1}, "seed = 0, and here it is 1"),
        ("stream", {"shuffle": 0}, "shuffle = 6, and here it is 0"),
        ("stream", {"partial": False}, "partial = True, and here it is False"),
        ("stream", {"equal_ranks": True}, "equal_ranks = False, and here it is True"),
        ("stream", {"workers": 2}, "workers = 1, and here it is 2"),
        ("sampler", {"seed": 1}, "seed = 0, and here it is 1"),
        ("sampler", {"batch_size": 5}, "batch_size = 4, and here it is 5"),
        ("sampler", {"neighbors": "walk"}, "neighbors = window, and here it is walk"),
        ("sampler", {"rank": 0, "ranks": 2}, "ranks = 1, and here it is 2"),
        ("sampler", {"drop_last": True}, "batches = 9, and here it is 8"),
    ],
)
def test_a_state_of_another_order_is_refused_by_both_values(
    store: Path, kind: str, changed: dict[str, Any], named: str
) -> None:
    state = loader_of(store, kind, 0).state_dict()
    loader = loader_of(store, kind, changed.pop("workers", 0), **changed)
    with pytest.raises(ConfigError, match=rf"{re.escape(named)}(.|\n)*-> resume with"):
        loader.load_state_dict(state)


def test_other_ranks_tars_and_nodes_are_refused(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {kind: loader_of(store, kind, 0).state_dict() for kind in ("stream", "sampler")}
    write_shard(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"tars = 6, .* here it is 1, "):
        loader_of(tmp_path, "stream", 0).load_state_dict(states["stream"])
    with pytest.raises(ConfigError, match=r"batches = 9|nodes = 35"):
        loader_of(tmp_path, "sampler", 0).load_state_dict(states["sampler"])
    dataset = GraphDataset(f"{store}/*.tar")
    other = NeighborBatchSampler(RING, 4, nodes=dataset.nodes[::-1], group=2)
    with pytest.raises(ConfigError, match=r"nodes = 35, .* here it is 35, "):
        other.load_state_dict(states["sampler"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="ranks = 1, and here it is 2"):
        loader_of(store, "stream", 0).load_state_dict(states["stream"])


def test_a_loader_refuses_what_has_no_order(store: Path) -> None:
    dataset, sampler = sampled(store)
    for parts, options in (
        ((dataset,), {}),
        ((stream_of(store), sampler), {}),
        ((stream_of(store),), {"in_order": False}),
    ):
        with pytest.raises(ConfigError, match="batches come in order"):
            GraphLoader(*parts, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_made_within_an_epoch_goes_on_as_the_loader_does(store: Path, workers: int) -> None:
    loader = GraphLoader(stream_of(store), num_workers=workers)
    batches = iter(loader)
    next(batches)
    again = copy.deepcopy(loader)
    again.load_state_dict(loader.state_dict())
    assert [batch["key"] for batch in again] == [batch["key"] for batch in batches]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_an_epoch_left_to_the_garbage_collection_are_not_waited_for(store: Path, persistent: bool) -> None:
    """A trainer leaves its loader, or the iterator of an unfinished epoch, in a circle of references."""
    loader = GraphLoader(stream_of(store), num_workers=2, persistent_workers=persistent)
    circle: list[Any] = [loader if persistent else iter(loader)]
    circle.append(circle)
    assert next(iter(circle[0]))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    del circle, loader
    begin = time.monotonic()
    gc.collect()
    assert time.monotonic() - begin < 4, "five seconds is the least that torch waits for a worker that heard nothing"
    assert not set(workers) & set(multiprocessing.active_children())


def test_an_epoch_ends_after_as_many_batches_as_it_may_have(store: Path) -> None:
    whole = run(loader_of(store, "stream", 0), 1)[0]
    loader = GraphLoader(stream_of(store), batches=7)
    assert len(loader) == 7
    assert keys_of(loader) == whole[:7]
    loader.load_state_dict({**loader.state_dict(), "taken": 5})
    assert keys_of(loader) == whole[5:7]


# The dataset and the sampler themselves


def test_a_stream_without_workers_goes_on_by_its_own_state(store: Path) -> None:
    first = stream_of(store)
    whole = run(first, 2)
    first.set_epoch(1)
    taken = keys_of(islice(first, 4))
    second = stream_of(store)
    second.load_state_dict(first.state_dict())
    second.set_epoch(1)
    assert taken + keys_of(second) == whole[1]
    assert keys_of(second) == whole[1]


def test_a_stream_that_workers_read_does_not_pretend_to_know_what_was_taken(store: Path) -> None:
    dataset = stream_of(store)
    next(iter(DataLoader(dataset, batch_size=None, num_workers=2)))
    with pytest.raises(ConfigError, match=r"workers read ahead(.|\n)*-> take the state of a GraphLoader"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert dataset.state_dict()["epoch"] == 1


def test_workers_refuse_a_state_of_another_number_of_them(store: Path) -> None:
    dataset = stream_of(store)
    dataset.load_state_dict(stream_of(store).state_dict())
    text = refusal(DataLoader(dataset, batch_size=None, num_workers=2))
    assert "workers = 1, and here it is 2" in text
    assert "-> resume with workers = 1" in text


def test_a_sampler_goes_on_by_its_own_state(store: Path) -> None:
    _, sampler = sampled(store)
    whole = list(sampler)
    taken = list(islice(sampler, 3))
    _, other = sampled(store)
    other.load_state_dict(pickle.loads(pickle.dumps(sampler.state_dict())))
    assert taken + list(other) == whole


# torchdata's StatefulDataLoader


def stateful(store: Path, kind: str, workers: int) -> tuple[Any, Callable[[int], Any]]:
    """A StatefulDataLoader, and what sets its epochs."""
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")
    if kind == "stream":
        dataset = stream_of(store)
        loader = stateful_dataloader.StatefulDataLoader(dataset, batch_size=None, num_workers=workers)
        return loader, dataset.set_epoch
    dataset, sampler = sampled(store)
    loader = stateful_dataloader.StatefulDataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers
    )
    return loader, sampler.set_epoch


@pytest.mark.parametrize("kind", ["stream", "sampler"])
@pytest.mark.parametrize("workers", [0, *(pytest.param(workers, marks=TORCHDATA) for workers in (1, 3))])
@pytest.mark.parametrize("taken", [1, 6, None])
def test_torchdatas_loader_goes_on_with_what_the_uninterrupted_run_has(
    store: Path, kind: str, workers: int, taken: int | None
) -> None:
    loader, set_epoch = stateful(store, kind, workers)
    whole = run(loader, 3, set_epoch)
    plain = loader_of(store, kind, workers)
    assert whole == run(plain, 3)
    set_epoch(1)
    count = len(whole[1]) if taken is None else taken
    iterator = iter(loader)
    assert keys_of(islice(iterator, count)) == whole[1][:count]
    if taken is None:
        assert next(iterator, None) is None
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    loader, set_epoch = stateful(store, kind, workers)
    loader.load_state_dict(state)
    read = []
    for epoch in range(1 if taken else 2, 3):
        set_epoch(epoch)
        read.append(keys_of(loader))
    assert read == ([whole[1][count:]] if taken else []) + [whole[2]]


@TORCHDATA
def test_torchdatas_loader_goes_on_behind_a_resumed_epoch(store: Path) -> None:
    """Saved twice in one epoch: the second state counts from the epoch's begin too."""
    loader, set_epoch = stateful(store, "stream", 2)
    whole = run(loader, 2, set_epoch)[1]
    read: Keys = []
    state = None
    for count in (3, 4, None):
        loader, set_epoch = stateful(store, "stream", 2)
        set_epoch(1)
        if state is not None:
            loader.load_state_dict(state)
        read += keys_of(islice(iter(loader), count))
        state = loader.state_dict()
    assert read == whole


def test_torchdatas_workers_refuse_a_state_of_another_number_of_them(store: Path) -> None:
    loader, set_epoch = stateful(store, "stream", 2)
    set_epoch(1)
    next(iter(loader))
    state = loader.state_dict()
    state["_snapshot"]["_main_snapshot"]["_num_workers"] = 3  # past torchdata's own assertion
    other, _ = stateful(store, "stream", 3)
    other.load_state_dict(state)
    assert "workers = 2, and here it is 3" in refusal(other)
