"""The engines through the whole index verb, against float64 brute force in numpy."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_device import other_device

from graphbuild.errors import ConfigError, GraphbuildError, QualityError
from graphbuild.graph import prepare, tasks
from graphbuild.job.verbs import run_verb
from graphbuild.knn import (
    codes,
    device,
    engine,
    exact,
    faiss_index,
    kernels,
    leaders,
    lists,
    partition,
    products,
    sample,
)
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task
from graphbuild.store.sharded import ShardedArray
from graphbuild.store.store import Store


def build(
    folder: Path, vectors: np.ndarray, *, shard_size: int = 70, workers: int = 0, force: bool = False, **index: object
) -> Store:
    """A graph, whose certificate is of few nodes: the tests here compare all of it with brute force themselves."""
    folder.mkdir(exist_ok=True)
    if not (folder / "vectors.npy").exists():
        np.save(folder / "vectors.npy", vectors)
    store = Store(str(folder / "store"))
    recipe = Recipe(
        embed=Embed(vectors=str(folder / "vectors.npy"), shard_size=shard_size),
        index=Index(**{"min_recall": 0.0, "recall_sample": 200, **index}),  # type: ignore[arg-type]
    )
    with Runner(workers=workers) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner, force=force)
    return store


def whole(store: Store, pattern: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(Path(store.url).glob(pattern))])


def graph(store: Store) -> tuple[np.ndarray, np.ndarray]:
    return whole(store, "graph/*.neighbors.npy"), whole(store, "graph/*.similarities.npy")


def similarities_of(vectors: np.ndarray) -> np.ndarray:
    """Float32 similarities of all pairs of float16 vectors as they are stored; of a node with itself none."""
    x = vectors.astype(np.float64)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = (x @ x.T).astype(np.float32)
    np.fill_diagonal(scores, -np.inf)
    return scores


def brute_force(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours by similarity, ties by smaller id."""
    scores = similarities_of(vectors)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def assert_exact(store: Store, vectors: np.ndarray, k: int) -> None:
    neighbors, similarities = graph(store)
    expected, scores = brute_force(vectors, k)
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_array_equal(similarities, scores.astype(np.float16))


def recall_of(store: Store, vectors: np.ndarray, k: int) -> float:
    neighbors, _ = graph(store)
    x = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    worst = np.partition(similarities_of(vectors), -k, axis=1)[:, -k]
    found = np.einsum("nd,nkd->nk", x, x[neighbors])
    return float((found >= worst[:, None] - 1e-3).mean())


def random_vectors(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float16)


def clustered(n: int, d: int = 32, clusters: int = 60, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, d))
    return (centres[random.integers(0, clusters, n)] + 0.5 * random.standard_normal((n, d))).astype(np.float32)


def searched_again(store: Store) -> int:
    records = Path(store.url).glob("_state/search/*.done.json")
    return sum(json.loads(path.read_text())["facts"]["searched_again"] for path in records)


# -- codes


@pytest.mark.parametrize("way", ["int8", "pairs", "float"])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 16, 33, 384, 1_041, 1_056])
def test_products_of_codes_are_exact_integers(monkeypatch: pytest.MonkeyPatch, width: int, way: str) -> None:
    if way != "int8":
        monkeypatch.setattr(products, "_has_int8", lambda device: False)
        monkeypatch.setattr(products, "_has_pairs", lambda: way == "pairs")
    random = np.random.default_rng(width)
    for m, n in ((1, 1), (3, 40), (70, 1), (64, 65), (4, 2), (5, 3), (39, 39), (40, 40)):
        a, b = (random.choice([-127, 127, 5, 0], (rows, width)).astype(np.int8) for rows in (m, n))
        found = products.products(torch.from_numpy(a), torch.from_numpy(b))
        np.testing.assert_array_equal(found.numpy(), a.astype(np.int64) @ b.astype(np.int64).T)
        some = torch.full((m + 1, width), 99, dtype=torch.int8)[1:]  # not at the beginning of its memory
        some[:] = torch.from_numpy(a)
        upper = products.products(some, some, products.tile_memory(), upper=True).numpy()
        np.testing.assert_array_equal(np.triu(upper, 1), np.triu(a.astype(np.int64) @ a.astype(np.int64).T, 1))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 60), seed=st.integers(0, 10**6), heavy=st.booleans())
