"""Experiments on a small store that graphbuild's own commands have made: what is run, resumed, kept and summed up."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from other_device import CPU, other_device
from scipy.stats import ttest_rel

from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments import cost, plan, runs, sources
from benchmarks.experiments.results import Results, plot, plot_differences, summary
from benchmarks.experiments.runs import claimed
from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.torch import graph_webdataset
from tests.e2e import forked

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.experiments", "run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SCENES = {
    "images": "scenes",
    "train": 120,
    "test": 60,
    "probe": 100,
    "pixels": 32,
    "k": 4,
    "usual_background": 0.6,
    "shard_size": 60,
}
RECIPE: dict[str, Any] = {
    "title": "Small",
    "data": {"scenes": SCENES},
    "base": {
        "method": "xsample",
        "backbone": "small",
        "width": 8,  # torch 2.13 corrupts the heap in a 1 x 1 convolution of 4 channels, on one thread
        "pixels": 32,
        "batch_size": 40,
        "epochs": 2,
        "held_out": 0,
    },
    "forms": {"reduced": {"seeds": 2}},
    "groups": [{"name": "first", "data": "scenes", "variants": {"SimCLR": {"method": "simclr"}, "X-Sample": {}}}],
    "measures": ["linear kind", "linear kind swapped"],
    "claims": [{"group": "first", "measure": "linear kind", "better": "X-Sample", "worse": "SimCLR", "deviations": 2}],
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def commands_are_forked() -> Iterator[None]:
    """What prepares the data runs graphbuild's commands, each of which would begin with its imports."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return forked.run(["graphbuild", *command[len(sources.GRAPHBUILD) :]], os.environ, 300)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sources, "subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data lies once for all tests: the first run prepares it."""
    return tmp_path_factory.mktemp("work")


def write(path: Path, recipe: dict[str, Any] = RECIPE, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump({**recipe, "base": {**recipe["base"], **settings}}, sort_keys=False))
    return path


def run(recipe: Path, work: Path, results: Path, **options: Any) -> None:
    given = {"recipes": [recipe], "every": False, "form": "reduced", "seeds": None, "cifar": None, "groups": ""}
    experiments.run(**{**given, "work": work, "results": results, "minutes": None, "processes": 1, **options})


def lines_of(results: Path, name: str = "small") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]


# --- running --------------------


