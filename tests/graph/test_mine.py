"""Derived lists against brute force: cosines of all pairs, components of scipy, windows and margins in plain loops."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError, StageError
from graphbuild.graph.lists import derived
from graphbuild.graph.lists.mine import LISTS, mine_store
from graphbuild.job.verbs import run_verb
from graphbuild.mine import false_negative_edges, false_negatives, hard_negatives, near_duplicates, neighbor_positives
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.graph.test_index import built, cosines

CAPTIONS: list[list[str | None]] = [
    ["a dog runs in the snow", "a dog is running in the snow", "two red apples", None, "a dog runs in the snow"],
    [
        "a man plays the guitar",
        "two red apples",
        "a dog running in snow",
        "a man is playing a guitar",
        "the sea at night",
    ],
    ["the sea by night", "a bowl of soup", "two red apples", "a woman plays the guitar", "the old town hall"],
]


def clusters(sizes: list[int], noise: float, d: int = 16, seed: int = 3) -> np.ndarray:
    """Vectors around a random centre each cluster, in mixed order."""
    draw = np.random.default_rng(seed)
    centres = np.repeat(draw.standard_normal((len(sizes), d)), sizes, axis=0)
    return draw.permutation(centres + noise * draw.standard_normal(centres.shape)).astype(np.float16)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    """200 nodes in clusters of 1 to 7, in three shards; k = 9."""
    vectors = clusters([1, 2, 3, 5, 7, 4, 3] * 8, noise=0.3)
    return SampleGraph.open(built(tmp_path_factory.mktemp("mine"), vectors, k=9).url)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    """CAPTIONS as a store: a tar each list, keys 000000 and so on; None has no caption."""
    folder = tmp_path_factory.mktemp("captioned")
    key = 0
    for number, captions in enumerate(CAPTIONS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for caption in captions:
                for extension, content in (("jpg", b"\xff\xd8\xff\xd9"), ("txt", caption and caption.encode())):
                    if content:
                        info = tarfile.TarInfo(f"{key:06d}.{extension}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                key += 1
    recipe = Recipe(embed=Embed(shards=f"{folder}/*.tar"), index=Index(k=7))
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner)
    return SampleGraph.open(store.url)


@pytest.fixture(params=["graph", "captioned"])
def either(request: pytest.FixtureRequest) -> SampleGraph:
    found: SampleGraph = request.getfixturevalue(request.param)
    return found


# ---- the reference: files read by numpy and polars, float64, loops


def similarities(graph: SampleGraph) -> np.ndarray:
    """All pairs' cosines [M, M] of the stored vectors, rounded to float16 as the store rounds them, as float64."""
    stored = np.concatenate([np.load(path) for path in sorted(Path(graph.url).glob("nodes/*.npy"))])
    return cosines(stored).astype(np.float32).astype(np.float16).astype(np.float64)


def lists(graph: SampleGraph) -> tuple[np.ndarray, np.ndarray]:
    names = ("neighbors", "similarities")
    both = [[np.load(path) for path in sorted(Path(graph.url).glob(f"graph/*.{name}.npy"))] for name in names]
    return np.concatenate(both[0]).astype(int), np.concatenate(both[1]).astype(float)


def sample_rows(graph: SampleGraph) -> list[dict[str, Any]]:
    paths = sorted(Path(graph.url).glob("samples/*.parquet"))
    return [row | {"shard": path.stem} for path in paths for row in pl.read_parquet(path).to_dicts()]


def components(close: np.ndarray) -> list[list[int]]:
    """Nodes of each connected component, ascending."""
    count, label = connected_components(csr_array(close), directed=False)
    return [np.flatnonzero(label == group).tolist() for group in range(count)]


def expected_groups(graph: SampleGraph, threshold: float) -> dict[int, list[dict[str, Any]]]:
    """Smallest node -> the samples of each component of two or more samples, over all pairs."""
    close = similarities(graph) >= threshold
    found = {
        nodes[0]: [sample for sample in sample_rows(graph) if sample["node"] in nodes] for nodes in components(close)
    }
    return {group: samples for group, samples in found.items() if len(samples) > 1}


