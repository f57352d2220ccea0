"""X-Sample against formulas written with loops and its limits; what every loss promises, also over two processes."""

import gc
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DistributedDataParallel does it: once here, not in each rank
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import (
    CLIPLoss,
    CWCLLoss,
    DebiasedLoss,
    DecoupledLoss,
    GraphSimCLRLoss,
    GraphVICRegLoss,
    KernelInfoNCELoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    Targets,
    XSampleLoss,
)

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
    with pytest.raises(InputError, match=r'(?s)16 embeddings for 8 images.*captions="mean"'):
        XSampleLoss()(z1, z2, texts.repeat_interleave(2, dim=0))
    with pytest.raises(InputError, match="dtype"):
        XSampleLoss()(z1, z2.double(), texts)
    with pytest.raises(InputError, match="shape"):
        XSampleLoss()(z1, z2, texts[:, 0])


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": -1.0}, {"tau_s": 0.0}])
def test_temperatures_must_be_positive(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        XSampleLoss(**options)


# Every loss, with each kind of target it can read.

LOSSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "x-sample of embeddings": (XSampleLoss, "embeddings"),
    "x-sample of a block, self kept": (lambda: XSampleLoss(keep_self=True), "similarities"),
    "x-sample of labels": (XSampleLoss, "labels"),
    "x-sample of edges and sketches": (XSampleLoss, "sketch"),
    "x-sample of edges and background": (XSampleLoss, "background"),
    "x-sample of embeddings, calibrated": (lambda: XSampleLoss(tau_s="calibrated"), "dense and stored"),
    "x-sample of edges, calibrated": (lambda: XSampleLoss(tau_s="calibrated"), "background"),
    "soft clip of edges and sketches, calibrated": (lambda: CLIPLoss(tau_s="calibrated", other_view=0.7), "sketch"),
    "x-sample with a learned temperature": (lambda: XSampleLoss(learnable=True), "embeddings"),
    "nt-xent": (NTXentLoss, "class_priors"),
    "supcon": (SupConLoss, "labels"),
    "supcon of a block": (lambda: SupConLoss(threshold=0.6), "similarities"),
    "decoupled": (DecoupledLoss, "labels"),
    "decoupled by graph": (lambda: DecoupledLoss(threshold=0.6), "similarities"),
    "debiased": (DebiasedLoss, "labels"),
    "debiased by anchor": (lambda: DebiasedLoss(tau_plus=None), "class_priors"),
    "kernel info-nce": (lambda: KernelInfoNCELoss(exponents=(1.0, 2.0)), "similarities"),
    "graph simclr": (GraphSimCLRLoss, "labels"),
    "graph vicreg": (GraphVICRegLoss, "similarities"),
    "clip": (lambda: CLIPLoss(learnable=True), "labels"),
    "soft clip": (lambda: CLIPLoss(tau_s=0.1), "embeddings"),
    "cwcl": (lambda: CWCLLoss(learnable=True), "similarities"),
    "siglip": (SigLIPLoss, "labels"),
    "masked clip": (lambda: CLIPLoss(mask=0.2), "similarities"),
    "clip with hard negatives": (lambda: CLIPLoss(hard=0.2, learnable=True), "similarities"),
    "repaired clip": (lambda: CLIPLoss(positive=0.2), "similarities"),
    "repaired siglip": (lambda: SigLIPLoss(positive=0.2), "embeddings"),
    "masked siglip": (lambda: SigLIPLoss(mask=0.2), "embeddings"),
    "soft siglip": (lambda: SigLIPLoss(threshold=0.2, learnable=True), "embeddings"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def targets_of(kind: str, images: int, rows: slice = slice(None)) -> Targets:
    """The rows' part of targets of a joint batch: a directed block that keeps its diagonal, three classes, ..."""
    generator = torch.Generator().manual_seed(5)
    if kind == "embeddings":
        return Targets(embeddings=torch.randn(images, TEXT_WIDTH, generator=generator)[rows])
    if kind == "similarities":
        block = 2 * torch.rand(images, images, generator=generator) - 1
        return Targets(similarities=block[rows], keep_diagonal=True)
    if kind == "labels":
        return Targets(labels=torch.arange(images)[rows] % 3)
    if kind in ("sketch", "background", "dense and stored"):
        node = torch.randint(0, 2 * images, (images,), generator=generator)  # some twice
        fields = {
            "node": node,
            "neighbors": torch.stack([torch.randperm(2 * images + 8, generator=generator)[:4] for _ in range(images)]),
            "similarities": torch.rand(images, 4, generator=generator),
            "background": torch.rand(images, 2, generator=generator) / 4,
            "node_count": torch.full((images,), 2 * images + 8),
            "sketch": torch.randn(images, 3, generator=generator) / 2,
            "embedding": torch.randn(images, TEXT_WIDTH, generator=generator),
        }
        left_out = {"sketch": {"embedding"}, "background": {"embedding", "sketch"}}.get(kind, {"sketch"})
        return Targets.from_batch({name: field[rows] for name, field in fields.items() if name not in left_out})
    return Targets(class_priors=0.5 * torch.rand(images, generator=generator)[rows])


@every_loss
def test_every_loss_has_the_gradient_of_its_value(name: str, batch: tuple[np.ndarray, ...]) -> None:
    build, kind = LOSSES[name]
    z1, z2, _ = tensors(*batch, dtype=torch.float64)
    loss, targets = build().double(), targets_of(kind, IMAGES)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, targets), (z1.requires_grad_(), z2.requires_grad_()))