@pytest.mark.slow
def test_each_run_has_one_line_and_a_rerun_adds_none(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path / "small.yaml")
    run(recipe, work, tmp_path / "results")
    first = lines_of(tmp_path / "results")
    assert [(line["seed"], line["variant"]) for line in first] == [
        (0, "SimCLR"), (0, "X-Sample"), (1, "SimCLR"), (1, "X-Sample"),
    ]  # fmt: skip
    for line in first:
        wanted = {
            "linear kind",
            "linear kind swapped",
            "knn kind",
            "5-shot kind",
            "linear background",
            "linear position",
        }
        assert wanted <= line["metrics"].keys()
        assert line["metrics"]["edges per anchor"] > 0
        assert line["seconds"] > 0
    assert len({line["fingerprint"] for line in first}) == 2
    capsys.readouterr()
    run(recipe, work, tmp_path / "results")
    assert lines_of(tmp_path / "results") == first
    assert "small: 4 of 4 runs are finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_setting_is_run_again_and_another_group_keeps_what_it_shares(work: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    recipe = write(tmp_path / "small.yaml", epochs=1)
    run(recipe, work, results, seeds=1)
    run(write(tmp_path / "small.yaml", epochs=1, tau=0.2), work, results, seeds=1)
    lines = lines_of(results)
    assert Counter(line["settings"].get("tau") for line in lines) == {None: 2, 0.2: 2}
    assert len({line["fingerprint"] for line in lines}) == 4
    # The same run under another name, in another experiment, is not trained twice.
    shared = {**RECIPE, "groups": [{"name": "g", "data": "scenes", "variants": {"other name": {"method": "simclr"}}}]}
    run(write(tmp_path / "shared.yaml", shared, epochs=1), work, results, seeds=1)
    assert not (results / "shared.jsonl").exists()
    experiments.write_summary([tmp_path / "shared.yaml"], False, "reduced", 1, results, plots=False)
    assert "1 of 1 runs are finished" in (results / "shared.md").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(work: Path, tmp_path: Path) -> None:
    groups = [{"name": "first", "data": "scenes", "variants": {"X-Sample": {}}}]
    recipe = write(tmp_path / "small.yaml", {**RECIPE, "groups": groups}, epochs=30)
    sources.prepare(sources.Data(**SCENES), work / "data")
    fingerprint = plan.read_experiment(recipe, "reduced").runs[0].fingerprint
    command = [*COMMAND, str(recipe), "--seeds", "1", "--work"]
    interrupted = [*command, str(work), "--results", str(tmp_path / "killed")]
    process = subprocess.Popen(interrupted, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = False
    deadline = time.monotonic() + 120
    while not begun:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
        begun = any(
            path.read_text().count("mean_loss") >= 3 for path in (work / "runs").glob(f"{fingerprint}-0/metrics.jsonl")
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "small.jsonl").exists()
    subprocess.run(interrupted, env=ENVIRONMENT, check=True, capture_output=True)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "data").symlink_to(work / "data")
    whole_run = [*command, str(tmp_path / "again"), "--results", str(tmp_path / "whole")]
    subprocess.run(whole_run, env=ENVIRONMENT, check=True, capture_output=True)
    killed, whole = lines_of(tmp_path / "killed")[0], lines_of(tmp_path / "whole")[0]
    assert killed["fingerprint"] == whole["fingerprint"]
    timing = {"images per second", "share waiting for data"}
    assert {name: value for name, value in killed["metrics"].items() if name not in timing} == {
        name: value for name, value in whole["metrics"].items() if name not in timing
    }
    metrics = work / "runs" / f"{killed['fingerprint']}-0" / "metrics.jsonl"
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines() if "mean_loss" in line]
    assert epochs == list(range(30))


@pytest.mark.slow
def test_a_text_side_is_tested_zero_shot_and_an_untrained_network_without_one(work: Path, tmp_path: Path) -> None:
    variants = {"CLIP": {"method": "clip"}, "untrained": {"epochs": 0}}
    recipe = {**RECIPE, "groups": [{"name": "g", "data": "scenes", "variants": variants}]}
    run(write(tmp_path / "small.yaml", recipe, epochs=1), work, tmp_path / "results", seeds=1)
    clip, untrained = (line["metrics"] for line in lines_of(tmp_path / "results"))
    assert clip.keys() - untrained.keys() == {
        "zero-shot kind", "zero-shot kind swapped", "loss", "edges per anchor", "images per second",
        "share waiting for data", "target's other view", "target's perplexity", "learned tau",
    }  # fmt: skip
    probed = {"kind", "colour", "texture", "count", "position", "size", "background"}
    assert {name for name in untrained if name.startswith("linear")} == {
        f"linear {label}{part}" for label in probed for part in ("", " swapped")
    }


