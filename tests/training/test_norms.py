"""Two processes that share a batch against one that has all of it: loss, gradients and statistics in float64."""

from __future__ import annotations

import copy
import gc
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DistributedDataParallel does it: once here, not in each rank
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
CASES = tuple(product(("xsample", "clip_soft"), (0, 3)))  # method and chunk


def whole_batch() -> tuple[Tensor, Tensor]:
    """Both views [2, B, 3, P, P], and embeddings [B, 6]."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, BATCH, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    return views, torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)


def config_of(method: Any) -> Config:
    return Config(store="", width=8, method=method)


def new_model(method: str) -> nn.Module:
    torch.manual_seed(1)
    return Model(config_of(method), text_width=6).double().train()


def state_after(
    model: nn.Module, wrapped: nn.Module, method: str, views: Tensor, embeddings: Tensor, chunk: int
) -> dict[str, Tensor]:
    """After one step: its loss, the gradients (of CLIP's temperature too), the running statistics."""
    objective = Objective(config_of(method)).double()
    texts = [embeddings] if method == "clip_soft" else []
    loss = partial(objective, targets=Targets(embeddings=embeddings))
    value = backward(wrapped, [*views, *texts], loss, chunk=chunk, seed=2)
    named = [*model.named_parameters(), *objective.named_parameters()]
    return {"loss": value, **{name: parameter.grad for name, parameter in named}, **dict(model.named_buffers())}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    views, embeddings = whole_batch()
    own_views, own_embeddings = views.chunk(RANKS, 1)[rank], embeddings.chunk(RANKS)[rank]
    for method, chunk in CASES:
        model = over_ranks(new_model(method), Place(rank, RANKS, torch.device("cpu")))
        state = state_after(model, DistributedDataParallel(model), method, own_views, own_embeddings, chunk)
        torch.save(state, f"{folder}/{method}_{chunk}_{rank}.pt")
    gc.collect()  # a replica that outlived the group would keep its threads, which can abort the exit
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where both ranks left their losses, gradients and statistics."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(one_rank, (str(folder),), nprocs=RANKS, start_method="fork")
    return folder


@pytest.mark.parametrize(("method", "chunk"), CASES)
def test_two_ranks_have_the_gradients_and_statistics_of_one_process(method: str, chunk: int, two_ranks: Path) -> None:
    """With chunks the one process has chunks of the same images: those that the ranks normalise together."""
    model, (views, embeddings) = new_model(method), whole_batch()
    order = torch.arange(BATCH)
    if chunk:  # the ranks' n-th chunks, side by side
        order = order.view(RANKS, -1, chunk).transpose(0, 1).flatten()
    wanted = state_after(model, model, method, views[:, order], embeddings[order], chunk * RANKS)
    assert ("loss.log_scale" in wanted) == (method == "clip_soft")
    found: list[dict[str, Any]] = [torch.load(two_ranks / f"{method}_{chunk}_{r}.pt") for r in range(RANKS)]
    loss = sum(each["loss"].item() for each in found) / RANKS
    assert loss == pytest.approx(wanted.pop("loss").item(), abs=1e-12)
    for name, expected in wanted.items():
        for each in found:
            assert (each[name] - expected).abs().max() < 1e-10, name


def test_one_rank_keeps_its_norms() -> None:
    model = new_model("xsample")
    before = copy.deepcopy(model)
    assert str(over_ranks(model, Place(0, 1, torch.device("cpu")))) == str(before)
