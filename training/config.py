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
    "similar": (-1, 1),
    "other_view": (0, 1),
    "width": (
        8,
        math.inf,
    ),  # torch 2.13 may crash on 4 channels: in a 1x1 convolution's backward pass on AVX2, one thread
    "pixels": (8, math.inf),
    "area_min": (0, 1),
    "jitter": (0, 1),
    "jitter_share": (0, 1),
    "hue": (0, 0.5),
    "grayscale": (0, 1),
    "blur": (0, 1),
    "solarise": (0, 1),
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),
    "chunk": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warm_up": (0, 1),
    "clip_norm": (0, math.inf),
    "workers": (0, math.inf),
    "checkpoint_steps": (0, math.inf),
}
OWN = ("weight_decay", "warm_up", "clip_norm")  # -1: what the optimizer is used with


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
    selection: Annotated[str, "only the samples of this file of `graphbuild select`"] = ""

    method: Annotated[
        Literal[
            "simclr",
            "supcon",
            "xsample",
            "clip",
            "clip_soft",
            "siglip",
            "siglip_mask",
            "siglip_positive",
            "siglip_soft",
        ],
        "supcon: equal nodes are positives; clip_soft: soft targets over captions; siglip_*: other captions that are"
        " `similar` are left out, are positives, or are so in part",
    ] = "xsample"
    targets: Annotated[
        Literal["dense", "sketch", "background", "labels", "uniform"],
        "similarities of xsample, clip_soft and siglip_*: of embeddings; of stored edges, the others by sketches or"
        " background values; 1 for equal nodes, 0 for others; or the control that knows nothing: what other_view leaves"
        " goes to all other images alike",
    ] = "dense"
    permute_graph: Annotated[bool, "control: every node gets another node's similarities and neighbours"] = False
    view_weight: Annotated[float, "adds so much of SimCLR's loss, of a head of its own, to the method's"] = 0.0
    tau: Annotated[float, "temperature of the model; where the learned one of clip starts"] = 0.1
    learn_tau: Annotated[bool, "xsample learns its tau too, as clip does"] = False
    tau_s: Annotated[float, "temperature of the target"] = 0.1
    other_view: Annotated[
        float, "calibrates tau_s: the share of its target that a view's other one, or the own caption, keeps; 0: tau_s"
    ] = 0.0
    similar: Annotated[
        float, "similarity from which siglip_mask and siglip_positive repair a pair, and siglip_soft's target rises"
    ] = 0.6
    text: Annotated[
        Literal["projection", "tower"],
        "text side of clip and siglip: a projection of the caption's embedding, or a small transformer on its words",
    ] = "projection"

    batches: Annotated[
        Literal["random", "window", "walk", "communities"],
        "random ones, or of groups of neighbours: see NeighborBatchSampler",
    ] = "random"
    group: Annotated[int, "samples of such a group"] = 8
    random_share: Annotated[float, "share of the batches that are random ones all the same"] = 0.0

    backbone: Annotated[str, "small | resnet50 | vit | timm:NAME, or timm/NAME"] = "small"
    width: Annotated[int, "channels of the small backbone's first stage"] = 16
    pixels: Annotated[int, "side of the images"] = 64
    area_min: Annotated[float, "a crop keeps at least this share of an image"] = 0.6
    jitter: Annotated[float, "largest relative change of brightness, contrast and saturation"] = 0.3
    jitter_share: Annotated[float, "probability of that change, and of the hue's"] = 1.0
    hue: Annotated[float, "largest turn of the hue, in circles"] = 0.0
    grayscale: Annotated[float, "probability of losing all colour"] = 0.05
    blur: Annotated[float, "probability of a Gaussian blur, of 0.1 to 2 pixels"] = 0.0
    solarise: Annotated[float, "probability of inverting all values above the middle"] = 0.0
    flip: Annotated[bool, "mirror half of the views"] = True
    full_crops: Annotated[
        bool, "cut crops out of the whole image before it is shrunk, not out of its shrunk middle; needs --no-cache"
    ] = False

    epochs: Annotated[int, "passes over the training samples"] = 8
    batch_size: Annotated[int, "images of a step, over all ranks"] = 64
    chunk: Annotated[int, "images that a rank holds activations of at once (GradCache); 0: all"] = 0
    optimizer: Annotated[Literal["adamw", "lars"], ""] = "adamw"
    learning_rate: Annotated[float, "the highest; 0: 3e-3 of adamw, SimCLR's 0.3 x batch_size / 256 of lars"] = 0.0
    weight_decay: Annotated[float, "of matrices and kernels alone; -1: 1e-2 of adamw, SimCLR's 1e-6 of lars"] = -1.0
    warm_up: Annotated[float, "share of the training; -1: 0.05 of adamw, of lars 10 epochs, at most a tenth"] = -1.0
    clip_norm: Annotated[
        float, "longest gradient, others are scaled down to it; 0: any; -1: 1 of adamw, 0 of lars"
    ] = -1.0
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "auto: bfloat16 on GPUs that have it; float16 scales the loss, and leaves out steps that overflow",
    ] = "auto"
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
            value = getattr(self, name)
            if not least <= value <= most and not (value == -1 and name in OWN):
                wanted = f"{least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
                raise ConfigError(f"{name} = {value}", f"use {wanted}")
        for wrong, cause, fix in (
            (self.samples == 0, "samples = 0", "use a share in (0, 1], or a number of samples"),
            (self.area_min == 0, "area_min = 0", "use a share of the image in (0, 1]"),
            (self.full_crops and self.cache, "full_crops with a cache of shrunk images", "pass --no-cache --workers"),
            (self.other_view == 1, "other_view = 1", "use a share of the target in (0, 1), or method simclr or clip"),
            (
                self.other_view > 0 and not self.is_soft,
                f"other_view with method {self.method!r} and targets {self.targets!r}",
                "it is the share of soft targets: use method xsample or clip_soft, and not targets labels",
            ),
            (
                self.targets == "uniform" and self.is_soft and self.other_view == 0,
                "targets = 'uniform' without other_view",
                "say what share of its target a view's other one keeps: --other-view 0.6",
            ),
            (
                self.learn_tau and self.method != "xsample",
                f"learn_tau with method {self.method!r}",
                "use it with xsample; methods with texts learn theirs anyway",
            ),
            (
                self.targets == "uniform" and self.method.startswith("siglip_"),
                f"targets = 'uniform' with method {self.method!r}",
                "it has no share to give away: use method siglip, or another target",
            ),
            (self.similar == 1 and self.method == "siglip_soft", "similar = 1", "use a similarity below 1"),
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
        """With what "auto", -1 and a learning rate of 0 mean on this device."""
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        auto = "bfloat16" if bfloat16 else "float32"
        rate, own = 3e-3, {"weight_decay": 1e-2, "warm_up": 0.05, "clip_norm": 1.0}
        if self.optimizer == "lars":
            rate = 0.3 * self.batch_size / 256
            own = {"weight_decay": 1e-6, "warm_up": min(0.1, 10 / self.epochs), "clip_norm": 0.0}
        return replace(
            self,
            precision=auto if self.precision == "auto" else self.precision,
            learning_rate=self.learning_rate or rate,
            **{name: value for name, value in own.items() if getattr(self, name) == -1},
        )

    @property
    def reads_texts(self) -> bool:
        """Whether the model has a text side."""
        return self.method.startswith(("clip", "siglip"))

    @property
    def is_soft(self) -> bool:
        """Whether the target is a softmax at tau_s, or at a share of the other view."""
        return self.method in ("xsample", "clip_soft") and self.targets != "labels"

    @property
    def reads_similarities(self) -> bool:
        """Whether the loss reads similarities out of the graph."""
        repaired = self.method.startswith("siglip_") and self.targets != "labels"
        return repaired or (self.is_soft and self.targets != "uniform")


@dataclass(frozen=True)
class Place:
    """This process: its rank, how many there are, its device."""

    rank: int
    ranks: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Probing:
    """What a run's encoder is asked after the training; it changes nothing of the training."""

    labels: Annotated[str, "what to probe: fields of the json members, or members by their extension, as kind,.cls"] = (
        ""
    )
    probe: Annotated[str, "another store that the probes are fitted and tested on; empty: STORE"] = ""
    probe_held_out: Annotated[int, "last shards of that store, which test the probes"] = 1
    tests: Annotated[str, "YAML file of folders of images that the first label's probes are tested on too"] = ""

    def __post_init__(self) -> None:
        if (self.probe or self.tests) and not self.labels:
            raise ConfigError("--probe or --tests without --labels", "say what to probe, as --labels kind or .cls")

    @property
    def names(self) -> list[str]:
        """The labels."""
        return [label for label in self.labels.split(",") if label]


def options(of: Any = Config) -> dict[str, tuple[Any, str]]:
    """Type and explanation of each field of Config, or of Probing."""
    hints = get_type_hints(of, include_extras=True)
    return {field.name: get_args(hints[field.name]) for field in fields(of)}


def read_command_line(arguments: Sequence[str] | None = None) -> tuple[Config, Path, Probing]:
    """The run's Config, its directory, and what to probe.

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
    for field in (*fields(Probing), *fields(Config)):
        kind, text = (options(Probing) | options())[field.name]
        if field.default is MISSING:
            parser.add_argument(field.name, nargs="?", help=text)
            continue
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        flags = [f"--{field.name.replace('_', '-')}", *(["--model"] if field.name == "backbone" else [])]
        parser.add_argument(*flags, **how, dest=field.name, help=f"{text} ({field.default})")
    given = vars(parser.parse_args(arguments))
    run_dir = given.pop("run_dir")
    probing = Probing(**{name: given.pop(name) for name in options(Probing) if name in given})
    if "config" in given:
        given = {**read_yaml(given.pop("config")), **given}
    if "store" not in given:
        raise ConfigError("no store", "name a finished graphbuild store: python training/train.py STORE")
    return Config(**given), run_dir, probing


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