@pytest.mark.slow
def test_a_failing_run_is_told_and_the_others_are_done(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [
        {"name": "g", "data": "scenes", "variants": {"too large": {"batch_size": 1000}, "SimCLR": {"method": "simclr"}}}
    ]
    recipe = write(tmp_path / "small.yaml", {**RECIPE, "groups": groups}, epochs=1)
    with pytest.raises(SystemExit, match="1 runs failed"):
        run(recipe, work, tmp_path / "results", seeds=1)
    assert "too large: seed 0 failed: 120 training samples do not fill a batch of 1000" in capsys.readouterr().out
    assert [line["variant"] for line in lines_of(tmp_path / "results")] == ["SimCLR"]


def test_a_fault_in_one_run_does_not_end_the_others(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(run: Any, *_: Any) -> Any:
        return {}[0] if run.variant == "SimCLR" else ({"linear kind": 0.5}, 1.0)

    monkeypatch.setattr("benchmarks.experiments.work.finish", faulty)
    with pytest.raises(SystemExit, match="1 runs failed"):
        run(write(tmp_path / "small.yaml"), work, tmp_path / "results", seeds=1)
    assert "SimCLR: seed 0 failed: KeyError: 0" in capsys.readouterr().out
    assert [line["variant"] for line in lines_of(tmp_path / "results")] == ["X-Sample"]


@pytest.mark.slow
def test_two_processes_share_a_work_folder_and_none_does_the_other_s_run(tmp_path: Path) -> None:
    recipe, results = write(tmp_path / "small.yaml", epochs=1), tmp_path / "results"
    command = [*COMMAND, recipe, "--work", tmp_path / "work"]
    both = [
        subprocess.Popen(
            [*command, "--results", results],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert Counter((line["variant"], line["seed"]) for line in lines_of(results)) == {
        (variant, seed): 1 for variant in ("SimCLR", "X-Sample") for seed in range(2)
    }
    done = [sum(line.startswith("[") for line in text.splitlines()) for text in told]
    assert sorted(done) in ([1, 3], [2, 2]), told


@pytest.mark.slow
def test_a_run_that_another_process_does_is_left_to_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path / "small.yaml", epochs=1)
    first = plan.read_experiment(recipe, "reduced", 1).runs[0]
    with claimed(first.name, work) as mine:
        assert mine
        run(recipe, work, tmp_path / "results", seeds=1)
    assert "1 runs were another process's: the same command does what that leaves" in capsys.readouterr().out
    assert [line["variant"] for line in lines_of(tmp_path / "results")] == ["X-Sample"]
    run(recipe, work, tmp_path / "results", seeds=1)
    assert [line["variant"] for line in lines_of(tmp_path / "results")] == ["X-Sample", "SimCLR"]


def test_where_a_file_system_has_no_locks_a_run_is_anybody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claimed("a run", tmp_path) as one, claimed("a run", tmp_path) as other:
        assert (one, other) == (True, True)


def test_no_run_begins_when_the_minutes_are_over(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path / "small.yaml"), work, tmp_path / "results", minutes=0)
    assert "4 runs were not begun within 0 minutes" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (1, 2)])
@pytest.mark.slow
def test_the_cost_of_the_graph_is_the_share_by_which_steps_are_longer(
    work: Path, tmp_path: Path, workers: int, processes: int
) -> None:
    groups = [{"name": "steps", "data": "scenes", "variants": {"steps": {"epochs": 4, "workers": workers}}}]
    run(
        write(tmp_path / "small.yaml", {**RECIPE, "kind": "cost", "groups": groups}),
        work,
        tmp_path,
        seeds=1,
        processes=processes,
    )
    found = lines_of(tmp_path)[0]["metrics"]
    for arm in ("fields", "targets"):
        assert found[f"{arm} overhead share"] == pytest.approx(found[f"{arm} ms"] / found["plain ms"] - 1, abs=1e-4)
    assert min(found[f"{arm} ms"] for arm in ("plain", "fields", "targets")) > 0.1


def test_readers_that_cannot_fill_a_batch_are_an_error_not_a_wait(work: Path) -> None:
    store = sources.prepare(sources.Data(**SCENES), work / "data").store
    tars = sorted(str(path) for path in (store / "shards").glob("*.tar"))
    with pytest.raises(ConfigError, match=r"(?s)no batch in a pass.*smaller batch_size"):
        next(cost.endless(cost.plain(tars, 10_000, 16), 0))


