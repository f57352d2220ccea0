"""What the graph costs a training step: the same steps without its fields, with them, and with targets from them.

Three arms take turns, step by step in changing order, on one model: `plain` reads images alone (webdataset) and trains
SimCLR, `fields` reads the sidecars too and trains SimCLR, `targets` trains X-Sample on their embeddings. With
workers = 0 a step includes reading its batch, so nothing hides behind the arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import webdataset as wds
from augment import DRAWS, random_view
from models import Model, scaled
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.experiments.plan import Run
from benchmarks.experiments.sources import Prepared
from graphbuild.errors import ConfigError
from graphbuild.torch import NTXentLoss, XSampleLoss, graph_webdataset
from graphbuild.torch.images import ImageDecoder

ARMS = ("plain", "fields", "targets")
SHUFFLE = 1000
WARM_UP = 3  # rounds


def step_seconds(run: Run, prepared: Prepared, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a step of each arm, and by what share the other two exceed the plain one.

    The run's epochs count rounds (a step of each arm).
    """
    config = replace(run.config(prepared.store), method="xsample").resolved(device)
    tars = sorted(str(path) for path in (prepared.store / "shards").glob("*.tar"))
    torch.manual_seed(run.seed)
    model = Model(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    with_fields = [
        endless(
            graph_webdataset(
                tars,
                batch_size=config.batch_size,
                image_pixels=config.pixels,
                shuffle=SHUFFLE,
                partial=False,
                seed=seed,
            ),
            config.workers,
        )
        for seed in range(2)
    ]
    batches = dict(
        zip(ARMS, (endless(plain(tars, config.batch_size, config.pixels), config.workers), *with_fields), strict=True)
    )
    simclr, xsample = NTXentLoss(tau=config.tau), XSampleLoss(tau=config.tau, tau_s=config.tau_s)

    def step(arm: str) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        batch = next(batches[arm])
        images = scaled(batch["image"].to(device, non_blocking=True))
        draws = torch.rand(2, DRAWS, len(images))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            z1, z2 = model(random_view(images, draws[0], config), random_view(images, draws[1], config))[:2]
        loss = simclr(z1, z2) if arm != "targets" else xsample(z1, z2, batch["embedding"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(WARM_UP + int(run.settings["epochs"])):
        turn = number % len(ARMS)
        for arm in (*ARMS[turn:], *ARMS[:turn]):
            taken = step(arm)
            if number >= WARM_UP:
                seconds[arm].append(taken)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    found = {f"{arm} ms": 1000 * value for arm, value in medians.items()}
    return found | {f"{arm} overhead share": medians[arm] / medians["plain"] - 1 for arm in ARMS[1:]}


def plain(tars: list[str], batch_size: int, pixels: int) -> wds.DataPipeline:
    """webdataset's own pipeline over the images of the same tars, decoded by the same decoder."""
    collate = partial(images_alone, ImageDecoder(pixels, None))
    return wds.DataPipeline(
        wds.SimpleShardList(tars),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLE, initial=SHUFFLE),
        wds.batched(batch_size, collation_fn=collate, partial=False),
    )


def images_alone(decoder: ImageDecoder, samples: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [sample["__key__"] for sample in samples]
    return {"image": decoder.collate(decoder.decode([sample["jpg"] for sample in samples], keys)[0])}


def endless(dataset: Any, workers: int) -> Iterator[dict[str, Tensor]]:
    """The batches of one pass after another; ConfigError where a pass has none."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ConfigError(
                f"no batch in a pass: each of {max(workers, 1)} reader(s) has fewer samples than a batch",
                "set fewer workers or a smaller batch_size",
            )
