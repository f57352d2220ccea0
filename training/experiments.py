"""Experiments as recipes: `run` does what is missing of them, `summary` makes tables and plots of what is there.

    python training/experiments.py run pipelines/experiments/b.yaml
    python training/experiments.py run --all --cifar FOLDER
    python training/experiments.py summary --all

A finished run is a line in benchmarks/results/experiments/; an interrupted one goes on from its checkpoint. With --all
the first group of every experiment comes before the second of any.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

# On shared cores OpenMP threads that wait must not spin: under load this is four to eight times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import typer
from config import Config, Place
from cost import step_seconds
from data import EpochBatches, training_samples
from evaluate import features_of, probes, zero_shot
from models import Model
from plan import Experiment, Form, Run, in_turn, read_experiment
from results import Results, plot, summary
from sources import Prepared, prepare
from train import load_run, new_model, train

from graphbuild.errors import ConfigError, GraphbuildError

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "pipelines" / "experiments"
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
FormOption = Annotated[Form, typer.Option(help="reduced: overnight on two cores; full: for a GPU")]
RecipesArgument = Annotated[list[Path] | None, typer.Argument(metavar="[RECIPE]...", show_default=False)]
AllOption = Annotated[bool, typer.Option("--all", help="every recipe in pipelines/experiments")]
SeedsOption = Annotated[int | None, typer.Option(min=1, help="seeds of each variant  [default: the recipe's]")]
ResultsOption = Annotated[Path, typer.Option("--results", help="folder of the results")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@app.command()
def run(
    recipes: RecipesArgument = None,
    every: AllOption = False,
    form: FormOption = "reduced",
    seeds: SeedsOption = None,
    cifar: Annotated[Path | None, typer.Option(help="folder of cifar_train.tar.xz and cifar_test.tar.xz")] = None,
    work: Annotated[Path, typer.Option(help="folder for data and runs")] = Path("runs/experiments"),
    results: ResultsOption = RESULTS,
    groups: Annotated[str, typer.Option(help="only the first N groups of each recipe, or those named: a;b")] = "",
    minutes: Annotated[float | None, typer.Option(help="begin no run that would end after so long")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the forecast")] = False,
) -> None:
    """Do the runs that have no result yet."""
    experiments = chosen(recipes, every, form, seeds)
    found = Results(results)
    runs = [run for run in in_turn(experiments) if _wanted(run, experiments, groups)]
    missing = [run for run in runs if found.of(run) is None]
    by_name = {experiment.name: experiment for experiment in experiments}
    print(forecast(runs, missing, by_name, found), flush=True)
    if dry_run:
        return
    device, begun, failed, left = torch_device(), time.perf_counter(), [], []
    for number, one in enumerate(missing, 1):
        if found.of(one) is not None:  # another experiment had the same run
            continue
        expected = found.seconds(one, by_name[one.experiment])
        if minutes is not None and time.perf_counter() - begun + expected > 60 * minutes:
            left.append(one)
            continue
        started = time.perf_counter()
        try:
            metrics, seconds = finish(one, work, device, cifar)
        except (GraphbuildError, RuntimeError) as error:
            failed.append(one)
            print(f"{one} failed: {error}", flush=True)
            continue
        found.add(one, metrics, seconds, device_name(device))
        main = f"linear {one.data.main_label}"
        told = f"{main} {100 * metrics[main]:.1f}  " if main in metrics else ""
        spent = time.perf_counter() - started
        print(f"[{number}/{len(missing)}] {one}  {told}{spent:.0f} s (forecast {expected:.0f} s)", flush=True)
    if left:
        print(f"{len(left)} runs would have ended after {minutes:g} minutes: the same command goes on with them")
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, see above; the same command tries them again")


@app.command(name="summary")
def write_summary(
    recipes: RecipesArgument = None,
    every: AllOption = False,
    form: FormOption = "reduced",
    seeds: SeedsOption = None,
    results: ResultsOption = RESULTS,
    plots: bool = True,
) -> None:
    """Tables (NAME.md) and plots (NAME.png) of the results, beside them; in the full form NAME_full."""
    found = Results(results)
    for experiment in chosen(recipes, every, form, seeds):
        name = experiment.name if form == "reduced" else f"{experiment.name}_{form}"
        text = summary(experiment, found)
        if plots and plot(experiment, found, results / f"{name}.png"):
            text += f"\n![{experiment.title}]({name}.png)\n"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.md").write_text(text)
        print(text)


def chosen(recipes: list[Path] | None, every: bool, form: Form, seeds: int | None) -> list[Experiment]:
    if every == bool(recipes):
        raise ConfigError("no recipe" if not every else "recipes and --all", "name recipes, or pass --all")
    return [read_experiment(path, form, seeds) for path in (recipes or sorted(RECIPES.glob("*.yaml")))]


def forecast(runs: list[Run], missing: list[Run], experiments: dict[str, Experiment], found: Results) -> str:
    """How many runs are missing of each experiment, and the hours they take by what is known."""
    lines, total, known = [], 0.0, set()
    for name, experiment in experiments.items():
        seconds = 0.0
        mine = [run for run in missing if run.experiment == name]
        for run in mine:
            key = (run.fingerprint, run.seed)
            seconds += 0 if key in known else found.seconds(run, experiment)
            known.add(key)
        total += seconds
        count = sum(run.experiment == name for run in runs)
        lines.append(
            f"{name}: {count - len(mine)} of {count} runs are finished, the others take {seconds / 3600:.2f} hours"
        )
    return "\n".join([*lines, f"forecast: {total / 3600:.2f} hours on {device_name(torch_device())}"])


def finish(run: Run, work: Path, device: torch.device, cifar: Path | None) -> tuple[dict[str, float], float]:
    """Prepare, train or go on, and evaluate: the run's metrics, and its seconds of training and evaluation."""
    prepared = prepare(run.data, work / "data", cifar)
    started = time.perf_counter()
    if run.kind == "cost":
        return step_seconds(run, prepared, device), time.perf_counter() - started
    config, model, training, before = trained(run, prepared, work, device)
    metrics = {**training, **evaluated(config, model, run, prepared, device)}
    return metrics, before + time.perf_counter() - started


