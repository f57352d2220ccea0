"""The loss against formulas written with loops, against its limits, and split over two processes."""

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import XSampleLoss

IMAGES, WIDTH, TEXT_WIDTH = 8, 6, 5


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def written_out(z1: np.ndarray, z2: np.ndarray, texts: np.ndarray, tau: float, tau_s: float) -> float:
    """Sobal et al., arXiv 2407.18134: mean over i of - sum over j != i of s_ij log p_ij, in float64."""
    z, texts, images = (
        unit(np.concatenate([z1, z2]).astype(np.float64)),
        unit(texts.astype(np.float64)),
        len(z1),
    )
    losses = []
    for i in range(2 * images):
        others = [j for j in range(2 * images) if j != i]
        g = [1.0 if i % images == j % images else float(texts[i % images] @ texts[j % images]) for j in others]
        s = [math.exp(value / tau_s) for value in g]
        p = [math.exp(float(z[i] @ z[j]) / tau) for j in others]
        losses.append(-sum(a / sum(s) * math.log(b / sum(p)) for a, b in zip(s, p, strict=True)))
    return sum(losses) / len(losses)


def nt_xent(z1: np.ndarray, z2: np.ndarray, tau: float) -> float:
    """SimCLR, arXiv 2002.05709, equation 1, averaged over both directions of all pairs."""
    z, images = unit(np.concatenate([z1, z2])), len(z1)
    losses = []
    for i in range(2 * images):
        positive = (i + images) % (2 * images)
        denominator = sum(math.exp(float(z[i] @ z[k]) / tau) for k in range(2 * images) if k != i)
        losses.append(-math.log(math.exp(float(z[i] @ z[positive]) / tau) / denominator))
    return sum(losses) / len(losses)


def sup_con(z1: np.ndarray, z2: np.ndarray, labels: np.ndarray, tau: float) -> float:
    """SupCon, arXiv 2004.11362, equation 2 (L_out), averaged over anchors."""
    z, classes = unit(np.concatenate([z1, z2])), np.concatenate([labels, labels])
    losses = []
    for i in range(len(z)):
        denominator = sum(math.exp(float(z[i] @ z[a]) / tau) for a in range(len(z)) if a != i)
        positives = [p for p in range(len(z)) if p != i and classes[p] == classes[i]]
        log_p = [math.log(math.exp(float(z[i] @ z[p]) / tau) / denominator) for p in positives]
        losses.append(-sum(log_p) / len(positives))
    return sum(losses) / len(losses)


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    z1 = rng.normal(size=(IMAGES, WIDTH))
    return z1, z1 + 0.5 * rng.normal(size=z1.shape), rng.normal(size=(IMAGES, TEXT_WIDTH))


def tensors(*arrays: np.ndarray, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays]


