"""Ranks that differ in what they pass, refuse a batch alone, do not gather, or train in groups: processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo  # DistributedDataParallel does it: once here, not in each rank
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch import CLIPLoss, CWCLLoss, DebiasedLoss, NTXentLoss, SigLIPLoss, SupConLoss, Targets, XSampleLoss
from graphbuild.torch.gather import Ranks
from tests.torch.test_losses import on_rank

IMAGES = 4


def views(rank: int) -> tuple[Tensor, Tensor]:
    z1, z2 = torch.randn(2, IMAGES, 3, generator=torch.Generator().manual_seed(rank))
    return z1, z2


def all_views(ranks: int) -> tuple[Tensor, Tensor]:
    first, second = zip(*map(views, range(ranks)), strict=True)
    return torch.cat(first), torch.cat(second)


# Refusals: what these functions assert on each rank is the test.


def dtypes_that_differ(rank: int, folder: str) -> None:
    z1, z2 = views(rank)
    integers = (torch.int32, torch.int64)
    labels = Targets(labels=torch.arange(IMAGES, dtype=integers[rank]))
    with pytest.raises(InputError, match=r"dtype of labels: \[torch.int32, torch.int64\]"):
        SupConLoss()(z1, z2, labels)
    floats = (torch.float32, torch.float64)
    with pytest.raises(InputError, match=r"dtype of z: \[torch.float32, torch.float64\]"):
        NTXentLoss()(z1.to(floats[rank]), z2.to(floats[rank]))
    halves = (torch.float16, torch.bfloat16)  # of one size: a gather would take the bits of one for the other
    with pytest.raises(InputError, match=r"dtype of class_priors: \[torch.float16, torch.bfloat16\]"):
        DebiasedLoss(tau_plus=None)(z1, z2, Targets(class_priors=torch.full((IMAGES,), 0.1, dtype=halves[rank])))


def refusals_of_one_rank(rank: int, folder: str) -> None:
    z1, z2 = views(rank)
    texts = torch.randn(IMAGES, 5)
    for message, wrong in (
        ("3 embeddings for 4 images", (z1, z2, texts[:-1])),
        (r"shape \[0, 5\]", (z1[:0], z2[:0], texts[:0])),
        ("embeddings are torch.int64", (z1, z2, texts.long())),
        ("embeddings are a ndarray", (z1, z2, texts.numpy())),
        ("one dtype", (z1, z2.double(), texts)),
    ):
        with pytest.raises(InputError, match=message if rank == 1 else r"rank\(s\) \[1\] refused their batch"):
            XSampleLoss()(*(wrong if rank == 1 else (z1, z2, texts)))
    with pytest.raises(InputError, match="ranks differ in width of embeddings"):
        XSampleLoss()(z1, z2, texts if rank else None)
    XSampleLoss()(z1, z2, texts)  # the ranks are still together


LEARNABLE = {
    "clip": lambda **options: CLIPLoss(learnable=True, **options),
    "cwcl": lambda **options: CWCLLoss(learnable=True, **options),
    "siglip": lambda **options: SigLIPLoss(learnable=True, **options),
}


def scale_gradient(loss: nn.Module, z1: Tensor, z2: Tensor) -> Tensor:
    loss(z1, z2, Targets(labels=torch.arange(len(z1)))).backward()
    return next(loss.parameters()).grad


def learn_without_gathering(rank: int, folder: str) -> None:
    gradients = {name: scale_gradient(build(gather=False), *views(rank)) for name, build in LEARNABLE.items()}
    torch.save(gradients, f"{folder}/scale{rank}.pt")


def integers_that_no_backend_gathers(rank: int, folder: str) -> None:
    z1, z2 = views(rank)
    integers = (torch.int64, torch.int16)
    losses = [SupConLoss()(z1, z2, Targets(labels=torch.arange(IMAGES, dtype=dtype) + rank)) for dtype in integers]
    assert len(set(map(float, losses))) == 1


def gather_and_differentiate(rank: int, folder: str) -> None:
    """sum over ranks r of (r + 1) x sum of (the joint tensor)^3: each part's gradient is 3 x 3 part^2."""
    for dim in (0, 1, 2):
        parts = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(10 + r)) for r in range(2)]
        own = parts[rank].clone().requires_grad_()
        joint = Ranks.of_process_group().concatenate(own.transpose(0, 2), dim)  # not contiguous, nor its gradient
        assert torch.equal(joint.detach(), torch.cat([part.transpose(0, 2) for part in parts], dim))
        ((rank + 1) * joint.transpose(0, 1).pow(3)).sum().backward()
        torch.testing.assert_close(own.grad, 9 * parts[rank] ** 2)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        *(dtypes_that_differ, refusals_of_one_rank, integers_that_no_backend_gathers),
        *(gather_and_differentiate, learn_without_gathering),
    ]
    mp.start_processes(on_rank, (jobs, str(folder)), nprocs=2, start_method="fork")
    return folder


@pytest.mark.parametrize("name", LEARNABLE)
def test_a_scale_that_is_learned_without_gathering_stays_the_same_on_all_ranks(name: str, two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"scale{rank}.pt")[name] for rank in range(2))
    alone = [scale_gradient(LEARNABLE[name](), *views(rank)) for rank in range(2)]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, (alone[0] + alone[1]) / 2)


# Groups: of three ranks, the first two train together.


def train_in_a_group(rank: int, folder: str) -> None:
    group = dist.new_group([0, 1])
    if rank < 2:
        loss = CLIPLoss(learnable=True, process_group=group)
        gradient = scale_gradient(loss, *views(rank))
        value = NTXentLoss(process_group=group)(*views(rank))
        torch.save({"gradient": gradient, "value": value}, f"{folder}/group{rank}.pt")
    else:
        assert NTXentLoss(gather=False)(*views(rank)).isfinite()
        with pytest.raises(ConfigError, match="not in process_group"):
            NTXentLoss(process_group=group)(*views(rank))


def test_a_process_group_is_one_joint_batch_and_shares_its_scale(tmp_path: Path) -> None:
    mp.start_processes(on_rank, ([train_in_a_group], str(tmp_path), 3), nprocs=3, start_method="fork")
    ranks = [torch.load(tmp_path / f"group{rank}.pt") for rank in range(2)]
    joint = all_views(2)
    value = (ranks[0]["value"] + ranks[1]["value"]) / 2
    torch.testing.assert_close(value, NTXentLoss()(*joint))
    for rank in ranks:
        torch.testing.assert_close(rank["gradient"], scale_gradient(CLIPLoss(learnable=True), *joint))