def trained(
    run: Run, prepared: Prepared, work: Path, device: torch.device
) -> tuple[Config, Model, dict[str, float], float]:
    """The trained model, what its training tells, seconds of earlier sessions. No epochs: the model at its start."""
    if run.settings["epochs"] == 0:
        config = replace(run, settings={**run.settings, "epochs": 1}).config(prepared.store)
        return config, new_model(config, 1).to(device), {}, 0.0
    folder = work / "runs" / f"{run.fingerprint}-{run.seed}"
    before = sum(line["seconds"] for line in epochs_of(folder))
    train(run.config(prepared.store), folder, Place(0, 1, device))
    config, model = load_run(folder, device)
    epochs = epochs_of(folder)
    means = {
        name.replace("_", " "): sum(line[name] for line in epochs) / len(epochs)
        for name in ("images_per_second", "share_waiting_for_data")
    }
    return config, model, {"loss": epochs[-1]["mean_loss"], **means, **edges_of(config)}, before


def epochs_of(folder: Path) -> list[dict[str, float]]:
    """The lines of the finished epochs of a run, with their seconds."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line
    lines = [json.loads(line) for line in whole.splitlines()]
    steps = Counter(line["epoch"] for line in lines if "step" in line)
    return [
        {**line, "seconds": line["seconds_per_step"] * steps[line["epoch"]]} for line in lines if "mean_loss" in line
    ]


def edges_of(config: Config) -> dict[str, float]:
    """Of the batches of the first epoch: how many of its own k neighbours an image finds in its batch, on average."""
    samples = training_samples(config)
    edges = []
    for batch in EpochBatches(config, samples.graph, samples.nodes, Place(0, 1, torch.device("cpu"))):
        nodes = samples.nodes[batch]
        edges.append(np.isin(samples.graph.neighbors(nodes)[0], nodes).sum(1).mean())
    return {"edges per anchor": float(np.mean(edges))}


def evaluated(config: Config, model: Model, run: Run, prepared: Prepared, device: torch.device) -> dict[str, float]:
    """All probes of the frozen encoder, and zero-shot where the model has a text side on frozen embeddings."""
    labelled = prepared.labelled()
    features = {name: features_of(model.encoder, part.images, device) for name, part in labelled.items()}
    labels = {("train" if name == "probe" else name): part.labels for name, part in labelled.items()}
    main = run.data.main_label
    tests = {name: part for name, part in features.items() if name != "probe"}
    metrics = probes(features["probe"], tests, labels, main)
    if run.settings["epochs"] and config.reads_texts and config.text == "projection":
        assert model.text_projection is not None
        prompts = prepared.prompts()
        with torch.inference_mode():
            texts = model.text_projection(torch.stack(list(prompts.values())).to(device)).cpu()
            for name, part in tests.items():
                images = model.image_projection(part.to(device)).cpu()
                accuracy = zero_shot(images, texts, list(prompts), labels[name][main])
                metrics[f"zero-shot {main}" + (f" {name}" if name != "test" else "")] = accuracy
    return metrics


def _wanted(run: Run, experiments: list[Experiment], groups: str) -> bool:
    if not groups:
        return True
    names = next(experiment.groups for experiment in experiments if experiment.name == run.experiment)
    return run.group in (names[: int(groups)] if groups.isdigit() else groups.split(";"))


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name; or the processor's, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    try:
        app()
    except GraphbuildError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
