"""Losses of images and texts against formulas written with loops in float64, and against each other where they meet."""

import math

import numpy as np
import pytest
import torch

from graphbuild.errors import ConfigError
from graphbuild.torch import CLIPLoss, CWCLLoss, SigLIPLoss, Targets

PAIRS, WIDTH, TEXT_WIDTH = 6, 5, 4
Pairs = tuple[np.ndarray, np.ndarray]
ALL_APART = Targets(labels=torch.arange(PAIRS))


@pytest.fixture
def pairs() -> Pairs:
    rng = np.random.default_rng(8)
    images = rng.normal(size=(PAIRS, WIDTH))
    return images, images + rng.normal(size=images.shape)


@pytest.fixture
def block() -> np.ndarray:
    return np.random.default_rng(9).uniform(-1, 1, size=(PAIRS, PAIRS))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def run(
    loss: torch.nn.Module, pairs: Pairs, targets: Targets | None = None, dtype: torch.dtype = torch.float64
) -> float:
    value = loss(*(torch.from_numpy(z).to(dtype) for z in pairs), targets)
    assert value.dtype == dtype
    return float(value.detach())


def assert_equals(loss: torch.nn.Module, pairs: Pairs, targets: Targets | None, expected: float) -> None:
    assert run(loss, pairs, targets) == pytest.approx(expected, rel=1e-6)  # the targets' block is float32
    assert run(loss, pairs, targets, torch.float32) == pytest.approx(expected, rel=2e-5)


def one_direction(anchors: np.ndarray, others: np.ndarray, weights: np.ndarray, tau: float) -> float:
    """Mean over anchors i of - sum_j w_ij log softmax_j(a_i.b_j / tau)."""
    losses = []
    for i in range(PAIRS):
        denominator = sum(math.exp(anchors[i] @ others[j] / tau) for j in range(PAIRS))
        losses.append(
            -sum(weights[i, j] * math.log(math.exp(anchors[i] @ others[j] / tau) / denominator) for j in range(PAIRS))
        )
    return float(np.mean(losses))


def own_one(block: np.ndarray) -> np.ndarray:
    return np.where(np.eye(PAIRS, dtype=bool), 1.0, block)


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_clip(pairs: Pairs, tau: float) -> None:
    images, texts = unit(pairs[0]), unit(pairs[1])
    to_text = one_direction(images, texts, np.eye(PAIRS), tau)
    to_image = one_direction(texts, images, np.eye(PAIRS), tau)
    assert to_text != pytest.approx(to_image, rel=1e-3)
    assert_equals(CLIPLoss(tau), pairs, None, (to_text + to_image) / 2)


@pytest.mark.parametrize("tau_s", [0.05, 0.5])
def test_clip_with_soft_targets(pairs: Pairs, tau_s: float) -> None:
    images, texts = unit(pairs[0]), unit(pairs[1])
    captions = np.random.default_rng(10).normal(size=(PAIRS, TEXT_WIDTH))
    soft = np.exp(unit(captions) @ unit(captions).T / tau_s)
    soft = soft / soft.sum(1, keepdims=True)
    expected = (one_direction(images, texts, soft, 0.2) + one_direction(texts, images, soft, 0.2)) / 2
    loss = CLIPLoss(0.2, tau_s)
    assert_equals(loss, pairs, Targets(embeddings=torch.from_numpy(captions)), expected)
    z1, z2 = (torch.from_numpy(z) for z in pairs)
    assert loss(z1, z2, torch.from_numpy(captions)).item() == pytest.approx(expected, rel=1e-9)


def dropped(block: np.ndarray, mask: float) -> np.ndarray:
    """Pairs of similarity `mask` or more, but for each row's own."""
    return np.array([[i != j and block[i, j] >= mask for j in range(PAIRS)] for i in range(PAIRS)])


def test_clip_leaves_false_negatives_out(pairs: Pairs, block: np.ndarray) -> None:
    images, texts = unit(pairs[0]), unit(pairs[1])
    drop, tau, total = dropped(block, 0.3), 0.2, 0.0
    assert drop.any()
    for anchors, others in ((images, texts), (texts, images)):
        for i in range(PAIRS):
            kept = [math.exp(anchors[i] @ others[j] / tau) for j in range(PAIRS) if not drop[i, j]]
            total -= math.log(math.exp(anchors[i] @ others[i] / tau) / sum(kept)) / PAIRS / 2
    assert_equals(CLIPLoss(tau, mask=0.3), pairs, Targets(similarities=torch.from_numpy(block)), total)
    assert run(CLIPLoss(tau, mask=1.0), pairs, ALL_APART) == pytest.approx(run(CLIPLoss(tau), pairs), rel=1e-12)


