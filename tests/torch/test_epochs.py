"""Epochs of the stream over ranks, workers, copies and processes, against the whole stream of each rank."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import epochs, graph_webdataset
from tests.torch.test_loader import SAMPLES, SHARDS, members_of, rows_of, write_shard

EVERY_ROW = list(range(SHARDS * SAMPLES))
Rank = Callable[[int, int], None]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for number in range(SHARDS):
        write_shard(tmp_path, number)
    return tmp_path


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Shards of 10, 3, 7, 1, 9 and 5 samples, a sample of each without a node or an image."""
    for number, samples in enumerate([10, 3, 7, 1, 9, 5]):
        write_shard(
            tmp_path,
            number,
            lambda row: members_of(row)[1:] if row % SAMPLES == 4 else members_of(row),
            samples=samples,
            without_node=(number * SAMPLES + 2,),
        )
    return tmp_path


@pytest.fixture
def rank_is(monkeypatch: pytest.MonkeyPatch) -> Rank:
    def set_rank(rank: int, ranks: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))

    return set_rank


# Copies, and ranks that are known late


def read_as_a_rank(rank: int, dataset: Any, folder: Path) -> None:
    """A process of a group of two: what it reads itself, and by a worker that is started afresh."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    workers = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    (folder / f"{rank}.json").write_text(json.dumps([rows_of(dataset), rows_of(workers)]))
    dist.destroy_process_group()


def test_a_dataset_made_before_the_process_group_is_split_over_its_ranks(store: Path) -> None:
    dataset = graph_webdataset(f"{store}/*.tar", batch_size=8)
    multiprocessing.start_processes(read_as_a_rank, (dataset, store), nprocs=2, start_method="fork")
    first, second = (json.loads((store / f"{rank}.json").read_text()) for rank in range(2))
    for rows, others in zip(first, second, strict=True):
        assert len(rows) == len(others) == len(EVERY_ROW) // 2
        assert sorted(rows + others) == EVERY_ROW


def test_the_rank_of_this_process_goes_before_one_that_came_along(store: Path, rank_is: Rank) -> None:
    rank_is(0, 2)
    carried = pickle.dumps(graph_webdataset(f"{store}/*.tar", batch_size=8))
    rank_is(1, 3)
    assert rows_of(pickle.loads(carried)) == rows_of(graph_webdataset(f"{store}/*.tar", batch_size=8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_workers_that_live_on_see_the_epoch_of_a_copy(store: Path, copied: Any) -> None:
    dataset = copied(graph_webdataset(f"{store}/*.tar", batch_size=8))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    expected = graph_webdataset(f"{store}/*.tar", batch_size=8)
    for epoch in (3, 1):
        dataset.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert rows_of(loader) == rows_of(expected)


# Equally many batches for every rank


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 0), (3, 0), *(pytest.param(some, 3, marks=pytest.mark.slow) for some in (2, 3))],  # workers start slowly
)
def test_equal_ranks_end_where_the_rank_with_fewest_batches_does(
    uneven: Path, rank_is: Rank, ranks: int, workers: int, partial: bool
) -> None:
    def read(rank: int, epoch: int, taken: int = 0, **options: bool) -> tuple[list[list[str]], int]:
        rank_is(rank, ranks)
        dataset = graph_webdataset(f"{uneven}/*.tar", batch_size=2, shuffle=6, partial=partial, **options)
        dataset.set_epoch(epoch, taken)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        return [batch["key"] for batch in loader], dataset.batches_per_epoch(workers)

    differed = False
    for epoch in range(2):
        whole, counts = zip(*(read(rank, epoch) for rank in range(ranks)), strict=True)
        assert [len(batches) for batches in whole] == list(counts)
        fewest = min(counts)
        differed = differed or max(counts) > fewest
        for rank in range(ranks):
            assert read(rank, epoch, equal_ranks=True) == (whole[rank][:fewest], fewest)
            taken = fewest // 2
            assert read(rank, epoch, taken, equal_ranks=True) == (whole[rank][taken:fewest], fewest)
    assert differed


def test_a_rank_without_a_batch_is_named(uneven: Path, rank_is: Rank) -> None:
    rank_is(0, 2)
    dataset = graph_webdataset(f"{uneven}/*.tar", batch_size=12, shuffle=0, partial=False, equal_ranks=True)
    for read in (lambda: list(dataset), lambda: dataset.batches_per_epoch(0)):
        with pytest.raises(ConfigError, match=r"with 1 worker\(s\) rank 1 has no batch of 12 in epoch 0"):
            read()


def test_more_ranks_than_tars_and_workers_below_zero_are_refused(uneven: Path, rank_is: Rank) -> None:
    dataset = graph_webdataset(f"{uneven}/*.tar", batch_size=2)
    with pytest.raises(ConfigError, match="workers = -1"):
        dataset.batches_per_epoch(-1)
    rank_is(0, 7)
    with pytest.raises(InputError, match=r"6 tar\(s\) for 7 ranks"):
        dataset.batches_per_epoch(2)


def test_a_process_counts_each_shard_once(uneven: Path, rank_is: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    count = epochs.count_joined

    def count_and_note(shard: Any, **options: Any) -> int:
        counted.append(shard.tar)
        return count(shard, **options)

    monkeypatch.setattr(epochs, "count_joined", count_and_note)
    rank_is(1, 2)
    dataset = graph_webdataset(f"{uneven}/*.tar", batch_size=2, equal_ranks=True)
    for epoch in range(3):
        dataset.set_epoch(epoch, skip_batches=1)
        assert len(list(dataset)) + 1 == dataset.batches_per_epoch(1)
    assert dataset.count_samples() == (10 - 2) + (3 - 1) + (7 - 2) + 1 + (9 - 2) + (5 - 2)
    assert sorted(counted) == sorted(str(path) for path in uneven.glob("*.tar"))
    loader = DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=None, num_workers=2)
    assert len(list(loader)) == dataset.batches_per_epoch(2) - 1
    assert len(counted) == SHARDS