# ---- duplicates


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.95])
def test_groups_are_the_connected_components_over_all_pairs(either: SampleGraph, threshold: float) -> None:
    found = near_duplicates(either, threshold)
    table = found.table()
    expected = expected_groups(either, threshold)
    assert expected
    assert found.counts["truncated_nodes"] == 0
    assert found.counts["groups"] == len(expected)
    assert found.counts["samples"] == len(table) == sum(map(len, expected.values()))
    assert found.counts["samples_to_drop"] == len(table) - len(expected)
    columns = ["row", "key", "shard", "node", "caption"]
    for group, samples in expected.items():
        rows = table.filter(np.array(table["group"]) == group).select(columns).to_pylist()
        assert rows == [{name: sample[name] for name in columns} for sample in samples]
    assert table["row"].to_pylist() == sorted(table["row"].to_pylist())


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.95])
def test_kept_is_one_sample_a_group_of_the_node_with_the_most_similarity_in_it(
    either: SampleGraph, threshold: float
) -> None:
    found = near_duplicates(either, threshold)
    table = found.table()
    ids, stored = lists(either)
    exact = similarities(either)
    strength = np.zeros(len(either))
    for node, (row, values) in enumerate(zip(ids, stored, strict=True)):
        for other, value in zip(row, values, strict=True):
            if value >= threshold:
                strength[node] += value
                strength[other] += value
    chained = 0
    for samples in expected_groups(either, threshold).values():
        nodes = sorted({sample["node"] for sample in samples})
        kept = max(nodes, key=lambda node: (strength[node], -node))
        first = min(sample["row"] for sample in samples if sample["node"] == kept)
        for sample in samples:
            row = table.filter(np.array(table["row"]) == sample["row"]).to_pylist()[0]
            assert row["keep"] == (sample["row"] == first)
            assert row["similarity"] == pytest.approx(exact[sample["node"], kept], abs=3e-4)
            chained += row["similarity"] < threshold
    assert found.counts["chained_samples"] == chained


def test_samples_of_one_node_are_duplicates_at_one_and_one_without_a_caption_is_none(captioned: SampleGraph) -> None:
    table = near_duplicates(captioned, 1.0).table().to_pylist()
    assert [(row["row"], row["key"], row["shard"], row["caption"], row["keep"]) for row in table] == [
        (0, "000000", "00000", "a dog runs in the snow", True),
        (2, "000002", "00000", "two red apples", True),
        (4, "000004", "00000", "a dog runs in the snow", False),
        (6, "000006", "00001", "two red apples", False),
        (12, "000012", "00002", "two red apples", False),
    ]
    assert {row["similarity"] for row in table} == {1.0}


