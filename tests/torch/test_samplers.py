"""Neighbour-aware batches: every sample once, and in-batch edges against plain loops over graphs of known structure."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.batches.batches import pack
from graphbuild.graph.batches.groups import NeighborLists, groups_by_growth, groups_of_anchors, join_near, order_by_node
from graphbuild.graph.batches.order import WAYS
from graphbuild.torch import NeighborBatchSampler
from tests.graph.test_index import built

CLIQUES, CLIQUE = 30, 10
NODES = CLIQUES * CLIQUE


def sampler_of(graph: Any, batch_size: int, **options: Any) -> NeighborBatchSampler:
    """Over all samples of a store where `nodes` does not say otherwise."""
    return NeighborBatchSampler(graph, batch_size, **{"nodes": graph.sample_nodes(), **options})


@pytest.fixture(scope="module")
def cliques(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    """Node i's neighbours are the 9 other nodes of clique i % 30: tight clusters, far apart, over five shards."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((32, CLIQUES)))[0].T
    vectors = centres[np.arange(NODES) % CLIQUES] + 0.02 * rng.standard_normal((NODES, 32))
    graph = SampleGraph.open(built(tmp_path_factory.mktemp("cliques"), vectors.astype(np.float16), k=CLIQUE - 1).url)
    neighbors, _ = graph.neighbors(np.arange(NODES))
    assert (neighbors % CLIQUES == np.arange(NODES)[:, None] % CLIQUES).all()
    return graph


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    """500 random nodes, k = 12: no clusters, edges of all kinds."""
    vectors = np.random.default_rng(1).standard_normal((500, 8)).astype(np.float16)
    return SampleGraph.open(built(tmp_path_factory.mktemp("cloud"), vectors, k=12).url)


def all_ranks(graph: SampleGraph, batch_size: int, ranks: int, **options: Any) -> list[list[list[int]]]:
    return [list(sampler_of(graph, batch_size, rank=rank, ranks=ranks, **options)) for rank in range(ranks)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("items", "batch_size"), [(500, 64), (497, 7), (64, 64), (129, 32), (97, 32), (3, 2)])
def test_every_sample_comes_exactly_once(
    cloud: SampleGraph, way: str, drop_last: bool, ranks: int, items: int, batch_size: int
) -> None:
    options = {"neighbors": way, "drop_last": drop_last, "group": min(batch_size, 5), "nodes": np.arange(items)}
    steps, rest = divmod(items, batch_size * ranks)
    if steps == 0 and (drop_last or rest < ranks):
        with pytest.raises(ConfigError, match="make no batch"):
            all_ranks(cloud, batch_size, ranks, **options)
        return
    parts = all_ranks(cloud, batch_size, ranks, **options)
    assert len({len(part) for part in parts}) == 1
    counts = Counter(item for part in parts for batch in part for item in batch)
    assert set(counts.values()) == {1}
    sizes = np.array([[len(batch) for batch in part] for part in parts])
    if drop_last:
        assert (sizes == batch_size).all()
        assert items - len(counts) == rest
    else:
        assert sorted(counts) == list(range(items))
        assert (sizes >= 1).all()
        assert sizes.max() <= batch_size
        assert (np.ptp(sizes, axis=0) <= 1).all()
        smaller = 0 if rest == 0 else 1 if rest >= ranks else 2
        assert (sizes[:, : sizes.shape[1] - smaller] == batch_size).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("same_node", [1, 4])
@pytest.mark.parametrize("random_share", [0.0, 0.3, 1.0])
def test_samples_that_share_nodes_come_exactly_once_and_those_without_a_node_never(
    cloud: SampleGraph, way: str, same_node: int, random_share: float
) -> None:
    nodes = (np.random.default_rng(2).pareto(0.5, 4_000) * 10).astype(np.int64) % 501 - 1  # 0 to 500 or -1
    sampler = sampler_of(cloud, 50, neighbors=way, nodes=nodes, same_node=same_node, random_share=random_share, group=6)
    seen = np.concatenate(list(sampler))
    assert np.array_equal(np.sort(seen), np.flatnonzero(nodes >= 0))


def test_all_samples_of_one_node_come_exactly_once(cloud: SampleGraph) -> None:
    for way in WAYS:
        batches = list(sampler_of(cloud, 8, neighbors=way, nodes=np.full(21, 7)))
        assert sorted(len(batch) for batch in batches) == [5, 8, 8]
        assert sorted(np.concatenate(batches)) == list(range(21))