def test_the_error_of_coded_similarities_is_within_the_bound(width: int, seed: int, heavy: bool) -> None:
    x = random_vectors(40, width, seed)
    x = (x**3 if heavy else x) + np.float16(1e-3)
    exact_x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    coded = codes.encode(x)
    approximate = coded.codes.astype(np.float64) * coded.scales[:, :1]
    rests = coded.scales[:, 1].astype(np.float64)
    bound = rests[:, None] + rests[None, :] + rests[:, None] * rests[None, :]
    assert (np.abs(exact_x @ exact_x.T - approximate @ approximate.T) <= bound).all()


# -- exact


@pytest.mark.parametrize("shard_size", [37, 700])
@pytest.mark.parametrize("at_once", [50, 10_000])
def test_exact_equals_brute_force_whatever_the_groups_tiles_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int, at_once: int
) -> None:
    monkeypatch.setattr(exact, "TILE_ROWS", 45)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 53)
    monkeypatch.setattr(engine, "LEAST_NODES", 1)
    monkeypatch.setattr(engine, "nodes_at_once", lambda *_: at_once)
    x = random_vectors(700, 24)
    assert_exact(build(tmp_path, x, shard_size=shard_size, engine="exact", k=15), x, 15)


def test_exact_on_torch_alone_as_on_a_gpu_gives_the_same_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(900)
    monkeypatch.setattr(exact, "GROUP_ROWS", 250)
    monkeypatch.setattr(device, "ROWS", 100)
    monkeypatch.setattr(device, "COLUMNS", 130)

    join = exact.Exact.join

    def join_on_device(self: exact.Exact, argument: Any, inputs: Any, length: int, _: str) -> Any:
        with other_device() as place:
            return join(self, argument, inputs, length, place.type)

    monkeypatch.setattr(exact.Exact, "join", join_on_device)
    assert_exact(build(tmp_path, x, engine="exact", k=9), x, 9)


def test_a_gpu_packs_lists_as_the_cpu_does() -> None:
    random = np.random.default_rng(0)
    scores = random.choice(np.array([-np.inf, -1.5, -0.0, 0.0, 0.25, 1.0], np.float32), (50, 40))
    ids = random.integers(0, device.NO_NODE, scores.shape)
    ids[scores == -np.inf] = device.NO_NODE
    packed = device.keys(torch.from_numpy(scores), torch.from_numpy(ids)).numpy()
    np.testing.assert_array_equal(packed, np.sort(lists.pack(scores, ids), axis=1)[:, ::-1])
    assert (packed == lists.EMPTY).any()


@pytest.mark.parametrize("width", [24, 32, 1_100])  # by float32, by pairs, and by float64
def test_exact_without_int8_instructions_gives_the_same_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(products, "_has_int8", lambda device: False)
    monkeypatch.setattr(products, "_has_pairs", lambda: width == 32)
    x = random_vectors(300, width)
    assert_exact(build(tmp_path, x, engine="exact", k=9), x, 9)


def test_a_device_that_refuses_int8_products_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

    monkeypatch.setattr(products, "cpu_features", lambda: {"avx512_vnni": True})
    monkeypatch.setattr(torch, "_int_mm", refused)
    assert not products._has_int8.__wrapped__("cpu")


def test_lists_that_the_error_bound_does_not_prove_are_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact.Exact, "length", lambda self, k, nodes: k)
    x = clustered(600)
    store = build(tmp_path, x, engine="exact", k=9)
    assert searched_again(store) == 600
    assert_exact(store, x, 9)


def test_few_lists_need_a_second_search(tmp_path: Path) -> None:
    assert searched_again(build(tmp_path, clustered(3_000), engine="exact", k=10)) < 60


