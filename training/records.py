"""What a run leaves in its directory: config.json, metrics.jsonl and checkpoint.pt."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from config import Config
from torch import nn
from torch.optim import Optimizer

from graphbuild.errors import ConfigError

# What may differ when a run goes on: it changes no number.
FREE = ("cache", "workers", "checkpoint_steps", "log")


class Metrics:
    """JSON lines, flushed: one a step, one an epoch; and the same to TensorBoard or W&B where config.log says so.

    A run that goes on with a step of an epoch first drops the lines from there on.
    """

    def __init__(self, run_dir: Path, config: Config, epoch: int, step: int) -> None:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(line + "\n" for line in lines if _is_before(json.loads(line), epoch, step)))
        self._stream = path.open("a")
        self._mirror = mirror(run_dir, config)

    def write(self, number: int, **values: float) -> None:
        """A line; `number` is the step of the whole run, which the mirrors plot it at."""
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()
        if self._mirror:
            self._mirror(number, values)

    def close(self) -> None:
        self._stream.close()


def _is_before(line: Mapping[str, Any], epoch: int, step: int) -> bool:
    """Whether a line was written before a step of an epoch; the line of an epoch comes after all its steps."""
    return "epoch" in line and (line["epoch"], line.get("step", float("inf"))) < (epoch, step)


def mirror(run_dir: Path, config: Config) -> Any:
    """A function (step, values) that also records them where config.log says, or None; ConfigError if not installed."""
    package = {"": None, "tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[config.log]
    if package is None:
        return None
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"log = {config.log!r}: {error}", f"pip install {config.log}, or leave --log out") from error
    if config.log == "wandb":
        run = module.init(dir=run_dir, config=asdict(config), name=run_dir.name)
        return lambda step, values: run.log(values, step=step)
    writer = module.SummaryWriter(str(run_dir / "tensorboard"))
    return lambda step, values: [writer.add_scalar(name, value, step) for name, value in values.items()]


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, in one file: modules by name, the optimizer, and the next step."""

    path: Path
    config: Config
    modules: Mapping[str, nn.Module]
    optimizer: Optimizer

    def save(self, epoch: int, step: int) -> None:
        """Temporary name, fsync, rename: a crash leaves the last whole checkpoint."""
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "config": asdict(self.config)}
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            torch.save({**state, "epoch": epoch, "step": step}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)

    def restore(self) -> tuple[int, int]:
        """The epoch and the step to go on with, 0 and 0 where there is no checkpoint; ConfigError for another run's."""
        if not self.path.exists():
            return 0, 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        saved, wanted = state["config"], asdict(self.config)
        changed = [name for name in wanted if name not in FREE and saved.get(name) != wanted[name]]
        if changed:
            raise ConfigError(
                f"{self.path} was trained with other {', '.join(changed)}", "choose another --run-dir, or delete it"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["epoch"], state["step"]
