"""What an experiment's recipe asks for: a YAML file of benchmarks/experiments to a list of runs, in order.

A run's settings are the recipe's base, then what its form (reduced or full), its group and its variant change. Groups
stand in order of importance; within a group all variants of one seed come before the next seed, so whatever is
finished compares like with like. Costs nothing: data and models are made when a run begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from config import Config

from benchmarks.experiments.sources import Data, fingerprint
from graphbuild.errors import ConfigError

EVALUATION = 1  # the probes' version: another one makes results incomparable
PLACE = ("store", "seed", "workers", "cache", "checkpoint_steps", "log")  # settings that decide no result
SECTIONS = (
    "title",
    "question",
    "kind",
    "data",
    "base",
    "forms",
    "groups",
    "order",
    "early",
    "measures",
    "baselines",
    "plot",
    "claims",
)
SEED = "seed"  # a value of `draw` in data: each seed trains on a draw of its own
Form = Literal["reduced", "full"]


@dataclass(frozen=True)
class Claim:
    """What the recipe expects: in `group`, `measure` of `better` less that of `worse` is at least `margin`, and their
    means lie more than `deviations` standard deviations apart."""

    better: str
    worse: str
    measure: str
    group: str
    margin: float = 0.0
    deviations: float = 0.0


@dataclass(frozen=True)
class Run:
    """One training with its evaluation, or one timing."""

    experiment: str
    kind: Literal["training", "cost"]
    form: Form
    group: str
    variant: str
    seed: int
    data: Data
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of all that decides the result but the seed: the same run in two experiments has the same one."""
        decisive = {name: value for name, value in self.settings.items() if name not in PLACE}
        return fingerprint([EVALUATION, self.kind, self.data.decisive, decisive])

    @property
    def name(self) -> str:
        """Of its folder, the same in every experiment."""
        return f"{self.fingerprint}-{self.seed}"

    @property
    def steps(self) -> int:
        """Of the training."""
        samples = self.settings.get("samples", 1.0)
        count = round(samples if samples > 1 else samples * self.data.train)
        epochs: int = self.settings["epochs"]
        return epochs * (count // self.settings["batch_size"])

    def config(self, store: Path) -> Config:
        """What to train; of a run of no epochs, which is evaluated untrained, its model."""
        epochs = max(1, self.settings["epochs"])
        return Config(**{**self.settings, "epochs": epochs, "store": str(store), "seed": self.seed})

    def __str__(self) -> str:
        return f"{self.experiment}: {self.group}: {self.variant}: seed {self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A recipe in one form."""

    name: str
    title: str
    question: str
    form: Form
    runs: list[Run]
    measures: list[str]
    plot: list[str]
    claims: list[Claim]
    baselines: list[str]  # variants that the others of their group are compared with, seed by seed
    seeds_first: bool  # all groups of a seed before the next seed, not all seeds of a group before the next group
    early: list[str]  # variants whose runs come before those of all others

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(run.group for run in self.runs))


def read_experiment(path: Path, form: Form, seeds: int | None = None) -> Experiment:
    """The experiment that a recipe describes.

    Raises:
        ConfigError: no such file or form, an unknown section or setting, a variant without its data.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read as YAML ({error})", "see benchmarks/experiments/ for examples"
        ) from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} must hold sections: {', '.join(SECTIONS)}", "see benchmarks/experiments/")
    _check_names(path, "section", recipe, SECTIONS)
    missing = [name for name in ("data", "base", "forms", "groups", "measures") if name not in recipe]
    if missing or form not in recipe["forms"]:
        raise ConfigError(f"{path} has no {', '.join(missing) or f'form {form}'}", "see benchmarks/experiments/")
    here = dict(recipe["forms"][form])
    data_changes = here.pop("data", {})
    settings_known = [field.name for field in fields(Config)]
    runs = []
    for group in recipe["groups"]:
        _check_names(path, f"key of group {group.get('name')}", group, ("name", "data", "reduced", "full", "variants"))
        changes = {**here, **group.get(form, {})}
        if changes.pop("skip", False):
            continue
        count = changes.pop("seeds", 3)
        for seed in range(seeds or count):
            for variant, own in group["variants"].items():
                settings = {**recipe["base"], **changes, **own}
                data_name = settings.pop("data", group.get("data"))
                if data_name not in recipe["data"]:
                    raise ConfigError(
                        f"{path}: {group['name']}: {variant}: no data {data_name!r}", "name one of `data:`"
                    )
                _check_names(path, f"setting of {variant}", settings, settings_known)
                values = {**recipe["data"][data_name], **data_changes}
                if values.get("draw") == SEED:
                    values["draw"] = seed
                _check_names(path, f"setting of data {data_name}", values, [field.name for field in fields(Data)])
                kind = recipe.get("kind", "training")
                runs.append(Run(path.stem, kind, form, group["name"], variant, seed, Data(**values), settings))
    return Experiment(
        name=path.stem,
        title=recipe.get("title", path.stem),
        question=recipe.get("question", ""),
        form=form,
        runs=runs,
        measures=list(recipe["measures"]),
        plot=list(recipe.get("plot", recipe["measures"][:2])),
        claims=[Claim(**claim) for claim in recipe.get("claims", [])],
        baselines=list(recipe.get("baselines", [])),
        seeds_first=recipe.get("order", "groups") == "seeds",
        early=list(recipe.get("early", [])),
    )


def in_turn(experiments: Sequence[Experiment]) -> list[Run]:
    """The runs of several experiments: first groups first, or first seeds where a recipe says `order: seeds`; of a
    recipe that names `early` variants these in this order, then the others."""
    ranked = [
        (
            bool(experiment.early) and run.variant not in experiment.early,
            run.seed if experiment.seeds_first else experiment.groups.index(run.group),
            order,
            run,
        )
        for order, experiment in enumerate(experiments)
        for run in experiment.runs
    ]
    return [run for *_, run in sorted(ranked, key=lambda item: item[:3])]


def _check_names(path: Path, what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{path}: unknown {what}: {', '.join(unknown)}", f"known: {', '.join(known)}")