@pytest.mark.parametrize("name", ["exact", "partition", "faiss:IVF4,Flat"])
def test_thirty_percent_duplicates_are_ties_by_smaller_id(tmp_path: Path, name: str) -> None:
    x = clustered(500)
    x[350:] = x[:150]
    store = build(tmp_path, x, engine=name, k=7)
    if name == "exact":
        assert_exact(store, x, 7)
    assert recall_of(store, x, 7) > 0.99


@pytest.mark.parametrize("name", ["exact", "partition", "faiss:Flat"])
def test_all_vectors_equal(tmp_path: Path, name: str) -> None:
    x = np.ones((300, 8), np.float32)
    store = build(tmp_path, x, engine=name, k=5)
    neighbors, similarities = graph(store)
    assert (similarities == 1).all()
    if name == "exact":
        assert_exact(store, x, 5)
    else:
        assert all(len(set(row)) == 5 and node not in row for node, row in enumerate(neighbors.tolist()))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), n=st.integers(2, 60), d=st.integers(1, 9))
def test_any_small_set_with_duplicates_is_exact(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n: int, d: int
) -> None:
    distinct = random_vectors(max(n // 3, 1), d, seed=n * 31 + d)
    x = distinct[data.draw(st.lists(st.integers(0, len(distinct) - 1), min_size=n, max_size=n))]
    k = data.draw(st.integers(1, n - 1))
    assert_exact(build(tmp_path_factory.mktemp("x"), x, shard_size=13, engine="exact", k=k), x, k)


@pytest.mark.parametrize("name", ["exact", "partition", "faiss:Flat"])
def test_two_nodes_are_each_others_neighbour(tmp_path: Path, name: str) -> None:
    neighbors, _ = graph(build(tmp_path, random_vectors(2, 8), engine=name, k=1))
    assert neighbors.tolist() == [[1], [0]]


@pytest.mark.parametrize("name", ["exact", "partition", "faiss:Flat"])
def test_k_of_all_other_nodes(tmp_path: Path, name: str) -> None:
    x = random_vectors(40, 8)
    assert_exact(build(tmp_path, x, engine=name, k=39), x, 39)


def test_one_node_or_k_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        build(tmp_path / "one", random_vectors(1, 4), k=1)
    with pytest.raises(ConfigError, match="--k 9 or fewer"):
        build(tmp_path / "ten", random_vectors(10, 4), k=10)


def test_opposite_vectors_give_negative_similarities_in_order(tmp_path: Path) -> None:
    x = np.array([[1, 0], [-1, 0], [0, 1], [0.6, 0.8]], np.float32)
    neighbors, similarities = graph(build(tmp_path, x, engine="exact", k=3))
    np.testing.assert_array_equal(neighbors[0], [3, 2, 1])
    np.testing.assert_allclose(similarities[0], [0.6, 0, -1], atol=1e-3)


# -- partition


def test_partition_reaches_the_recall_asked_for_and_little_more(tmp_path: Path) -> None:
    x = clustered(6_000, d=48, clusters=200)
    recalls = {}
    for recall in (0.8, 0.97):
        store = build(tmp_path, x, shard_size=2_000, engine="partition", k=10, recall=recall, force=True)
        recalls[recall] = recall_of(store, x, 10)
        assert store.manifest()["graph"]["promised_recall"] < recalls[recall] + 0.02
    assert 0.78 < recalls[0.8] < recalls[0.97]
    assert recalls[0.97] > 0.96


def test_lists_are_longer_where_codes_cannot_tell_the_nearest_apart(tmp_path: Path) -> None:
    """Many nodes on few lines, as where N is large: the nearest differ by less than codes are wrong."""
    rng = np.random.default_rng(0)
    ends = rng.standard_normal((8, 64)).astype(np.float32)
    own = rng.integers(0, 8, 6_000)
    other = (own + rng.integers(1, 8, 6_000)) % 8
    x = ends[own] + rng.random((6_000, 1), np.float32) * (ends[other] - ends[own])
    store = build(tmp_path, x, shard_size=2_000, engine="partition", k=16, recall=0.95, recall_sample=500)
    told, measured = (store.manifest()[name] for name in ("graph", "recall"))
    assert told["listed"] > partition.list_length(16, 6_000)
    assert measured["recall"] > 0.95
    assert told["promised_recall"] == pytest.approx(measured["recall"], abs=0.015)
    plain = build(tmp_path / "plain", clustered(3_000), shard_size=1_000, engine="partition", k=16, recall=0.95)
    assert plain.manifest()["graph"]["listed"] == partition.list_length(16, 3_000)


@pytest.mark.slow
def test_partition_does_not_depend_on_tasks_tiles_or_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(3_000)
    once = graph(build(tmp_path / "a", x, shard_size=800, engine="partition", k=8, recall=0.8, workers=2))
    monkeypatch.setattr(partition, "TASK_NODES", 400)
    monkeypatch.setattr(partition, "TILE_ROWS", 60)
    monkeypatch.setattr(leaders, "BLOCK_NODES", 700)
    again = graph(build(tmp_path / "b", x, shard_size=800, engine="partition", k=8, recall=0.8))
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1], again[1])