@pytest.mark.parametrize(("tau", "tau_s"), [(0.1, 0.1), (0.5, 0.05), (1.0, 1.0)])
def test_equals_the_written_formula(batch: tuple[np.ndarray, ...], tau: float, tau_s: float) -> None:
    expected = written_out(*batch, tau, tau_s)
    single = XSampleLoss(tau, tau_s)(*tensors(*batch))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5)
    assert XSampleLoss(tau, tau_s)(*tensors(*batch, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_only_directions_of_z_and_of_the_embeddings_count(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, texts = tensors(*batch)
    loss = XSampleLoss()
    torch.testing.assert_close(loss(7 * z1, 0.1 * z2, 1e-3 * texts), loss(z1, z2, texts))


def test_vanishing_tau_s_with_class_prompts_is_supcon(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, _ = batch
    labels = np.array([0, 1, 2, 0, 1, 0, 2, 2])
    prompts = unit(np.random.default_rng(2).normal(size=(3, 64)))[labels]
    for dtype in (torch.float32, torch.float64):
        loss = XSampleLoss(tau=0.2, tau_s=0.01)(*tensors(z1, z2, prompts, dtype=dtype))
        assert loss.item() == pytest.approx(sup_con(z1, z2, labels, 0.2), abs=1e-5)


def test_vanishing_tau_s_with_all_captions_apart_is_nt_xent(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, _ = batch
    loss = XSampleLoss(tau=0.2, tau_s=0.01)(*tensors(z1, z2, np.eye(IMAGES)))
    assert loss.item() == pytest.approx(nt_xent(z1, z2, 0.2), abs=1e-5)


def test_gradients_pass_gradcheck(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, texts = tensors(*batch, dtype=torch.float64)
    loss = XSampleLoss(tau=0.3)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, texts), (z1.requires_grad_(), z2.requires_grad_()))


def test_no_gradient_reaches_the_embeddings(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, texts = (tensor.requires_grad_() for tensor in tensors(*batch))
    XSampleLoss()(z1, z2, texts).backward()
    assert z1.grad is not None
    assert texts.grad is None


def test_half_precision_inputs_and_autocast_are_computed_in_float32(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, texts = tensors(*batch)
    half = [z1.bfloat16(), z2.bfloat16(), texts.half()]
    exact = XSampleLoss()(*(tensor.float() for tensor in half))
    with torch.autocast("cpu", torch.bfloat16):
        loss = XSampleLoss()(*half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)


def test_int8_embeddings_equal_their_float_values(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, texts = tensors(*batch)
    stored = (texts * 40).round().clamp(-127, 127).to(torch.int8)
    torch.testing.assert_close(XSampleLoss()(z1, z2, stored), XSampleLoss()(z1, z2, stored.float() / 40))


def test_a_batch_of_one_image_has_no_loss_left() -> None:
    assert XSampleLoss()(torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 3)).item() == 0


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_unusable_embeddings_raise_instead_of_nan(batch: tuple[np.ndarray, ...], value: float) -> None:
    z1, z2, texts = tensors(*batch)
    texts[3] = value
    with pytest.raises(InputError, match=r"\[3\]"):
        XSampleLoss()(z1, z2, texts)


def test_wrong_shapes_raise(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, texts = tensors(*batch)
    with pytest.raises(InputError, match="two views"):
        XSampleLoss()(z1, z2[:-1], texts)
    with pytest.raises(InputError, match="7 embeddings for 8 images"):
        XSampleLoss()(z1, z2, texts[:-1])
    with pytest.raises(InputError, match="dtype"):
        XSampleLoss()(z1, z2.double(), texts)
    with pytest.raises(InputError, match="shape"):
        XSampleLoss()(z1, z2, texts[:, 0])


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": -1.0}, {"tau_s": 0.0}])
def test_temperatures_must_be_positive(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        XSampleLoss(**options)


# Two processes: the joint batch is 2 x 8 images; rank r holds images 8 r to 8 r + 7.


def encoder() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, WIDTH))


def joint_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x1 = torch.randn(2 * IMAGES, 10, generator=generator)
    x2 = x1 + 0.3 * torch.randn(x1.shape, generator=generator)
    return x1, x2, torch.randn(2 * IMAGES, TEXT_WIDTH, generator=generator)


def train_step(rank: int, folder: str) -> None:
    x1, x2, texts = (tensor[rank * IMAGES :][:IMAGES] for tensor in joint_batch())
    model = DistributedDataParallel(encoder())
    z1, z2 = model(torch.cat([x1, x2])).chunk(2)
    loss = XSampleLoss()(z1, z2, texts)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.save({"loss": loss.detach(), "gradients": gradients}, f"{folder}/{rank}.pt")


def unequal_batches(rank: int, folder: str) -> None:
    images = IMAGES - rank
    with pytest.raises(InputError, match="ranks differ"):
        XSampleLoss()(torch.randn(images, 4), torch.randn(images, 4), torch.randn(images, 3))


def a_zero_embedding_on_one_rank(rank: int, folder: str) -> None:
    texts = torch.ones(4, 3)
    texts[1] = rank
    texts[0] = 1 - rank
    with pytest.raises(InputError, match=r"2 of the batch's 8 embeddings.*rows \[1, 4\]"):
        XSampleLoss()(torch.randn(4, 4), torch.randn(4, 4), texts)


def without_gather(rank: int, folder: str) -> None:
    z1, z2, texts = torch.randn(3, IMAGES - rank, 4).unbind()
    torch.testing.assert_close(
        XSampleLoss(gather=False)(z1, z2, texts).item(),
        written_out(z1.numpy(), z2.numpy(), texts.numpy(), 0.1, 0.1),
        rtol=1e-4,
        atol=1e-4,
    )


def on_rank(rank: int, jobs: list[Callable[[int, str], None]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for job in jobs:
        job(rank, folder)
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joint_batch_and_refuse_bad_batches_together(tmp_path: Path) -> None:
    jobs = [train_step, unequal_batches, a_zero_embedding_on_one_rank, without_gather]
    mp.spawn(on_rank, (jobs, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    model = encoder()
    x1, x2, texts = joint_batch()
    z1, z2 = model(torch.cat([x1, x2])).chunk(2)
    loss = XSampleLoss()(z1, z2, texts)
    loss.backward()
    assert (ranks[0]["loss"] + ranks[1]["loss"]).item() / 2 == pytest.approx(loss.item(), abs=1e-5)
    assert ranks[0]["loss"].item() != pytest.approx(ranks[1]["loss"].item(), abs=1e-5)
    for rank in ranks:
        for split, parameter in zip(rank["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(split, parameter.grad, atol=1e-5, rtol=1e-5)
