"""Losses of two views against formulas written with loops in float64, and against each other where they meet."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import (
    DebiasedLoss,
    DecoupledLoss,
    GraphSimCLRLoss,
    GraphVICRegLoss,
    KernelInfoNCELoss,
    NTXentLoss,
    SupConLoss,
    Targets,
    XSampleLoss,
)

IMAGES, WIDTH = 7, 5
LABELS = np.array([0, 1, 2, 0, 1, 0, 3])
Views = tuple[np.ndarray, np.ndarray]
Weights = Callable[[int, int], float]


@pytest.fixture
def views() -> Views:
    rng = np.random.default_rng(5)
    z1 = rng.normal(size=(IMAGES, WIDTH))
    return z1, z1 + 0.5 * rng.normal(size=z1.shape)


@pytest.fixture
def block() -> np.ndarray:
    """A directed graph: weights in [-0.3, 1], its diagonal too."""
    block = np.random.default_rng(6).uniform(-0.3, 1, size=(IMAGES, IMAGES))
    assert (block < 0).any()
    return block


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def run(
    loss: torch.nn.Module, views: Views, targets: Targets | None = None, dtype: torch.dtype = torch.float64
) -> float:
    value = loss(*(torch.from_numpy(z).to(dtype) for z in views), targets)
    assert value.dtype == dtype
    return float(value)


def assert_equals(loss: torch.nn.Module, views: Views, targets: Targets | None, expected: float) -> None:
    assert run(loss, views, targets) == pytest.approx(expected, rel=1e-6)  # the targets' block is float32
    assert run(loss, views, targets, torch.float32) == pytest.approx(expected, rel=2e-5, abs=2e-6)


def image(view: int) -> int:
    return view % IMAGES


def other(view: int) -> int:
    return (view + IMAGES) % (2 * IMAGES)


def log_probabilities(z: np.ndarray, tau: float) -> np.ndarray:
    """log p_ij = z_i.z_j / tau - log sum over j' != i of exp(z_i.z_j' / tau)."""
    table = np.zeros((len(z), len(z)))
    for i in range(len(z)):
        denominator = sum(math.exp(z[i] @ z[k] / tau) for k in range(len(z)) if k != i)
        for j in range(len(z)):
            table[i, j] = z[i] @ z[j] / tau - math.log(denominator)
    return table


def nt_xent(views: Views, tau: float) -> float:
    log_p = log_probabilities(unit(np.concatenate(views)), tau)
    return float(np.mean([-log_p[i, other(i)] for i in range(2 * IMAGES)]))


def positives_of(i: int, is_positive: Callable[[int, int], bool]) -> list[int]:
    return [j for j in range(2 * IMAGES) if j != i and is_positive(image(i), image(j))]


def sup_con(views: Views, tau: float, is_positive: Callable[[int, int], bool]) -> float:
    log_p = log_probabilities(unit(np.concatenate(views)), tau)
    losses = []
    for i in range(2 * IMAGES):
        positives = positives_of(i, is_positive)
        losses.append(-sum(log_p[i, p] for p in positives) / len(positives) if positives else 0.0)
    return float(np.mean(losses))


def same_class(i: int, j: int) -> bool:
    return bool(LABELS[i] == LABELS[j])


CLASSES = Targets(labels=torch.from_numpy(LABELS))
ALL_APART = Targets(labels=torch.arange(IMAGES))


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_nt_xent(views: Views, tau: float) -> None:
    assert_equals(NTXentLoss(tau), views, None, nt_xent(views, tau))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_supcon_from_labels(views: Views, tau: float) -> None:
    assert_equals(SupConLoss(tau), views, CLASSES, sup_con(views, tau, same_class))


def test_supcon_takes_equal_captions_from_embeddings_and_a_threshold_from_a_block(
    views: Views, block: np.ndarray
) -> None:
    prompts = torch.from_numpy(np.random.default_rng(7).normal(size=(4, 16))[LABELS])
    assert_equals(SupConLoss(0.1), views, Targets(embeddings=prompts), sup_con(views, 0.1, same_class))
    expected = sup_con(views, 0.1, lambda i, j: i == j or block[i, j] >= 0.6)
    assert_equals(SupConLoss(0.1, threshold=0.6), views, Targets(similarities=torch.from_numpy(block)), expected)


def test_supcon_of_distinct_labels_is_nt_xent(views: Views) -> None:
    assert run(SupConLoss(0.2), views, ALL_APART) == pytest.approx(run(NTXentLoss(0.2), views), rel=1e-12)


@pytest.mark.parametrize("keep_self", [False, True])
def test_x_sample_from_labels_block_and_diagonal(views: Views, block: np.ndarray, keep_self: bool) -> None:
    z, tau, tau_s = unit(np.concatenate(views)), 0.3, 0.2
    for targets, similarity in (
        (CLASSES, lambda i, j: float(same_class(i, j))),
        (Targets(similarities=torch.from_numpy(block)), lambda i, j: 1.0 if i == j else block[i, j]),
        (Targets(similarities=torch.from_numpy(block), keep_diagonal=True), lambda i, j: block[i, j]),
    ):
        losses = []
        for i in range(2 * IMAGES):
            slots = [j for j in range(2 * IMAGES) if keep_self or j != i]
            g = [1.0 if j == i else similarity(image(i), image(j)) for j in slots]
            s = [math.exp(value / tau_s) for value in g]
            p = [math.exp(z[i] @ z[j] / tau) for j in slots]
            losses.append(-sum(a / sum(s) * math.log(b / sum(p)) for a, b in zip(s, p, strict=True)))
        assert_equals(XSampleLoss(tau, tau_s, keep_self=keep_self), views, targets, float(np.mean(losses)))


def decoupled(views: Views, tau: float, is_positive: Callable[[int, int], bool]) -> float:
    """arXiv 2110.06848: attraction to the positives, and NT-Xent's denominator without them."""
    z, losses = unit(np.concatenate(views)), []
    for i in range(2 * IMAGES):
        positives = positives_of(i, is_positive)
        attraction = sum(z[i] @ z[j] / tau for j in positives) / len(positives)
        negatives = [j for j in range(2 * IMAGES) if j != i and j not in positives]
        losses.append(math.log(sum(math.exp(z[i] @ z[j] / tau) for j in negatives)) - attraction)
    return float(np.mean(losses))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_decoupled_is_nt_xent_minus_the_positive_in_the_denominator(views: Views, tau: float) -> None:
    assert_equals(DecoupledLoss(tau), views, None, decoupled(views, tau, lambda i, j: i == j))
    z, gaps = unit(np.concatenate(views)), []
    for i in range(2 * IMAGES):
        terms = {j: math.exp(z[i] @ z[j] / tau) for j in range(2 * IMAGES) if j != i}
        gaps.append(math.log(sum(terms.values()) / (sum(terms.values()) - terms[other(i)])))
    assert run(NTXentLoss(tau), views) - run(DecoupledLoss(tau), views) == pytest.approx(np.mean(gaps), rel=1e-9)