@pytest.mark.parametrize("name", ["exact", "partition"])
def test_shards_whose_codes_are_made_by_one_task_give_the_same_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("INFO", "graphbuild")
    x = clustered(4_000, d=24)
    alone = build(tmp_path / "a", x, shard_size=300, engine=name, k=8, recall=0.8)
    monkeypatch.setattr("graphbuild.knn.leaders.ROWS_A_GROUP", 25_000)
    assert 1_000 < leaders.compared_at_once(4_000) < 1_200, "so four shards a task"
    together = build(tmp_path / "b", x, shard_size=300, engine=name, k=8, recall=0.8)
    said = [record.message for record in caplog.records if record.message.startswith("codes")]
    assert [line.split()[1] for line in said] == ["14", "4"]
    files = sorted(path.name for path in Path(alone.url, "graph").iterdir())
    assert files == sorted(path.name for path in Path(together.url, "graph").iterdir())
    for file in files:
        assert Path(alone.url, "graph", file).read_bytes() == Path(together.url, "graph", file).read_bytes(), file


def test_a_promise_under_the_floor_is_refused_before_anything_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "graphbuild")
    monkeypatch.setattr(partition, "FANS", range(2, 3))  # as if more would not help
    x = random_vectors(6_000, 48)
    asked = {"shard_size": 2_000, "engine": "partition", "k": 8, "recall": 0.95, "recall_sample": 300}
    with pytest.raises(
        QualityError, match=r"partition promises a recall of 0\.\d+ for these vectors, under the floor of 0\.94"
    ):
        build(tmp_path, x, **asked, min_recall=None)
    assert not [record for record in caplog.records if record.message.startswith("codes")]
    manifest = build(tmp_path, x, **asked, min_recall=0.1).manifest()
    assert manifest["recall"]["recall"] < manifest["graph"]["promised_recall"] < 0.94, "so the refusal was right"


def test_a_second_build_in_the_same_process_reads_nothing_of_the_first(tmp_path: Path) -> None:
    x = clustered(2_500)
    build(tmp_path / "a", x, shard_size=800, engine="partition", k=8, recall=0.6)
    twice = build(tmp_path / "a", x, shard_size=800, engine="partition", k=10, recall=0.99, force=True)
    once = build(tmp_path / "b", x, shard_size=800, engine="partition", k=10, recall=0.99)
    assert twice.manifest()["graph"]["fan"] == once.manifest()["graph"]["fan"]
    for ours, fresh in zip(graph(twice), graph(once), strict=True):
        np.testing.assert_array_equal(ours, fresh)


def test_a_leaf_too_large_is_cut_and_its_nodes_still_get_whole_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "LARGEST_LEAF", 50)
    neighbors, _ = graph(build(tmp_path, np.ones((400, 6), np.float32), engine="partition", k=12))
    assert all(len(set(row)) == 12 and node not in row for node, row in enumerate(neighbors.tolist()))