@pytest.mark.parametrize("way", ["window", "communities"])
def test_cliques_fill_batches_in_whole_groups(cliques: SampleGraph, way: str) -> None:
    sampler = sampler_of(cliques, 20, neighbors=way, group=CLIQUE // 2, seed=3)
    for batch in sampler:
        of_clique = Counter(item % CLIQUES for item in batch)
        assert min(of_clique.values()) >= 5
    assert sampler.report()["groups_cut"] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_report_counts_edges_as_plain_loops_do(cloud: SampleGraph, way: str, ranks: int) -> None:
    nodes = np.random.default_rng(4).integers(0, 500, 900)
    options = {"neighbors": way, "nodes": nodes, "drop_last": True, "group": 4}
    batches = [batch for part in all_ranks(cloud, 30, ranks, **options) for batch in part]
    neighbors, _ = cloud.neighbors(np.arange(500))
    lists = [set(row.tolist()) for row in neighbors]
    edges = [[sum(nodes[j] in lists[nodes[i]] for j in batch) for i in batch] for batch in batches]
    report = sampler_of(cloud, 30, rank=ranks - 1, ranks=ranks, **options).report()
    assert report["edges_per_anchor"] == np.mean(edges)
    assert report["anchors_with_edge"] == np.mean(np.array(edges) > 0)
    assert (report["batches"], report["batches_measured"]) == (len(batches), len(batches))
    assert report["dropped"] == 900 - 30 * len(batches)


def test_random_batches_have_the_edges_that_chance_gives(cloud: SampleGraph) -> None:
    expected = 12 * 49 / 499  # k (B - 1) / (N - 1)
    sampler = sampler_of(cloud, 50, random_share=1.0)
    found = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        report = sampler.report()
        found.append((report["edges_per_anchor"], report["random_edges_per_anchor"]))
        assert report["groups"] == 0
    np.testing.assert_allclose(np.mean(found, axis=0), expected, rtol=0.03)


@pytest.mark.parametrize("way", WAYS)
def test_nearly_all_anchors_have_an_edge_where_random_batches_have_few(cloud: SampleGraph, way: str) -> None:
    report = sampler_of(cloud, 10, neighbors=way, group=4).report()
    assert report["anchors_with_edge"] > 0.9
    assert report["random_anchors_with_edge"] < 0.3


@pytest.mark.parametrize(("random_share", "plain"), [(0.2, 6), (0.5, 15), (1.0, 30)])
def test_a_share_of_the_batches_is_random(cliques: SampleGraph, random_share: float, plain: int) -> None:
    """Random batches of 10 hold about 9 cliques, grouped ones 2 or 3."""
    for seed in range(5):
        batches = list(sampler_of(cliques, 10, group=5, random_share=random_share, seed=seed))
        of_cliques = np.array([len({item % CLIQUES for item in batch}) for batch in batches])
        assert np.sum(of_cliques >= 5) == plain


def test_batches_depend_on_seed_and_epoch_alone_and_ranks_deal_them_out(cloud: SampleGraph) -> None:
    sampler = sampler_of(cloud, 16, seed=5)
    first = list(sampler)
    assert list(sampler_of(cloud, 16, seed=5)) == first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(sampler_of(cloud, 16, seed=6)) != first
    for ranks in (2, 3):
        parts = all_ranks(cloud, 16, ranks, seed=5, drop_last=True)
        dealt = [batch for step in zip(*parts, strict=True) for batch in step]
        assert dealt == first[: len(dealt)]


def test_the_groups_of_epochs_differ(cliques: SampleGraph) -> None:
    sampler = sampler_of(cliques, 5, group=5)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append({frozenset(batch) for batch in sampler})
    assert len(epochs[0] & epochs[1]) <= 20  # of 60: a clique's first anchor, one of 10, decides on its halves


def test_ranks_come_from_the_environment(cloud: SampleGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert list(sampler_of(cloud, 16)) == list(sampler_of(cloud, 16, rank=1, ranks=3))


def test_a_data_loader_takes_it_and_a_copy_in_another_process_too(cloud: SampleGraph) -> None:
    sampler = sampler_of(cloud, 16)
    expected = list(sampler)
    loaded = [batch[0].tolist() for batch in DataLoader(TensorDataset(torch.arange(500)), batch_sampler=sampler)]
    assert loaded == expected
    assert len(sampler) == len(expected)
    assert list(pickle.loads(pickle.dumps(sampler))) == expected


def test_anchors_take_neighbours_of_the_window_and_all_members_have_an_edge(cloud: SampleGraph) -> None:
    neighbors, _ = cloud.neighbors(np.arange(500))
    visits = np.random.default_rng(6).permutation(500).astype(np.uint32)
    _, starts = order_by_node(visits, 500)
    lists = NeighborLists(cloud)
    for restart in (-1.0, 0.2):
        labels, count = groups_of_anchors(visits, starts, lists.window(3, 6), 4, 1, restart, 1)
        window = [set(row[3:9].tolist()) for row in neighbors]
        sizes = np.bincount(labels, minlength=count)
        assert sizes.max() == 4
        assert sizes.min() == 1
        for members in (set(np.flatnonzero(labels == label).tolist()) for label in np.flatnonzero(sizes > 1)):
            assert all(window[member] & members for member in members)


@pytest.mark.parametrize("same_node", [1, 3])
def test_a_group_takes_at_most_same_node_samples_of_a_node(cloud: SampleGraph, same_node: int) -> None:
    nodes = np.random.default_rng(7).integers(0, 100, 2_000).astype(np.uint32)
    order, starts = order_by_node(nodes, 500)
    assert np.array_equal(order, np.argsort(nodes, kind="stable"))
    assert np.array_equal(starts, np.searchsorted(np.sort(nodes), np.arange(501)))
    lists = NeighborLists(cloud)
    labels, _ = groups_of_anchors(nodes, starts, lists.window(0, 12), 6, same_node, -1.0, 0)
    together = Counter(zip(labels.tolist(), np.sort(nodes).tolist(), strict=True))
    assert max(together.values()) == same_node


def test_samples_of_a_node_stay_together_when_chosen(cliques: SampleGraph) -> None:
    nodes = np.repeat(np.arange(NODES), 4)
    mates = {}
    for same_node in (1, 4):
        batches = list(sampler_of(cliques, 16, nodes=nodes, group=8, same_node=same_node))
        mates[same_node] = np.mean([Counter(nodes[batch])[nodes[item]] - 1 for batch in batches for item in batch])
    assert mates[1] < 0.5
    assert mates[4] > 2.5


def test_communities_of_cliques_are_the_cliques(cliques: SampleGraph) -> None:
    visits = np.random.default_rng(8).permutation(NODES).astype(np.uint32)
    lists = NeighborLists(cliques)
    labels, count = groups_by_growth(visits, np.arange(NODES + 1), lists.window(0, CLIQUE - 1), CLIQUE, 1)
    assert count == CLIQUES
    assert len(set(zip(labels.tolist(), (np.arange(NODES) % CLIQUES).tolist(), strict=True))) == CLIQUES


def test_communities_grow_by_the_node_that_most_members_list(cloud: SampleGraph) -> None:
    """Against the rule written out in sets and loops."""
    neighbors, _ = cloud.neighbors(np.arange(500))
    window = neighbors[:, 2:10].tolist()
    visits = np.random.default_rng(9).permutation(500).astype(np.uint32)
    expected: dict[int, int] = {}
    groups = 0
    for anchor in visits.tolist():
        if anchor in expected:
            continue
        members, out = [anchor], set()
        expected[anchor] = groups
        while len(members) < 5:
            listed = [node for member in members for node in window[member] if node not in expected and node not in out]
            if not listed:
                break
            best = max(dict.fromkeys(listed), key=listed.count)
            if set(window[best]) & set(members):
                members.append(best)
                expected[best] = groups
            else:
                out.add(best)
        groups += 1
    lists = NeighborLists(cloud)
    labels, count = groups_by_growth(visits, np.arange(501), lists.window(2, 8), 5, 1)
    assert count == groups
    assert labels.tolist() == [expected[node] for node in range(500)]


def test_single_samples_join_the_group_they_have_most_edges_to(cliques: SampleGraph) -> None:
    labels = np.where(np.arange(NODES) < CLIQUES, CLIQUES, 0) + np.arange(NODES) % CLIQUES  # a clique: 9 and 1 alone
    labels = labels.astype(np.int32)
    full = labels.copy()
    lists = NeighborLists(cliques)
    nodes, starts, window = np.arange(NODES), np.arange(NODES + 1), lists.window(0, CLIQUE - 1)
    join_near(labels, 2 * CLIQUES, nodes, starts, window, 1, 10, 2)
    assert np.array_equal(labels, np.arange(NODES) % CLIQUES)
    join_near(full, 2 * CLIQUES, nodes, starts, window, 1, 9, 2)
    assert np.array_equal(full[:CLIQUES], CLIQUES + np.arange(CLIQUES))  # no room


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [
        ([3] * 9 + [1] * 9, 4),
        ([3] * 4, 4),
        ([4, 2, 4, 2, 4, 4, 2, 2], 6),
        ([1], 5),
        ([5] * 4, 5),
        ([7, 0, 9, 8] * 40, 32),
    ],
)
def test_packing_cuts_a_group_only_where_no_other_fits(sizes: list[int], batch_size: int) -> None:
    rng = np.random.default_rng(9)
    for _ in range(20):
        labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
        order, filled, cuts = pack(labels, rng.permutation(len(sizes)), batch_size)
        assert np.array_equal(np.sort(order), np.arange(len(labels)))
        packed = [label for label, _ in itertools.groupby(labels[order].tolist())]
        assert len(set(packed)) == len(packed) == filled
        end, found = 0, 0
        for place, label in enumerate(packed):
            room = batch_size - end % batch_size
            if sizes[label] > room:
                found += 1
                assert all(sizes[other] > room for other in packed[place:])
            end += sizes[label]
        assert found == cuts


def test_packing_leaves_groups_whole_where_two_sizes_fill_a_batch() -> None:
    sizes = np.random.default_rng(10).integers(8, 17, 5_000)
    labels = np.repeat(np.arange(5_000), sizes).astype(np.int32)
    batches = len(labels) // 256
    _, _, cuts = pack(labels, np.random.default_rng(11).permutation(5_000), 256)
    assert cuts < 0.05 * batches  # packed as they come, 90% of batches would cut one


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 1}, "batch_size = 1"),
        ({"neighbors": "nearest"}, "window, walk, communities"),
        ({"group": 1}, "group = 1"),
        ({"group": 17}, "group = 17"),
        ({"skip": 5, "width": 8}, "skip = 5, width = 8: the graph has k = 12"),
        ({"skip": 12}, "width = 0"),
        ({"skip": -1}, "skip = -1"),
        ({"restart": 1.5}, "restart = 1.5"),
        ({"same_node": 0}, "same_node = 0"),
        ({"same_node": 9}, "same_node = 9"),
        ({"random_share": -0.1}, "random_share = -0.1"),
        ({"rank": 2, "ranks": 2}, "rank = 2 of ranks = 2"),
        ({"nodes": []}, "0 samples make no batch"),
        ({"nodes": [-1, -1]}, "0 samples make no batch"),
        ({"nodes": [1, 2, 3], "drop_last": True}, "3 samples make no batch of 16"),
    ],
)
def test_an_option_out_of_range_is_named(cloud: SampleGraph, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        sampler_of(cloud, **{"batch_size": 16, **options})


@pytest.mark.parametrize(
    ("nodes", "named"),
    [([0, 500], "item 1 has node 500"), ([-2], "item 0 has node -2"), ([[0], [1]], r"\[2, 1\]"), ([0.5], "float64")],
)
def test_nodes_that_are_not_of_the_graph_are_named(cloud: SampleGraph, nodes: list[Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        sampler_of(cloud, 16, nodes=nodes)


def test_by_default_items_are_the_rows_of_the_store(cloud: SampleGraph) -> None:
    assert np.array_equal(cloud.sample_nodes(), np.arange(500))
    assert sorted(np.concatenate(list(sampler_of(cloud, 16)))) == list(range(500))


# --- ranks and resumption --------------------


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_the_rest_of_an_epoch_is_that_of_one_without_interruption(cloud: SampleGraph, ranks: int, taken: int) -> None:
    for rank in range(ranks):
        whole, rest = (sampler_of(cloud, 16, rank=rank, ranks=ranks, seed=3) for _ in range(2))
        whole.set_epoch(2)
        rest.set_epoch(2, skip_batches=taken)
        assert list(rest) == list(whole)[taken:]
        rest.set_epoch(3)
        whole.set_epoch(3)
        assert list(rest) == list(whole)
    with pytest.raises(ConfigError, match="resume with the nodes"):
        rest.set_epoch(2, skip_batches=len(rest) + 1)


def test_by_default_several_ranks_have_full_batches_and_one_has_every_sample(cloud: SampleGraph) -> None:
    assert {len(batch) for rank in all_ranks(cloud, 16, 3) for batch in rank} == {16}
    (alone,) = all_ranks(cloud, 16, 1)
    assert sum(map(len, alone)) == len(cloud.sample_nodes())


def test_a_sampler_made_before_its_rank_is_known_is_refused(
    cloud: SampleGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, told = sampler_of(cloud, 16), sampler_of(cloud, 16, rank=0, ranks=1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="made as rank 0 of 1, but this is rank 1 of 2"):
        next(iter(early))
    assert len(list(told)) == len(told)
    assert list(sampler_of(cloud, 16)) == list(sampler_of(cloud, 16, rank=1, ranks=2))