def test_decoupled_with_a_graph_has_no_positive_among_its_negatives(views: Views) -> None:
    assert_equals(DecoupledLoss(0.2, threshold=0.5), views, CLASSES, decoupled(views, 0.2, same_class))


def debiased(views: Views, tau: float, priors: list[float]) -> float:
    """arXiv 2007.00224, equations 7 and 8 with M = 1."""
    z, losses, n = unit(np.concatenate(views)), [], 2 * IMAGES - 2
    for i in range(2 * IMAGES):
        own = math.exp(z[i] @ z[other(i)] / tau)
        others = sum(math.exp(z[i] @ z[j] / tau) for j in range(2 * IMAGES) if image(j) != image(i))
        prior = priors[image(i)]
        g = max((others / n - prior * own) / (1 - prior), math.exp(-1 / tau))
        losses.append(-math.log(own / (own + n * g)))
    return float(np.mean(losses))


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("prior", [0.01, 0.1, 0.9])
def test_debiased_with_one_prior(views: Views, tau: float, prior: float) -> None:
    assert_equals(DebiasedLoss(tau, prior), views, None, debiased(views, tau, [prior] * IMAGES))


def test_debiased_with_a_prior_per_anchor(views: Views) -> None:
    priors = np.linspace(0, 0.6, IMAGES)
    targets = Targets(class_priors=torch.from_numpy(priors))
    assert_equals(DebiasedLoss(0.5, tau_plus=None), views, targets, debiased(views, 0.5, list(priors)))
    assert debiased(views, 0.5, list(priors)) != pytest.approx(debiased(views, 0.5, list(priors[::-1])), rel=1e-3)


def test_debiased_with_prior_zero_is_nt_xent(views: Views) -> None:
    assert run(DebiasedLoss(0.1, 0.0), views) == pytest.approx(run(NTXentLoss(0.1), views), rel=1e-12)


def test_debiased_reaches_its_floor(views: Views) -> None:
    z = unit(views[0])
    same = (z, z)  # positives at similarity 1: the estimate of the negatives would be negative
    expected = math.log(1 + (2 * IMAGES - 2) * math.exp(-2 / 0.5))
    assert_equals(DebiasedLoss(0.5, 0.9), same, None, expected)


