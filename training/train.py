"""Contrastive training on a graphbuild store: tars and their graph in, an encoder and its probes out.

`python training/train.py STORE --method xsample --run-dir runs/demo` on one device, `torchrun --nproc-per-node 8
training/train.py ...` on several: the losses are those of one device with the joint batch. The same command goes on
with an interrupted run from its last checkpoint, with the same losses. Writes to the run directory: config.json,
metrics.jsonl (a line a step, a line an epoch, then a line a probe), checkpoint.pt.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# On shared cores OpenMP threads that wait must not spin: under load this is four to eight times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from augment import random_view, seed_of, view_draws
from config import Config, Place, read_command_line
from data import Batch, EpochBatches, training_samples, unchanged
from gradcache import backward
from models import Model, scaled
from norms import over_ranks
from objective import GraphReader, Objective
from optim import new_optimizer, schedule
from probe import check_probing, probe
from records import Checkpoint, Metrics, stored_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError, GraphbuildError, StageError
from graphbuild.torch import Targets

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ASKED_TO_END = threading.Event()  # by SIGTERM, which clusters send some seconds before they take a machine away

__all__ = ["Config", "Place", "load_run", "process_group", "train"]


def train(config: Config, run_dir: Path, place: Place) -> nn.Module:
    """Train, or go on from the checkpoint in `run_dir`; return the trained encoder.

    Raises:
        ConfigError: a Config that does not fit the store, another Config or store than the run began with, or ranks
            that do not begin alike.
        StageError: a gradient is not finite; the weights of the last checkpoint are.
        SystemExit: the process was asked to end, and the checkpoint is written.
    """
    config = config.resolved(place.device)
    samples = training_samples(config)
    graph = GraphReader(config, samples.graph)
    batches = EpochBatches(config, samples.graph, graph.graph_nodes(samples.nodes), place)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=unchanged,
        num_workers=0 if config.cache else config.workers,
        persistent_workers=not config.cache and config.workers > 0,
        pin_memory=place.device.type == "cuda",
    )
    model = over_ranks(new_model(config, samples.graph.d), place)
    model.to(place.device, memory_format=torch.channels_last)
    objective = Objective(config).to(place.device)
    optimizer = new_optimizer(config, model, objective)
    scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "float16")
    modules = {"model": model, "objective": objective}
    checkpoint = Checkpoint(run_dir / "checkpoint.pt", config, samples.graph.fingerprint, modules, optimizer, scaler)
    first_epoch, first_step, losses = checkpoint.restore()
    begin_alike(place, epoch=first_epoch, step=first_step, graph=samples.graph.fingerprint, **asdict(config))
    metrics = None
    if place.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        metrics = Metrics(run_dir, config, first_epoch, first_step, first_epoch * batches.steps + first_step)
    replica = DistributedDataParallel(model) if place.ranks > 1 else model
    model.train()

    for epoch in range(first_epoch, config.epochs):
        batches.set_epoch(epoch, first_step)
        clock = Clock()
        for step, batch in enumerate(clock.waiting(loader), first_step):
            number = epoch * batches.steps + step
            rate = config.learning_rate * schedule(number / (config.epochs * batches.steps), config.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = rate
            targets = graph.targets(batch).to(place.device)
            texts = (text.to(place.device) for text in graph.texts(batch))
            inputs = [*two_views(batch, config, place, epoch, step), *texts]
            seed = seed_of(config, epoch, step, 1 + place.rank)
            loss, norm = update(replica, objective, optimizer, scaler, inputs, targets, config, place, seed)
            loss_of_all, facts, ending = over_all_ranks(loss, objective.target_facts(loss), place)
            losses.append(loss_of_all)
            if metrics:
                told = {"loss": losses[-1], "learning_rate": rate, **facts, **objective.learned()}
                told |= {"gradient_norm": norm} if math.isfinite(norm) else {}
                told |= {"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}
                metrics.write(number, epoch=epoch, step=step, **told)
                due = ending or (config.checkpoint_steps and (number + 1) % config.checkpoint_steps == 0)
                if due and step + 1 < batches.steps:
                    checkpoint.save(epoch, step + 1, losses)
            if ending and step + 1 < batches.steps:
                raise SystemExit(128 + signal.SIGTERM)
        if metrics:
            seconds, steps = clock.seconds(), len(batches)  # of this epoch, since the run went on
            speed, mean = steps * config.batch_size / seconds, sum(losses) / len(losses)
            print(f"epoch {epoch + 1}/{config.epochs}  loss {mean:.4f}  {speed:,.0f} images/s", flush=True)
            metrics.write(
                (epoch + 1) * batches.steps,
                epoch=epoch,
                mean_loss=mean,
                images_per_second=speed,
                seconds_per_step=seconds / steps,
                share_waiting_for_data=clock.waited / seconds,
                **batches.report(),
            )
            if not config.checkpoint_steps or due or epoch + 1 == config.epochs:
                checkpoint.save(epoch + 1, 0, [])
        if ending:
            raise SystemExit(128 + signal.SIGTERM)
        first_step, losses = 0, []
    if metrics:
        metrics.close()
    return model.encoder


def update(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    inputs: Sequence[Tensor],
    targets: Targets,
    config: Config,
    place: Place,
    seed: int,
) -> tuple[Tensor, float]:
    """One step of the optimizer: the loss before it, of this rank, detached, and the norm of the model's gradient.

    inputs: of the model, two views and texts. In float16 a gradient that overflows halves the loss's scale, and nothing
    else changes. StageError: the gradient is not finite for another reason; the weights are as they were.
    """
    optimizer.zero_grad()
    half = HALVES.get(config.precision)
    autocast = torch.autocast(place.device.type, half or torch.bfloat16, enabled=half is not None)
    loss_of = partial(objective, targets=targets)
    loss = backward(model, inputs, loss_of, chunk=config.chunk, seed=seed, autocast=autocast, scale=scaler.scale)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf).item()
    overflows = scaler.is_enabled() and scaler.get_scale() >= 1 and bool(loss.isfinite())
    if not math.isfinite(norm) and not overflows:
        rate = optimizer.param_groups[0]["lr"]
        raise StageError(f"a gradient is not finite, at learning rate {rate:.3g}", "lower --learning-rate")
    scaler.step(optimizer)
    scaler.update()
    return loss, norm


def load_run(run_dir: Path, device: torch.device = torch.device("cpu")) -> tuple[Config, Model]:
    """The Config of a run and its model as of the last checkpoint, in eval mode; ConfigError where there is none."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        raise ConfigError(f"{run_dir} holds no checkpoint.pt", "train it first: python training/train.py --run-dir")
    state = torch.load(path, map_location="cpu", weights_only=True)
    config, weights = stored_config(path, state["config"]), state["model"]
    projection = weights.get("text_projection.weight")  # as wide as the embeddings of the store
    model = new_model(config, 0 if projection is None else projection.shape[1])
    model.load_state_dict(weights)
    return config, model.to(device, memory_format=torch.channels_last).eval()