def test_repaired_false_negatives_are_positives(pairs: Pairs, block: np.ndarray) -> None:
    images, texts, targets = unit(pairs[0]), unit(pairs[1]), Targets(similarities=torch.from_numpy(block))
    positives = (dropped(block, 0.3) | np.eye(PAIRS, dtype=bool)).astype(float)
    shares = positives / positives.sum(1, keepdims=True)
    expected = (one_direction(images, texts, shares, 0.2) + one_direction(texts, images, shares, 0.2)) / 2
    assert_equals(CLIPLoss(0.2, positive=0.3), pairs, targets, expected)
    assert_equals(SigLIPLoss(positive=0.3), pairs, targets, siglip(pairs, 10.0, -10.0, positives))
    assert run(CLIPLoss(0.2, positive=1.0), pairs, ALL_APART) == pytest.approx(run(CLIPLoss(0.2), pairs), rel=1e-12)


def test_hard_negatives_stay_nearer_than_other_negatives(pairs: Pairs, block: np.ndarray) -> None:
    images, texts, hard = unit(pairs[0]), unit(pairs[1]), dropped(block, 0.3)
    hard[0] = False  # a row without any
    block[0] = -1.0
    expected, margins = run(CLIPLoss(0.2), pairs), []
    for anchors, others in ((images, texts), (texts, images)):
        for i in range(PAIRS):
            near = [anchors[i] @ others[j] for j in range(PAIRS) if hard[i, j]]
            far = [anchors[i] @ others[j] for j in range(PAIRS) if not hard[i, j] and j != i]
            margins.append(np.mean([max(0, one - min(near)) for one in far]) if near and far else 0.0)
    assert max(margins) > 0
    targets = Targets(similarities=torch.from_numpy(block))
    assert_equals(CLIPLoss(0.2, hard=0.3), pairs, targets, expected + float(np.mean(margins)))
    assert_equals(CLIPLoss(0.2, learnable=True, hard=0.3), pairs, targets, expected + float(np.mean(margins)))
    assert run(CLIPLoss(0.2, hard=1.0), pairs, ALL_APART) == pytest.approx(run(CLIPLoss(0.2), pairs), rel=1e-12)


def test_siglip_leaves_false_negatives_out(pairs: Pairs, block: np.ndarray) -> None:
    images, texts, drop, total = unit(pairs[0]), unit(pairs[1]), dropped(block, 0.3), 0.0
    for i in range(PAIRS):
        for j in range(PAIRS):
            sign = 1 if i == j else -1
            if not drop[i, j]:
                total += math.log(1 + math.exp(-sign * (10 * (images[i] @ texts[j]) - 10))) / PAIRS
    assert_equals(SigLIPLoss(mask=0.3), pairs, Targets(similarities=torch.from_numpy(block)), total)


def test_clip_with_identity_targets_is_clip(pairs: Pairs) -> None:
    assert run(CLIPLoss(0.07, tau_s=0.01), pairs, ALL_APART) == pytest.approx(run(CLIPLoss(0.07), pairs), rel=1e-12)


@pytest.mark.parametrize("keep_diagonal", [False, True])
def test_cwcl_weighs_the_rows_of_its_first_argument(pairs: Pairs, block: np.ndarray, keep_diagonal: bool) -> None:
    images, texts = unit(pairs[0]), unit(pairs[1])
    weights = (1 + (block if keep_diagonal else own_one(block))) / 2
    weights = weights / weights.sum(1, keepdims=True)
    weighted = one_direction(images, texts, weights, 0.3)
    plain = one_direction(texts, images, np.eye(PAIRS), 0.3)
    targets = Targets(similarities=torch.from_numpy(block), keep_diagonal=keep_diagonal)
    assert_equals(CWCLLoss(0.3), pairs, targets, (weighted + plain) / 2)


def test_cwcl_with_all_others_opposite_is_clip(pairs: Pairs) -> None:
    opposite = Targets(similarities=torch.full((PAIRS, PAIRS), -1.0))
    assert run(CWCLLoss(0.07), pairs, opposite) == pytest.approx(run(CLIPLoss(0.07), pairs), rel=1e-12)


def test_cwcl_row_without_weight_adds_nothing(pairs: Pairs) -> None:
    z1, z2 = (torch.from_numpy(z).requires_grad_() for z in pairs)
    nothing = Targets(similarities=torch.full((PAIRS, PAIRS), -1.0), keep_diagonal=True)
    value = CWCLLoss(0.3)(z1, z2, nothing)
    value.backward()
    plain = one_direction(unit(pairs[1]), unit(pairs[0]), np.eye(PAIRS), 0.3)
    assert value.item() == pytest.approx(plain / 2, rel=1e-9)
    assert z1.grad.isfinite().all()


