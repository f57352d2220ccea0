"""What a run leaves in its directory: config.json, metrics.jsonl and checkpoint.pt."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from config import Config, options
from torch import nn
from torch.optim import Optimizer

from graphbuild.errors import ConfigError

# What may differ when a run goes on: it changes no number.
FREE = ("cache", "workers", "checkpoint_steps", "log")


class Metrics:
    """JSON lines, flushed: one a step, one an epoch; and the same to TensorBoard or W&B where config.log says so.

    A run that goes on with a step of an epoch, `number` in the whole run, first drops the lines from there on.
    ConfigError: what config.log names is not installed.
    """

    def __init__(self, run_dir: Path, config: Config, epoch: int, step: int, number: int) -> None:
        self._mirror = mirror(run_dir, config, number)
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))  # a crash may have cut the last one
        replace(path, "".join(line for line in whole if is_before(json.loads(line), epoch, step)).encode())
        self._stream = path.open("a")

    def write(self, number: int, **values: float) -> None:
        """A line; for the mirror, `number` counts the steps of the whole run."""
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()
        if self._mirror:
            self._mirror.log(values, number)

    def close(self) -> None:
        self._stream.close()
        if self._mirror:
            self._mirror.finish()


def is_before(line: Mapping[str, Any], epoch: int, step: int) -> bool:
    """Whether a line was written before a step of an epoch; the line of an epoch comes after all its steps."""
    return "epoch" in line and (line["epoch"], line.get("step", math.inf)) < (epoch, step)


def mirror(run_dir: Path, config: Config, number: int) -> Any:
    """A W&B run, or what looks like one to Metrics and writes for TensorBoard; None where config.log is empty.

    A run that goes on, with step `number`, stays the same run there.
    """
    if not config.log:
        return None
    package = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[config.log]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"log = {config.log!r}: {error}", f"pip install {config.log}, or leave --log out") from error
    if config.log == "wandb":
        kept = run_dir / "wandb.id"
        if not number or not kept.exists():
            kept.write_text(module.util.generate_id())
        return module.init(
            dir=run_dir,
            id=kept.read_text(),
            resume="allow",
            config=asdict(config),
            name=run_dir.name,
            reinit="finish_previous",
        )
    return TensorBoard(module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=number))


@dataclass(frozen=True)
class TensorBoard:
    """A SummaryWriter with the methods of a W&B run."""

    writer: Any

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, in one file: modules by name, the optimizer, the next step, its epoch's losses.

    graph: the fingerprint of the graph it learns from.
    """

    path: Path
    config: Config
    graph: str
    modules: Mapping[str, nn.Module]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler

    def save(self, epoch: int, step: int, losses: list[float]) -> None:
        """A crash leaves the last whole checkpoint."""
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "config": asdict(self.config), "graph": self.graph}
        state["scaler"] = self.scaler.state_dict()
        content = io.BytesIO()
        torch.save({**state, "epoch": epoch, "step": step, "losses": losses}, content)
        replace(self.path, content.getbuffer())

    def restore(self) -> tuple[int, int, list[float]]:
        """The epoch and the step to go on with, and the losses of that epoch's steps before it; 0, 0 and none where
        there is no checkpoint. ConfigError: it is another run's."""
        if not self.path.exists():
            return 0, 0, []
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        saved, wanted = asdict(stored_config(self.path, state["config"])), asdict(self.config)
        changed = [name for name in wanted if name not in FREE and saved[name] != wanted[name]]
        if changed:
            raise ConfigError(
                f"{self.path} was trained with other {', '.join(changed)}", "choose another --run-dir, or delete it"
            )
        if state.get("graph", self.graph) != self.graph:  # older checkpoints have none
            raise ConfigError(
                f"{self.path} was trained with another graph than {self.config.store} has now",
                "choose another --run-dir, or delete it",
            )
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        return state["epoch"], state["step"], state["losses"]


def stored_config(path: Path, stored: Mapping[str, Any]) -> Config:
    """The Config of a checkpoint. Options that came later have their defaults, which are what was done before them.

    ConfigError: it has options that this trainer does not know.
    """
    if unknown := stored.keys() - options().keys():
        fix = "use the trainer that wrote it, or choose another --run-dir"
        raise ConfigError(f"{path} was trained with unknown {', '.join(sorted(unknown))}", fix)
    return Config(**stored).resolved(torch.device("cpu"))


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
