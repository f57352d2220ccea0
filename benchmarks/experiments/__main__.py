"""Experiments as recipes: `run` does what is missing of them, `summary` makes tables and plots of what is there.

    python -m benchmarks.experiments run benchmarks/experiments/b.yaml
    python -m benchmarks.experiments run --all --cifar FOLDER
    python -m benchmarks.experiments summary --all

in the project's root. A finished run is a line in benchmarks/results/experiments/; an interrupted one goes on from its
checkpoint. With --all the first group of every experiment comes before the second of any. What a run costs: runs.py.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

# On shared cores OpenMP threads that wait must not spin: under load this is four to eight times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from benchmarks.experiments.plan import Experiment, Form, Run, in_turn, read_experiment
from benchmarks.experiments.results import Results, plot, plot_differences, summary
from benchmarks.experiments.work import Work, outcomes
from graphbuild.errors import ConfigError, GraphbuildError

RECIPES = Path(__file__).parent
RESULTS = RECIPES.parent / "results" / "experiments"
FormOption = Annotated[Form, typer.Option(help="reduced: overnight on two cores; full: for a GPU")]
RecipesArgument = Annotated[list[Path] | None, typer.Argument(metavar="[RECIPE]...", show_default=False)]
AllOption = Annotated[bool, typer.Option("--all", help="every recipe in benchmarks/experiments")]
SeedsOption = Annotated[int | None, typer.Option(min=1, help="seeds of each variant  [default: the recipe's]")]
ResultsOption = Annotated[Path, typer.Option("--results", help="folder of the results")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@app.command()
def run(
    recipes: RecipesArgument = None,
    every: AllOption = False,
    form: FormOption = "reduced",
    seeds: SeedsOption = None,
    cifar: Annotated[
        Path | None,
        typer.Option(envvar="CIFAR_FOLDER", help="folder of cifar_train.tar.xz and cifar_test.tar.xz"),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(envvar="CAPTIONS_FILE", help="captions of photos: parquet with the column caption")
    ] = None,
    icons: Annotated[
        Path | None, typer.Option(envvar="ICONS_FILE", help="the tar that `npm pack @iconify/json` makes")
    ] = None,
    work: Annotated[Path, typer.Option(help="folder for data and runs")] = Path("runs/experiments"),
    results: ResultsOption = RESULTS,
    groups: Annotated[str, typer.Option(help="only the first N groups of each recipe, or those named: a;b")] = "",
    minutes: Annotated[float | None, typer.Option(min=0, help="begin no run after so long")] = None,
    processes: Annotated[int, typer.Option(min=1, help="runs at once; several fill a GPU, or a core each")] = 1,
) -> None:
    """Do the runs that have no result yet."""
    began = time.time()
    experiments = chosen(recipes, every, form, seeds)
    found = Results(results)
    runs = [run for run in in_turn(experiments) if _wanted(run, experiments, groups)]
    shared: dict[str, Run] = {}  # groups and experiments may share a run
    for one in runs:
        if found.of(one) is None:
            shared.setdefault(one.name, one)
    missing = list(shared.values())
    for name, count in Counter(run.experiment for run in runs).items():
        finished = sum(run.experiment == name and found.of(run) is not None for run in runs)
        print(f"{name}: {finished} of {count} runs are finished", flush=True)
    until = None if minutes is None else began + 60 * minutes
    states: Counter[str] = Counter()
    for number, outcome in enumerate(
        outcomes(Work(work, results, cifar, until, captions, icons), missing, processes), 1
    ):
        one = outcome.run
        states[outcome.state] += 1
        if outcome.state == "done":
            print(f"[{number}/{len(missing)}] {one}  {outcome.told}  {outcome.seconds:.0f} s", flush=True)
        elif outcome.state == "failed":
            print(f"{one} failed: {outcome.told}", flush=True)
    if states["elsewhere"]:
        print(f"{states['elsewhere']} runs were another process's: the same command does what that leaves")
    if states["late"]:
        print(f"{states['late']} runs were not begun within {minutes:g} minutes: the same command goes on with them")
    if states["failed"]:
        raise SystemExit(f"{states['failed']} runs failed, see above; the same command tries them again")


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
            if plot_differences(experiment, found, results / f"{name}_less.png"):
                text += f"\n![Differences of paired runs]({name}_less.png)\n"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.md").write_text(text)
        print(text)


def chosen(recipes: list[Path] | None, every: bool, form: Form, seeds: int | None) -> list[Experiment]:
    if every == bool(recipes):
        raise ConfigError("no recipe" if not every else "recipes and --all", "name recipes, or pass --all")
    return [read_experiment(path, form, seeds) for path in (recipes or sorted(RECIPES.glob("*.yaml")))]


def _wanted(run: Run, experiments: list[Experiment], groups: str) -> bool:
    if not groups:
        return True
    names = next(experiment.groups for experiment in experiments if experiment.name == run.experiment)
    return run.group in (names[: int(groups)] if groups.isdigit() else groups.split(";"))


def main() -> None:
    try:
        app()
    except GraphbuildError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