def siglip(pairs: Pairs, scale: float, bias: float, probability: np.ndarray) -> float:
    images, texts = unit(pairs[0]), unit(pairs[1])
    total = 0.0
    for i in range(PAIRS):
        for j in range(PAIRS):
            p = 1 / (1 + math.exp(-(scale * (images[i] @ texts[j]) + bias)))
            total -= probability[i, j] * math.log(p) + (1 - probability[i, j]) * math.log(1 - p)
    return total / PAIRS


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (3.0, 0.5)])
def test_siglip(pairs: Pairs, scale: float, bias: float) -> None:
    assert_equals(SigLIPLoss(scale, bias), pairs, None, siglip(pairs, scale, bias, np.eye(PAIRS)))


@pytest.mark.parametrize("threshold", [0.0, 0.4, -1.0])
def test_siglip_with_soft_targets(pairs: Pairs, block: np.ndarray, threshold: float) -> None:
    probability = np.clip((own_one(block) - threshold) / (1 - threshold), 0, 1)
    targets = Targets(similarities=torch.from_numpy(block))
    expected = siglip(pairs, 5.0, -2.0, probability)
    assert_equals(SigLIPLoss(5.0, -2.0, threshold=threshold), pairs, targets, expected)


def test_siglip_with_identity_targets_is_siglip(pairs: Pairs) -> None:
    soft = run(SigLIPLoss(threshold=0.3), pairs, ALL_APART)
    assert soft == pytest.approx(run(SigLIPLoss(), pairs), rel=1e-12)


def derivative(loss_at: object, point: float, step: float = 1e-4) -> float:
    return (loss_at(point + step) - loss_at(point - step)) / (2 * step)  # type: ignore[operator]


def test_a_learnable_clip_scale_starts_at_tau_and_has_the_derivative_by_log_scale(pairs: Pairs) -> None:
    loss = CLIPLoss(0.2, learnable=True)
    value = loss(*(torch.from_numpy(z) for z in pairs))
    value.backward()
    assert value.item() == pytest.approx(run(CLIPLoss(0.2), pairs), rel=1e-6)
    expected = derivative(lambda log_scale: run(CLIPLoss(math.exp(-log_scale)), pairs), math.log(1 / 0.2))
    assert loss.log_scale.grad.item() == pytest.approx(expected, rel=1e-4)
    assert not list(CLIPLoss(0.2).parameters())


def test_a_learnable_clip_scale_stops_at_100_and_can_come_back(pairs: Pairs) -> None:
    loss = CLIPLoss(0.07, learnable=True)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    value = loss(*(torch.from_numpy(z) for z in pairs))
    value.backward()
    assert value.item() == pytest.approx(run(CLIPLoss(0.01), pairs), rel=1e-5)
    assert loss.log_scale.grad.item() != 0


def test_learnable_siglip_scale_and_bias_have_their_derivatives(pairs: Pairs) -> None:
    loss = SigLIPLoss(4.0, -1.0, learnable=True)
    value = loss(*(torch.from_numpy(z) for z in pairs))
    value.backward()
    assert value.item() == pytest.approx(run(SigLIPLoss(4.0, -1.0), pairs), rel=1e-6)
    by_scale = derivative(lambda log_scale: run(SigLIPLoss(math.exp(log_scale), -1.0), pairs), math.log(4.0))
    by_bias = derivative(lambda bias: run(SigLIPLoss(4.0, bias), pairs), -1.0)
    assert loss.log_scale_and_bias.grad.tolist() == pytest.approx([by_scale, by_bias], rel=1e-4)


def test_options_out_of_range_are_refused() -> None:
    for build in (
        lambda: CLIPLoss(tau=0.0),
        lambda: CLIPLoss(tau_s=0.0),
        lambda: CLIPLoss(mask=1.5),
        lambda: CLIPLoss(mask=0.9, positive=0.9),
        lambda: CLIPLoss(tau_s=0.1, mask=0.9),
        lambda: SigLIPLoss(threshold=0.5, mask=0.9),
        lambda: SigLIPLoss(scale=0.0),
        lambda: SigLIPLoss(threshold=1.0),
    ):
        with pytest.raises(ConfigError):
            build()


@pytest.mark.parametrize("loss", [CLIPLoss(tau_s=0.1), CWCLLoss(), SigLIPLoss(threshold=0.0)])
def test_soft_targets_must_be_given(pairs: Pairs, loss: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="embeddings, similarities, labels or edges"):
        run(loss, pairs)
