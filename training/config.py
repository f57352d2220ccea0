"""What decides a training run: `Config`, read from the command line over a YAML file over the defaults.

Every field is an option of `training/train.py` (`--batch-size 256`) and a key of its YAML file (`batch_size: 256`).
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml

from graphbuild.errors import ConfigError

RANGES: dict[str, tuple[float, float]] = {
    "held_out": (0, math.inf),
    "samples": (0, math.inf),
    "random_share": (0, 1),
    "view_weight": (0, math.inf),
    "width": (
        8,
        math.inf,
    ),  # torch 2.13 may crash on 4 channels: in a 1x1 convolution's backward pass on AVX2, one thread
    "pixels": (8, math.inf),
    "area_min": (0, 1),
    "jitter": (0, 1),
    "grayscale": (0, 1),
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),
    "chunk": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warm_up": (0, 1),
    "workers": (0, math.inf),
    "checkpoint_steps": (0, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the result of a run; saved with it, and not to be changed when it goes on.

    ConfigError: a value out of range, or two that do not go together.
    """

    store: Annotated[str, "folder or URL of a finished graphbuild store"]
    train_shards: Annotated[str, "brace pattern or glob, in STORE or absolute; empty: all but the held-out shards"] = ""
    held_out: Annotated[int, "last shards of the store, kept from training, that test the probes"] = 1
    samples: Annotated[float, "share of the training samples in (0, 1], or their number"] = 1.0
    subset_seed: Annotated[int, "draws them; a smaller subset is part of a larger one"] = 0

    method: Annotated[
        Literal["simclr", "supcon", "xsample", "clip", "clip_soft"],
        "supcon: equal nodes are positives; clip_soft: soft targets over captions",
    ] = "xsample"
    targets: Annotated[
        Literal["dense", "sketch", "background", "labels"],
        "similarities of xsample and clip_soft: of embeddings; of stored edges, the others by sketches or background"
        " values; or 1 for equal nodes, 0 for others",
    ] = "dense"
    permute_graph: Annotated[bool, "control: every node gets another node's similarities and neighbours"] = False
    view_weight: Annotated[float, "adds so much of SimCLR's loss, of a head of its own, to the method's"] = 0.0
    tau: Annotated[float, "temperature of the model; where the learned one of clip starts"] = 0.1
    tau_s: Annotated[float, "temperature of the target"] = 0.1
    text: Annotated[
        Literal["projection", "tower"],
        "text side of clip: a projection of the caption's frozen embedding, or a small transformer on its words",
    ] = "projection"

    batches: Annotated[
        Literal["random", "window", "walk", "communities"],
        "random ones, or of groups of neighbours: see NeighborBatchSampler",
    ] = "random"
    group: Annotated[int, "samples of such a group"] = 8
    random_share: Annotated[float, "share of the batches that are random ones all the same"] = 0.0

    backbone: Annotated[str, "small | resnet50 | vit | timm:NAME"] = "small"
    width: Annotated[int, "channels of the small backbone's first stage"] = 16
    pixels: Annotated[int, "side of the images"] = 64
    area_min: Annotated[float, "a crop keeps at least this share of an image"] = 0.6
    jitter: Annotated[float, "largest relative change of brightness, contrast and saturation"] = 0.3
    grayscale: Annotated[float, "probability of losing all colour"] = 0.05
    flip: Annotated[bool, "mirror half of the views"] = True

    epochs: Annotated[int, "passes over the training samples"] = 8
    batch_size: Annotated[int, "images of a step, over all ranks"] = 64
    chunk: Annotated[int, "images that a rank holds activations of at once (GradCache); 0: all"] = 0
    optimizer: Annotated[Literal["adamw", "lars"], ""] = "adamw"
    learning_rate: Annotated[float, "the highest; 0: 3e-3 of adamw, SimCLR's 0.3 x batch_size / 256 of lars"] = 0.0
    weight_decay: Annotated[float, "of matrices and kernels; biases and norms have none"] = 1e-2
    warm_up: Annotated[float, "share of the training"] = 0.05
    precision: Annotated[Literal["auto", "float32", "bfloat16"], "auto: bfloat16 on GPUs that have it"] = "auto"
    seed: Annotated[int, "of weights, batches and views"] = 0

    cache: Annotated[bool, "decode every image once, into memory: 3 x pixels x pixels bytes each, on every rank"] = True
    workers: Annotated[int, "processes that decode images"] = 0
    checkpoint_steps: Annotated[int, "steps between checkpoints; 0: one an epoch; the last step has one always"] = 0
    log: Annotated[Literal["", "tensorboard", "wandb"], "where else metrics go"] = ""

    def __post_init__(self) -> None:
        for name, (kind, _) in options().items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ConfigError(f"{name} = {value!r}", f"use one of {', '.join(map(repr, get_args(kind)))}")
        for name, (least, most) in RANGES.items():
            if not least <= (value := getattr(self, name)) <= most:
                wanted = f"{least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
                raise ConfigError(f"{name} = {value}", f"use {wanted}")
        for wrong, cause, fix in (
            (self.samples == 0, "samples = 0", "use a share in (0, 1], or a number of samples"),
            (self.area_min == 0, "area_min = 0", "use a share of the image in (0, 1]"),
            (self.warm_up == 1, "warm_up = 1", "use a share of the training in [0, 1)"),
            (math.isinf(self.learning_rate), "learning_rate = inf", "use a number"),
            (
                self.permute_graph and not self.reads_similarities and self.batches == "random",
                f"permute_graph with method {self.method!r}, targets {self.targets!r} and random batches",
                "it changes targets from embeddings or edges, and batches of neighbours: use one of them",
            ),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(cause, fix)

    def resolved(self, device: torch.device) -> Config:
        """With what "auto" and a learning rate of 0 mean on this device."""
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        auto = "bfloat16" if bfloat16 else "float32"
        usual = 3e-3 if self.optimizer == "adamw" else 0.3 * self.batch_size / 256
        return replace(
            self,
            precision=auto if self.precision == "auto" else self.precision,
            learning_rate=self.learning_rate or usual,
        )

    @property
    def reads_texts(self) -> bool:
        """Whether the model has a text side."""
        return self.method in ("clip", "clip_soft")

    @property
    def reads_similarities(self) -> bool:
        """Whether the loss reads similarities out of the graph."""
        return self.method in ("xsample", "clip_soft") and self.targets != "labels"


@dataclass(frozen=True)
class Place:
    """This process: its rank, how many there are, its device."""

    rank: int
    ranks: int
    device: torch.device


def options() -> dict[str, tuple[Any, str]]:
    """Type and explanation of each field of Config."""
    hints = get_type_hints(Config, include_extras=True)
    return {field.name: get_args(hints[field.name]) for field in fields(Config)}


def read_command_line(arguments: Sequence[str] | None = None) -> tuple[Config, Path, list[str]]:
    """The run's Config, its directory, and the labels to probe.

    Raises:
        ConfigError: a file that holds something else than fields of Config, or values that Config refuses.
    """
    parser = argparse.ArgumentParser(
        description="Train an encoder on STORE's shards, and probe it on the held-out ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, help="YAML file of options; the command line goes before it")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/default"), help="goes on with the run there")
    parser.add_argument("--labels", default="", help="fields of the json members to probe: a,b,c")
    for field in fields(Config):
        kind, text = options()[field.name]
        if field.default is MISSING:
            parser.add_argument(field.name, nargs="?", help=text)
            continue
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how, help=f"{text} ({field.default})")
    given = vars(parser.parse_args(arguments))
    run_dir, labels = given.pop("run_dir"), given.pop("labels")
    if "config" in given:
        given = {**read_yaml(given.pop("config")), **given}
    if "store" not in given:
        raise ConfigError("no store", "name a finished graphbuild store: python training/train.py STORE")
    return Config(**given), run_dir, [label for label in labels.split(",") if label]


def read_yaml(path: Path) -> dict[str, Any]:
    """Fields of Config by name; ConfigError where the file holds something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "pass a YAML file of options") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no options", "write lines such as batch_size: 256")
    unknown = content.keys() - options().keys()
    if unknown:
        raise ConfigError(f"{path}: no option {', '.join(sorted(map(str, unknown)))}", f"use {', '.join(options())}")
    return {name: _typed(path, name, value) for name, value in content.items()}


def _typed(path: Path, name: str, value: Any) -> Any:
    kind, _ = options()[name]
    kind = str if get_origin(kind) is Literal else kind
    if kind is float and isinstance(value, str | int):
        with contextlib.suppress(ValueError):  # YAML takes 3e-3, without a point, for a text
            value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path}: {name} = {value!r}", f"write a value of type {kind.__name__}")
    return value
