"""The trainer as a user starts it, on a store of drawn scenes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import objective
import pytest
import torch
from config import Config, Place, read_command_line
from data import EpochBatches, split_shards, training_samples
from records import Checkpoint
from torch import nn
from train import ASKED_TO_END, load_run, main, new_model, train, two_views, update

from graphbuild.errors import ConfigError, StageError
from graphbuild.torch import GraphDataset, Targets

SCRIPT = Path(__file__).parents[2] / "training" / "train.py"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that share cores with others wait for each other
HERE = Place(0, 1, torch.device("cpu"))
METHODS = ("simclr", "supcon", "xsample", "clip", "clip_soft")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EPOCHS, BATCH, STEPS = 6, 60, 6  # three train shards of 120


pytestmark = pytest.mark.usefixtures("one_thread")


def command(store: str, run_dir: Path, **more: object) -> list[str]:
    options = {"run_dir": run_dir, "epochs": EPOCHS, "batch_size": BATCH, "pixels": 32, "learning_rate": 0.01, **more}
    flags = [str(text) for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    return [str(SCRIPT), store, *flags]


def start(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def start_here(arguments: list[str]) -> str:
    """As `start`, without the seconds that a process needs for its imports; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        main(arguments[1:])
    return told.getvalue()


@contextlib.contextmanager
def asked_to_end(when: Callable[[], bool]) -> Iterator[None]:
    """This process is sent SIGTERM as soon as that is so, and takes it as before afterwards."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.01):
            if when():
                return os.kill(os.getpid(), signal.SIGTERM)

    thread, before = threading.Thread(target=ask), signal.getsignal(signal.SIGTERM)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
        ASKED_TO_END.clear()


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir) if "step" in line]


@pytest.fixture(scope="module")
def whole_run(scenes_store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; output.txt holds what it printed."""
    run_dir = tmp_path_factory.mktemp("whole")
    with (run_dir / "output.txt").open("w") as output, contextlib.redirect_stdout(output):
        main(command(scenes_store, run_dir, labels="colour,background")[1:])
    return run_dir


def test_the_loss_falls_and_the_probe_beats_chance_and_an_untrained_encoder(whole_run: Path) -> None:
    losses = [line["loss"] for line in steps(whole_run)]
    assert len(losses) == EPOCHS * STEPS
    assert np.mean(losses[-STEPS:]) < np.mean(losses[:STEPS]) - 0.2
    rows = {line["label"]: line for line in lines(whole_run) if "label" in line}
    assert set(rows) == {"colour", "background"}
    assert rows["background"]["linear trained"] > rows["background"]["chance"] + 0.3
    trained, untrained = (
        np.mean([row[f"{name} {encoder}"] for row in rows.values() for name in ("knn", "linear")])
        for encoder in ("trained", "untrained")
    )
    assert trained > untrained + 0.03
    assert "linear untrained" in (whole_run / "output.txt").read_text()  # the final table
    assert json.loads((whole_run / "config.json").read_text())["epochs"] == EPOCHS


def test_each_epoch_has_a_line_of_its_speed_and_its_wait_for_data(whole_run: Path) -> None:
    epochs = [line for line in lines(whole_run) if "images_per_second" in line]
    assert [line["epoch"] for line in epochs] == list(range(EPOCHS))
    for line in epochs:
        of_epoch = [step["loss"] for step in steps(whole_run) if step["epoch"] == line["epoch"]]
        assert line["mean_loss"] == pytest.approx(np.mean(of_epoch))
        assert line["images_per_second"] * line["seconds_per_step"] == pytest.approx(BATCH)
        assert 0 < line["share_waiting_for_data"] < 1


def test_the_rate_of_each_step_rises_over_the_warm_up_and_falls_by_half_a_cosine(whole_run: Path) -> None:
    total, warm = EPOCHS * STEPS, 0.05
    expected = [0.01 * 0.01]  # the first step has a hundredth of the rate, not none
    expected += [0.01 * min(i / total / warm, 1) for i in range(1, 2)]
    expected += [0.005 * (1 + math.cos(math.pi * (i / total - warm) / (1 - warm))) for i in range(2, total)]
    assert [line["learning_rate"] for line in steps(whole_run)] == pytest.approx(expected)