def angles(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_the_middle_of_a_chain_is_kept_and_its_far_ends_are_counted(tmp_path: Path) -> None:
    vectors = angles(0, 10, 20, 30, 40, 120, 200)  # cos 10 = 0.985, cos 20 = 0.940
    found = near_duplicates(SampleGraph.open(built(tmp_path, vectors, k=5).url), 0.96)
    table = found.table()
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["keep"].to_pylist() == [False, True, False, False, False]  # 1, 2 and 3 have two edges each
    np.testing.assert_allclose(table["similarity"], np.cos(np.radians([10, 0, 10, 20, 30])), atol=1e-3)
    assert found.counts["chained_samples"] == 2


def test_a_hub_is_kept_over_smaller_nodes(tmp_path: Path) -> None:
    leaves = np.hstack([np.full((3, 1), 3.0), np.eye(3)])  # 0.949 from the hub, 0.9 from each other
    vectors = np.vstack([leaves, [[1, 0, 0, 0]], -np.eye(4)])
    found = near_duplicates(SampleGraph.open(built(tmp_path, vectors, k=4).url), 0.93)
    assert found.table()["keep"].to_pylist() == [False, False, False, True]
    assert found.counts["chained_samples"] == 0


def test_what_lists_a_node_makes_it_central_though_its_own_list_is_full(tmp_path: Path) -> None:
    axes = np.eye(10)
    close = 0.95 * axes[0] + 0.312 * axes[1] + 0.01 * axes[2:7]  # 5 alike, 0.95 from the hub
    leaves = 0.93 * axes[0] + 0.368 * axes[2:10]  # 8, 0.93 from the hub, below 0.89 from all others
    vectors = np.vstack([close, leaves, axes[:1]])
    graph = SampleGraph.open(built(tmp_path, vectors, k=4).url)  # the hub lists 4 of the 5, and no leaf
    found = near_duplicates(graph, 0.92).table()
    assert found["keep"].to_pylist() == [False] * 13 + [True]
    assert similarities(graph).sum(axis=1).argmax() == 13  # nearest the mean


def test_a_pair_is_missed_only_between_truncated_nodes_and_these_are_counted(tmp_path: Path) -> None:
    vectors = np.vstack([clusters([12], 0.02, seed=1), clusters([12], 0.02, seed=1) + 0.3, clusters([5, 1, 1], 0.05)])
    graph = SampleGraph.open(built(tmp_path, vectors, k=9).url)
    close = similarities(graph) >= 0.9
    np.fill_diagonal(close, False)
    ids, stored = lists(graph)
    truncated = set(np.flatnonzero(stored[:, -1] >= 0.9).tolist())
    found = near_duplicates(graph, 0.9)
    assert [len(group) for group in groups_of(found.table())] == [12, 12, 5]
    assert found.counts["truncated_nodes"] == len(truncated) == 24
    missed = [(i, j) for i, j in np.argwhere(close) if j not in ids[i] and i not in ids[j]]
    assert missed
    assert all(i in truncated and j in truncated for i, j in missed)
    assert sorted(map(len, components(close))) == [1, 1, 5, 24]  # all pairs make one of the two groups of 12


def groups_of(table: Any) -> Iterator[Any]:
    for group in sorted(set(table["group"].to_pylist())):
        yield table.filter(np.array(table["group"]) == group)


def test_lists_that_hold_every_other_node_are_never_truncated(tmp_path: Path) -> None:
    graph = SampleGraph.open(built(tmp_path, clusters([8], 0.01), k=7).url)
    found = near_duplicates(graph, 0.5)
    assert len(found.table()) == 8
    assert found.counts["truncated_nodes"] == 0
    edges = false_negative_edges(graph, 0.5)
    assert len(edges.table()) == 8 * 7
    assert edges.counts["truncated_nodes"] == 0


# ---- hard negatives


def expected_negatives(
    graph: SampleGraph,
    *,
    count: int = 10,
    skip: int = 0,
    positive: Any = 1.0,
    absolute_margin: float = 0.0,
    relative_margin: float = 0.05,
    min_similarity: float = -1.0,
    max_similarity: float = 1.0,
) -> list[tuple[int, int, int, int, float]]:
    ids, stored = lists(graph)
    found = []
    for sample in sample_rows(graph):
        if sample["node"] is None:
            continue
        score = positive if np.isscalar(positive) else float(positive[sample["row"]])
        taken = 0
        for place, (other, value) in enumerate(zip(ids[sample["node"]], stored[sample["node"]], strict=True)):
            if place < skip or taken == count:
                continue
            if value >= score - absolute_margin or value >= score - relative_margin * abs(score):
                continue
            if min_similarity <= value <= max_similarity:
                found.append((sample["row"], sample["node"], int(other), place + 1, float(value)))
                taken += 1
    return found


RULES: list[dict[str, Any]] = [
    {"count": 3},
    {"count": 2, "skip": 4},
    {"count": 5, "relative_margin": 0.3},
    {"count": 4, "relative_margin": 0.0, "positive": 0.45},
    {"count": 4, "absolute_margin": 0.4},
    {"count": 7, "min_similarity": 0.2, "max_similarity": 0.7},
    {"count": 2, "skip": 1, "positive": 0.9, "absolute_margin": 0.1, "relative_margin": 0.2, "min_similarity": 0.1},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_hard_negatives_are_those_of_plain_loops(either: SampleGraph, rules: dict[str, Any]) -> None:
    found = hard_negatives(either, **rules)
    rows = [tuple(row.values()) for row in found.table().to_pylist()]
    expected = expected_negatives(either, **rules)
    assert rows == expected
    anchors = [sample["row"] for sample in sample_rows(either) if sample["node"] is not None]
    taken = np.bincount([row for row, *_ in expected], minlength=max(anchors) + 1)[anchors]
    assert found.counts["anchors"] == len(anchors)
    assert found.counts["anchors_with_fewer"] == (taken < rules["count"]).sum()


def test_the_rules_bite(graph: SampleGraph) -> None:
    found = [expected_negatives(graph, **rules) for rules in RULES]
    nearest = [expected_negatives(graph, count=rules["count"], relative_margin=0, positive=2) for rules in RULES]
    assert all(rows and rows != others for rows, others in zip(found, nearest, strict=True))


def test_the_relative_margin_is_a_share_of_the_magnitude(tmp_path: Path) -> None:
    graph = SampleGraph.open(built(tmp_path, angles(0, 95, 100, 110, 130, 180), k=5).url)
    found = hard_negatives(graph, count=5, positive=-0.3, relative_margin=0.5).table()  # bound -0.45
    of_first = found.filter(np.array(found["row"]) == 0)
    assert of_first["neighbor"].to_pylist() == [4, 5]  # cosines -0.64 and -1, not -0.17 and -0.34


def test_each_sample_is_measured_by_its_own_score(either: SampleGraph) -> None:
    samples = sample_rows(either)
    scores = np.random.default_rng(0).uniform(0.2, 0.9, len(samples)).astype(np.float32)
    scores[[sample["node"] is None for sample in samples]] = np.nan
    rows = [tuple(row.values()) for row in hard_negatives(either, count=4, positive=scores).table().to_pylist()]
    assert rows == expected_negatives(either, count=4, positive=scores)


def test_negatives_join_with_samples_and_nodes_to_triplets(captioned: SampleGraph) -> None:
    store = Path(captioned.url)
    mine_store(Store(captioned.url), "hard-negatives", {"count": 1, "max_similarity": 0.6})
    negatives = pl.scan_parquet(store / "mined/hard-negatives.parquet")
    samples = pl.scan_parquet(store / "samples/*.parquet").select("row", "key", positive="caption")
    texts = pl.scan_parquet(store / "nodes/*.parquet").select(neighbor="node", negative="text")
    triplets = negatives.join(samples, on="row").join(texts, on="neighbor").sort("row")
    found = {row["key"]: (row["positive"], row["negative"]) for row in triplets.collect().to_dicts()}
    captions = [caption for part in CAPTIONS for caption in part]
    assert len(found) == len(captions) - 1
    texts_of = pl.read_parquet(store / "nodes/*.parquet").sort("node")["text"].to_list()
    exact = similarities(captioned)
    for key, (positive, negative) in found.items():
        assert positive == captions[int(key)]
        own = exact[texts_of.index(positive)]
        assert own[texts_of.index(negative)] == max(value for value in own if value <= 0.6)


# ---- false negatives and positives


@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("source", ["embeddings", "edges"])
def test_a_batch_mask_is_true_where_cosines_reach_the_threshold(
    graph: SampleGraph, source: Any, threshold: float
) -> None:
    nodes = np.random.default_rng(2).integers(0, 200, 150)
    ids, _ = lists(graph)
    exact = similarities(graph)
    found = false_negatives(graph, nodes, threshold, source=source)
    assert found.dtype == bool
    for i, a in enumerate(nodes):
        for j, b in enumerate(nodes):
            listed = a == b or b in ids[a] or a in ids[b]
            expected = i != j and exact[a, b] >= threshold and (source == "embeddings" or listed)
            assert found[i, j] == expected, (i, j)
    assert found.any()


def expected_edges(graph: SampleGraph, threshold: float, count: int, mutual: bool) -> list[tuple[int, int, int, float]]:
    ids, stored = lists(graph)
    found = []
    for node in range(len(graph)):
        pairs = enumerate(zip(ids[node], stored[node], strict=True), 1)
        kept = [(node, int(other), rank, float(value)) for rank, (other, value) in pairs if value >= threshold]
        found += [edge for edge in kept if not mutual or node in ids[edge[1]]][:count]
    return found


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.9])
def test_false_negative_edges_are_all_at_the_threshold(either: SampleGraph, threshold: float) -> None:
    found = false_negative_edges(either, threshold)
    rows = [tuple(row.values()) for row in found.table().to_pylist()]
    assert rows == expected_edges(either, threshold, either.k, False)
    _, stored = lists(either)
    assert found.counts == {
        "edges": len(rows),
        "nodes_without_any": (stored[:, 0] < threshold).sum(),
        "truncated_nodes": (stored[:, -1] >= threshold).sum(),
    }


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("threshold", [-1.0, 0.3])
def test_positives_are_the_nearest_at_the_threshold(
    graph: SampleGraph, threshold: float, count: int, mutual: bool
) -> None:
    found = neighbor_positives(graph, threshold, count=count, mutual=mutual)
    rows = [tuple(row.values()) for row in found.table().to_pylist()]
    assert rows == expected_edges(graph, threshold, count, mutual)
    assert found.counts["nodes_without_any"] == 200 - len({node for node, *_ in rows})
    assert len(expected_edges(graph, threshold, 9, True)) < len(expected_edges(graph, threshold, 9, False))