def test_lists_that_a_floor_has_emptied_are_completed_without_a_full_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = leaders.Leaders.leaves

    def with_floors_too_high(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        found, floors = find(*arguments)
        floors[::20] = 2
        return found, floors

    def refused(*_: object) -> None:
        raise AssertionError("a pass over all vectors")

    monkeypatch.setattr(leaders.Leaders, "leaves", with_floors_too_high)
    monkeypatch.setattr(exact, "search_again", refused)
    x = clustered(6_000)
    neighbors, _ = graph(build(tmp_path, x, shard_size=6_000, engine="partition", k=10, recall=0.95))
    unit = x.astype(np.float16).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    emptied = np.arange(0, len(x), 20)
    scores = unit[emptied] @ unit.T
    scores[np.arange(len(emptied)), emptied] = -2
    worst = np.sort(scores, axis=1)[:, -10]
    reached = np.take_along_axis(scores, neighbors[emptied].astype(int), axis=1) >= worst[:, None] - 1e-6
    assert reached.mean() > 0.95


def test_leaves_are_those_of_the_nearest_leaders_and_floors_their_scores() -> None:
    x, drawn = random_vectors(200, 16), random_vectors(90, 16, seed=1)
    found, floors = leaders.Leaders.of(drawn).leaves(codes.encode(x).codes, 5, 3)
    a, b = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True) for v in (x, drawn))
    scores = a @ b.T
    expected = np.sort(scores, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(np.take_along_axis(scores, found.astype(int), axis=1), expected, atol=0.03)
    np.testing.assert_allclose(floors * codes.encode(x).scales[:, :1], expected[:, 2:3], atol=0.03)


def test_leaders_that_are_ordered_in_parts_lie_as_near_and_few_are_read_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = clustered(6_000)
    unit = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    read: list[int] = []

    def reading(rows: np.ndarray) -> np.ndarray:
        read.append(len(rows))
        return x[rows].astype(np.float16)

    def spread(order: np.ndarray) -> float:
        assert sorted(order.tolist()) == list(range(6_000))
        groups = unit[order].reshape(-1, 60, unit.shape[1])
        return float(1 - np.linalg.norm(groups.mean(axis=1), axis=1).mean())

    whole = spread(leaders.order_leaders(reading, np.arange(6_000)))
    assert max(read) == 6_000
    read.clear()
    monkeypatch.setattr(leaders, "ORDERED", 500)
    monkeypatch.setattr(leaders, "DIRECTED", 250)
    assert spread(leaders.order_leaders(reading, np.arange(6_000))) < 1.1 * whole
    assert max(read) <= 500
    read.clear()
    monkeypatch.setattr(leaders, "GROUPS_AT_ONCE", 4)
    parted = leaders.Leaders.coded(reading, np.arange(6_000), np.empty(x.shape, np.int8))
    assert max(read) <= 4 * leaders.GROUP_LEADERS
    monkeypatch.setattr(leaders, "GROUPS_AT_ONCE", 10_000)
    at_once = leaders.Leaders.of(x.astype(np.float16))
    for part in ("codes", "scales", "group_codes", "group_scales"):
        np.testing.assert_array_equal(getattr(parted, part), getattr(at_once, part))


def test_groups_that_are_found_by_groups_of_groups_lose_few_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(9_000).astype(np.float16)
    monkeypatch.setattr(leaders, "GROUP_LEADERS", 8)
    monkeypatch.setattr(leaders, "GROUP_GROUPS", 8)
    drawn = x[leaders.order_leaders(x.__getitem__, np.arange(8_000))]
    asked = codes.encode(x[8_000:]).codes
    flat, compared = leaders.Leaders.of(drawn), []
    assert len(flat.group_codes) == 1_024
    search = leaders._search

    def counting(code: Any, rows: np.ndarray, others: np.ndarray, *rest: Any) -> None:
        compared.append(len(rows) * len(others))
        search(code, rows, others, *rest)

    monkeypatch.setattr(leaders, "_search", counting)
    found, _ = flat.leaves(asked, 5, 1)
    few, compared[:] = sum(compared), []
    monkeypatch.setattr(leaders, "MOST_GROUPS", 512)
    again, _ = leaders.Leaders.of(drawn).leaves(asked, 5, 1)
    assert sum(compared) < 0.5 * few
    shared = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, again, strict=True)]) / 5
    assert shared > 0.9