def test_the_script_can_be_read_at_a_sitting() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 400


@pytest.mark.slow  # the next test stops one between two steps
def test_a_killed_run_goes_on_with_the_same_losses(scenes_store: str, whole_run: Path, tmp_path: Path) -> None:
    arguments = command(scenes_store, tmp_path, labels="colour,background", checkpoint_steps=4)
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=ONE_THREAD)
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and '"epoch": 2, "step": 3' in path.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(steps(tmp_path)) < len(steps(whole_run))
    output = start_here(arguments)
    assert f"epoch {EPOCHS}/{EPOCHS}" in output
    assert f"epoch 1/{EPOCHS}" not in output
    assert steps(tmp_path) == steps(whole_run)
    assert [line for line in lines(tmp_path) if "label" in line] == [
        line for line in lines(whole_run) if "label" in line
    ]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("launcher", [[], pytest.param(LAUNCHER, marks=pytest.mark.slow)], ids=["one", "two ranks"])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_of_its_last_step(
    scenes_store: str, whole_run: Path, tmp_path: Path, launcher: list[str]
) -> None:
    arguments = [*launcher, *command(scenes_store, tmp_path)]
    path, began = tmp_path / "metrics.jsonl", '"epoch": 1, "step": 1'
    if launcher:
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=ONE_THREAD)
        while process.poll() is None and not (path.exists() and began in path.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    else:
        with asked_to_end(lambda: path.exists() and began in path.read_text()), pytest.raises(SystemExit) as ended:
            start_here(arguments)
        assert ended.value.code == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    last = steps(tmp_path)[-1]
    taken = (last["epoch"], last["step"] + 1) if last["step"] + 1 < STEPS else (last["epoch"] + 1, 0)
    assert (state["epoch"], state["step"]) == taken
    assert taken < (EPOCHS, 0)
    if not launcher:
        start_here(arguments)
    else:
        start(arguments)
        whole_run = tmp_path / "whole"
        start([*launcher, *command(scenes_store, whole_run)])
    assert steps(tmp_path) == steps(whole_run)


def small(store: str, **more: Any) -> Config:
    options = {"pixels": 16, "width": 8, "samples": 160, "batch_size": 40, "epochs": 2, "seed": 5}
    return Config(store=store, **options | more)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "simclr"},
        {"method": "supcon", "optimizer": "lars", "learning_rate": 0.1},
        {"method": "xsample", "batches": "window", "targets": "sketch"},
        {"method": "xsample", "batches": "communities", "random_share": 0.5, "chunk": 16},
        {"method": "clip", "text": "tower"},
        {"method": "clip_soft", "cache": False, "precision": "bfloat16"},
        {"method": "clip", "precision": "float16", "chunk": 16},
        {"full_crops": True, "cache": False, "hue": 0.2, "blur": 0.5, "solarise": 0.2},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_run_interrupted_within_an_epoch_ends_as_one_that_was_not(
    scenes_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    config = small(scenes_store, checkpoint_steps=3, **options)
    train(config, tmp_path / "whole", HERE)
    save = Checkpoint.save

    def save_and_stop(checkpoint: Checkpoint, epoch: int, step: int, losses: list[float]) -> None:
        save(checkpoint, epoch, step, losses)
        if step == 2:  # of epoch 1: the sixth step of the run
            raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", HERE)
    assert len(steps(tmp_path / "cut")) == 6
    train(config, tmp_path / "cut", HERE)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    assert len(steps(tmp_path / "whole")) == 8
    means = [[line["mean_loss"] for line in lines(tmp_path / name) if "mean_loss" in line] for name in ("cut", "whole")]
    assert means[0] == means[1]
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("model", "objective"):
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part])


