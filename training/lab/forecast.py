"""What a run will take on this machine: what it took here with another seed, else steps and probes timed on noise.

Timing costs four training steps for each shape of step among the runs and one fit of a probe for each shape of
features: seconds on a GPU, a minute or two on a CPU. Not counted: making data, checkpoints, and that processes which
share a device slow each other down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from config import Config, Place
from evaluate import PENALTIES, features_of, linear
from models import new_encoder, word_numbers
from objective import Objective
from optim import new_optimizer
from train import new_model, two_views, update

from graphbuild.demo.scenes import ATTRIBUTES
from graphbuild.torch import Targets
from lab.cost import ARMS, WARM_UP
from lab.plan import Run
from lab.results import Results
from lab.runs import device_name

TEXT_WIDTH = 384
CLASSES = 10
TIMED_STEPS, TIMED_IMAGES = 3, 512


class Forecast:
    """Seconds that runs will take on `device`; each shape of step or features is timed once."""

    def __init__(self, found: Results, device: torch.device) -> None:
        self._found, self._device = found, device
        self._timed: dict[tuple[object, ...], float] = {}

    def seconds(self, run: Run) -> float:
        """Of training and evaluation, in one process that has the device to itself."""
        here = device_name(self._device)
        like = [line["seconds"] for line in self._found.like(run) if line["device"] == here]
        if like:
            return statistics.fmean(like)
        config = run.config(Path())
        step = self._once(step_shape(config), partial(seconds_of_step, config, self._device))
        if run.kind == "cost":
            return steps_of(run) * step
        shape = probe_shape(run)
        return steps_of(run) * step + self._once(
            (config.backbone, config.width, *shape), partial(seconds_of_probes, config, self._device, *shape)
        )

    def _once(self, shape: tuple[object, ...], timed: Callable[[], float]) -> float:
        if shape not in self._timed:
            self._timed[shape] = timed()
        return self._timed[shape]


def steps_of(run: Run) -> int:
    """Of the training, or of all arms that are timed."""
    return len(ARMS) * (run.settings["epochs"] + WARM_UP) if run.kind == "cost" else run.steps


def step_shape(config: Config) -> tuple[object, ...]:
    """What the time of a step depends on."""
    texts = config.text if config.reads_texts else ""
    shape = (config.backbone, config.width, config.pixels, config.batch_size, config.chunk)
    return (*shape, config.method, texts, config.optimizer, config.precision)


def probe_shape(run: Run) -> tuple[int, int, int]:
    """Images that probes are fitted on, all images whose features are wanted, and labels with a probe each."""
    data = run.data
    tests, labels = (2, len(ATTRIBUTES)) if data.images == "scenes" else (1, 1)  # scenes are tested swapped too
    return data.probe, data.probe + tests * data.test, labels


def noisy_step(config: Config, device: torch.device) -> Callable[[], float]:
    """A training step on images and texts of noise, as `train` makes it of a batch, for many calls: its loss."""
    config, place = config.resolved(device), Place(0, 1, device)
    model = new_model(config, TEXT_WIDTH).to(device, memory_format=torch.channels_last).train()
    objective = Objective(config).to(device)
    optimizer = new_optimizer(config, model, objective)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    size = config.batch_size
    batch = {"image": torch.randint(0, 256, (size, 3, config.pixels, config.pixels), dtype=torch.uint8)}
    embeddings = torch.randn(size, TEXT_WIDTH)
    texts = [word_numbers(["a red disc on a lawn"] * size) if config.text == "tower" else embeddings]
    labels = Targets(labels=torch.arange(size))
    targets = {"simclr": Targets(), "clip": Targets(), "supcon": labels}

    def step() -> float:
        inputs = [*two_views(batch, config, place, 0, 0), *(text.to(device) for text in texts if config.reads_texts)]
        told = targets.get(config.method, Targets(embeddings=embeddings)).to(device)
        loss, _ = update(model, objective, optimizer, inputs, told, config, place, 0)
        return loss.item()

    return step


def seconds_of_step(config: Config, device: torch.device) -> float:
    """The quickest of a few: others may be at work on the machine."""
    step = noisy_step(config, device)
    step()
    taken = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def seconds_of_probes(config: Config, device: torch.device, fitted: int, images: int, labels: int) -> float:
    """Features of some images, and the fits of the linear probes of `labels` labels on `fitted` of them."""
    encoder = new_encoder(config).to(device, memory_format=torch.channels_last)
    noise = torch.randint(0, 256, (TIMED_IMAGES, 3, config.pixels, config.pixels), dtype=torch.uint8)
    features_of(encoder, noise, device)
    started = time.perf_counter()
    features = features_of(encoder, noise, device)
    seconds = (time.perf_counter() - started) * images / TIMED_IMAGES
    x = features[torch.arange(fitted) % TIMED_IMAGES] + 0.1 * torch.randn(fitted, features.shape[1])
    started = time.perf_counter()
    linear(x, torch.randint(0, CLASSES, (fitted,)), x[:1], CLASSES, PENALTIES[0])
    return seconds + (time.perf_counter() - started) * labels * (len(PENALTIES) + 1)