@every_loss
def test_every_loss_is_computed_in_float32_whatever_autocast(name: str, batch: tuple[np.ndarray, ...]) -> None:
    build, kind = LOSSES[name]
    z1, z2, _ = tensors(*batch)
    loss, targets = build(), targets_of(kind, IMAGES)
    half = [z1.bfloat16(), z2.bfloat16()]
    exact = loss(*(tensor.float() for tensor in half), targets)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*half, targets)
    assert value.dtype == torch.float32
    assert torch.equal(value, exact)


@every_loss
def test_every_loss_sends_no_gradient_into_its_targets_and_leaves_them_alone(
    name: str, batch: tuple[np.ndarray, ...]
) -> None:
    build, kind = LOSSES[name]
    z1, z2, _ = (tensor.requires_grad_() for tensor in tensors(*batch))
    targets = targets_of(kind, IMAGES)
    given = next(iter(targets.tensors().values()))
    before = given.clone()
    if given.is_floating_point():
        given = given.requires_grad_()
    build()(z1, z2, targets).backward()
    assert z1.grad is not None
    assert z2.grad is not None
    assert given.grad is None
    assert torch.equal(given, before)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "graph vicreg"])
def test_every_loss_of_one_image_is_finite_with_finite_gradients(name: str) -> None:
    build, kind = LOSSES[name]
    z1, z2 = (torch.tensor([[1.0, 2, 3]]).requires_grad_() for _ in range(2))
    value = build()(z1, z2, targets_of(kind, 1))
    value.backward()
    assert value.isfinite()
    assert z1.grad.isfinite().all()


def test_targets_must_fit_the_batch(batch: tuple[np.ndarray, ...]) -> None:
    z1, z2, _ = tensors(*batch)
    with pytest.raises(InputError, match="7 labels for 8 images"):
        NTXentLoss()(z1, z2, Targets(labels=torch.arange(7)))
    with pytest.raises(InputError, match="square"):
        SupConLoss()(z1, z2, Targets(similarities=torch.ones(8, 16)))


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


