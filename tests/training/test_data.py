"""Which samples a run trains on, and in which batches."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from augment import cut, view_draws
from config import Config, Place
from data import EpochBatches, TrainingSamples, split_shards, subset, training_samples, unchanged
from objective import GraphReader
from PIL import Image
from torch.utils.data import DataLoader

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.graph.select.rules import select_store
from graphbuild.store.store import Store
from graphbuild.torch import GraphDataset

METHODS = ("simclr", "supcon", "xsample", "clip", "clip_soft")
CPU = torch.device("cpu")


def config_of(store: str, **more: Any) -> Config:
    return Config(store=store, **{"pixels": 16, "batch_size": 24, "samples": 0.25, **more})


def batches_of(config: Config, rank: int = 0, ranks: int = 1) -> EpochBatches:
    samples = training_samples(config)
    places = GraphReader(config, samples.graph).graph_nodes(samples.nodes)
    return EpochBatches(config, samples.graph, places, Place(rank, ranks, CPU))


def test_every_method_trains_on_the_same_samples_in_the_same_batches(scenes_store: str) -> None:
    chosen = [batches_of(config_of(scenes_store, method=method, seed=3)) for method in METHODS]
    assert len({str(list(batches)) for batches in chosen}) == 1
    found = [
        training_samples(config_of(scenes_store, method=method, seed=seed)) for seed in (3, 4) for method in METHODS
    ]
    assert all(np.array_equal(samples.nodes, found[0].nodes) for samples in found)


def test_a_subset_is_random_fixed_by_its_seed_and_part_of_a_larger_one() -> None:
    small, large = subset(1000, 0.01, 0), subset(1000, 400, 0)
    assert (len(small), len(large)) == (10, 400)
    assert set(small) < set(large) < set(range(1000))
    assert np.array_equal(small, subset(1000, 0.01, 0))
    assert not np.array_equal(small, subset(1000, 0.01, 1))
    assert np.array_equal(subset(1000, 1.0, 5), np.arange(1000))
    for wrong in (0.0001, 1001):
        with pytest.raises(ConfigError, match="samples"):
            subset(1000, wrong, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_samples_are_those_of_the_tars(scenes_store: str, workers: int) -> None:
    tars, _ = split_shards(config_of(scenes_store))
    cached, read = (TrainingSamples(scenes_store, tars, 20, 0.5, 1, "", cache, workers) for cache in (True, False))
    assert len(cached) == len(read) == 180
    every = GraphDataset(tars, image_pixels=20)
    numbers = [5, 179, 0, 77]
    items = subset(360, 0.5, 1)[numbers]
    batches = [samples.__getitems__(numbers) for samples in (cached, read)]
    for batch in batches:
        for place, item in enumerate(items):
            expected = every[item]
            assert torch.equal(batch["image"][place], expected["image"])
            assert batch["node"][place] == expected["node"]
            assert batch["caption"][place] == expected["caption"]


def test_a_selection_leaves_its_samples_alone(scenes_store: str, tmp_path: Path) -> None:
    path = tmp_path / "third.parquet"
    select_store(Store(scenes_store), "x", {"where": "row % 3 = 0"}, str(path))
    samples = training_samples(config_of(scenes_store, selection=str(path), samples=1.0))
    every = SampleGraph.open(scenes_store).sample_nodes()[:360]
    assert np.array_equal(samples.nodes, every[::3])


def test_an_epoch_has_each_sample_once_but_those_that_fill_no_batch(scenes_store: str) -> None:
    batches = batches_of(config_of(scenes_store))  # 90 samples
    first = list(batches)
    used = list(chain.from_iterable(first))
    assert [len(batch) for batch in first] == [24] * 3
    assert len(set(used)) == len(used)
    batches.set_epoch(1)
    second = list(batches)
    assert set(chain.from_iterable(second)) != set(used)
    batches.set_epoch(1, first=2)
    assert list(batches) == second[2:]
    assert len(batches) == 1


@pytest.mark.parametrize("way", ["random", "window"])
def test_ranks_divide_the_batches_of_one_process(scenes_store: str, way: Any) -> None:
    config = config_of(scenes_store, batches=way)
    whole = list(batches_of(config))
    parts = [list(batches_of(config, rank, 2)) for rank in range(2)]
    assert [left + right for left, right in zip(*parts, strict=True)] == whole
    with pytest.raises(ConfigError, match="multiple of the ranks"):
        batches_of(config, 0, 5)


def edges_per_anchor(store: str, batches: EpochBatches, nodes: np.ndarray) -> float:
    neighbors = np.concatenate([np.load(path) for path in sorted(Path(store).glob("graph/*.neighbors.npy"))])
    edges = [
        np.isin(nodes[batch], neighbors[nodes[i]]).sum() - np.isin(nodes[i], neighbors[nodes[i]])
        for batch in batches
        for i in batch
    ]
    return float(np.mean(edges))


@pytest.mark.parametrize("way", ["window", "walk", "communities"])
def test_batches_of_neighbours_hold_them_and_report_how_many(scenes_store: str, way: Any) -> None:
    config = config_of(scenes_store, batches=way, samples=1.0)
    batches, nodes = batches_of(config), training_samples(config).nodes
    plain = batches_of(config_of(scenes_store, samples=1.0))
    found = edges_per_anchor(scenes_store, batches, nodes)
    assert found > 2 * edges_per_anchor(scenes_store, plain, nodes)
    assert batches.report()["edges_per_anchor"] == pytest.approx(found)
    assert plain.report() == {}
    mixed = batches_of(config_of(scenes_store, batches=way, samples=1.0, random_share=0.5))
    assert edges_per_anchor(scenes_store, mixed, nodes) < 0.8 * found


def test_the_permuted_control_groups_samples_that_are_no_neighbours(scenes_store: str) -> None:
    config = config_of(scenes_store, batches="window", samples=1.0, permute_graph=True)
    batches, nodes = batches_of(config), training_samples(config).nodes
    plain = batches_of(config_of(scenes_store, samples=1.0))
    found = edges_per_anchor(scenes_store, batches, nodes)
    assert found == pytest.approx(edges_per_anchor(scenes_store, plain, nodes), rel=0.5)
    permuted = GraphReader(config, SampleGraph.open(scenes_store)).graph_nodes(nodes)
    assert edges_per_anchor(scenes_store, batches, permuted) > 2 * found


@pytest.mark.parametrize("workers", [0, 1])
def test_with_full_crops_views_are_cut_out_of_whole_images_by_the_draws_of_their_step(
    scenes_store: str, workers: int
) -> None:
    config = config_of(scenes_store, full_crops=True, cache=False, seed=3, area_min=0.1)
    samples, (tars, _) = training_samples(config), split_shards(config)
    joint, *ranks = (batches_of(config, rank, count) for rank, count in ((0, 1), (0, 2), (1, 2)))
    whole = GraphDataset(tars, transform=np.asarray)
    items = subset(360, 0.25, 0)
    for batches in (joint, *ranks):
        batches.set_epoch(1, 2)
    (batch,) = DataLoader(samples, batch_sampler=joint, collate_fn=unchanged, num_workers=workers)
    (numbers,) = joint
    assert batch["image"].shape == (2, 24, 3, 16, 16)
    assert batch["node"].tolist() == samples.nodes[numbers].tolist()
    draws = view_draws(config, Place(0, 1, CPU), 1, 2, 24)
    for place, number in enumerate(numbers):
        image = Image.fromarray(np.asarray(whole[items[number]]["image"]))
        for one in (0, 1):
            wanted = cut(image, draws[one, :, place], config).transpose(2, 0, 1)
            assert torch.equal(batch["image"][one, place], torch.from_numpy(wanted.copy()))
    halves = [samples.__getitems__(next(iter(batches)))["image"] for batches in ranks]
    assert torch.equal(torch.cat(halves, 1), batch["image"])