# ---- how they are made and written


ALL: dict[str, dict[str, Any]] = {
    "duplicates": {"threshold": 0.8},
    "hard-negatives": {"count": 3},
    "false-negatives": {"threshold": 0.5},
    "positives": {"threshold": 0.3, "mutual": True},
}


@pytest.mark.parametrize("what", ALL)
def test_pieces_and_row_groups_of_any_size_make_the_same_list(
    either: SampleGraph, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = LISTS[what](either, **ALL[what]).table()
    monkeypatch.setattr(derived, "BLOCK", 3)
    monkeypatch.setattr(derived, "ROW_GROUP", 5)
    parts = list(LISTS[what](either, **ALL[what]))
    if what != "duplicates":  # whose parts are shards
        assert max(map(len, parts)) <= 3 * either.k
    mine_store(Store(either.url), what, ALL[what], str(tmp_path / "list.parquet"))
    file = pq.ParquetFile(tmp_path / "list.parquet")
    assert file.metadata.num_row_groups > 1
    assert all(file.metadata.row_group(group).num_rows <= 5 for group in range(file.metadata.num_row_groups))
    assert file.read().equals(whole)


@pytest.mark.parametrize("what", ALL)
def test_a_file_says_what_it_is(graph: SampleGraph, what: str, tmp_path: Path) -> None:
    said = mine_store(Store(graph.url), what, ALL[what], str(tmp_path / "list.parquet"))
    found = LISTS[what](graph, **ALL[what])
    table = found.table()
    assert said == f"mine      {len(table):,} rows, in {tmp_path}/list.parquet"
    about = json.loads(pq.read_metadata(tmp_path / "list.parquet").metadata[b"graphbuild"])
    assert about["options"].items() >= ALL[what].items()
    assert about["graph"] == json.loads((Path(graph.url) / "manifest.json").read_bytes())["graph"]["fingerprint"]
    assert about["counts"] == found.counts
    assert (about["format_version"], about["what"], about["rows"]) == (1, what, len(table))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("duplicates", {"threshold": 1.0}),
        ("hard-negatives", {"min_similarity": 0.5, "max_similarity": 0.4, "count": 1}),
        ("false-negatives", {"threshold": 1.0}),
        ("positives", {"threshold": 1.0}),
    ],
)
def test_an_empty_list_is_a_file_without_rows_and_said_so(
    graph: SampleGraph, what: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "graphbuild")
    assert "mine      0 rows" in mine_store(Store(graph.url), what, options, str(tmp_path / "list.parquet"))
    assert "nothing passed the filter: the file has 0 rows" in caplog.text
    found = pq.read_table(tmp_path / "list.parquet")
    assert len(found) == 0
    assert found.schema.equals(LISTS[what](graph, **options).schema)


