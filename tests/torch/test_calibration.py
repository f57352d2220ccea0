"""Calibrated targets: the share of the other view over many real random batches, against float64 softmaxes by numpy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import BatchEdges, CLIPLoss, Targets, XSampleLoss, similarity_targets
from graphbuild.torch.calibration import LEAST, calibrated

NODES, K = 2_000, 16


@pytest.fixture(scope="module")
def graph(make_once: Callable[[str, Callable[[Path], object]], Path]) -> SampleGraph:
    """Nodes of 300 topics of unequal size, in three groups, that have a direction in common: no normal distribution."""
    random = np.random.default_rng(0)
    topics = random.normal(size=(300, 48)) + 0.8 * random.normal(size=(3, 48))[random.integers(0, 3, 300)]
    shares = 1 / np.arange(10, 310)
    of = random.choice(300, NODES, p=shares / shares.sum())
    vectors = topics[of] + 1.1 * random.normal(size=(NODES, 48)) + 0.6

    def fill(folder: Path) -> None:
        np.save(folder / "vectors.npy", vectors)
        recipe = Recipe(embed=Embed(vectors=str(folder / "vectors.npy"), shard_size=1_000), index=Index(k=K))
        with Runner(workers=0) as runner:
            for verb in ("embed", "index"):
                run_verb(verb, recipe, Store(str(folder / "store")), runner)

    return SampleGraph.open(str(make_once("calibrated", fill) / "store"))


def stored(graph: SampleGraph, nodes: np.ndarray, sketch: bool = False) -> BatchEdges:
    fields = (nodes, *graph.neighbors(nodes), graph.background(nodes), *([graph.sketches(nodes)] if sketch else []))
    return BatchEdges(*map(torch.from_numpy, fields), node_count=len(graph))


def targets_of(graph: SampleGraph, kind: str, nodes: np.ndarray) -> Targets:
    if kind == "dense":
        return Targets(embeddings=torch.from_numpy(graph.embeddings(nodes)), calibration=stored(graph, nodes))
    return Targets(edges=stored(graph, nodes, sketch=kind == "sketch"))


def random_batches(graph: SampleGraph, size: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(size)
    return [random.choice(len(graph), size, replace=False) for _ in range(count)]


def fixed_share(graph: SampleGraph, size: int, tau_s: float) -> float:
    """The share of the other view at one temperature, float64, by the formula."""
    found = []
    for nodes in random_batches(graph, size, max(2, 2_000 // size)):
        vectors = graph.embeddings(nodes).astype(np.float64)
        masses = np.exp((vectors @ vectors.T - 1) / tau_s)
        np.fill_diagonal(masses, 0)
        found.append((1 / (1 + 2 * masses.sum(axis=1))).mean())
    return float(np.mean(found))


@pytest.mark.parametrize("kind", ["dense", "sketch", "edges"])
@pytest.mark.parametrize(("size", "asked"), [(32, 0.6), (128, 0.3), (128, 0.9), (512, 0.6)])
def test_the_share_is_what_was_asked_in_the_mean_over_random_batches(
    graph: SampleGraph, kind: str, size: int, asked: float
) -> None:
    shares, perplexities, loss = [], [], XSampleLoss(tau_s="calibrated", other_view=asked)
    for nodes in random_batches(graph, size, max(2, 2_000 // size)):
        targets = targets_of(graph, kind, nodes)
        loss(*torch.randn(2, size, 4), targets)
        at_it, tau_s = targets.tempered("calibrated", asked, size, slots=2)
        assert isinstance(tau_s, torch.Tensor)
        masses = np.exp((at_it.block().double().numpy() - 1) / tau_s.double().numpy())
        np.fill_diagonal(masses, 0)
        target = np.concatenate([masses, masses + np.eye(size)], axis=1)
        target /= target.sum(axis=1, keepdims=True)
        entropy = -(target * np.log(np.maximum(target, 1e-300))).sum(axis=1)
        shares.append(target[np.arange(size), size + np.arange(size)].mean())
        perplexities.append(np.exp(entropy).mean())
        assert loss.target_facts["other_view"].item() == pytest.approx(shares[-1], abs=1e-4)
        assert loss.target_facts["perplexity"].item() == pytest.approx(perplexities[-1], rel=1e-3)
    # These vectors are noisier than captions: their sketches miss more.
    assert np.mean(shares) == pytest.approx(asked, abs=0.04 if kind == "sketch" else 0.02)


def test_it_drifts_less_over_batch_sizes_than_a_fixed_temperature(graph: SampleGraph) -> None:
    sizes, loss = (32, 512), XSampleLoss(tau_s="calibrated", other_view=0.6)
    got = []
    for size in sizes:
        found = []
        for nodes in random_batches(graph, size, 2_000 // size):
            loss(*torch.randn(2, size, 4), targets_of(graph, "dense", nodes))
            found.append(loss.target_facts["other_view"].item())
        got.append(np.mean(found))
    fixed = [fixed_share(graph, size, 0.1) for size in sizes]
    assert abs(got[1] - got[0]) < abs(fixed[1] - fixed[0]) / 3


@pytest.mark.parametrize("views", [2, 3])
def test_the_target_is_the_formula_s_at_one_temperature_for_each_anchor(graph: SampleGraph, views: int) -> None:
    nodes = random_batches(graph, 64, 1)[0]
    embeddings = torch.from_numpy(graph.embeddings(nodes)).double()
    given = {"tau_s": "calibrated", "views": views, "calibration": stored(graph, nodes)}
    target = similarity_targets(embeddings, other_view=0.5, **given).numpy()
    similar = embeddings.numpy() @ embeddings.numpy().T
    for i in range(0, 64, 7):
        others = np.delete(np.arange(64), i)
        own = target[i, 64 + i]
        tau_s = (1 - similar[i, others]) / np.log(own / target[i, others])
        assert tau_s == pytest.approx(tau_s[0], rel=1e-6)
        assert 0.01 < tau_s[0] < 1
    assert target.sum(axis=1) == pytest.approx(1)
    assert (target.diagonal() == 0).all()
    kept = similarity_targets(embeddings, other_view=0.5, keep_self=True, **given).numpy()
    rest = np.where(np.eye(len(kept)) > 0, 0, kept)
    np.testing.assert_allclose(rest / rest.sum(axis=1, keepdims=True), target, atol=1e-12)


def test_a_text_is_one_slot_and_not_two(graph: SampleGraph) -> None:
    shares, loss = [], CLIPLoss(tau_s="calibrated", other_view=0.7)
    for nodes in random_batches(graph, 128, 12):
        loss(*torch.randn(2, 128, 4), targets_of(graph, "dense", nodes))
        shares.append(loss.target_facts["other_view"].item())
    assert np.mean(shares) == pytest.approx(0.7, abs=0.03)


def test_who_has_too_many_equals_gets_the_lowest_temperature_and_a_flat_graph_any(graph: SampleGraph) -> None:
    edges = BatchEdges(
        node=torch.arange(3),
        neighbors=torch.zeros(3, 4, dtype=torch.int64),
        similarities=torch.tensor([[1.0, 1, 1, 1], [0.9, 0.5, 0.4, 0.3], [0.2, 0.2, 0.2, 0.2]]),
        background=torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.2, 0.0]]),
        node_count=20,
    )
    tau_s, absent = calibrated(edges, images=16, other_view=0.9, slots=2)
    assert tau_s[0].item() == pytest.approx(LEAST)  # 4 of 19 nodes are equal: 6 slots of mass 1, in the mean
    assert (tau_s[1:] > 2 * LEAST).all()
    expected = 1 / (1 + 2 * 15 * np.exp(-0.8 / tau_s[2].item()))  # all others alike
    assert expected == pytest.approx(0.9, abs=1e-3)
    assert absent[2].item() == pytest.approx(0.2, abs=1e-3)


def test_all_nodes_listed_leave_no_background() -> None:
    similarities = torch.tensor([[0.8, 0.5, 0.1]])
    edges = BatchEdges(torch.zeros(1).long(), torch.ones(1, 3).long(), similarities, torch.zeros(1, 2), node_count=4)
    tau_s, _ = calibrated(edges, images=4, other_view=0.6, slots=2)
    masses = np.exp((similarities.double().numpy() - 1) / tau_s.item())
    assert 1 / (1 + 2 * masses.sum()) == pytest.approx(0.6, abs=1e-4)


def test_what_cannot_be_calibrated_is_refused(graph: SampleGraph) -> None:
    nodes, z = np.arange(2), torch.randn(2, 2, 4)
    embeddings = torch.from_numpy(graph.embeddings(nodes))
    loss = XSampleLoss(tau_s="calibrated", other_view=0.3)
    with pytest.raises(ConfigError, match=r"other_view = 0\.3 in a batch of 2 images: equal parts are 0\.333"):
        loss(*z, targets_of(graph, "dense", nodes))
    for targets in (embeddings, Targets(embeddings=embeddings), Targets(labels=torch.arange(2))):
        with pytest.raises(ConfigError, match=r"no calibration.*\n.*node_count.*graphbuild export"):
            loss(*z, targets)
    with pytest.raises(ConfigError, match="no calibration"):
        similarity_targets(embeddings, tau_s="calibrated")
    with pytest.raises(ConfigError, match=r"no slot of its own.*\n.*keep_self=True"):
        similarity_targets(embeddings, tau_s="calibrated", views=1, calibration=stored(graph, nodes))
    block = Targets(similarities=torch.eye(2), keep_diagonal=True, calibration=stored(graph, nodes))
    with pytest.raises(ConfigError, match="keep their diagonal"):
        loss(*z, block)
    with pytest.raises(InputError, match="calibration are a dict"):
        Targets(embeddings=embeddings, calibration={})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="5 calibration's node for 2 images"):
        loss(*z, Targets(embeddings=embeddings, calibration=stored(graph, np.arange(5))))
    for share in (0.0, 1.0, -0.5, float("nan")):
        for make in (XSampleLoss, CLIPLoss):
            with pytest.raises(ConfigError, match=re.escape(f"other_view = {share}")):
                make(tau_s="calibrated", other_view=share)
    with pytest.raises(ConfigError, match="tau_s = 'auto'"):
        CLIPLoss(tau_s="auto")  # type: ignore[arg-type]


def test_a_single_image_has_nobody_to_share_with(graph: SampleGraph) -> None:
    loss = XSampleLoss(tau_s="calibrated")
    assert loss(*torch.randn(2, 1, 4), targets_of(graph, "dense", np.arange(1))).isfinite()
    assert loss.target_facts["other_view"].item() == pytest.approx(1)
