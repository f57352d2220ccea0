"""What each method learns from: its loss against formulas in NumPy, its targets against the store's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config import Config
from data import training_samples
from objective import GraphReader, Objective

from graphbuild.errors import ConfigError
from graphbuild.torch import Targets

Array = np.ndarray[Any, np.dtype[Any]]
SIGLIPS = ("siglip", "siglip_mask", "siglip_positive", "siglip_soft")


def config_of(store: str, **more: Any) -> Config:
    return Config(store=store, **{"pixels": 16, "batch_size": 24, **more})


def batch_of(config: Config, count: int = 40) -> dict[str, Any]:
    samples = training_samples(config)
    return samples.__getitems__(list(range(0, len(samples), len(samples) // count))[:count])


def stored(store: str, pattern: str) -> Array:
    return np.concatenate([np.load(path) for path in sorted(Path(store).glob(pattern))])


def cosines(store: str, nodes: Array) -> Array:
    vectors = stored(store, "nodes/*.npy").astype(np.float64)[nodes]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def block(config: Config, batch: dict[str, Any]) -> Array:
    targets = GraphReader(config, training_samples(config).graph).targets(batch)
    return targets.block().double().numpy()


def test_dense_targets_are_the_cosines_of_the_captions(scenes_store: str) -> None:
    config = config_of(scenes_store)
    batch = batch_of(config)
    assert np.abs(block(config, batch) - cosines(scenes_store, batch["node"].numpy())).max() < 1e-5


@pytest.mark.parametrize("targets", ["sketch", "background"])
def test_sparse_targets_have_the_stored_edges_and_estimates_elsewhere(scenes_store: str, targets: Any) -> None:
    config = config_of(scenes_store, targets=targets)
    batch = batch_of(config)
    nodes, found = batch["node"].numpy(), block(config, batch)
    neighbors = stored(scenes_store, "graph/*.neighbors.npy")[nodes]
    exact = (neighbors[:, None, :] == nodes[None, :, None]).any(axis=2)
    exact = exact | exact.T | (nodes[:, None] == nodes)  # listed by either
    truth = cosines(scenes_store, nodes)
    assert exact.sum() > len(nodes)
    assert np.abs(found - truth)[exact].max() < 1e-3
    if targets == "sketch":
        assert np.abs(found - truth)[~exact].mean() < 0.02
    else:
        mean, deviation = stored(scenes_store, "graph/*.background.npy")[nodes].T
        expected = np.broadcast_to((mean + deviation**2 / (2 * config.tau_s))[:, None], found.shape)
        assert found[~exact] == pytest.approx(expected[~exact], abs=1e-5)


@pytest.mark.parametrize("options", [{"method": "supcon"}, {"method": "xsample", "targets": "labels"}])
def test_labels_say_which_nodes_are_equal(scenes_store: str, options: dict[str, Any]) -> None:
    config = config_of(scenes_store, **options)
    batch = batch_of(config)
    batch["node"][7] = batch["node"][30]
    nodes = batch["node"].numpy()
    assert np.array_equal(block(config, batch), nodes[:, None] == nodes)


@pytest.mark.parametrize("targets", ["dense", "sketch", "background"])
def test_the_permuted_control_has_the_targets_of_other_nodes(scenes_store: str, targets: Any) -> None:
    true, control = (config_of(scenes_store, targets=targets, permute_graph=permute) for permute in (False, True))
    batch = batch_of(true)
    nodes = batch["node"].numpy()
    reader = GraphReader(control, training_samples(control).graph)
    every = reader.graph_nodes(np.arange(len(training_samples(control).graph)))
    assert sorted(every) == list(range(len(every)))  # a permutation,
    assert (every == np.arange(len(every))).mean() < 0.05  # that moves nearly all,
    assert np.array_equal(reader.graph_nodes(nodes), every[nodes])  # the same one for each batch
    found = block(control, batch)
    assert np.array_equal(found, block(true, {**batch, "node": torch.from_numpy(every[nodes])}))
    off = ~np.eye(len(nodes), dtype=bool)
    assert abs(np.corrcoef(found[off], block(true, batch)[off])[0, 1]) < 0.3
    if targets == "dense":
        assert found == pytest.approx(cosines(scenes_store, every[nodes]), abs=1e-5)


def test_the_control_is_refused_where_it_would_change_nothing(scenes_store: str) -> None:
    for options in ({"method": "simclr"}, {"method": "supcon"}, {"method": "clip"}, {"targets": "labels"}):
        with pytest.raises(ConfigError, match="permute_graph"):
            config_of(scenes_store, permute_graph=True, **options)


def test_texts_stay_those_of_the_images_in_the_control(scenes_store: str) -> None:
    config = config_of(scenes_store, method="clip_soft", permute_graph=True)
    batch = batch_of(config)
    (texts,) = GraphReader(config, training_samples(config).graph).texts(batch)
    expected = stored(scenes_store, "nodes/*.npy").astype(np.float64)[batch["node"].numpy()]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(texts.numpy() - expected).max() < 1e-6


def test_simclr_reads_nothing_of_the_graph(scenes_store: str) -> None:
    config = config_of(scenes_store, method="simclr")
    reader = GraphReader(config, None)  # type: ignore[arg-type]
    assert reader.targets({}).tensors() == {}
    assert reader.texts({}) == ()


@pytest.mark.parametrize("targets", ["dense", "sketch", "background"])
def test_calibrated_targets_leave_the_other_view_its_share(scenes_store: str, targets: Any) -> None:
    shares = []
    for method in ("xsample", "clip_soft"):
        config = config_of(scenes_store, targets=targets, method=method, other_view=0.7)
        samples, objective = training_samples(config), Objective(config)
        rng = np.random.default_rng(0)
        for _ in range(12):
            batch = samples.__getitems__(np.sort(rng.choice(len(samples), 96, replace=False)).tolist())
            told = GraphReader(config, samples.graph).targets(batch)
            objective(*torch.randn(2 + config.reads_texts, 96, 8), targets=told)
            shares.append(objective.target_facts(torch.zeros(()))["other_view"].item())
    assert np.mean(shares) == pytest.approx(0.7, abs=0.05)


def test_uniform_targets_leave_the_other_view_its_share_and_others_equal_parts(scenes_store: str) -> None:
    for method, others in (("xsample", 46), ("clip_soft", 23)):
        config = config_of(scenes_store, targets="uniform", method=method, other_view=0.7)
        samples, objective = training_samples(config), Objective(config)
        told = GraphReader(config, samples.graph).targets(batch_of(config, 24))
        objective(*torch.randn(2 + config.reads_texts, 24, 8), targets=told)
        facts = {name: value.item() for name, value in objective.target_facts(torch.zeros(())).items()}
        assert facts["other_view"] == pytest.approx(0.7, abs=1e-5)
        assert facts["perplexity"] == pytest.approx(np.exp(-0.7 * np.log(0.7) - 0.3 * np.log(0.3 / others)), rel=1e-4)


def test_uniform_targets_are_refused_without_a_share_that_is_more_than_equal_parts(scenes_store: str) -> None:
    with pytest.raises(ConfigError, match="uniform"):
        config_of(scenes_store, targets="uniform")
    with pytest.raises(ConfigError, match="equal parts"):
        Objective(config_of(scenes_store, targets="uniform", other_view=0.02))
    with pytest.raises(ConfigError, match="permute_graph"):
        config_of(scenes_store, targets="uniform", other_view=0.6, permute_graph=True)


def test_x_sample_can_learn_its_temperature_and_the_methods_that_have_none_of_it_refuse(scenes_store: str) -> None:
    objective = Objective(config_of(scenes_store, learn_tau=True, tau=0.2))
    assert objective.learned() == {"tau": pytest.approx(0.2)}
    z = torch.nn.functional.normalize(torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0)), dim=2).double()
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).double()

    def loss(scale: float) -> float:
        views, others = z.flatten(0, 1).numpy(), ~np.eye(18, dtype=bool)
        unit = torch.nn.functional.normalize(vectors, dim=1).numpy()
        target = np.exp(np.tile(unit @ unit.T, (2, 2)) / 0.1) * others
        return cross_entropy(target / target.sum(1, keepdims=True), scale * views @ views.T, others)

    found = objective(*z, targets=Targets(embeddings=vectors))
    assert found.item() == pytest.approx(loss(5), rel=1e-6)
    found.backward()
    (parameter,) = objective.parameters()
    slope = (loss(5 * np.exp(1e-4)) - loss(5 * np.exp(-1e-4))) / 2e-4
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(slope, rel=1e-4)
    with pytest.raises(ConfigError, match="learn_tau"):
        config_of(scenes_store, learn_tau=True, method="simclr")


def test_a_share_is_refused_where_nothing_is_calibrated(scenes_store: str) -> None:
    for options in ({"method": "simclr"}, {"method": "clip"}, {"targets": "labels"}, {"other_view": 1.0}):
        with pytest.raises(ConfigError, match="other_view"):
            config_of(scenes_store, **{"other_view": 0.6, **options})
    with pytest.raises(ConfigError, match="other_view = -1"):
        config_of(scenes_store, other_view=-1.0)


def cross_entropy(target: Array, logits: Array, slots: Array) -> float:
    logits = np.where(slots, logits, -np.inf)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(target * np.where(slots, log_p, 0)).sum(axis=1).mean())


@pytest.mark.parametrize("view_weight", [0.0, 0.7])
@pytest.mark.parametrize("method", ["simclr", "supcon", "xsample", "clip", "clip_soft", *SIGLIPS])
def test_each_method_has_its_published_loss(method: Any, view_weight: float) -> None:
    tau, tau_s, count = 0.2, 0.3, 9
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, count, 8))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    vectors = rng.normal(size=(count, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.array([0, 1, 2, 0, 1, 3, 4, 5, 6])
    similar, views = vectors @ vectors.T, z[:2].reshape(2 * count, 8)
    others = ~np.eye(2 * count, dtype=bool)

    def simclr(views: Array) -> float:
        return cross_entropy(np.tile(np.eye(count), (2, 2)) * others, views @ views.T / tau, others)

    if method == "simclr":
        expected = simclr(views)
    elif method == "supcon":
        target = np.tile(labels[:, None] == labels, (2, 2)) * others
        expected = cross_entropy(target / target.sum(axis=1, keepdims=True), views @ views.T / tau, others)
    elif method == "xsample":
        target = np.exp(np.tile(similar, (2, 2)) / tau_s) * others
        expected = cross_entropy(target / target.sum(axis=1, keepdims=True), views @ views.T / tau, others)
    elif method in SIGLIPS:
        own = np.eye(count, dtype=bool)
        near = similar >= 0.4
        assert 0 < (near & ~own).sum() < count * (count - 1)
        target = {"siglip_positive": near | own, "siglip_soft": np.clip((similar - 0.4) / 0.6, 0, 1)}.get(method, own)
        counted = ~near | own if method == "siglip_mask" else np.ones_like(own)
        logits = [view @ z[2].T / tau - 10 for view in z[:2]]
        each = [target * np.log1p(np.exp(-at)) + (1 - target) * np.log1p(np.exp(at)) for at in logits]
        expected = np.mean([(loss * counted).sum() / count for loss in each])
    else:
        target = np.eye(count) if method == "clip" else np.exp(similar / tau_s)
        target = target / target.sum(axis=1, keepdims=True)
        both = np.ones((count, count), bool)
        logits = [view @ z[2].T / tau for view in z[:2]]
        expected = np.mean([cross_entropy(target, each, both) for pair in logits for each in (pair, pair.T)])
    expected += view_weight * simclr(z[3:].reshape(2 * count, 8))
    config = Config(store="", method=method, tau=tau, tau_s=tau_s, similar=0.4, view_weight=view_weight)
    objective = Objective(config).double()
    given = [torch.from_numpy(each) for each in (*z[: 2 + config.reads_texts], *(z[3:] if view_weight else ()))]
    if method == "supcon":
        targets = Targets(labels=torch.from_numpy(labels))
    else:
        targets = Targets(embeddings=torch.from_numpy(vectors))
    assert objective(*given, targets=targets).item() == pytest.approx(expected, abs=1e-6)
    assert len(list(objective.parameters())) == method.startswith(("clip", "siglip"))
    assert list(objective.learned()) == (["tau", "bias"] if method in SIGLIPS else ["tau"] if "clip" in method else [])
