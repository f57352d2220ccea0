"""X-Sample contrastive training on a graphbuild store: tars and sidecars in, an encoder and its probes out.

`python training/train.py STORE --run-dir runs/demo` on one device, `torchrun --nproc-per-node 8
training/train.py ...` on several. The same command continues an interrupted run from the last full epoch with
the same losses. Writes to the run directory: config.json, metrics.jsonl (a line a step, then a line a probe),
checkpoint.pt.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

# On shared cores OpenMP threads that wait must not spin: under load this is four to eight times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import typer
from augment import random_view
from evaluate import evaluate, extract, table
from model import Encoder, Model, normalise
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from graphbuild.errors import GraphbuildError
from graphbuild.torch import XSampleLoss, graph_webdataset


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the result. batch_size: images a rank; the loss compares with those of all ranks."""

    store: str
    epochs: int
    batch_size: int
    pixels: int
    held_out: int
    labels: list[str]
    width: int
    learning_rate: float
    weight_decay: float
    warm_up: float  # share of the training
    tau: float
    tau_s: float
    shuffle: int
    workers: int
    seed: int


@dataclass(frozen=True)
class Place:
    """This process: its rank, how many there are, its device."""

    rank: int
    ranks: int
    device: torch.device


def train(config: Config, run_dir: Path, place: Place) -> Encoder:
    """Train, or go on from the checkpoint in `run_dir`; return the trained encoder."""
    train_tars, _ = split_tars(config)
    dataset = graph_webdataset(
        train_tars,
        batch_size=config.batch_size,
        image_pixels=config.pixels,
        shuffle=config.shuffle,
        seed=config.seed,
        partial=False,
    )
    samples = dataset.count_samples()
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=place.device.type == "cuda",
    )
    model = new_model(config).to(place.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=config.weight_decay)
    checkpoint = run_dir / "checkpoint.pt"
    first_epoch = load_checkpoint(checkpoint, config, model, optimizer)
    metrics = None
    if place.rank == 0:
        (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        metrics = Metrics(run_dir / "metrics.jsonl", first_epoch)
    replica = DistributedDataParallel(model) if place.ranks > 1 else model
    criterion = XSampleLoss(tau=config.tau, tau_s=config.tau_s)
    # On a CPU without AMX bfloat16 is no faster than float32.
    bfloat16 = place.device.type == "cuda" and torch.cuda.is_bf16_supported()

    for epoch in range(first_epoch, config.epochs):
        dataset.set_epoch(epoch)
        started, seen, losses = time.perf_counter(), 0, []
        for step, batch in enumerate(in_step(loader, place)):
            done = (epoch + min(seen / samples, 1)) / config.epochs
            rate = config.learning_rate * schedule(done, config.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = rate
            draws = torch.Generator().manual_seed(hash((config.seed, epoch, step, place.rank)))
            images = normalise(batch["image"].to(place.device, non_blocking=True))
            views = torch.cat([random_view(images, draws), random_view(images, draws)])
            with torch.autocast(place.device.type, torch.bfloat16, enabled=bfloat16):
                z1, z2 = replica(views).chunk(2)
            loss = criterion(z1, z2, batch["embedding"].to(place.device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            # A checkpoint never holds weights that were updated with a gradient that is not finite.
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            losses.append(loss.item())
            seen += len(images) * place.ranks
            if metrics:
                metrics.write(epoch=epoch, step=step, loss=losses[-1], learning_rate=rate)
        if not losses:
            raise SystemExit(f"no worker found {config.batch_size} samples: lower --batch-size or --workers")
        if metrics:
            speed = seen / (time.perf_counter() - started)
            mean = sum(losses) / len(losses)
            print(f"epoch {epoch + 1}/{config.epochs}  loss {mean:.4f}  {speed:,.0f} images/s", flush=True)
            save_checkpoint(checkpoint, config, model, optimizer, epoch + 1)
    return model.encoder


def probe(config: Config, trained: Encoder, run_dir: Path, device: torch.device) -> None:
    """Compare the trained encoder with an untrained one on the held-out shards."""
    untrained = new_model(config).encoder.to(device, memory_format=torch.channels_last)
    encoders = {"untrained": untrained.eval(), "trained": trained.eval()}
    parts = []
    for tars in split_tars(config):
        dataset = graph_webdataset(
            tars,
            batch_size=config.batch_size,
            image_pixels=config.pixels,
            shuffle=0,
            extra=["json"],
            split_by_rank=False,
        )
        loader = DataLoader(dataset, batch_size=None, num_workers=config.workers)
        parts.append(extract(encoders, loader, config.labels, device))
    rows = evaluate(*parts)
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"\naccuracy on {config.held_out} held-out shard(s), percent:\n{table(rows)}")


def new_model(config: Config) -> Model:
    """The same initial weights whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Model(config.width)


def split_tars(config: Config) -> tuple[list[str], list[str]]:
    tars = sorted(str(path) for path in Path(config.store, "shards").glob("*.tar"))
    if len(tars) <= config.held_out:
        raise SystemExit(f"{config.store}/shards holds {len(tars)} tar(s): --held-out must leave one to train on")
    kept = len(tars) - config.held_out
    return tars[:kept], tars[kept:]


def in_step(loader: Iterable[dict[str, Any]], place: Place) -> Iterator[dict[str, Any]]:
    """Batches until the first rank runs out: shards differ in size, and every rank must take part in every
    step."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        ready = torch.tensor(batch is not None, dtype=torch.int32, device=place.device)
        if place.ranks > 1:
            dist.all_reduce(ready, dist.ReduceOp.MIN)
        if batch is None or not ready:
            return
        yield batch


def schedule(done: float, warm_up: float) -> float:
    """Share of the learning rate after the share `done` of the training: linear warm-up, then half a
    cosine."""
    if done < warm_up:
        return max(done / warm_up, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


class Metrics:
    """JSON lines, one a step, flushed; a run that goes on first drops what came after its checkpoint."""

    def __init__(self, path: Path, first_epoch: int) -> None:
        lines = path.read_text().splitlines() if path.exists() and first_epoch else []
        kept = [line for line in lines if json.loads(line).get("epoch", first_epoch) < first_epoch]
        path.write_text("".join(line + "\n" for line in kept))
        self.stream = path.open("a")

    def write(self, **values: float) -> None:
        self.stream.write(json.dumps(values) + "\n")
        self.stream.flush()


def save_checkpoint(path: Path, config: Config, model: Model, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Temporary name, fsync, rename: a crash leaves the last whole checkpoint."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "config": asdict(config),
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, config: Config, model: Model, optimizer: torch.optim.Optimizer) -> int:
    """Restore model and optimizer if there is a checkpoint; the epoch to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = [name for name, value in asdict(config).items() if state["config"].get(name) != value]
    if changed:
        raise SystemExit(f"{path} was trained with other {', '.join(changed)}: choose another --run-dir, or delete it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


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
        dist.destroy_process_group()


def main(
    store: str,
    run_dir: Path = Path("runs/default"),
    epochs: int = 8,
    batch_size: int = 64,
    pixels: int = 64,
    held_out: Annotated[int, typer.Option(help="last shards, kept from training, that test the probes")] = 1,
    labels: Annotated[str, typer.Option(help="fields of the json members to probe: a,b,c")] = "",
    width: int = 16,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    warm_up: float = 0.05,
    tau: float = 0.1,
    tau_s: float = 0.1,
    shuffle: int = 2000,
    workers: int = 0,
    seed: int = 0,
) -> None:
    """Train an encoder on STORE's shards and probe it on the held-out ones."""
    options = {name: value for name, value in locals().items() if name not in ("run_dir", "labels")}
    config = Config(**options, labels=[label for label in labels.split(",") if label])
    if config.labels and not held_out:
        raise SystemExit("--labels needs shards to test on: set --held-out to 1 or more")
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with process_group() as place:
            encoder = train(config, run_dir, place)
        if config.labels and place.rank == 0:
            probe(config, encoder, run_dir, place.device)
    except GraphbuildError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
