"""The certificate of arrays against float64 brute force written out: metric, recall, deficit, planted faults."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import faiss
import numpy as np
import pytest

from graphbuild.errors import InputError
from graphbuild.graph.recall.certificate import certify_graph

N, D, K = 600, 24, 8


def clustered(seed: int = 0, nodes: int = N) -> np.ndarray:
    """Vectors of unequal norms around 30 centres, far from the origin: each metric has other neighbours."""
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((30, D))[draw.integers(30, size=nodes)] + 0.4 * draw.standard_normal((nodes, D))
    return np.asarray((vectors + 0.5) * draw.uniform(0.5, 2, (nodes, 1)))


def nearness(vectors: np.ndarray, metric: str, queries: np.ndarray | None = None) -> np.ndarray:
    """Float64, larger for nearer; of all pairs, -inf with itself."""
    x = vectors.astype(np.float64)
    q = x if queries is None else queries.astype(np.float64)
    if metric == "l2":
        found = np.array([-np.linalg.norm(x - one, axis=1) for one in q])
    else:
        found = q @ x.T
        if metric == "cosine":
            found = found / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    if queries is None:
        np.fill_diagonal(found, -np.inf)
    return found


def graph(near: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    lists = np.argsort(-near, axis=1, kind="stable")[:, :k]
    return lists, np.take_along_axis(near, lists, axis=1)


@pytest.mark.parametrize(
    ("form", "metric", "write"),
    [
        ("cosine", "cosine", lambda s: s),
        ("1 - cosine", "cosine", lambda s: 1 - s),
        ("inner product", "inner-product", lambda s: s),
        ("1 - inner product", "inner-product", lambda s: 1 - s),
        ("negated inner product", "inner-product", lambda s: -s),
        ("L2 distance", "l2", lambda s: -s),
        ("squared L2 distance", "l2", lambda s: s * s),
        ("L2 distance of unit vectors", "cosine", lambda s: np.sqrt(2 - 2 * s)),
        ("squared L2 distance of unit vectors", "cosine", lambda s: 2 - 2 * s),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_what_a_tool_wrote_for_a_pair_is_found_out(
    form: str, metric: str, write: Callable[[np.ndarray], np.ndarray], dtype: type
) -> None:
    vectors = clustered()
    lists, scores = graph(nearness(vectors, metric))
    found = certify_graph(vectors.astype(np.float32), lists, write(scores).astype(dtype), sample=N)
    assert (found["metric"], found["similarities"]["form"], found["faults"]) == (metric, form, [])
    assert found["metric_found_by"] == "the similarities"
    assert found["recall"] > 0.999  # vectors are rounded


@pytest.mark.parametrize(
    ("metric", "offset"),
    [("cosine", 0), ("cosine", 100), ("inner-product", 0), ("inner-product", 1e4), ("l2", 0), ("l2", 1e4)],
)
def test_recall_deficit_and_worst_nodes_are_those_of_brute_force(metric: str, offset: float) -> None:
    vectors = clustered(1) + offset
    near = nearness(vectors, metric)
    lists, scores = graph(near)
    far = np.argsort(near, axis=1)[:, 1 : K + 1]  # the farthest but itself
    spoiled, places = np.arange(0, N, 7), np.arange(N) % K
    lists[spoiled, places[spoiled]] = far[spoiled, 0]
    lists[3] = far[3]
    kept = np.take_along_axis(near, lists, axis=1)
    recalls = (kept >= scores[:, -1:]).mean(axis=1)
    found = certify_graph(vectors, lists, metric=metric, sample=N)  # type: ignore[arg-type]
    assert found["recall"] == pytest.approx(recalls.mean(), abs=1e-9)
    assert found["worst_nodes"][0] == {"node": 3, "recall": 0.0}
    assert {one["node"] for one in found["worst_nodes"]} <= {3, *spoiled.tolist()}
    what = "mean_distance_excess" if metric == "l2" else "mean_similarity_deficit"
    assert found[what] == pytest.approx((scores - -np.sort(-kept, axis=1)).mean(), rel=1e-6, abs=2e-9)
    half = certify_graph(vectors, lists, metric=metric, sample=N // 2)  # type: ignore[arg-type]
    assert half["recall_95_low"] <= recalls.mean() <= half["recall_95_high"]


@pytest.mark.parametrize("metric", ["cosine", "inner-product", "l2"])
def test_the_metric_is_found_by_the_lists_alone_also_of_a_poor_graph(metric: str) -> None:
    vectors = clustered(2)
    lists, _ = graph(nearness(vectors, metric), 2 * K)
    poor = np.where(np.random.default_rng(0).random((N, K)) < 0.3, lists[:, K:], lists[:, :K])
    for some in (lists, poor):
        found = certify_graph(vectors, some)
        assert (found["metric"], found["metric_found_by"], found["faults"]) == (metric, "the lists", [])
    assert found["recall"] < 0.9


def swapped(lists: np.ndarray, values: np.ndarray) -> None:
    for array in (lists, values):
        array[40, [0, 5]] = array[40, [5, 0]]


def contradicted(lists: np.ndarray, values: np.ndarray) -> None:
    """Of a pair that list each other, one side's similarity is another."""
    node, place = next((i, p) for i in range(40, N) for p in range(K) if i in lists[lists[i, p]])
    values[node, place] += 0.2