@pytest.mark.parametrize(
    ("checkpoint_steps", "saved"),
    [(0, [(1, 0), (2, 0), (3, 0)]), (8, [(2, 0), (3, 0)]), (6, [(1, 2), (3, 0)]), (100, [(3, 0)])],
)
def test_checkpoints_come_when_asked_for_and_at_the_end(
    scenes_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_steps: int,
    saved: list[tuple[int, int]],
) -> None:
    """Of three epochs of four steps: the next epoch and step of each checkpoint."""
    found = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, epoch, step, losses: found.append((epoch, step)))
    train(small(scenes_store, epochs=3, checkpoint_steps=checkpoint_steps), tmp_path, HERE)
    assert found == saved


def test_every_method_begins_with_the_same_weights_and_sees_the_same_views(scenes_store: str) -> None:
    batch = training_samples(small(scenes_store)).__getitems__(list(range(8)))
    first, *others = [small(scenes_store, method=method) for method in METHODS]
    weights, views = new_model(first, 384).state_dict(), two_views(batch, first, HERE, 1, 2)
    for config in others:
        model = new_model(config, 384).state_dict()
        assert all(torch.equal(model[name], value) for name, value in weights.items())
        assert all(map(torch.equal, two_views(batch, config, HERE, 1, 2), views))


def test_a_seed_decides_the_weights_the_order_and_the_views_but_not_the_samples(scenes_store: str) -> None:
    one, two = (small(scenes_store, seed=seed) for seed in (1, 2))
    samples = training_samples(one)
    assert np.array_equal(samples.nodes, training_samples(two).nodes)
    weights = [new_model(config, 1).encoder.layers[0][0].weight for config in (one, two)]
    assert not torch.equal(*weights)
    for way in ("random", "window"):
        orders = [
            list(EpochBatches(small(scenes_store, seed=seed, batches=way), samples.graph, samples.nodes, HERE))
            for seed in (1, 2)
        ]
        assert orders[0] != orders[1]
    batch = samples.__getitems__(list(range(8)))
    views = [
        two_views(batch, config, HERE, epoch, step)[0]
        for config, epoch, step in ((one, 0, 0), (two, 0, 0), (one, 1, 0), (one, 0, 1))
    ]
    assert not any(torch.equal(views[0], other) for other in views[1:])