def test_prepare_in_ranges_of_shards_makes_the_graph_that_one_task_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = clustered(3_000)
    options = {"shard_size": 250, "engine": "partition", "k": 8, "recall": 0.9}
    once = build(tmp_path / "once", x, **options)
    monkeypatch.setattr(tasks, "PART_NODES", 700)
    ran: list[str] = []
    run, true_neighbors = prepare.STAGE.run, sample.true_neighbors

    def reading(task: Task, *rest: Any) -> Any:
        ran.append(task.name)
        return run(task, *rest)

    def within(vectors: ShardedArray, ids: np.ndarray, k: int, shards: range | None = None) -> Any:
        assert shards is not None, "each of its own range"
        assert len(shards) <= 3
        return true_neighbors(vectors, ids, k, shards)

    object.__setattr__(prepare.STAGE, "run", reading)
    monkeypatch.setattr(sample, "true_neighbors", within)
    try:
        ranged = build(tmp_path / "ranged", x, **options)
    finally:
        object.__setattr__(prepare.STAGE, "run", run)
    assert ran == ["00000", "00001", "00002", "00003", "00004", "all"]
    assert ranged.manifest()["graph"] == once.manifest()["graph"]


@pytest.mark.slow
def test_workers_certify_in_ranges_what_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PART_NODES", 700)
    options = {"shard_size": 250, "engine": "partition", "k": 8, "recall": 0.9}
    here, there = (build(tmp_path / str(workers), clustered(3_000), workers=workers, **options) for workers in (0, 2))
    assert there.manifest()["graph"] == here.manifest()["graph"]
    assert there.manifest()["recall"] == here.manifest()["recall"]
    certified = [
        {path.name: path.read_bytes() for path in Path(store.url).glob("_state/certify/*.npy")}
        for store in (here, there)
    ]
    assert certified[0] == certified[1] != {}


# -- faiss


@pytest.mark.parametrize(
    ("factory", "knob"), [("Flat", None), ("IVF16,Flat", "nprobe"), ("HNSW16", "efSearch"), ("IVF8,SQ8", "nprobe")]
)
def test_faiss_reaches_the_recall_asked_for(tmp_path: Path, factory: str, knob: str | None) -> None:
    x = clustered(2_000)
    store = build(tmp_path, x, shard_size=900, engine=f"faiss:{factory}", k=10, recall=0.9)
    assert recall_of(store, x, 10) > 0.88
    assert store.manifest()["graph"]["knob"] == knob


def test_lists_that_faiss_leaves_short_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "LARGEST_EFFORT", 1)
    x = clustered(1_000)
    store = build(tmp_path, x, engine="faiss:IVF64,Flat", k=40)
    neighbors, _ = graph(store)
    assert searched_again(store) > 0
    assert neighbors.max() < 1_000
    assert all(len(set(row)) == 40 and node not in row for node, row in enumerate(neighbors.tolist()))


@pytest.mark.parametrize("name", ["faiss:Quatsch", "faiss:IVF4096,Flat"])
def test_a_factory_that_cannot_be_built_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(GraphbuildError, match=name):
        build(tmp_path, random_vectors(100, 8), engine=name, k=5)


def test_faiss_on_a_gpu_that_is_not_there_is_refused_not_run_on_the_cpu(tmp_path: Path) -> None:
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is a GPU")
    path = tmp_path / "index"
    faiss.write_index(faiss.IndexFlatIP(4), str(path))
    with pytest.raises(ConfigError, match="no GPU"):
        faiss_index.open_index(path, "1", None, None, "cuda")


