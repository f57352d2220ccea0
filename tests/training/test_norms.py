"""Two processes that share a batch against one that has all of it: loss, gradients and statistics in float64."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from config import Config, Place
from gradcache import backward
from models import Model
from norms import over_ranks
from objective import Objective
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphbuild.torch import Targets

RANKS, BATCH, PIXELS = 2, 12, 16
CHUNKS = (0, 3)
CONFIG = Config(store="", width=8)


def whole_batch() -> tuple[Tensor, Tensor]:
    """Both views [2, B, 3, P, P], and embeddings [B, 6]."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, BATCH, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    return views, torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)


def new_model() -> nn.Module:
    torch.manual_seed(1)
    return Model(CONFIG).double().train()


def step(model: nn.Module, views: Tensor, embeddings: Tensor, chunk: int) -> Tensor:
    objective = partial(Objective(CONFIG), targets=Targets(embeddings=embeddings))
    return backward(model, list(views), objective, chunk=chunk, seed=2)


def state_after(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {**gradients, **dict(model.named_buffers())}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    views, embeddings = whole_batch()
    for chunk in CHUNKS:
        model = over_ranks(new_model(), Place(rank, RANKS, torch.device("cpu")))
        loss = step(DistributedDataParallel(model), views.chunk(RANKS, 1)[rank], embeddings.chunk(RANKS)[rank], chunk)
        torch.save({"loss": loss, **state_after(model)}, f"{folder}/{chunk}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where both ranks left their losses, gradients and statistics."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_rank, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("chunk", CHUNKS)
def test_two_ranks_have_the_gradients_and_statistics_of_one_process(chunk: int, two_ranks: Path) -> None:
    """With chunks the one process has chunks of the same images: those that the ranks normalise together."""
    model, (views, embeddings) = new_model(), whole_batch()
    order = torch.arange(BATCH)
    if chunk:  # the ranks' n-th chunks, side by side
        order = order.view(RANKS, -1, chunk).transpose(0, 1).flatten()
    loss = step(model, views[:, order], embeddings[order], chunk * RANKS)
    found: list[dict[str, Any]] = [torch.load(two_ranks / f"{chunk}_{r}.pt") for r in range(RANKS)]
    assert sum(each["loss"].item() for each in found) / RANKS == pytest.approx(loss.item(), abs=1e-12)
    for name, expected in state_after(model).items():
        for each in found:
            assert (each[name] - expected).abs().max() < 1e-10, name


def test_one_rank_keeps_its_norms() -> None:
    model = new_model()
    before = copy.deepcopy(model)
    assert str(over_ranks(model, Place(0, 1, torch.device("cpu")))) == str(before)