@pytest.mark.parametrize("kind", [pytest.param("training", marks=pytest.mark.slow), "cost"])
def test_a_run_on_another_device_has_the_metrics_of_the_cpu_s(work: Path, tmp_path: Path, kind: Any) -> None:
    settings = {"method": "clip_soft", "pixels": 32, "width": 8, "batch_size": 40, "epochs": 1, "held_out": 0}
    run = plan.Run("x", kind, "full", "group", "variant", 0, sources.Data(**SCENES), settings)
    sources.prepare(run.data, work / "data")
    found = {}
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(work / "data")
    with other_device() as device:
        found["there"], _ = runs.finish(run, tmp_path / "there", device, None)
    found["here"], _ = runs.finish(run, tmp_path / "here", CPU, None)
    assert found["there"].keys() == found["here"].keys()
    told = [name for name in found["here"] if "zero-shot" in name or "linear" in name or name == "loss"]
    assert bool(told) == (kind == "training")
    here, there = ([metrics[name] for name in told] for metrics in found.values())
    assert there == pytest.approx(here, abs=1e-4)


@pytest.mark.slow
def test_several_processes_do_each_run_once_and_tell_what_failed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"SimCLR": {"method": "simclr"}, "X-Sample": {}, "too large": {"batch_size": 1000}}
    groups = [{"name": "g", "data": "scenes", "variants": variants}]
    recipe = write(tmp_path / "small.yaml", {**RECIPE, "groups": groups}, epochs=1)
    timing = {**RECIPE, "kind": "cost", "groups": [{"name": "g", "data": "scenes", "variants": {"steps": {}}}]}
    with pytest.raises(SystemExit, match="2 runs failed"):
        run(recipe, work, tmp_path / "results", processes=2, recipes=[recipe, write(tmp_path / "t.yaml", timing)])
    assert Counter((line["variant"], line["seed"]) for line in lines_of(tmp_path / "results")) == {
        (variant, seed): 1 for variant in ("SimCLR", "X-Sample") for seed in range(2)
    }
    printed = capsys.readouterr().out
    assert printed.index("t: g: steps: seed 1  ") < printed.index("small: g")
    assert printed.count("too large: seed") == printed.count("do not fill a batch of 1000") == 2
    assert "epoch 1/1" not in printed
    assert "epoch 1/1" in "".join(path.read_text() for path in (work / "logs").glob("*.log"))


@pytest.mark.slow
def test_what_a_killed_process_was_doing_has_failed_and_is_done_by_the_same_command(tmp_path: Path) -> None:
    recipe, results = write(tmp_path / "small.yaml", epochs=60), tmp_path / "results"
    command = [*COMMAND, recipe, "--work", tmp_path / "work"]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, "--results", results, "--processes", "2"], **options)  # type: ignore[call-overload]
    while process.poll() is None and not list((tmp_path / "work" / "runs").glob("*/metrics.jsonl")):
        time.sleep(0.05)
    logs = sorted((tmp_path / "work" / "logs").glob("*.log"))
    os.kill(int(logs[0].stem), signal.SIGKILL)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 1, told
    assert "failed: a process died" in told
    assert f"{4 - len(lines_of(results)) if results.exists() else 4} runs failed" in told
    subprocess.run([*command, "--results", results], env=ENVIRONMENT, check=True, capture_output=True)
    assert len(lines_of(results)) == 4


# --- recipes --------------------


@pytest.mark.parametrize("form", ["reduced", "full"])
@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e", "f", "g", "i"])
def test_the_recipes_give_three_seeds_or_more_of_every_variant_and_valid_settings(name: str, form: str) -> None:
    experiment = plan.read_experiment(ROOT / "benchmarks" / "experiments" / f"{name}.yaml", form)
    counts = Counter((run.group, run.variant) for run in experiment.runs)
    assert min(counts.values()) >= 3
    seeds = {(group, counts[group, variant]) for group, variant in counts}
    assert len(seeds) == len(experiment.groups)  # as many of every variant of a group
    for run in experiment.runs:
        assert run.settings["epochs"] == 0 or run.config(Path("store")).held_out == 0
    for claim in experiment.claims:
        assert {(claim.group, claim.better), (claim.group, claim.worse)} <= counts.keys()