def new_model(config: Config, text_width: int) -> Model:
    """The same initial weights whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Model(config, text_width)


def two_views(batch: Batch, config: Config, place: Place, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """Both views of this rank's images [B, 3, P, P], by its part of the draws for the joint batch."""
    images = batch["image"].to(place.device, non_blocking=True)
    view1, view2 = map(scaled, images) if config.full_crops else [scaled(images)] * 2
    draws = view_draws(config, place, epoch, step, len(view1))
    return random_view(view1, draws[0], config), random_view(view2, draws[1], config)


def begin_alike(place: Place, **facts: object) -> None:
    """ConfigError where the ranks do not begin with the same step, settings and graph."""
    if place.ranks == 1:
        return
    found: list[Any] = [None] * place.ranks
    dist.all_gather_object(found, facts)
    for rank, its in enumerate(found):
        if other := [
            f"{name} = {its[name]} on rank {rank}, {found[0][name]} on rank 0"
            for name in its
            if its[name] != found[0][name]
        ]:
            raise ConfigError(
                "; ".join(other), "give all ranks the same options, store and --run-dir, a folder they share"
            )


def over_all_ranks(loss: Tensor, facts: Mapping[str, Tensor], place: Place) -> tuple[float, dict[str, float], bool]:
    """The loss and the facts of the joint batch, and whether a rank has been asked to end."""
    told = torch.stack([torch.full_like(loss, ASKED_TO_END.is_set()), loss, *facts.values()])
    if place.ranks > 1:
        dist.all_reduce(told)
    ending, *sums = told.cpu().tolist()
    mean, *others = (total / place.ranks for total in sums)
    return mean, dict(zip(facts, others, strict=True)), ending > 0


class Clock:
    """Seconds since it was made, and how many of them went by waiting for data."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; what it takes to get one is waiting."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()


@contextlib.contextmanager
def process_group() -> Iterator[Place]:
    """The process group that torchrun describes, or this process alone."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield Place(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        gc.collect()  # a replica that outlived the group would keep its threads, which can abort the exit
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Train, then probe where there are labels."""
    try:
        config, run_dir, probing = read_command_line(arguments)
        check_probing(config, probing)
        with process_group() as place:
            signal.signal(signal.SIGTERM, lambda *_: ASKED_TO_END.set())
            encoder = train(config, run_dir, place)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # probes have nothing to save
            if place.rank == 0:
                print(f"trained model: {run_dir / 'checkpoint.pt'}")
        if probing.names and place.rank == 0:
            untrained = new_model(config, 1).encoder.to(place.device, memory_format=torch.channels_last).eval()
            probe(config, probing, {"untrained": untrained, "trained": encoder.eval()}, run_dir, place.device)
    except GraphbuildError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
