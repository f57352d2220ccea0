"""The interval of recall: how often it misses the truth, however often one looks, and how wide it is."""

from __future__ import annotations

import numpy as np
import pytest

from graphbuild.graph.recall.interval import capital, interval

K = 32
LOOKS = (50, 100, 250, 500, 1_000)


def graph(draw: np.random.Generator, nodes: int, recall: float) -> np.ndarray:
    """Recalls of all nodes, multiples of 1 / K: each node's chance of a hit is drawn too, so they vary more than chance
    alone; some are 0, as real ones may be."""
    chances = draw.beta(12 * recall, 12 * (1 - recall), nodes) * (draw.random(nodes) > 0.002)
    return draw.binomial(K, chances) / K


def missed(draw: np.random.Generator, nodes: int, recall: float) -> bool:
    """Whether the true mean is outside the interval at one look or more: its ends are where the capital is 40."""
    recalls = graph(draw, nodes, recall)
    mean, drawn = recalls.mean(), draw.choice(recalls, LOOKS[-1], replace=False)
    sides = ((drawn, mean), (1 - drawn, 1 - mean))
    return any(capital(shares[:n], nodes, m) >= 40 for n in LOOKS for shares, m in sides)


@pytest.mark.parametrize(("nodes", "recall"), [(5_000, 0.965), (5_000, 0.995), (1_200, 0.9), (5_000, 0.5)])
def test_of_simulated_graphs_at_most_5_percent_are_missed_though_looked_at_each_time(nodes: int, recall: float) -> None:
    draw = np.random.default_rng(nodes)
    assert sum(missed(draw, nodes, recall) for _ in range(300)) <= 300 * 0.05


@pytest.mark.slow
@pytest.mark.parametrize("recall", [0.965, 0.995])
def test_of_10_000_simulated_graphs_at_most_5_percent_are_missed(recall: float) -> None:
    draw = np.random.default_rng(7)
    assert sum(missed(draw, 5_000, recall) for _ in range(10_000)) <= 10_000 * 0.05


def test_an_interval_that_was_made_for_one_look_would_fail_this() -> None:
    draw, out = np.random.default_rng(3), 0
    for _ in range(300):
        recalls = graph(draw, 5_000, 0.965)
        drawn = draw.choice(recalls, LOOKS[-1], replace=False)
        usual = ((n, 1.96 * drawn[:n].std() / n**0.5) for n in LOOKS)
        out += any(abs(drawn[:n].mean() - recalls.mean()) > half for n, half in usual)
    assert out > 300 * 0.05


def test_ends_are_where_the_capital_is_40() -> None:
    drawn = graph(np.random.default_rng(1), 1_000, 0.95)
    low, high = interval(drawn, 10**6)
    for shares, end in ((drawn, low), (1 - drawn, 1 - high)):
        assert capital(shares, 10**6, end - 1e-6) > 40 > capital(shares, 10**6, end + 1e-6)
    assert low < drawn.mean() < high


@pytest.mark.parametrize("recall", [0.9, 0.965, 0.995])
def test_it_is_at_most_two_and_a_half_times_as_wide_as_the_usual_one_for_one_look(recall: float) -> None:
    draw = np.random.default_rng(2)
    for n in (1_000, 4_000):
        drawn = graph(draw, n, recall)
        low, high = interval(drawn, 10**9)
        assert high - low < 2.5 * 2 * 1.96 * drawn.std() / n**0.5


def test_what_was_drawn_bounds_the_mean_and_all_nodes_tell_it() -> None:
    recalls = graph(np.random.default_rng(4), 700, 0.9)
    for n in (1, 300, 690, 700):
        low, high = interval(recalls[:n], 700)
        assert recalls[:n].sum() / 700 - 1e-9 <= low <= recalls.mean() + 1e-9
        assert recalls.mean() - 1e-9 <= high <= (recalls[:n].sum() + 700 - n) / 700 + 1e-9
    assert interval(recalls, 700) == pytest.approx((recalls.mean(), recalls.mean()))
    assert interval(np.ones(500), 10**9)[0] == pytest.approx(1 - 6.4 / 500, abs=1e-3)
    assert interval(np.zeros(500), 10**9)[1] < 0.013