def test_a_list_that_fails_halfway_leaves_no_file_and_the_old_one_as_it_was(tmp_path: Path) -> None:
    store = built(tmp_path, clusters([3] * 50, 0.1), k=5)
    mine_store(store, "duplicates", {"threshold": 0.9})
    before = (Path(store.url) / "mined/duplicates.parquet").read_bytes()
    (Path(store.url) / "samples/00001.parquet").write_bytes(b"PAR1")
    for out in (None, str(tmp_path / "lists/duplicates.parquet")):
        with pytest.raises(StageError, match=r"00001\.parquet"):
            mine_store(store, "hard-negatives", {"count": 2}, out)
    assert [path.name for path in (Path(store.url) / "mined").iterdir()] == ["duplicates.parquet"]
    assert (Path(store.url) / "mined/duplicates.parquet").read_bytes() == before
    assert list((tmp_path / "lists").iterdir()) == []


# ---- what is refused


@pytest.mark.parametrize("threshold", [-1.01, 1.5, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(graph: SampleGraph, threshold: float) -> None:
    for refuse in (near_duplicates, false_negative_edges, neighbor_positives):
        with pytest.raises(ConfigError, match="threshold = "):
            refuse(graph, threshold)
    with pytest.raises(ConfigError, match="threshold = "):
        false_negatives(graph, [0, 1], threshold)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"count": 10}, "k = 9"),
        ({"count": 4, "skip": 6}, "skip = 6 and count = 4"),
        ({"count": 0}, "count = 0"),
        ({"count": 1, "skip": -1}, "skip = -1"),
        ({"count": 1, "absolute_margin": -0.1}, "absolute_margin = -0.1"),
        ({"count": 1, "relative_margin": float("nan")}, "relative_margin = nan"),
        ({"count": 1, "min_similarity": -2}, "min_similarity = -2"),
        ({"count": 1, "max_similarity": 1.1}, "max_similarity = 1.1"),
        ({"count": 1, "positive": 1.5}, "positive = 1.5"),
    ],
)
def test_a_rule_out_of_range_is_refused_by_name(graph: SampleGraph, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        hard_negatives(graph, **options)


def test_scores_that_do_not_fit_are_refused_with_their_row(captioned: SampleGraph) -> None:
    with pytest.raises(InputError, match=r"\[14\].*\n.*\[15\]"):
        hard_negatives(captioned, count=1, positive=np.ones(14))
    scores = np.full(15, 0.3)
    scores[[3, 7]] = np.nan  # row 3 has no node
    with pytest.raises(InputError, match=r"row 7 .*\(1 such rows\)"):
        hard_negatives(captioned, count=1, positive=scores)


def test_a_count_of_no_positives_is_refused(graph: SampleGraph) -> None:
    with pytest.raises(ConfigError, match="count = 0"):
        neighbor_positives(graph, 0.5, count=0)


@pytest.mark.parametrize(
    ("nodes", "named"),
    [([0, 200], "node id 200 "), ([-1, 0], "node id -1 "), ([[0, 1]], r"\[1, 2\]"), ([0.5, 1.0], "float64")],
)
def test_nodes_that_are_no_ids_are_refused(graph: SampleGraph, nodes: Any, named: str) -> None:
    for source in ("embeddings", "edges"):
        with pytest.raises(InputError, match=named):
            false_negatives(graph, nodes, 0.5, source=source)  # type: ignore[arg-type]


def test_a_list_can_be_read_again_and_its_counts_only_after_it_was_read(graph: SampleGraph) -> None:
    found = hard_negatives(graph, count=2)
    with pytest.raises(ConfigError, match="counts of hard-negatives"):
        _ = found.counts
    next(iter(found))
    with pytest.raises(ConfigError, match="counts of hard-negatives"):
        _ = found.counts
    first = found.table()
    assert found.table().equals(first)
    assert found.counts["anchors"] == 200


def test_a_similarity_equal_to_the_bound_reaches_it(graph: SampleGraph) -> None:
    _, stored = lists(graph)
    bound = float(stored[7, 3])
    edges = false_negative_edges(graph, bound).table().to_pylist()
    assert (7, 4) in {(edge["node"], edge["rank"]) for edge in edges}
    assert min(edge["similarity"] for edge in edges) == bound
    below = hard_negatives(graph, count=9, positive=bound, relative_margin=0).table()["similarity"].to_numpy()
    between = hard_negatives(graph, count=9, min_similarity=bound, max_similarity=bound).table().to_pylist()
    assert below.max() < bound
    assert (7, 4) in {(row["node"], row["rank"]) for row in between}
    assert {row["similarity"] for row in between} == {bound}


def test_options_may_be_numpy_scalars(graph: SampleGraph, tmp_path: Path) -> None:
    options = {"threshold": np.float32(0.25), "count": np.int64(2)}
    mine_store(Store(graph.url), "positives", options, str(tmp_path / "list.parquet"))
    about = json.loads(pq.read_metadata(tmp_path / "list.parquet").metadata[b"graphbuild"])
    assert about["options"] == {"threshold": 0.25, "count": 2, "mutual": False}
