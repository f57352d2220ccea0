"""Results of experiments: one JSON line a finished run, and what the lines say together: tables, claims, plots.

`benchmarks/results/experiments/NAME.jsonl` grows by whole lines; NAME.md and NAME.png are made from it.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from benchmarks.experiments.plan import Claim, Experiment, Run
from graphbuild.errors import InputError

Line = dict[str, Any]
SHARES = ("linear", "knn", "shot", "zero-shot", "recall", "reciprocal")  # measures in percent


class Results:
    """The finished runs in `folder`, of all experiments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: dict[str, list[Line]] = {path.stem: _read(path) for path in sorted(folder.glob("*.jsonl"))}

    def of(self, run: Run) -> Line | None:
        """The line of a run, in its own experiment or, where two experiments share it, in another."""
        for lines in (self.lines.get(run.experiment, []), *self.lines.values()):
            for line in lines:
                if (line["fingerprint"], line["seed"]) == (run.fingerprint, run.seed):
                    return line
        return None

    def of_experiment(self, experiment: Experiment) -> list[tuple[Run, Line | None]]:
        return [(run, self.of(run)) for run in experiment.runs]

    def add(self, run: Run, metrics: dict[str, float], seconds: float, device: str) -> None:
        """Append a run's line; on the disk before this returns."""
        line = {
            "experiment": run.experiment,
            "form": run.form,
            "group": run.group,
            "variant": run.variant,
            "seed": run.seed,
            "fingerprint": run.fingerprint,
            "seconds": round(seconds, 1),
            "device": device,
            "metrics": {name: round(value, 6) for name, value in metrics.items()},
            "settings": run.settings,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{run.experiment}.jsonl"
        content = path.read_bytes() if path.exists() else b""
        if not content.endswith(b"\n"):
            path.write_bytes(_whole(content))
        with path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.lines.setdefault(run.experiment, []).append(line)


def _whole(content: bytes) -> bytes:
    """Without a last line that a crash has cut."""
    return content[: content.rfind(b"\n") + 1]


def _read(path: Path) -> list[Line]:
    lines = []
    for number, text in enumerate(_whole(path.read_bytes()).splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise InputError(
                f"{path}, line {number} is not JSON ({error})", "remove the line: its run is repeated"
            ) from None
    return lines


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def collect(pairs: Sequence[tuple[Run, Line | None]]) -> dict[str, dict[str, list[Line | None]]]:
    """Of each group, of each variant, the line of each seed."""
    found: dict[str, dict[str, list[Line | None]]] = {}
    for run, line in pairs:
        found.setdefault(run.group, {}).setdefault(run.variant, []).append(line)
    return found


def values_of(lines: Sequence[Line | None], measure: str) -> list[float]:
    return [line["metrics"][measure] for line in lines if line is not None and measure in line["metrics"]]


def summary(experiment: Experiment, results: Results) -> str:
    """The experiment's results as markdown: a table a group, then each claim with its verdict."""
    pairs = results.of_experiment(experiment)
    groups = collect(pairs)
    done = [line for _, line in pairs if line is not None]
    text = [f"# {experiment.title}", "", experiment.question, ""]
    devices = "; ".join(sorted({line["device"] for line in done}))
    hours = sum(line["seconds"] for line in done) / 3600
    text.append(
        f"Form: {experiment.form}. {len(done)} of {len(pairs)} runs are finished"
        + (f" ({hours:.2f} hours on {devices})" if done else "")
        + (". " if len(done) == len(pairs) else ": **incomplete**. ")
        + "Mean ± standard deviation over seeds (number of seeds); accuracies in percent."
    )
    for group, variants in groups.items():
        measures = [m for m in experiment.measures if any(values_of(lines, m) for lines in variants.values())]
        text += ["", f"## {group}", ""]
        if not measures:
            text.append("Not run.")
            continue
        text += [f"| | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
        for variant, lines in variants.items():
            cells = [_cell(values_of(lines, measure), measure, len(lines)) for measure in measures]
            text.append(f"| {variant} | {' | '.join(cells)} |")
        text += _differences(experiment, variants)
    if experiment.claims:
        text += ["", "## What was expected", "", "Mean of the differences seed by seed, and its 95% interval.", ""]
        text += [f"- {verdict(claim, groups)}" for claim in experiment.claims]
    return "\n".join(text) + "\n"


def _differences(experiment: Experiment, variants: dict[str, list[Line | None]]) -> list[str]:
    """A table of each variant less each baseline, by paired runs, in the measures of the recipe's plot."""
    compared = [(measure, one) for measure in experiment.plot for one in experiment.baselines if one in variants]
    rows = []
    for variant, lines in variants.items():
        found = [(measure, paired(lines, variants[one], measure)) for measure, one in compared]
        told = [[_shown(value, measure, "+") for value in less or ()] for measure, less in found]
        cells = [f"{less[0]} ({less[1]} to {less[2]})" if less else "" for less in told]
        rows += [f"| {variant} | {' | '.join(cells)} |"] if any(cells) else []
    if not rows:
        return []
    names = [f"{measure}, less {one}" for measure, one in compared]
    head = "Differences of paired runs: mean (95% interval)."
    return ["", head, "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows]


def paired(
    lines: Sequence[Line | None], others: Sequence[Line | None], measure: str
) -> tuple[float, float, float] | None:
    """Mean and 95% interval of the differences of runs of the same seed; None of fewer than two, or of itself."""
    pairs = [values_of(pair, measure) for pair in zip(lines, others, strict=False)]
    differences = [pair[0] - pair[1] for pair in pairs if len(pair) == 2]
    return interval(differences) if len(differences) > 1 and lines is not others else None


def verdict(claim: Claim, groups: dict[str, dict[str, list[Line | None]]]) -> str:
    """A claim against the results of the seeds that both sides have: it holds, does not hold, or is open.

    Runs of one seed share weights, order and views, so their differences are what is looked at: the claim is open where
    the 95% interval of their mean (Student's t) includes the margin. Standard deviations are the root of the mean of
    both variances over seeds.
    """
    name = f"{claim.group}, {claim.measure}: {claim.better} against {claim.worse}"
    sides = [groups.get(claim.group, {}).get(side, []) for side in (claim.better, claim.worse)]
    pairs = [pair for pair in zip(*sides, strict=False) if len(values_of(pair, claim.measure)) == 2]
    wanted = f"expected at least {_shown(claim.margin, claim.measure, '+')}"
    if claim.deviations:
        wanted += f" and {claim.deviations:g} standard deviations"
    if len(pairs) < 2:
        return f"{name}: **open**, seeds finished: {len(pairs)} ({wanted})"
    better, worse = (values_of(side, claim.measure) for side in zip(*pairs, strict=True))
    mean, low, high = interval([one - other for one, other in zip(better, worse, strict=True)])
    apart = mean / max(((statistics.variance(better) + statistics.variance(worse)) / 2) ** 0.5, 1e-9)
    state = "open" if low <= claim.margin <= high else "does not hold"
    if low > claim.margin and (not claim.deviations or apart > claim.deviations):
        state = "holds"
    if len(pairs) < len(sides[0]):
        state += " so far"
    shown = (_shown(value, claim.measure, "+") for value in (mean, low, high))
    return "{}: {} ({} to {}), {:.1f} standard deviations, {} seeds: **{}** ({})".format(
        name, *shown, apart, len(pairs), state, wanted
    )


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95% interval by Student's t."""
    from scipy.stats import t

    mean, deviation = spread(differences)
    reach = float(t.ppf(0.975, len(differences) - 1)) * deviation / len(differences) ** 0.5
    return mean, mean - reach, mean + reach


def is_share(measure: str) -> bool:
    return any(word in measure for word in SHARES) or measure.endswith("share")


def _shown(value: float, measure: str, sign: str = "") -> str:
    if is_share(measure):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.4g}" if abs(value) < 100 else f"{value:{sign},.0f}"


def _cell(values: list[float], measure: str, seeds: int) -> str:
    if not values:
        return ""
    mean, deviation = spread(values)
    count = f"({len(values)})" if len(values) == seeds else f"(**{len(values)} of {seeds}**)"
    around = f" ± {_shown(deviation, measure)}" if len(values) > 1 else ""
    return f"{_shown(mean, measure)}{around} {count}"


def plot(experiment: Experiment, results: Results, path: Path) -> bool:
    """Bars with error bars, a panel for each measure in the recipe's `plot`; False where there is nothing yet."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("plots need matplotlib", "pip install matplotlib, or pass --no-plots") from None
    mpl.use("agg")
    import matplotlib.pyplot as plt

    groups = collect(results.of_experiment(experiment))
    shown = {
        measure: {
            group: {variant: values for variant, lines in variants.items() if (values := values_of(lines, measure))}
            for group, variants in groups.items()
        }
        for measure in experiment.plot
    }
    shown = {measure: {group: bars for group, bars in by.items() if bars} for measure, by in shown.items()}
    shown = {measure: by for measure, by in shown.items() if by}
    if not shown:
        return False
    names = list(dict.fromkeys(variant for by in shown.values() for bars in by.values() for variant in bars))
    colours = dict(zip(names, plt.get_cmap("tab20")(range(len(names))), strict=True))
    figure, panels = plt.subplots(len(shown), 1, figsize=(8, 3.1 * len(shown)), squeeze=False)
    for axes, (measure, by) in zip(panels[:, 0], shown.items(), strict=True):
        scale, at, ticks = 100 if is_share(measure) else 1, 0.0, []
        for bars in by.values():
            start = at
            for variant, values in bars.items():
                mean, deviation = spread([scale * value for value in values])
                axes.bar(at, mean, 0.9, yerr=deviation, capsize=3, color=colours[variant])
                at += 1
            ticks.append((start + at - 1) / 2)
            at += 0.8
        axes.set_xticks(ticks, [fill(group, 80 // len(by)) for group in by], fontsize=8)
        axes.set_ylabel(measure + (" (%)" if scale == 100 else ""), fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    panels[0, 0].set_title(f"{experiment.title} ({experiment.form} form)", fontsize=10)
    figure.legend(handles, names, fontsize=8, ncols=4, loc="lower center")
    rows = -(-len(names) // 4)
    figure.tight_layout(rect=(0, (0.15 + 0.18 * rows) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_differences(experiment: Experiment, results: Results, path: Path) -> bool:
    """Each variant less each baseline, by paired runs, with 95% intervals; a panel a baseline, the first measure."""
    groups, measure = collect(results.of_experiment(experiment)), experiment.plot[0]
    found = {
        one: {
            group: {
                variant: less for variant, lines in variants.items() if (less := paired(lines, variants[one], measure))
            }
            for group, variants in groups.items()
            if one in variants
        }
        for one in experiment.baselines
    }
    found = {one: {group: rows for group, rows in by.items() if rows} for one, by in found.items()}
    found = {one: by for one, by in found.items() if by}
    if not found:
        return False
    import matplotlib.pyplot as plt

    scale = 100 if is_share(measure) else 1
    names = list(dict.fromkeys(variant for by in found.values() for rows in by.values() for variant in rows))
    orders = list(dict.fromkeys(group for by in found.values() for group in by))
    height = 0.32 * len(names) + 1.6
    figure, panels = plt.subplots(1, len(found), figsize=(5.2 * len(found) + 2, height), squeeze=False, sharey=True)
    for axes, (one, by) in zip(panels[0], found.items(), strict=True):
        for place, group in enumerate(orders):
            rows = by.get(group, {})
            at = [names.index(name) + 0.7 * ((place + 0.5) / len(orders) - 0.5) for name in rows]
            ends = np.array(list(rows.values())).reshape(-1, 3).T * scale
            reach = [ends[0] - ends[1], ends[2] - ends[0]]
            axes.errorbar(ends[0], at, xerr=reach, fmt="o", markersize=3, linewidth=1, color=f"C{place}", label=group)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel(f"{measure}{' (%)' if scale == 100 else ''}, less {one}", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="lower center")
    figure.suptitle(f"{experiment.title}: paired runs, 95% intervals", fontsize=9)
    figure.tight_layout(rect=(0, (0.1 + 0.16 * -(-len(orders) // 4)) / height, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