def graph_weights(block: np.ndarray, keep_diagonal: bool) -> Weights:
    return lambda i, j: 1.0 if i == j and not keep_diagonal else max(0.0, float(block[i, j]))


def graph_targets(block: np.ndarray, keep_diagonal: bool) -> Targets:
    return Targets(similarities=torch.from_numpy(block), keep_diagonal=keep_diagonal)


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize("exponents", [(2.0,), (1.0,), (0.5,), (1.0, 2.0)])
def test_kernel_info_nce(views: Views, block: np.ndarray, exponents: tuple[float, ...], keep_diagonal: bool) -> None:
    tau, z, weight, losses = 0.4, unit(np.concatenate(views)), graph_weights(block, keep_diagonal), []
    for i in range(2 * IMAGES):
        slots = [j for j in range(2 * IMAGES) if j != i]
        kernel = {j: sum(math.exp(-(np.linalg.norm(z[i] - z[j]) ** g) / tau) for g in exponents) for j in slots}
        row = {j: weight(image(i), image(j)) for j in slots}
        total = sum(kernel.values())
        losses.append(-sum(row[j] / sum(row.values()) * math.log(kernel[j] / total) for j in slots))
    loss = KernelInfoNCELoss(tau, exponents)
    assert_equals(loss, views, graph_targets(block, keep_diagonal), float(np.mean(losses)))


def test_gaussian_kernel_info_nce_with_the_other_view_alone_is_nt_xent_at_half_tau(views: Views) -> None:
    assert run(KernelInfoNCELoss(0.2), views, ALL_APART) == pytest.approx(run(NTXentLoss(0.1), views), rel=1e-9)


def test_gaussian_kernel_info_nce_of_classes_is_supcon_at_half_tau(views: Views) -> None:
    assert run(KernelInfoNCELoss(0.2), views, CLASSES) == pytest.approx(run(SupConLoss(0.1), views, CLASSES), rel=1e-6)


@pytest.mark.parametrize("keep_diagonal", [False, True])
def test_graph_simclr(views: Views, block: np.ndarray, keep_diagonal: bool) -> None:
    log_p, weight = log_probabilities(unit(np.concatenate(views)), 0.3), graph_weights(block, keep_diagonal)
    edges = [(i, j) for i in range(2 * IMAGES) for j in range(2 * IMAGES) if i != j]
    expected = -sum(weight(image(i), image(j)) * log_p[i, j] for i, j in edges) / (2 * IMAGES)
    assert_equals(GraphSimCLRLoss(0.3), views, graph_targets(block, keep_diagonal), expected)


def test_graph_simclr_with_the_other_view_alone_is_nt_xent(views: Views) -> None:
    assert run(GraphSimCLRLoss(0.3), views, ALL_APART) == pytest.approx(run(NTXentLoss(0.3), views), rel=1e-12)


