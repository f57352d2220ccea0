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
from pathlib import Path
from typing import Annotated

# On shared cores OpenMP threads that wait must not spin: under load this is four to eight times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from lab.plan import Experiment, Form, Run, in_turn, read_experiment
from lab.results import Results, plot, summary
from lab.runs import claimed, device_name, finish, torch_device

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
    device, begun, failed, left, elsewhere = torch_device(), time.perf_counter(), [], [], []
    for number, one in enumerate(missing, 1):
        with claimed(one.name, work) as mine:
            if not mine:
                elsewhere.append(one)
                continue
            found = Results(results)  # another experiment or process may have finished the same run
            if found.of(one) is not None:
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
    if elsewhere:
        print(f"{len(elsewhere)} runs were another process's: the same command does what that leaves")
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
