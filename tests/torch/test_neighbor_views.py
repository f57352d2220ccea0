"""Partners of samples against the graph's lists and the dataset's own images, in plain loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.torch import GraphDataset
from graphbuild.torch.neighbor_views import NeighborViews
from tests.conftest import MakeOnce
from tests.training.conftest import make_scenes_store

LEAST = 0.75


@pytest.fixture(scope="module")
def views(make_once: MakeOnce) -> NeighborViews:
    """Of three of the scenes' four tars: neighbours in the fourth have no image here."""
    store = make_once("scenes", make_scenes_store)
    dataset = GraphDataset(f"{store}/shards/{{00000..00002}}.tar", image_pixels=8)
    return NeighborViews(dataset, SampleGraph.open(str(store)), probability=0.5, least=LEAST)


def allowed(views: NeighborViews, item: int) -> list[int]:
    """The items that may be its partner, but for itself; one item is listed once for each node that leads to it."""
    nodes, graph = views.dataset.nodes.tolist(), views.graph
    ids, similarities = (each[0].tolist() for each in graph.neighbors(np.array([nodes[item]])))
    near = [node for node, value in zip(ids, similarities, strict=True) if value >= LEAST]
    return [other for node in near for other in range(len(nodes)) if nodes[other] == node]


def test_a_partner_is_a_neighbour_above_the_similarity_or_the_sample_itself(views: NeighborViews) -> None:
    items = np.arange(len(views))
    may = [allowed(views, item) for item in range(len(views))]
    assert any(may)
    assert not all(may)
    seen: list[Counter[int]] = [Counter() for _ in may]
    for epoch in range(300):
        views.set_epoch(epoch)
        for item, partner in enumerate(views.partners(items).tolist()):
            seen[item][partner] += 1
    changed = total = 0
    for item, own in enumerate(may):
        assert set(seen[item]) <= {item, *own}
        assert own or seen[item][item] == 300
        total += 300 * bool(own)
        changed += 300 - seen[item][item] if own else 0
    assert abs(changed / total - 0.5) < 5 * (0.25 / total) ** 0.5
    for item, own in enumerate(may):  # all alike: none is left out in 150 draws of at most 8 nodes
        nodes = {int(views.dataset.nodes[other]) for other in own}
        drawn = Counter(int(views.dataset.nodes[other]) for other in seen[item].elements() if other != item)
        assert set(drawn) == nodes
        assert all(abs(drawn[node] - 150 / len(nodes)) < 6 * (150 / len(nodes)) ** 0.5 for node in nodes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_partners_images_whatever_the_workers(views: NeighborViews, workers: int) -> None:
    views.set_epoch(3)
    expected = views.partners(np.arange(len(views)))
    rows = [views.dataset[item]["row"].item() for item in range(len(views))]
    item_of = {row: item for item, row in enumerate(rows)}
    found = 0
    for batch in DataLoader(views, batch_size=50, num_workers=workers, collate_fn=views.collate):
        for row, partner_row, image, partner in zip(
            batch["row"].tolist(), batch["partner_row"].tolist(), batch["image"], batch["partner"], strict=True
        ):
            assert partner_row == rows[expected[item_of[row]]]
            assert torch.equal(partner, views.dataset[item_of[partner_row]]["image"])
            assert torch.equal(image, views.dataset[item_of[row]]["image"])
            found += 1
    assert found == len(views)


def test_without_a_probability_there_is_no_other_and_bounds_are_refused(views: NeighborViews, tmp_path: Path) -> None:
    never = NeighborViews(views.dataset, views.graph, probability=0)
    assert never.partners(np.arange(len(never))).tolist() == list(range(len(never)))
    for wrong in ({"probability": 1.5}, {"least": 2.0}):
        with pytest.raises(ConfigError, match="set probability in"):
            NeighborViews(views.dataset, views.graph, **wrong)