def vicreg(views: Views, weight: Weights, coefficients: tuple[float, float, float]) -> float:
    z, width = np.concatenate(views), views[0].shape[1]
    pairs = [(i, j) for i in range(2 * IMAGES) for j in range(2 * IMAGES) if i != j]
    invariance = sum(weight(image(i), image(j)) * ((z[i] - z[j]) ** 2).sum() for i, j in pairs) / (2 * IMAGES * width)
    hinges, redundancy = [], 0.0
    for view in views:
        covariance = np.cov(view, rowvar=False)
        hinges += [max(0.0, 1 - math.sqrt(covariance[k, k] + 1e-4)) for k in range(width)]
        redundancy += sum(covariance[k, m] ** 2 for k in range(width) for m in range(width) if k != m) / width
    terms = (invariance, float(np.mean(hinges)), redundancy)
    return sum(a * b for a, b in zip(coefficients, terms, strict=True))


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize("coefficients", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_graph_vicreg(
    views: Views, block: np.ndarray, keep_diagonal: bool, coefficients: tuple[float, float, float]
) -> None:
    views = (0.7 * views[0] + 3, 0.7 * views[1] - 2)  # some dimensions below unit deviation; no norm is taken away
    expected = vicreg(views, graph_weights(block, keep_diagonal), coefficients)
    assert expected > 0
    assert_equals(GraphVICRegLoss(*coefficients), views, graph_targets(block, keep_diagonal), expected)


def test_graph_vicreg_with_the_other_view_alone_is_vicreg(views: Views) -> None:
    """arXiv 2105.04906 with its authors' scaling: mean squared error, half of each view's hinge."""
    expected = vicreg(views, lambda i, j: 0.0, (25.0, 25.0, 1.0)) + 25 * ((views[0] - views[1]) ** 2).mean()
    assert_equals(GraphVICRegLoss(), views, ALL_APART, float(expected))


def test_graph_vicreg_keeps_its_precision_far_from_the_origin(views: Views) -> None:
    far = (views[0] + 200, views[1] + 200)
    expected = vicreg(views, same_class, (1.0, 0.0, 0.0))
    assert run(GraphVICRegLoss(1.0, 0.0, 0.0), far, CLASSES, torch.float32) == pytest.approx(expected, rel=1e-4)


def test_equal_views_give_finite_gradients_for_every_kernel(views: Views) -> None:
    z = torch.from_numpy(views[0]).float().requires_grad_()
    KernelInfoNCELoss(exponents=(0.5, 1.0, 2.0))(z, z, CLASSES).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


WITHOUT_EDGES = [SupConLoss(), DecoupledLoss(threshold=0.5), KernelInfoNCELoss(), GraphSimCLRLoss()]


@pytest.mark.parametrize("loss", WITHOUT_EDGES, ids=lambda loss: type(loss).__name__)
def test_a_graph_without_edges_gives_zero_and_no_gradient(loss: torch.nn.Module, views: Views) -> None:
    z1, z2 = (torch.from_numpy(z).float().requires_grad_() for z in views)
    value = loss(z1, z2, Targets(similarities=torch.zeros(IMAGES, IMAGES), keep_diagonal=True))
    value.backward()
    assert value.item() == 0
    assert (z1.grad == 0).all()
    assert (z2.grad == 0).all()


@pytest.mark.parametrize("loss", WITHOUT_EDGES, ids=lambda loss: type(loss).__name__)
def test_a_view_without_edges_adds_nothing_to_the_others(loss: torch.nn.Module, views: Views) -> None:
    some = torch.from_numpy((LABELS[:, None] == LABELS).astype(np.float64))
    edgeless = some.clone()
    edgeless[2] = 0
    rows = []
    for row in range(IMAGES):  # the loss is a mean over anchors: what each anchor's edges contribute, one at a time
        alone = torch.zeros_like(some)
        alone[row] = some[row]
        rows.append(run(loss, views, Targets(similarities=alone, keep_diagonal=True)))
    rest = sum(value for row, value in enumerate(rows) if row != 2)
    z1, z2 = (torch.from_numpy(z).requires_grad_() for z in views)
    value = loss(z1, z2, Targets(similarities=edgeless, keep_diagonal=True))
    value.backward()
    assert rows[2] != 0
    assert value.item() == pytest.approx(rest, rel=1e-9)
    assert z1.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_decoupled_without_negatives_is_zero_and_has_no_gradient(views: Views) -> None:
    z1, z2 = (torch.from_numpy(z).float().requires_grad_() for z in views)
    with torch.autograd.detect_anomaly(check_nan=True):  # raises at a NaN on the way, also one that a mask would hide
        value = DecoupledLoss(threshold=0.5)(z1, z2, Targets(labels=torch.zeros(IMAGES, dtype=torch.int64)))
        value.backward()
    assert value.item() == 0
    assert (z1.grad == 0).all()


def test_graph_vicreg_without_edges_keeps_variance_and_covariance(views: Views) -> None:
    nothing = Targets(similarities=torch.zeros(IMAGES, IMAGES), keep_diagonal=True)
    assert_equals(GraphVICRegLoss(), views, nothing, vicreg(views, lambda i, j: 0.0, (25.0, 25.0, 1.0)))


def test_options_out_of_range_are_refused() -> None:
    for build in (
        lambda: DebiasedLoss(tau_plus=1.0),
        lambda: DebiasedLoss(tau_plus=-0.1),
        lambda: KernelInfoNCELoss(exponents=()),
        lambda: KernelInfoNCELoss(exponents=(3.0,)),
        lambda: NTXentLoss(0.0),
    ):
        with pytest.raises(ConfigError):
            build()
    one = torch.ones(1, WIDTH)
    with pytest.raises(ConfigError, match="one image"):
        GraphVICRegLoss()(one, one, Targets(labels=torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize("prior", [1.0, -0.5, float("nan")])
def test_class_priors_out_of_range_are_named(views: Views, prior: float) -> None:
    priors = torch.full((IMAGES,), 0.1)
    priors[4] = prior
    with pytest.raises(InputError, match=r"class priors.*\[4\]"):
        run(DebiasedLoss(tau_plus=None), views, Targets(class_priors=priors))


@pytest.mark.parametrize("loss", [XSampleLoss(), SupConLoss(), KernelInfoNCELoss(), DebiasedLoss(tau_plus=None)])
def test_what_a_loss_reads_must_be_given(views: Views, loss: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="pass"):
        run(loss, views)
