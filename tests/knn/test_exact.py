"""The exact engine against float64 brute force in numpy: order, ties, block borders, and the second search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphbuild.knn import exact
from graphbuild.sharded import ShardedArray
from graphbuild.store import Store


def sharded(folder: Path, *parts: np.ndarray) -> ShardedArray:
    store = Store(str(folder))
    for number, part in enumerate(parts):
        np.save(folder / f"{number}.npy", part)
    return ShardedArray(store, [f"{number}.npy" for number in range(len(parts))], [len(part) for part in parts])


def brute_force(vectors: np.ndarray, first: int, count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    x = vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = (x[first : first + count] @ x.T).astype(np.float32)
    scores[np.arange(count), np.arange(first, first + count)] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(x)), scores.shape), -scores), axis=1)[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def random_vectors(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float16)


def test_lists_equal_brute_force_across_shards_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "QUERY_ROWS", 37)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 53)
    x = random_vectors(700, 24)
    vectors = sharded(tmp_path, x[:1], x[1:300], x[300:301], x[301:])
    ids, similarities, _ = exact.search(vectors, 250, 200, 15, "cpu")
    expected_ids, expected = brute_force(x, 250, 200, 15)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(similarities, expected)


def test_result_does_not_depend_on_block_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = sharded(tmp_path, random_vectors(900, 48))
    once = exact.search(vectors, 0, 900, 20, "cpu")
    monkeypatch.setattr(exact, "QUERY_ROWS", 101)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 67)
    again = exact.search(vectors, 0, 900, 20, "cpu")
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1], again[1])


def test_ties_beyond_the_slack_are_found_by_the_second_search(tmp_path: Path) -> None:
    x = np.repeat(random_vectors(6, 16), 120, axis=0)
    ids, similarities, searched_again = exact.search(sharded(tmp_path, x[:333], x[333:]), 0, len(x), 10, "cpu")
    expected_ids, expected = brute_force(x, 0, len(x), 10)
    assert searched_again == len(x)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(similarities, expected)


def test_random_vectors_need_no_second_search(tmp_path: Path) -> None:
    assert exact.search(sharded(tmp_path, random_vectors(3_000, 32)), 0, 500, 10, "cpu")[2] == 0


def test_opposite_vectors_give_negative_similarities_in_order(tmp_path: Path) -> None:
    x = np.array([[1, 0], [-1, 0], [0, 1], [0.6, 0.8]], np.float16)
    ids, similarities, _ = exact.search(sharded(tmp_path, x), 0, 4, 3, "cpu")
    np.testing.assert_array_equal(ids[0], [3, 2, 1])
    np.testing.assert_allclose(similarities[0], [0.6, 0, -1], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(2, 60), d=st.integers(1, 9))
def test_any_small_set_with_duplicates_is_exact(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n: int, d: int
) -> None:
    distinct = random_vectors(max(n // 3, 1), d, seed=n * 31 + d)
    x = distinct[data.draw(st.lists(st.integers(0, len(distinct) - 1), min_size=n, max_size=n))]
    k = data.draw(st.integers(1, n - 1))
    ids, similarities, _ = exact.search(sharded(tmp_path_factory.mktemp("x"), x), 0, n, k, "cpu")
    expected_ids, expected = brute_force(x, 0, n, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(similarities, expected)


def test_real_captions_agree_with_faiss(tmp_path: Path, shared_data: Path) -> None:
    faiss = pytest.importorskip("faiss")
    x = np.load(shared_data / "embeddings" / "minilm_50k.npy", mmap_mode="r")[:6_000]
    ids, similarities, _ = exact.search(sharded(tmp_path, x[:2_500], x[2_500:]), 0, 1_000, 32, "cpu")
    unit = x.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores, found = faiss.knn(unit[:1_000], unit, 33, metric=faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_allclose(similarities, scores[:, 1:], atol=2e-6)
    agreement = np.mean(
        [len(np.intersect1d(a, b[b != row])) / 32 for row, (a, b) in enumerate(zip(ids, found, strict=True))]
    )
    assert agreement > 0.999