def test_what_faiss_cannot_do_on_a_gpu_is_refused_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the GPU build, which refuses what that one does."""
    import faiss

    def to_gpu(resources: object, number: int, index: Any) -> Any:
        if isinstance(index, faiss.IndexHNSW):
            raise RuntimeError("Error in clone_Index:\nThis index type is not implemented on GPU.")
        return index

    def no_more(*arguments: object) -> None:
        raise RuntimeError("GPU index only supports min/max-K selection up to 2048 (requested 2309)")

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    for factory in ("Flat", "HNSW8"):
        faiss.write_index(faiss.index_factory(4, factory, faiss.METRIC_INNER_PRODUCT), str(tmp_path / factory))
    with pytest.raises(ConfigError, match="not implemented on GPU"):
        faiss_index.open_index(tmp_path / "HNSW8", "1", "efSearch", 16, "cuda")
    flat = faiss_index.open_index(tmp_path / "Flat", "2", None, None, "cuda")
    monkeypatch.setattr(flat, "search", no_more)
    with pytest.raises(ConfigError, match=r"finds no 2309 neighbours .*2048"):
        faiss_index.search(flat, np.zeros((1, 4), np.float32), np.arange(1), 2_308)


# -- choice, memory, scratch


@pytest.mark.parametrize(
    ("nodes", "device", "name"),
    [
        (50_000, "auto", "exact"),
        (2_900_000, "cpu", "partition"),
        (2_900_000, "cuda", "exact"),
        (2_900_000, "auto", "partition"),
        (2_900_000, "auto, with a GPU", "exact"),
        (30_000_000, "cuda", "exact"),
        (100_000_000, "cuda", "partition"),
        (100_000_000, "auto, with a GPU", "partition"),
    ],
)
def test_auto_takes_exact_where_it_is_affordable_and_says_why(
    monkeypatch: pytest.MonkeyPatch, nodes: int, device: str, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "GPU" in device)
    chosen, reason = engine.choose(Index(device=device.split(",")[0]), nodes, 384)  # type: ignore[arg-type]
    assert chosen.name == name
    assert f"{nodes:,}" in reason


def test_the_engine_its_reason_and_its_memory_are_shown_before_it_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        build(tmp_path, random_vectors(100, 8), k=5)
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("plan"))
    assert "exact" in line
    assert "GB a worker" in line
    assert "scratch" in line


def test_less_memory_makes_more_tasks_and_too_little_is_refused() -> None:
    counts = []
    for memory in (1.05, 4.0):
        index = Index(engine="exact", memory=memory)
        chosen, _ = engine.choose(index, 1_000_000, 384)
        counts.append(len(chosen.joins(1_000_000, engine.nodes_at_once(chosen, index, 1_000_000, 384))))
    assert counts[0] > counts[1]
    with pytest.raises(ConfigError, match="--memory 1"):
        engine.forecast(Index(engine="exact", memory=1.001), 1_000_000, 384)
    with pytest.raises(ConfigError, match="--memory 4"):
        engine.forecast(Index(engine="faiss:HNSW32"), 5_000_000, 384)


def test_scratch_is_gone_when_the_graph_is_whole_and_a_rerun_does_nothing(tmp_path: Path) -> None:
    x = random_vectors(200, 8)
    store = build(tmp_path, x, k=5, engine="partition")
    assert {path.name for path in Path(store.url).glob("_state/*")} == {"vectors", "moments", "search", "certify"}
    assert not (Path(store.url) / "_work").exists()
    before = {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*.npy")}
    build(tmp_path, x, k=5, engine="partition")
    assert before == {path: path.stat().st_mtime_ns for path in Path(store.url).rglob("*.npy")}


def test_a_build_that_stopped_takes_up_its_finished_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(900)
    monkeypatch.setattr(exact, "GROUP_ROWS", 300)
    whole_join, calls = exact.Exact.join, []

    def failing(self: exact.Exact, argument: Any, *rest: Any) -> object:
        calls.append(argument)
        if len(calls) == 4:
            raise RuntimeError("power")
        return whole_join(self, argument, *rest)

    monkeypatch.setattr(exact.Exact, "join", failing)
    with pytest.raises(GraphbuildError, match="power"):
        build(tmp_path, x, engine="exact", k=9)
    assert len(calls) == 6
    store = build(tmp_path, x, engine="exact", k=9)
    assert len(calls) == 7
    assert_exact(store, x, 9)


@pytest.mark.slow
def test_real_captions_partition_keeps_its_promise(tmp_path: Path, shared_data: Path) -> None:
    x = np.load(shared_data / "embeddings" / "minilm_50k.npy", mmap_mode="r")[:12_000]
    sample = Index().recall_sample
    options = {"recall_sample": sample, "recall_width": 0.0}
    store = build(tmp_path, x, shard_size=6_000, engine="partition", k=32, recall=0.97, **options)
    manifest = store.manifest()
    assert manifest["recall"]["recall"] > 0.96
    assert manifest["recall"]["sampled_nodes"] == 10_000
    assert manifest["graph"]["promised_recall"] == pytest.approx(manifest["recall"]["recall"], abs=0.015)


def test_real_captions_agree_with_faiss(tmp_path: Path, shared_data: Path) -> None:
    faiss = faiss_index.import_faiss()
    x = np.load(shared_data / "embeddings" / "minilm_50k.npy", mmap_mode="r")[:3_000]
    neighbors, similarities = graph(build(tmp_path, x, shard_size=1_250, engine="exact", k=32))
    unit = products.unit(whole(Store(str(tmp_path / "store")), "nodes/*.npy")).numpy()
    scores, found = faiss.knn(unit, unit, 33, metric=faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_allclose(similarities[:1_000], scores[:1_000, 1:], atol=6e-4)
    agreement = np.mean(
        [len(np.intersect1d(a, b[b != row])) / 32 for row, (a, b) in enumerate(zip(neighbors, found, strict=True))]
    )
    assert agreement > 0.999


@pytest.mark.parametrize("apart", [1, 1 << 14, 12_345])
def test_refinement_leaves_out_pairs_of_one_leaf_and_no_others_whatever_the_numbers_of_leaves(
    tmp_path: Path, apart: int
) -> None:
    random = np.random.default_rng(4)
    coded = codes.encode(random.standard_normal((60, 16)).astype(np.float16))
    scores = coded.codes.astype(np.int64) @ coded.codes.T.astype(np.int64) * coded.scales[:, 0]
    np.fill_diagonal(scores, -np.inf)
    nearest = np.stack([random.permutation(np.delete(np.arange(60), node))[:6] for node in range(60)])
    listed = -np.sort(-lists.pack(np.take_along_axis(scores, nearest, 1), nearest), axis=1)
    groups = np.arange(60) // 6  # nodes of a leaf; each is in one
    leaves = (groups * apart)[:, None].astype(np.int32)
    tables = []
    for number, part in enumerate((listed, coded.codes, coded.scales, leaves)):
        np.save(tmp_path / f"{number}.npy", part)
        tables.append(ShardedArray(Store(str(tmp_path)), [f"{number}.npy"], [60]))
    refined = listed.copy()
    kernels.refine_lists(0, refined, 4, 4, *(table.table() for table in tables), 16, 1)
    for node in range(60):
        near = lists.unpack(listed[node])[1]
        offered = {other for one in near[:4] for other in lists.unpack(listed[one])[1][:4]} - {node, *near}
        offered = {other for other in offered if groups[other] != groups[node]} | set(near.tolist())
        ids = np.array(sorted(offered))
        expected = -np.sort(-lists.pack(scores[node, ids], ids))[:6]
        np.testing.assert_array_equal(refined[node], expected)


def test_ids_beyond_what_a_key_holds_are_refused(tmp_path: Path) -> None:
    ids = np.array([0, 2**31 - 1])
    assert lists.unpack(lists.pack(np.array([0.5, -1.0]), ids))[1].tolist() == ids.tolist()
    with pytest.raises(ValueError, match="node id 2147483648"):
        lists.pack(np.zeros(1), np.array([2**31]))
    shard = {"shard": "00000", "first_row": 0, "first_node": 0, "nodes": 2**31, "samples": 2**31, "tar": None}
    manifest = {"format_version": 1, "stages": {"vectors": {}}, "embeddings": {"d": 8}, "shards": [shard]}
    store = Store(str(tmp_path))
    store.write_json("manifest.json", manifest)
    with pytest.raises(ConfigError, match="2,147,483,648 nodes, and a graph holds 2,147,483,647 at most"):
        prepare.plan(Recipe(), store)