@pytest.mark.parametrize("name", ["a", "b", "c", "e", "f", "f_choices", "g", "i"])
def test_methods_that_are_compared_differ_in_what_is_compared_alone(name: str) -> None:
    """The same images, network, augmentation, steps and learning rate for every method of a group."""
    allowed = {"method", "text", "targets", "tau", "tau_s", "other_view", "batches", "random_share", "permute_graph"}
    allowed |= {"similar"}
    experiment = plan.read_experiment(ROOT / "benchmarks" / "experiments" / f"{name}.yaml", "reduced")
    for group in experiment.groups:
        settings = [run.settings for run in experiment.runs if run.group == group and run.settings["epochs"]]
        differing = {key for one in settings for key in one if one.get(key) != settings[0].get(key)}
        assert differing <= allowed, group


@pytest.mark.parametrize("name", ["a", "b", "c", "e"])
def test_methods_that_are_compared_get_as_many_temperatures_each(name: str) -> None:
    experiment = plan.read_experiment(ROOT / "benchmarks" / "experiments" / f"{name}.yaml", "reduced")
    for group in experiment.groups:
        tried: dict[str, set[tuple[float, float]]] = {}
        for run in experiment.runs:
            if run.group == group and run.settings["epochs"]:
                tried.setdefault(run.settings["method"], set()).add((run.settings["tau"], run.settings["tau_s"]))
        assert len({len(pairs) for pairs in tried.values()}) == 1, group


def test_first_groups_come_first_and_seeds_are_whole_comparisons(tmp_path: Path) -> None:
    two = [{**RECIPE["groups"][0], "name": name} for name in ("first", "second")]
    read = [
        plan.read_experiment(write(tmp_path / f"{name}.yaml", {**RECIPE, "groups": two}), "reduced", 2) for name in "ab"
    ]
    order = [(run.experiment, run.group, run.seed) for run in plan.in_turn(read)]
    assert order[::2] == [
        (name, group, seed) for group in ("first", "second") for name in "ab" for seed in (0, 1)
    ]  # fmt: skip


def test_a_recipe_that_puts_seeds_first_has_all_groups_of_a_seed_before_the_next_and_a_draw_for_each(
    tmp_path: Path,
) -> None:
    two = [{**RECIPE["groups"][0], "name": name} for name in ("first", "second")]
    data = {"scenes": {**SCENES, "images": "photos", "draw": "seed"}}
    read = plan.read_experiment(
        write(tmp_path / "a.yaml", {**RECIPE, "groups": two, "order": "seeds", "data": data}), "reduced", 2
    )
    assert [(run.seed, run.group, run.data.draw) for run in plan.in_turn([read])][::2] == [
        (seed, group, seed) for seed in (0, 1) for group in ("first", "second")
    ]
    early = dataclasses.replace(read, early=["X-Sample"])
    assert [run.variant for run in plan.in_turn([early])] == 4 * ["X-Sample"] + 4 * ["SimCLR"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bse": {}}, "unknown section: bse"),
        ({"base": {**RECIPE["base"], "learnin_rate": 1}}, "unknown setting of SimCLR: learnin_rate"),
        ({"data": {"scenes": {**SCENES, "pixel": 3}}}, "unknown setting of data scenes: pixel"),
        ({"groups": [{"name": "g", "data": "no", "variants": {"a": {}}}]}, "no data 'no'"),
        ({"forms": {"full": {}}}, "no form reduced"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**RECIPE, **change}))
    with pytest.raises(ConfigError, match=message):
        plan.read_experiment(tmp_path / "small.yaml", "reduced")


# --- results --------------------


def make_results(tmp_path: Path, values: dict[str, list[float]]) -> tuple[Any, Any]:
    """An experiment of three seeds, and results with these accuracies of its variants' first seeds."""
    experiment = plan.read_experiment(write(tmp_path / "small.yaml"), "reduced", 3)
    results = Results(tmp_path / "results")
    for run in experiment.runs:
        if run.seed < len(values[run.variant]):
            results.add(run, {"linear kind": values[run.variant][run.seed]}, 60.0, "a processor")
    return experiment, Results(tmp_path / "results")