def step(name: str, model: nn.Module, rows: slice = slice(None)) -> dict[str, object]:
    """One training step on rows of the joint batch: the loss and the gradients of the model and of the loss."""
    build, kind = LOSSES[name]
    loss = build()
    x1, x2, _ = (tensor[rows] for tensor in joint_batch())
    z1, z2 = model(torch.cat([x1, x2])).chunk(2)
    value = loss(z1, z2, targets_of(kind, 2 * IMAGES, rows))
    value.backward()
    parameters = [*model.parameters(), *loss.parameters()]
    return {"loss": value.detach(), "gradients": [parameter.grad for parameter in parameters]}


def step_of_every_loss(rank: int, folder: str) -> None:
    rows = slice(rank * IMAGES, (rank + 1) * IMAGES)
    torch.save(
        {name: step(name, DistributedDataParallel(encoder()), rows) for name in LOSSES}, f"{folder}/all{rank}.pt"
    )


def batch_edges(**changes: Tensor) -> Targets:
    fields = {
        "node": torch.arange(4),
        "neighbors": torch.tensor([[1, 9], [0, 3], [7, 8], [9, 2]]),
        "similarities": torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4], [0.3, 0.2]]),
        "background": torch.tensor([[0.05, 0.1]]).repeat(4, 1),
    }
    return Targets.from_batch({**fields, **changes})


def targets_that_do_not_fit(rank: int, folder: str) -> None:
    z = torch.randn(4, 3)
    for targets, message in (
        (Targets(similarities=torch.eye(4)), r"\[4, 4\] on 2 gathering.*\n.*\[4, 8\]"),
        (Targets(labels=torch.tensor([0, 1, 2, -rank])), r"1 of the batch's 8 labels are negative: rows \[7\]"),
        (Targets(similarities=torch.ones(4, 8) / torch.tensor([[1.0], [1 - rank], [1], [1]])), r"infinity.*\[5\]"),
        (Targets(labels=torch.arange(4)) if rank else Targets(embeddings=torch.ones(4, 1)), "ranks differ"),
        (
            batch_edges(node=torch.tensor([0, 1, 2 - 3 * rank, 3])),
            r"1 of the batch's 8 images have no node: rows \[6\]",
        ),
    ):
        with pytest.raises(InputError, match=message):
            SupConLoss()(z, z, targets)
    with pytest.raises(InputError, match=r"class priors.*\[4\]"):
        DebiasedLoss(tau_plus=None)(z, z, Targets(class_priors=torch.tensor([rank, 0.1, 0.1, 0.1])))


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


def on_rank(rank: int, jobs: list[Callable[[int, str], None]], folder: str, ranks: int = 2) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    for job in jobs:
        job(rank, folder)
    gc.collect()  # a replica that outlived the group would keep its threads, which can abort the exit
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left their results; what they assert themselves has passed."""
    folder = tmp_path_factory.mktemp("ranks")
    refusals = [unequal_batches, a_zero_embedding_on_one_rank, targets_that_do_not_fit]
    mp.start_processes(
        on_rank,
        ([train_step, step_of_every_loss, *refusals, without_gather], str(folder)),
        nprocs=2,
        start_method="fork",
    )
    return folder


def test_two_processes_equal_one_on_the_joint_batch_and_refuse_bad_batches_together(two_processes: Path) -> None:
    ranks = [torch.load(two_processes / f"{rank}.pt") for rank in range(2)]

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


@every_loss
def test_two_processes_equal_one_on_the_joint_batch(name: str, two_processes: Path) -> None:
    ranks = [torch.load(two_processes / f"all{rank}.pt")[name] for rank in range(2)]
    joint = step(name, encoder())
    assert (ranks[0]["loss"] + ranks[1]["loss"]).item() / 2 == pytest.approx(joint["loss"].item(), rel=1e-5)
    assert ranks[0]["loss"].item() != pytest.approx(ranks[1]["loss"].item(), rel=1e-5)
    for rank in ranks:
        assert len(rank["gradients"]) == len(joint["gradients"])
        for split, whole in zip(rank["gradients"], joint["gradients"], strict=True):
            torch.testing.assert_close(split, whole, atol=2e-5, rtol=1e-4)