def test_bfloat16_is_near_float32_and_keeps_weights_in_it(scenes_store: str, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        train(small(scenes_store, epochs=1, precision=precision), tmp_path / precision, HERE)
    exact, rounded = ([line["loss"] for line in steps(tmp_path / name)] for name in ("float32", "bfloat16"))
    assert exact != rounded
    assert rounded[0] == pytest.approx(exact[0], rel=0.005)  # of the same weights
    assert rounded == pytest.approx(exact, rel=0.03)  # Adam makes steps of rounding errors, others on other processors
    _, model = load_run(tmp_path / "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_clip_learns_its_temperature(scenes_store: str, tmp_path: Path) -> None:
    train(small(scenes_store, epochs=1, method="clip"), tmp_path, HERE)
    (log_scale,) = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["objective"].values()
    assert 0 < abs(log_scale.item() - math.log(1 / 0.1)) < 0.1
    told = [line["tau"] for line in steps(tmp_path)]
    assert told[-1] == pytest.approx(math.exp(-log_scale.item()))
    assert len(set(told)) == len(told)
    assert {(line["other_view"], line["perplexity"]) for line in steps(tmp_path)} == {(1, 1)}


def test_a_run_tells_how_much_of_its_targets_the_other_view_has(scenes_store: str, tmp_path: Path) -> None:
    for name, options in (("fixed", {"tau_s": 0.2}), ("calibrated", {"other_view": 0.8})):
        train(small(scenes_store, epochs=1, method="xsample", **options), tmp_path / name, HERE)
    (fixed, calibrated) = ([line["other_view"] for line in steps(tmp_path / name)] for name in ("fixed", "calibrated"))
    assert max(fixed) < 0.5
    assert sum(calibrated) / len(calibrated) == pytest.approx(0.8, abs=0.05)
    assert all(1 < line["perplexity"] < 2 * 32 for name in ("fixed", "calibrated") for line in steps(tmp_path / name))


@pytest.mark.parametrize(("method", "text"), [("xsample", "projection"), ("clip", "projection"), ("clip", "tower")])
def test_a_run_is_read_back_with_its_projections(scenes_store: str, tmp_path: Path, method: Any, text: Any) -> None:
    config = small(scenes_store, epochs=1, method=method, text=text)
    encoder = train(config, tmp_path, HERE).eval()
    read, model = load_run(tmp_path)
    assert read == config.resolved(HERE.device)
    images = torch.randn(3, 3, 16, 16)
    features = model.encoder(images)
    assert torch.equal(features, encoder(images))
    assert features.shape == (3, encoder.features)
    assert model.image_projection(features).shape == (3, 128)
    if method == "xsample":
        assert model.text_projection is None
    else:
        given = torch.randn(3, 384) if text == "projection" else torch.randint(0, 99, (3, 7))
        assert model.text_projection(given).shape == (3, 128)


@pytest.mark.slow  # test_norms.py has both ranks without a launcher
def test_two_ranks_have_the_losses_of_one_process_with_the_joint_batch(scenes_store: str, tmp_path: Path) -> None:
    """Under a real torchrun. Adam turns the rounding of near-zero gradients into steps, which small ones keep small."""
    options = {"epochs": 1, "learning_rate": 1e-5, "batches": "window", "pixels": 16}
    main(command(scenes_store, tmp_path / "one", **options)[1:])
    start([*LAUNCHER, *command(scenes_store, tmp_path / "two", **options)])
    one, two = ([line["loss"] for line in steps(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == STEPS
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
def test_two_ranks_killed_within_an_epoch_go_on_with_the_same_losses(scenes_store: str, tmp_path: Path) -> None:
    options = {"method": "clip_soft", "pixels": 16, "epochs": 40, "checkpoint_steps": 4}
    start([*LAUNCHER, *command(scenes_store, tmp_path / "whole", **options)])
    arguments = [sys.executable, *LAUNCHER, *command(scenes_store, tmp_path / "cut", **options)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    path = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and '"epoch": 2, "step": 3' in path.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # the launcher ends its ranks
    process.wait()
    done = len(steps(tmp_path / "cut"))
    assert 2 * STEPS < done < 40 * STEPS
    checkpoint = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    start(arguments[1:])
    assert [line["loss"] for line in steps(tmp_path / "cut")] == [line["loss"] for line in steps(tmp_path / "whole")]
    assert checkpoint["epoch"] < 40


def test_a_file_of_options_stands_between_the_defaults_and_the_command_line(scenes_store: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"store: {scenes_store}\nepochs: 1\npixels: 16\nlearning_rate: 2e-3\nseed: 1\nflip: false\n")
    main(["--config", str(file), "--seed", "2", "--run-dir", str(tmp_path / "run")])
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {
        "epochs": 1,
        "learning_rate": 0.002,
        "seed": 2,
        "flip": False,
        "batch_size": Config(store="").batch_size,
    }
    assert written | expected == written


def test_mistakes_are_explained(scenes_store: str, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("epoch: 3\n")
    (tmp_path / "text.yaml").write_text("epochs: many\n")
    for arguments, message in (
        ([scenes_store, "--batch-size", "5000"], "do not fill a batch of 5000"),
        ([scenes_store, "--held-out", "4"], "leave|left to train on"),
        ([scenes_store, "--labels", "kind", "--held-out", "0"], "set --held-out to 1"),
        ([scenes_store, "--labels", "weight", "--epochs", "1", "--pixels", "16"], "no label 'weight'"),
        ([scenes_store, "--samples", "0"], "share in"),
        ([scenes_store, "--learning-rate", "-0.1"], "learning_rate = -0.1.*use 0 or more"),
        ([scenes_store, "--learning-rate", "nan"], "learning_rate = nan"),
        ([scenes_store, "--weight-decay", "-2"], "weight_decay = -2.0.*use 0 or more"),
        ([scenes_store, "--hue", "0.6"], "hue = 0.6.*use 0 to 0.5"),
        ([scenes_store, "--full-crops"], "full_crops with a cache.*--no-cache"),
        ([scenes_store, "--jitter", "5"], "jitter = 5.0.*use 0 to 1"),
        ([scenes_store, "--width", "7"], "width = 7.*use 8 or more"),
        ([scenes_store, "--train-shards", "shards/*.tar"], "00003.tar is held out, and among the train shards"),
        ([scenes_store, "--samples", "361"], "361 of 360"),
        ([scenes_store, "--pixels", "999999"], "pass --no-cache"),
        ([scenes_store, "--backbone", "large"], "use small, resnet50, vit or timm:NAME"),
        ([scenes_store, "--permute-graph", "--method", "simclr"], "permute_graph with method 'simclr'"),
        ([scenes_store, "--config", str(tmp_path / "typo.yaml")], "no option epoch"),
        ([scenes_store, "--config", str(tmp_path / "text.yaml")], "epochs = 'many'"),
        ([scenes_store, "--config", str(tmp_path / "none.yaml")], "none.yaml cannot be read"),
        ([], "name a finished graphbuild store"),
    ):
        with pytest.raises(SystemExit, match=f"(?s){message}"):
            main([*arguments, "--run-dir", str(tmp_path / "run")])
    assert not list(tmp_path.glob("run/*"))  # labels too are looked at before the training
    with pytest.raises(ConfigError, match="no checkpoint"):
        load_run(tmp_path)


def test_a_run_of_other_settings_is_not_continued(scenes_store: str, tmp_path: Path) -> None:
    train(small(scenes_store, epochs=1), tmp_path, HERE)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="trained with other tau_s, seed"):
        train(small(scenes_store, epochs=1, seed=1, tau_s=0.2), tmp_path, HERE)
    train(small(scenes_store, epochs=1, checkpoint_steps=1, cache=False), tmp_path, HERE)  # changes no number
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_is_not_continued_on_another_graph(scenes_store: str, tmp_path: Path) -> None:
    config = small(scenes_store, epochs=1)
    train(config, tmp_path, HERE)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["graph"] == json.loads((Path(scenes_store) / "manifest.json").read_text())["graph"]["fingerprint"]
    torch.save({**state, "graph": "of another encoder"}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match=r"another graph than .* has now"):
        train(config, tmp_path, HERE)


@pytest.mark.slow  # two ranks of a launcher import for as long as others test
def test_ranks_that_do_not_see_the_same_checkpoint_do_not_begin(scenes_store: str, tmp_path: Path) -> None:
    train(small(scenes_store, epochs=1), tmp_path / "0", HERE)  # rank 1 has a folder of its own, and nothing in it
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport train\n"
        f"train.main([*sys.argv[1:], '--run-dir', {str(tmp_path)!r} + '/' + os.environ['RANK']])\n"
    )
    options = {"pixels": 16, "width": 8, "samples": 160, "batch_size": 40, "epochs": 1, "seed": 5}
    flags = [str(text) for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = subprocess.run(
        [sys.executable, *LAUNCHER, str(script), scenes_store, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=ONE_THREAD,
    )
    assert done.returncode != 0
    assert "epoch = 0 on rank 1, 1 on rank 0" in done.stderr
    assert "--run-dir, a folder they share" in done.stderr


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_weights_kept(
    scenes_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = objective.Objective.forward
    monkeypatch.setattr(objective.Objective, "forward", lambda *args, **more: broken(*args, **more) * math.nan)
    config = small(scenes_store, epochs=1, learning_rate=0.02)
    with pytest.raises(StageError, match=r"(?s)not finite, at learning rate 0.0002.*lower --learning-rate"):
        train(config, tmp_path, HERE)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_the_device_and_the_optimizer_decide_is_written_down() -> None:
    adamw = Config(store="").resolved(torch.device("cpu"))
    assert (adamw.precision, adamw.learning_rate, adamw.weight_decay) == ("float32", 3e-3, 1e-2)
    assert (adamw.warm_up, adamw.clip_norm) == (0.05, 1)
    lars = Config(store="", optimizer="lars", batch_size=1024, epochs=200).resolved(torch.device("cpu"))
    assert (lars.learning_rate, lars.weight_decay) == (pytest.approx(0.3 * 1024 / 256), 1e-6)  # SimCLR, appendix B.6
    assert (lars.warm_up * 200, lars.clip_norm) == (10, 0)
    assert Config(store="", optimizer="lars", epochs=8).resolved(torch.device("cpu")).warm_up == 0.1
    chosen = {"learning_rate": 0.1, "weight_decay": 0.0, "warm_up": 0.0, "clip_norm": 3.0, "precision": "bfloat16"}
    config = Config(store="", optimizer="lars", **chosen)  # type: ignore[arg-type]
    assert config.resolved(torch.device("cpu")) == config


def test_the_published_protocol_is_a_file_of_options(tmp_path: Path) -> None:
    config, _, _ = read_command_line(["store", "--config", str(SCRIPT.parent / "protocol.yaml")])
    found = config.resolved(HERE.device)
    simclr = {"learning_rate": 1.2, "weight_decay": 1e-6, "warm_up": 0.1, "optimizer": "lars", "backbone": "resnet50"}
    xsample = {"method": "xsample", "tau": 0.1, "tau_s": 0.1, "batch_size": 1024, "epochs": 100, "pixels": 224}
    views = {"area_min": 0.08, "hue": 0.2, "jitter": 0.8, "jitter_share": 0.8, "grayscale": 0.2, "blur": 0.5}
    wanted = simclr | xsample | views | {"full_crops": True}
    assert {name: getattr(found, name) for name in wanted} == wanted


def updated(scale: float, **options: Any) -> tuple[nn.Module, nn.Module, torch.amp.GradScaler, float]:
    """A linear model before and after one step on a loss of 100 times the sum, with the norm of the gradient."""
    config = Config(store="", **{"optimizer": "lars", "learning_rate": 0.1, **options}).resolved(HERE.device)
    model, loss = nn.Linear(3, 2, bias=False), objective.Objective(config)
    before = copy.deepcopy(model)
    loss.forward = lambda *outputs, targets: 100 * sum(output.sum() for output in outputs)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=config.precision == "float16")
    alone = Alone(model)
    _, norm = update(alone, loss, optimizer, scaler, [torch.eye(3)], Targets(), config, HERE, 0)
    return before, model, scaler, norm


class Alone(nn.Module):
    """A model whose outputs are a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(x),)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("clip_norm", "length"), [(0.0, 100 * math.sqrt(6)), (2.0, 2.0), (1e4, 100 * math.sqrt(6))])
def test_gradients_are_scaled_down_to_clip_norm(clip_norm: float, length: float, precision: str) -> None:
    """The gradient of 100 times the sum of all weights is 100 everywhere; float16 scales the loss, not the step."""
    before, after, _, norm = updated(4.0, clip_norm=clip_norm, precision=precision)
    assert norm == pytest.approx(100 * math.sqrt(6))
    step = (before.weight - after.weight).detach() / 0.1
    assert torch.allclose(step, torch.full((2, 3), length / math.sqrt(6)), rtol=1e-4)


def test_a_step_that_overflows_float16_is_left_out_and_halves_the_scale() -> None:
    before, after, scaler, norm = updated(2.0**125, precision="float16")  # 100 times this is beyond float32
    assert norm == math.inf or math.isnan(norm)
    assert torch.equal(before.weight, after.weight)
    assert scaler.get_scale() == 2.0**124


def test_float16_is_near_float32_and_finds_its_scale(scenes_store: str, tmp_path: Path) -> None:
    """Small steps, so that the first ones, which overflow and are left out, make little difference."""
    for precision in ("float32", "float16"):
        config = small(scenes_store, epochs=1, precision=precision, learning_rate=1e-4)
        train(config, tmp_path / precision, HERE)
    exact, rounded = (steps(tmp_path / name) for name in ("float32", "float16"))
    assert [line["loss"] for line in rounded] == pytest.approx([line["loss"] for line in exact], rel=0.015)
    assert rounded[0]["loss"] != exact[0]["loss"]
    scale = 2.0**16
    for line, other in zip(rounded, exact, strict=True):
        scale = scale if "gradient_norm" in line else scale / 2
        assert line["loss_scale"] == scale
        assert line.get("gradient_norm", other["gradient_norm"]) == pytest.approx(other["gradient_norm"], rel=0.05)
    assert "gradient_norm" in rounded[-1]  # of the gradient itself, not of the scaled one
    assert scale < 2.0**16
    assert "loss_scale" not in exact[0]
    saved = torch.load(tmp_path / "float16/checkpoint.pt", weights_only=True)["scaler"]
    assert saved["scale"] == scale


def test_a_run_of_an_older_trainer_goes_on_and_one_of_a_newer_is_refused(scenes_store: str, tmp_path: Path) -> None:
    """An older one stored no option that came later; these have defaults that change nothing."""
    config = small(scenes_store, epochs=1)
    train(config, tmp_path, HERE)
    whole = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    later = ("jitter_share", "hue", "blur", "solarise", "full_crops", "clip_norm")
    older = {name: value for name, value in whole["config"].items() if name not in later}
    state = {name: value for name, value in whole.items() if name != "scaler"}
    torch.save({**state, "config": older}, tmp_path / "checkpoint.pt")
    train(config, tmp_path, HERE)
    assert load_run(tmp_path)[0] == config.resolved(HERE.device)
    with pytest.raises(ConfigError, match="trained with other blur"):
        train(small(scenes_store, epochs=1, blur=0.5), tmp_path, HERE)
    torch.save({**state, "config": {**older, "wings": 2}}, tmp_path / "checkpoint.pt")
    for read in (lambda: train(config, tmp_path, HERE), lambda: load_run(tmp_path)):
        with pytest.raises(ConfigError, match="trained with unknown wings"):
            read()


def test_shards_are_split_into_train_and_held_out(scenes_store: str) -> None:
    names = [[Path(tar).name for tar in part] for part in split_shards(small(scenes_store, held_out=2))]
    assert names == [["00000.tar", "00001.tar"], ["00002.tar", "00003.tar"]]
    chosen, _ = split_shards(small(scenes_store, train_shards="shards/{00001..00003}.tar", held_out=0))
    assert len(GraphDataset(chosen)) == 360


def test_tars_that_lie_elsewhere_are_found_by_the_store_s_recipe(scenes_store: str, tmp_path: Path) -> None:
    """The same store without tars in it: sidecars only, as `graphbuild embed --shards` leaves it."""
    other = tmp_path / "store"
    shutil.copytree(scenes_store, other, ignore=shutil.ignore_patterns("*.tar"))
    here, there = (training_samples(small(store)) for store in (scenes_store, str(other)))
    assert np.array_equal(here.nodes, there.nodes)
    assert torch.equal(here.__getitems__([0, 159])["image"], there.__getitems__([0, 159])["image"])
    main(command(str(other), tmp_path / "run", epochs=1, pixels=16, labels="background")[1:])
    assert [line["label"] for line in lines(tmp_path / "run") if "label" in line] == ["background"]
    config = small(str(other), train_shards=f"{scenes_store}/shards/{{00000..00001}}.tar")
    assert len(training_samples(config)) == 160


@pytest.mark.slow
@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_metrics_go_where_log_says(
    scenes_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    pytest.importorskip(log)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small(scenes_store, epochs=1, log=log, checkpoint_steps=2)
    save = Checkpoint.save

    def save_and_stop(checkpoint: Checkpoint, epoch: int, step: int, losses: list[float]) -> None:
        save(checkpoint, epoch, step, losses)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path, HERE)
    train(config, tmp_path, HERE)
    if log == "wandb":  # one run there too
        runs = {path.stem for path in tmp_path.glob("wandb/offline-run*/run*.wandb")}
        assert runs == {f"run-{(tmp_path / 'wandb.id').read_text()}"}
    assert list(tmp_path.glob("tensorboard/events*" if log == "tensorboard" else "wandb/offline-run*/run*.wandb"))