def test_the_summary_has_mean_deviation_and_number_of_seeds_and_marks_what_is_missing(tmp_path: Path) -> None:
    values = {"SimCLR": [0.30, 0.33, 0.36], "X-Sample": [0.52, 0.56]}
    experiment, results = make_results(tmp_path, values)
    text = summary(experiment, results)
    assert f"| SimCLR | 33.0 ± {100 * statistics.stdev(values['SimCLR']):.1f} (3) |" in text
    assert f"| X-Sample | 54.0 ± {100 * statistics.stdev(values['X-Sample']):.1f} (**2 of 3**) |" in text
    assert "5 of 6 runs are finished" in text
    assert "**incomplete**" in text
    both = values["SimCLR"][:2], values["X-Sample"]
    apart = 0.225 / np.sqrt((np.var(both[0], ddof=1) + np.var(both[1], ddof=1)) / 2)
    assert f"+22.5 (+16.1 to +28.9), {apart:.1f} standard deviations, 2 seeds: **holds so far**" in text


@pytest.mark.parametrize(
    ("better", "told"),
    [
        ([0.35, 0.45, 0.56], "+5.3 (+3.9 to +6.8), 0.5 standard deviations, 3 seeds: **does not hold**"),  # of the two
        ([0.61, 0.70, 0.82], "+31.0 (+28.5 to +33.5), 3.0 standard deviations, 3 seeds: **holds**"),
        ([0.55, 0.40, 0.52], "+9.0 (-25.5 to +43.5), 1.0 standard deviations, 3 seeds: **open**"),
        ([0.25, 0.34, 0.45], "-5.3 (-6.8 to -3.9), -0.5 standard deviations, 3 seeds: **does not hold**"),
        ([0.35], "**open**, seeds finished: 1"),
    ],
)
def test_a_claim_holds_by_the_differences_of_its_seeds_and_its_deviations(
    tmp_path: Path, better: list[float], told: str
) -> None:
    noisy = {"SimCLR": [0.30, 0.40, 0.50], "X-Sample": better}
    experiment, results = make_results(tmp_path, noisy)
    assert told in summary(experiment, results)
    if len(better) == 3:
        expected = ttest_rel(better, noisy["SimCLR"]).confidence_interval(0.95)
        low, high = (f"{100 * value:+.1f}" for value in expected)
        assert f"({low} to {high})" in told


def test_a_line_that_a_crash_has_cut_is_run_again(tmp_path: Path) -> None:
    experiment, _ = make_results(tmp_path, {"SimCLR": [0.3], "X-Sample": []})
    path = tmp_path / "results" / "small.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    results = Results(tmp_path / "results")
    assert [line is not None for _, line in results.of_experiment(experiment)] == [True] + 5 * [False]
    results.add(experiment.runs[1], {"linear kind": 0.4}, 60.0, "a processor")
    assert path.read_bytes().startswith(whole)
    read = Results(tmp_path / "results").of_experiment(experiment)
    assert [line is not None for _, line in read] == 2 * [True] + 4 * [False]