FAULTS = {
    "self": lambda lists, values: lists.__setitem__((40, 2), 40),
    "twice": lambda lists, values: lists.__setitem__((40, 2), lists[40, 0]),
    "missing": lambda lists, values: (lists.__setitem__((40, -1), -1), values.__setitem__((40, -1), np.nan)),
    "range": lambda lists, values: lists.__setitem__((40, 2), N),
    "range, below": lambda lists, values: lists.__setitem__((40, 2), -7),
    "number": lambda lists, values: values.__setitem__((40, 2), np.nan),
    "order": swapped,
    "wrong": lambda lists, values: values.__setitem__((40, 0), values[40, 0] + 0.05),
    "contradiction": contradicted,
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_named_with_its_list(name: str) -> None:
    vectors = clustered(3)
    lists, values = graph(nearness(vectors, "cosine"))
    FAULTS[name](lists, values)
    found = {fault["fault"]: fault for fault in certify_graph(vectors, lists, values, sample=N)["faults"]}
    kind = name.split(",")[0]
    assert kind in found, found
    if kind != "contradiction":
        assert (found[kind]["lists"], found[kind]["first"]) == (1, 40)
    also = {"twice": {"wrong", "contradiction"}, "contradiction": {"wrong", "order"}, "wrong": {"contradiction"}}
    assert found.keys() <= {kind} | also.get(kind, set())  # what a similarity in the wrong place is, too


def test_faults_of_structure_are_found_in_every_list_and_their_places_are_missed() -> None:
    vectors = clustered(4, 70_000).astype(np.float32)
    draw = np.random.default_rng(0)
    lists = (np.arange(70_000)[:, None] + draw.choice(np.arange(1, 60_000), K, replace=False)) % 70_000
    lists[[5, 69_999], 0] = -1
    lists[69_998, 1] = lists[69_998, 2]
    found = certify_graph(vectors, lists.astype(np.int32), metric="l2", sample=3)
    assert [(fault["fault"], fault["lists"], fault["first"]) for fault in found["faults"]] == [
        ("twice", 1, 69_998),
        ("missing", 2, 5),
    ]
    lists, _ = graph(nearness(vectors[:N], "l2"))
    lists[:, 0] = lists[:, 1]
    lists[:, 2] = -1
    assert certify_graph(vectors[:N], lists, metric="l2", sample=N)["recall"] == pytest.approx(1 - 2 / K)
    unsigned = np.where(lists < 0, np.iinfo(np.uint32).max, lists).astype(np.uint32)
    faults = certify_graph(vectors[:N], unsigned)["faults"]
    assert [fault["fault"] for fault in faults] == ["twice", "missing"]


def test_similarities_of_other_vectors_are_refused_unless_the_lists_alone_are_judged() -> None:
    vectors, others = clustered(5), clustered(6)
    for metric in ("cosine", "inner-product", "l2"):
        lists, values = graph(nearness(others, metric))
        with pytest.raises(InputError, match=r"similarities are of other vectors.*nearest: .* wrong by"):
            certify_graph(vectors, lists, np.abs(values))
        with pytest.raises(InputError, match="other vectors"):  # in another order, too
            certify_graph(vectors[::-1], *graph(nearness(vectors, metric)))
        assert certify_graph(vectors, lists)["recall"] < 0.1
    with pytest.raises(InputError, match="other vectors"):
        certify_graph(vectors, lists, np.full(lists.shape, np.nan))
    lists, values = graph(nearness(vectors, "l2"))
    with pytest.raises(InputError, match=r"nearest: .*unit vectors"):
        certify_graph(vectors, lists, -values, metric="cosine")


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_an_exact_graph_of_faiss_passes_as_it_is_written(metric: int) -> None:
    vectors = clustered(7).astype(np.float32)
    index = faiss.IndexFlat(D, metric)
    index.add(vectors)
    values, lists = index.search(vectors, K + 1)
    if metric == faiss.METRIC_L2:
        assert certify_graph(vectors, lists, values)["faults"][0]["lists"] == N
        found = certify_graph(vectors, lists, values, with_self=True)
        assert found["similarities"]["form"] == "squared L2 distance"
    else:  # whose nearest need not be the node itself
        own = (lists == np.arange(N)[:, None]).any(axis=1)
        found = certify_graph(vectors, lists, values, with_self=True)
        assert found["similarities"]["form"] == "inner product"
        assert own.any()
        assert not own.all()
    assert (found["faults"], found["k"]) == ([], K)
    assert found["recall"] > 0.999
    queries = clustered(8)[:50].astype(np.float32)
    values, lists = index.search(queries, K)
    found = certify_graph(vectors, lists, values, queries=queries)
    assert (found["faults"], found["lists"], found["recall"]) == ([], 50, 1.0)
    true = graph(nearness(vectors, found["metric"], queries))[0]
    shifted = certify_graph(vectors, np.roll(true, 1, axis=0), queries=queries, metric=found["metric"])
    assert shifted["recall"] < 0.5


def test_nearly_equal_and_equal_vectors_are_ties_and_no_faults() -> None:
    cone = 1 + 1e-3 * np.random.default_rng(0).standard_normal((N, 96))
    found = certify_graph(cone, *graph(nearness(cone, "cosine")), sample=N)
    assert (found["recall"], found["faults"]) == (1.0, [])
    same = np.repeat(np.random.default_rng(3).standard_normal((20, 16)), 12, axis=0)
    own = np.arange(240)[:, None]
    others = own // 12 * 12 + (own + np.arange(7, 12)) % 12
    found = certify_graph(same, others, metric="l2", sample=240)
    assert found["recall"] == 1.0
    assert found["mean_distance_excess"] == pytest.approx(0, abs=1e-6)
    zero = np.vstack([np.zeros((3, 16)), same])  # of which a cosine is 0
    assert certify_graph(zero, graph(np.nan_to_num(nearness(zero[3:], "cosine")))[0] + 3, queries=same)["nodes"] == 243


def test_memory_does_not_grow_with_the_graph_that_is_bad() -> None:
    vectors = np.random.default_rng(5).standard_normal((60_000, 8)).astype(np.float16)
    bad = (np.arange(60_000)[:, None] + 7_000 + np.arange(5)) % 60_000
    certify_graph(vectors[:100], bad[:100] % 100, metric="l2", sample=10)
    tracemalloc.start()
    try:
        assert certify_graph(vectors, bad, metric="l2", sample=300)["recall"] < 0.01
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 120e6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"neighbors": np.zeros((N, K))}, "NEIGHBORS are float64"),
        ({"neighbors": np.zeros(N, np.int64)}, r"NEIGHBORS are int64 \[600\]"),
        ({"neighbors": np.zeros((N - 1, K), int)}, "NEIGHBORS have 599 lists, and there are 600 vectors"),
        ({"neighbors": np.zeros((N, N), int)}, "lists of 600 nodes, of 600 vectors"),
        ({"neighbors": np.zeros((N, 1), int), "with_self": True}, "lists of 0 nodes"),
        ({"similarities": np.zeros((N, K + 1))}, r"SIMILARITIES are float64 \[600, 9\], NEIGHBORS \[600, 8\]"),
        ({"similarities": np.full((N, K), "x")}, "SIMILARITIES are <U1"),
        ({"vectors": np.zeros(N)}, r"VECTORS are float64 \[600\]"),
        ({"vectors": np.full((N, D), "x")}, "VECTORS are <U1"),
        ({"queries": np.ones((N, D + 1))}, "--queries are of 25 numbers, VECTORS of 24"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(change: dict[str, np.ndarray], told: str) -> None:
    vectors = clustered()
    lists, values = graph(nearness(vectors, "cosine"))
    with pytest.raises(InputError, match=told):
        certify_graph(**{"vectors": vectors, "neighbors": lists, "similarities": values} | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bad", "sample"), [(np.nan, N), (np.inf, N), (np.nan, 5), (1e200, 5)])
def test_a_vector_that_is_not_finite_is_named(bad: float, sample: int) -> None:
    vectors = clustered()
    lists, _ = graph(nearness(vectors, "cosine"))
    vectors[577, 3] = bad
    with pytest.raises(InputError, match="row 577"):
        certify_graph(vectors, lists, metric="l2", sample=sample)
