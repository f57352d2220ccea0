"""Subsets against dense float64 references: formulas written out over matrices of all rows, of equal text too.

Stores have more rows than nodes. In `sparse` each of 2,000 nodes lists 32; in `full` each of 400 lists all others, so
that nothing is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize
from scipy.stats import chisquare

from graphbuild import SampleGraph
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import make_scenes
from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.select.clusters import clustered
from graphbuild.graph.select.subsets import METHODS, choose
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.graph.test_index import built

SCENES = 3_300
NODES = {"sparse": 2_000, "full": 400}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, words: str) -> dict[str, SampleGraph]:
    folder = tmp_path_factory.mktemp("subsets")
    texts: list[str | None] = [f"{caption(scene)}, no. {n % 7}" for n, scene in enumerate(make_scenes(SCENES))]
    distinct = list(dict.fromkeys(texts))
    found = {}
    for name, k in (("sparse", 32), ("full", 0)):
        some = texts[: texts.index(distinct[NODES[name] - 1]) + 1]
        some[40:40] = [None, None]  # rows without a node
        pl.DataFrame({"caption": some}).write_parquet(folder / f"{name}.parquet")
        embed = Embed(captions=str(folder / f"{name}.parquet"), encoder=words, shard_size=900)
        recipe = Recipe(embed=embed, index=Index(k=k))
        store = Store(str(folder / name))
        with Runner(workers=0) as runner:
            run_verb("embed", recipe, store, runner)
            run_verb("index", recipe, store, runner)
        found[name] = SampleGraph.open(store.url)
        assert len(found[name]) == NODES[name]
    return found


@pytest.fixture(params=["sparse", "full"])
def graph(request: pytest.FixtureRequest, stores: dict[str, SampleGraph]) -> SampleGraph:
    return stores[request.param]


# ---- the reference: files read by numpy and polars, matrices of all rows


class Dense:
    """Rows that may be chosen, by node, of a node by `best` first; similarities [n, n], NaN where neither node lists
    the other, 1 within a node."""

    def __init__(self, graph: SampleGraph, within: np.ndarray | None = None, best: np.ndarray | None = None) -> None:
        paths = sorted(Path(graph.url).glob("samples/*.parquet"))
        node = pl.concat([pl.read_parquet(path, columns=["node"]) for path in paths])["node"].fill_null(-1).to_numpy()
        rows = [row for row in range(len(node)) if node[row] >= 0 and (within is None or within[row])]
        rows.sort(key=lambda row: (node[row], 0 if best is None else -best[row], row))
        self.rows, self.nodes = np.array(rows), node[rows]
        listed = np.full((len(graph), len(graph)), np.nan)
        neighbors, similarities = (
            np.concatenate([np.load(path) for path in sorted(Path(graph.url).glob(f"graph/*.{name}.npy"))])
            for name in ("neighbors", "similarities")
        )
        for node_, (others, values) in enumerate(zip(neighbors, similarities, strict=True)):
            listed[node_, others] = values
            listed[others, node_] = values
        self.last = similarities[:, -1].astype(float)
        self.mean = similarities.astype(float).mean(axis=1)
        np.fill_diagonal(listed, 1)
        self.similarity = listed[np.ix_(self.nodes, self.nodes)]
        stored = np.concatenate([np.load(path) for path in sorted(Path(graph.url).glob("nodes/*.npy"))]).astype(float)
        self.vectors = (stored / np.linalg.norm(stored, axis=1, keepdims=True))[self.nodes]
        self.copies = np.array([int((self.nodes[:place] == node).sum()) for place, node in enumerate(self.nodes)])


def of_rows(values: np.ndarray, dense: Dense) -> np.ndarray:
    return values[dense.rows]


def greedy_cut(similarity: np.ndarray, count: int) -> list[int]:
    """Places taken one by one, each adding most to the sum of s over pairs of which one is in the set."""
    s = np.nan_to_num(similarity)
    inside = np.zeros(len(s), bool)
    for _ in range(count):
        gains = s @ (1.0 - inside) - s.diagonal() - s @ (1.0 * inside)
        gains[inside] = -np.inf
        inside[gains.argmax()] = True
    return np.flatnonzero(inside).tolist()


def test_sas_is_the_greedy_maximum_of_the_cut_over_all_rows(graph: SampleGraph) -> None:
    dense = Dense(graph)
    expected = dense.rows[greedy_cut(dense.similarity, len(graph) // 6)]
    assert choose(graph, len(graph) // 6, "sas", seed=0).tolist() == sorted(expected.tolist())


def test_sas_takes_from_each_class_its_share_and_sees_no_pair_of_two_classes(graph: SampleGraph) -> None:
    labels = np.array(["a", "b", "c"])[np.random.default_rng(1).choice(3, len(graph.sample_nodes()), p=[0.6, 0.3, 0.1])]
    dense = Dense(graph)
    first = {node: labels[row] for row, node in zip(dense.rows[::-1], dense.nodes[::-1], strict=True)}
    own = np.array([first[node] for node in dense.nodes])
    shares = {name: len(graph) // 6 * (own == name).mean() for name in "abc"}
    chosen = choose(graph, len(graph) // 6, "sas", seed=0, labels=labels)
    expected: list[int] = []
    for name in "abc":
        places = np.flatnonzero(own == name)
        count = int(np.isin(dense.rows[places], chosen).sum())
        assert abs(count - shares[name]) < 1
        expected += dense.rows[places[greedy_cut(dense.similarity[np.ix_(places, places)], count)]].tolist()
    assert chosen.tolist() == sorted(expected)


@pytest.mark.parametrize(("scored", "reverse"), [(False, 1.0), (True, 1.0), (True, 0.2)])
def test_d2_passes_messages_forward_once_and_back_at_every_choice(
    graph: SampleGraph, scored: bool, reverse: float
) -> None:
    scores = np.random.default_rng(2).random(len(graph.sample_nodes()))
    dense = Dense(graph, best=scores if scored else None)
    squared = 2 - 2 * dense.similarity
    forward, back = np.nan_to_num(np.exp(-squared)), np.nan_to_num(np.exp(-reverse * squared))
    x = forward @ (of_rows(scores, dense) if scored else np.ones(len(dense.rows)))  # the diagonal adds x itself
    x = np.round(x, 10)  # rows of a node are equal, whatever the order of the sum
    expected = []
    for _ in range(len(graph) // 6):
        k = int(x.argmax())
        expected.append(int(dense.rows[k]))
        x -= back[k] * x[k]
        x[dense.rows == dense.rows[k]] = -np.inf
    options = {"scores": scores} if scored else {}
    assert choose(graph, len(graph) // 6, "d2", seed=0, reverse=reverse, **options).tolist() == sorted(expected)


def test_k_center_takes_the_farthest_row_first_and_unlisted_ones_before_all_listed(graph: SampleGraph) -> None:
    dense = Dense(graph)
    distance = np.where(np.isnan(dense.similarity), np.inf, 1 - dense.similarity)
    nearest, expected = np.full(len(dense.rows), np.inf), []
    for _ in range(len(graph) // 6):
        far = np.where(np.isinf(nearest), 2 + (1 - dense.last[dense.nodes]), nearest)
        far[np.isin(dense.rows, expected)] = -np.inf
        k = int(far.argmax())
        expected.append(int(dense.rows[k]))
        nearest = np.minimum(nearest, distance[k])
    assert choose(graph, len(graph) // 6, "k-center", seed=0).tolist() == sorted(expected)


def test_k_center_over_complete_lists_is_gonzalez_s(stores: dict[str, SampleGraph]) -> None:
    dense = Dense(stores["full"])
    chosen = [int(np.nanmin(dense.similarity, axis=1).argmin())]
    nearest = 1 - dense.similarity[chosen[0]]
    while len(chosen) < 150:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, 1 - dense.similarity[chosen[-1]])
        nearest[chosen] = -1
    assert choose(stores["full"], 150, "k-center", seed=0).tolist() == sorted(dense.rows[chosen].tolist())


@pytest.mark.parametrize("scored", [False, True])
def test_semdedup_drops_the_rows_nearest_to_one_before_them(graph: SampleGraph, scored: bool) -> None:
    scores = np.random.default_rng(3).random(len(graph.sample_nodes()))
    dense = Dense(graph, best=scores if scored else None)
    first = {node: row for row, node in zip(dense.rows[::-1], dense.nodes[::-1], strict=True)}
    hardness = [scores[first[node]] if scored else -dense.mean[node] for node in dense.nodes]
    order = sorted(range(len(dense.rows)), key=lambda place: (-hardness[place], dense.nodes[place], place))
    before, keys = dense.similarity[np.ix_(order, order)], []
    for place in range(len(order)):
        known = before[place, :place][~np.isnan(before[place, :place])]
        keys.append(min(known.max(), 1) if len(known) else -np.inf)
    copies = dense.copies[order]
    last = sorted(range(len(order)), key=lambda place: (keys[place], place))
    expected = dense.rows[np.array(order)[last[: len(graph) // 6]]]
    options = {"scores": scores} if scored else {}
    assert choose(graph, len(graph) // 6, "semdedup", seed=0, **options).tolist() == sorted(expected.tolist())
    assert np.asarray(keys)[copies > 0].min() == 1


def clusters_of(dense: Dense, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row its cluster and its cosine to the centroid; and centroids: means of texts, scaled to norm 1."""
    first = {node: labels[row] for row, node in zip(dense.rows[::-1], dense.nodes[::-1], strict=True)}
    own = np.array([first[node] for node in dense.nodes])
    texts = dense.copies == 0
    centroids = np.array([dense.vectors[texts & (own == label)].mean(axis=0) for label in range(own.max() + 1)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return own, (dense.vectors * centroids[own]).sum(axis=1), centroids


@pytest.mark.parametrize(("temperature", "share"), [(0.5, 0.3), (0.02, 0.3), (0.005, 0.7), (0.5, 0.002)])
def test_density_keeps_more_of_complex_clusters_and_there_what_is_far_from_the_centroid(
    graph: SampleGraph, temperature: float, share: float
) -> None:
    count = round(share * len(graph))
    labels = np.random.default_rng(4).choice(6, len(graph.sample_nodes()), p=[0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
    dense = Dense(graph)
    own, cosine, centroids = clusters_of(dense, labels)
    texts = dense.copies == 0
    complexity = []
    for label in range(6):
        intra = (1 - cosine[texts & (own == label)]).mean()
        inter = np.mean([1 - centroids[label] @ centroids[other] for other in range(6) if other != label])
        complexity.append(intra * inter)
    weight = np.exp(np.array(complexity) / temperature)
    target, sizes = count * weight / weight.sum(), np.bincount(own)
    least = 1 if count >= 6 else 0
    solved = minimize(
        lambda x: ((x - target) ** 2).sum() / count,
        np.full(6, count / 6),
        jac=lambda x: 2 * (x - target) / count,
        bounds=[(least, size) for size in sizes],
        constraints={"type": "eq", "fun": lambda x: x.sum() - count, "jac": lambda x: np.ones(6)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1_000},
    )
    chosen = choose(graph, count, "density", seed=0, labels=labels, temperature=temperature)
    assert len(chosen) == count
    for label in range(6):
        places = np.flatnonzero(own == label)
        taken = np.isin(dense.rows[places], chosen)
        assert abs(taken.sum() - solved.x[label]) < 1.01
        order = sorted(places, key=lambda place: (dense.copies[place], cosine[place]))
        assert set(dense.rows[places[taken]]) == set(dense.rows[order[: taken.sum()]])


def test_clusters_without_labels_are_as_tight_as_those_of_scikit_learn(stores: dict[str, SampleGraph]) -> None:
    from sklearn.cluster import KMeans

    own, cosine, centroids = clustered(stores["sparse"], np.arange(2_000), None, 20, seed=0)
    dense = Dense(stores["sparse"])
    texts = dense.vectors[dense.copies == 0]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(own, (texts @ centroids.T).argmax(axis=1))
    np.testing.assert_allclose(cosine, (texts @ centroids.T).max(axis=1), atol=1e-5)
    reference = KMeans(20, n_init=1, random_state=0).fit(texts)
    directions = reference.cluster_centers_ / np.linalg.norm(reference.cluster_centers_, axis=1, keepdims=True)
    assert cosine.mean() > (texts @ directions.T).max(axis=1).mean() - 0.02
    for method in ("density", "sensitivity"):
        scores = {"scores": np.ones(len(stores["sparse"].sample_nodes()))} if method == "sensitivity" else {}
        first, again = (choose(stores["sparse"], 700, method, seed=3, clusters=20, **scores) for _ in range(2))
        assert first.tolist() == again.tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    """12 nodes, a row each, in 3 shards."""
    vectors = np.random.default_rng(6).standard_normal((12, 5))
    return SampleGraph.open(built(tmp_path_factory.mktemp("small"), vectors, k=4).url)


@pytest.mark.parametrize("scored", [False, True])
def test_sensitivity_draws_rows_in_proportion_to_their_sensitivity(small: SampleGraph, scored: bool) -> None:
    stored = np.concatenate([np.load(path) for path in sorted(Path(small.url).glob("nodes/*.npy"))]).astype(float)
    x = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    labels, losses = np.arange(12) % 3, np.random.default_rng(7).random(12) * 3
    chances = []
    centroids = [x[labels == label].mean(axis=0) for label in range(3)]
    distances = [((x[i] - centroids[i % 3] / np.linalg.norm(centroids[i % 3])) ** 2).sum() for i in range(12)]
    for i in range(12):
        own = losses[labels == labels[i]].mean() + 2 * distances[i]
        chances.append(own if scored else distances[i] / sum(distances) + 1 / 4)
    options: dict[str, Any] = {"scores": losses, "holder": 2.0} if scored else {}
    drawn = [int(choose(small, 1, "sensitivity", seed=seed, labels=labels, **options)[0]) for seed in range(1_500)]
    expected = 1_500 * np.array(chances) / np.sum(chances)
    assert chisquare(np.bincount(drawn, minlength=12), expected).pvalue > 0.001
    assert expected.max() / expected.min() > 1.3  # or the test could not tell them from equal chances


def test_random_draws_every_row_as_often(small: SampleGraph) -> None:
    drawn = np.concatenate([choose(small, 5, "random", seed=seed) for seed in range(600)])
    assert chisquare(np.bincount(drawn, minlength=12)).pvalue > 0.001


# ---- what holds for all


def arguments(method: str, graph: SampleGraph) -> dict[str, Any]:
    """Scores or labels where the method must have them."""
    return {"labels": np.arange(len(graph.sample_nodes())) % 9} if method in ("sensitivity", "density") else {}


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_distinct_ascending_of_those_allowed_and_the_same_when_asked_again(
    graph: SampleGraph, method: str
) -> None:
    within = np.random.default_rng(8).random(len(graph.sample_nodes())) < 0.5
    chosen = choose(graph, 100, method, seed=1, within=within, **arguments(method, graph))
    assert chosen.dtype == np.int64
    assert len(chosen) == 100
    assert (np.diff(chosen) > 0).all()
    assert within[chosen].all()
    assert (graph.sample_nodes()[chosen] >= 0).all()
    again = choose(graph, 100, method, seed=1, within=within, **arguments(method, graph))
    assert chosen.tolist() == again.tolist()
    allowed = np.flatnonzero(within & (graph.sample_nodes() >= 0))
    every = choose(graph, len(allowed), method, seed=1, within=within, **arguments(method, graph))
    assert every.tolist() == allowed.tolist()


@pytest.mark.parametrize("method", ["sas", "d2", "k-center", "semdedup"])
def test_what_may_not_be_chosen_counts_as_if_it_were_not_there(stores: dict[str, SampleGraph], method: str) -> None:
    """For sas and k-center against the dense reference without these rows."""
    graph = stores["full"]
    within = np.random.default_rng(9).random(len(graph.sample_nodes())) < 0.4
    dense = Dense(graph, within)
    chosen = choose(graph, 60, method, seed=0, within=within)
    if method == "sas":
        assert chosen.tolist() == sorted(dense.rows[greedy_cut(dense.similarity, 60)].tolist())
    assert set(chosen) <= set(dense.rows)


@pytest.mark.parametrize("method", ["k-center", "semdedup"])
def test_no_text_comes_twice_while_others_are_left(graph: SampleGraph, method: str) -> None:
    chosen = choose(graph, len(graph) - 10, method, seed=0)
    assert len(np.unique(graph.sample_nodes()[chosen])) == len(graph) - 10
    first = [int(np.flatnonzero(graph.sample_nodes() == node)[0]) for node in graph.sample_nodes()[chosen]]
    assert chosen.tolist() == first


@pytest.mark.parametrize("method", ["sas", "d2", "k-center", "semdedup"])
def test_of_equal_values_the_smallest_rows_come_first(tmp_path: Path, method: str) -> None:
    graph = SampleGraph.open(built(tmp_path, np.eye(9), k=8).url)
    assert choose(graph, 4, method, seed=0).tolist() == [0, 1, 2, 3]


def test_two_seeds_draw_two_subsets(graph: SampleGraph) -> None:
    for method in ("random", "sensitivity"):
        given = arguments(method, graph)
        assert (
            choose(graph, 100, method, seed=1, **given).tolist() != choose(graph, 100, method, seed=2, **given).tolist()
        )


@pytest.mark.parametrize(
    ("method", "changed", "error", "said"),
    [
        ("best", {}, ConfigError, "no method 'best'.*\n.*sas, d2, density"),
        ("sas", {"count": 0}, ConfigError, "0 rows cannot be chosen of 12.*\n.*between 1 and 12"),
        ("sas", {"count": 13}, ConfigError, "13 rows cannot be chosen of 12"),
        ("random", {"within": np.arange(12) < 3}, ConfigError, "5 rows cannot be chosen of 3"),
        ("k-center", {"scores": np.ones(12)}, ConfigError, "k-center takes no scores.*\n.*d2, semdedup, sensitivity"),
        ("d2", {"labels": np.ones(12)}, ConfigError, "d2 takes no labels"),
        ("d2", {"scores": np.ones(11)}, InputError, r"scores are float64 \[11\]; the store has 12 rows"),
        ("d2", {"scores": np.array(["x"] * 12)}, InputError, "scores are <U1"),
        ("d2", {"scores": np.where(np.arange(12) == 7, np.nan, 1)}, InputError, "score of row 7 is no finite number"),
        ("d2", {"reverse": -1.0}, ConfigError, "reverse = -1.0"),
        ("density", {"temperature": 0.0}, ConfigError, "temperature = 0.0"),
        ("sas", {"within": np.arange(5)}, InputError, r"within are int64 \[5\]"),
        ("sensitivity", {}, ConfigError, "needs scores or labels"),
        ("sensitivity", {"scores": np.arange(12) - 1.0}, InputError, "score of row 0 is below 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    small: SampleGraph, method: str, changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    arguments: dict[str, Any] = {"count": 5} | changed
    with pytest.raises(error, match=said):
        choose(small, arguments.pop("count"), method, seed=0, **arguments)