def test_differences_from_a_baseline_are_those_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    values = {"SimCLR": [0.3, 0.42, 0.37], "X-Sample": [0.41, 0.5]}
    experiment, results = make_results(tmp_path, values)
    compared = dataclasses.replace(experiment, baselines=["SimCLR"], plot=["linear kind"])
    low, high = ttest_rel(values["X-Sample"], values["SimCLR"][:2]).confidence_interval()
    assert "2 seeds: **open so far**" in summary(experiment, results)  # of three
    text = summary(compared, results)
    assert f"| X-Sample | +9.5 ({100 * low:+.1f} to {100 * high:+.1f}) |" in text
    assert "less SimCLR" not in summary(experiment, results)
    assert plot_differences(compared, results, tmp_path / "less.png")
    assert (tmp_path / "less.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_differences(experiment, results, tmp_path / "none.png")


def test_plots_are_drawn_from_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    experiment, results = make_results(tmp_path, {"SimCLR": [0.3, 0.4], "X-Sample": [0.5]})
    assert plot(experiment, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    empty = Results(tmp_path / "nowhere")
    assert not plot(experiment, empty, tmp_path / "none.png")


# --- data --------------------


def test_the_share_of_usual_backgrounds_is_the_recipe_s() -> None:
    scenes = sources.scenes_of(sources.Data(**SCENES), 4000, 0)
    names = tuple(sources.BACKGROUNDS)
    usual = np.mean([names[sources.KINDS.index(scene.kind) % 5] == scene.background for scene in scenes])
    assert abs(usual - (0.6 + 0.4 / 5)) < 0.03


def test_exchanged_backgrounds_are_never_the_scene_s_own() -> None:
    assert all(sources.other_background(scene) != scene.background for scene in sources.make_scenes(500))


def test_the_swapped_images_are_the_test_images_on_other_backgrounds(work: Path) -> None:
    labelled = sources.prepare(sources.Data(**SCENES), work / "data").labelled()
    assert {name: len(part.images) for name, part in labelled.items()} == {"probe": 100, "test": 60, "swapped": 60}
    shown, swapped = dict(labelled["test"].labels), dict(labelled["swapped"].labels)
    assert all(one != other for one, other in zip(shown.pop("background"), swapped.pop("background"), strict=True))
    assert shown == swapped
    different = (labelled["test"].images.float() - labelled["swapped"].images.float()).abs().amax(1) > 24
    assert 0.3 < different.float().mean() < 0.97
    assert different[:, 1:5].float().mean() > 0.8  # the upper edge, where few shapes lie


def test_the_probes_own_images_are_the_first_that_train(work: Path) -> None:
    prepared = sources.prepare(sources.Data(**SCENES), work / "data")
    stream = graph_webdataset(
        str(prepared.store / "shards" / "*.tar"), batch_size=100, image_pixels=32, shuffle=0, extra=["json"]
    )
    batch = next(iter(stream))
    probe = prepared.labelled()["probe"]
    assert (batch["image"] == probe.images).all()
    assert [str(json["kind"]) for json in batch["json"]] == probe.labels["kind"]


@pytest.mark.slow
def test_an_encoder_of_words_finds_texts_alike_that_share_words(tmp_path: Path) -> None:
    def texts(store: Path) -> list[str]:
        return [
            text for path in sorted(store.glob("nodes/*.parquet")) for text in pq.read_table(path)["text"].to_pylist()
        ]

    for changes, d in (({"encoder": "words"}, sources.WORDS_DIM), ({"dim": 16}, 16)):
        prepared = sources.prepare(sources.Data(**{**SCENES, **changes}), tmp_path)
        graph = SampleGraph.open(str(prepared.store))
        assert graph.d == d
        assert {len(vector) for vector in prepared.prompts().values()} == {d}
        text = [set(text.lower().split()) for text in texts(prepared.store)]
        nearest = graph.neighbors(np.arange(len(graph)))[0][:, 0]
        shared = [len(text[node] & text[other]) for node, other in enumerate(nearest.tolist())]
        some = [len(text[node] & text[(node + 1) % len(text)]) for node in range(len(text))]
        assert np.mean(shared) > np.mean(some) + 0.5


def test_permuted_captions_are_the_same_ones_on_other_scenes(tmp_path: Path) -> None:
    captions = {}
    for permuted in (False, True):
        folder = tmp_path / str(permuted)
        (folder / "shards").mkdir(parents=True)
        sources._write_scenes(sources.Data(**{**SCENES, "permuted": permuted}), folder, folder / "shards")
        found = []
        for tar in sorted((folder / "shards").glob("*.tar")):
            with tarfile.open(tar) as archive:
                found += [archive.extractfile(m).read() for m in archive if m.name.endswith(".txt")]
        captions[permuted] = found
    assert Counter(captions[False]) == Counter(captions[True])
    assert np.mean([a == b for a, b in zip(captions[False], captions[True], strict=True)]) < 0.1
