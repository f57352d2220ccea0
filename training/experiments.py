"""Experiments as recipes: `run` does what is missing of them, `summary` makes tables and plots of what is there.

    python training/experiments.py run pipelines/experiments/b.yaml
    python training/experiments.py run --all --cifar FOLDER
    python training/experiments.py summary --all

A finished run is a line in benchmarks/results/experiments/; an interrupted one goes on from its checkpoint. With --all
the first group of every experiment comes before the second of any. What a run is, and costs: lab/.
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
from lab.forecast import Forecast
from lab.plan import Experiment, Form, Run, in_turn, read_experiment
from lab.results import Results, plot, summary
from lab.runs import device_name, torch_device
from lab.work import Work, outcomes

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
    processes: Annotated[int, typer.Option(min=1, help="runs at once; several fill a GPU, or a core each")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the forecast")] = False,
) -> None:
    """Do the runs that have no result yet."""
    began = time.time()
    experiments = chosen(recipes, every, form, seeds)
    found = Results(results)
    runs = [run for run in in_turn(experiments) if _wanted(run, experiments, groups)]
    missing = [run for run in runs if found.of(run) is None]
    forecast = Forecast(found, torch_device())
    once: dict[str, Run] = {}  # experiments may share a run
    for one in missing:
        once.setdefault(one.name, one)
    expected = {name: forecast.seconds(one) for name, one in once.items()}
    print(told(runs, missing, expected, processes), flush=True)
    if dry_run:
        return
    until = None if minutes is None else began + 60 * minutes
    states: Counter[str] = Counter()
    to_do = [(one, expected[name]) for name, one in once.items()]
    for number, outcome in enumerate(outcomes(Work(work, results, cifar, until), to_do, processes), 1):
        one = outcome.run
        states[outcome.state] += 1
        if outcome.state == "done":
            spent = f"{outcome.seconds:.0f} s (forecast {expected[one.name]:.0f} s)"
            print(f"[{number}/{len(to_do)}] {one}  {outcome.told}  {spent}", flush=True)
        elif outcome.state == "failed":
            print(f"{one} failed: {outcome.told}", flush=True)
    if states["elsewhere"]:
        print(f"{states['elsewhere']} runs were another process's: the same command does what that leaves")
    if states["late"]:
        print(f"{states['late']} runs would have ended after {minutes:g} minutes: the same command goes on with them")
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
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.md").write_text(text)
        print(text)


def chosen(recipes: list[Path] | None, every: bool, form: Form, seeds: int | None) -> list[Experiment]:
    if every == bool(recipes):
        raise ConfigError("no recipe" if not every else "recipes and --all", "name recipes, or pass --all")
    return [read_experiment(path, form, seeds) for path in (recipes or sorted(RECIPES.glob("*.yaml")))]


def told(runs: list[Run], missing: list[Run], expected: dict[str, float], processes: int) -> str:
    """How many runs are missing of each experiment, and how long they take; a shared run counts in the first alone."""
    lines, known = [], set()
    for name, count in Counter(run.experiment for run in runs).items():
        mine = [run.name for run in missing if run.experiment == name]
        seconds = sum(expected[one] for one in mine if one not in known)
        known.update(mine)
        lines.append(f"{name}: {count - len(mine)} of {count} runs are finished, the others take {_time(seconds)}")
    total = sum(expected.values())
    at_best = f", at best {_time(total / processes)} with {processes}" if processes > 1 else ""
    return "\n".join([*lines, f"forecast: {_time(total)} of one process{at_best}, on {device_name(torch_device())}"])


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


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
