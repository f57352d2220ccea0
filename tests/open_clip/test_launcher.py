"""`python -m graphbuild.open_clip` on the installed open_clip: references are open_clip alone, and plain loops."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip_train.main as stock
import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from PIL import Image

import graphbuild.open_clip as launcher
from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, GraphbuildError, InputError, ShardError
from graphbuild.graph.select.rules import select_store
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import CLIPLoss, SigLIPLoss, Targets, graph_webdataset

Train = Callable[..., dict[str, torch.Tensor]]
STEPS = 5  # 360 scenes in batches of 64


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the launcher's loss gave, one after the other."""
    found: list[float] = []
    forward = launcher.GraphLoss.forward

    def recorded(self: Any, *args: Any, **named: Any) -> Any:
        value = forward(self, *args, **named)
        found.append(value["contrastive_loss"].item())
        return value

    monkeypatch.setattr(launcher.GraphLoss, "forward", recorded)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_graph_it_is_open_clip_to_the_bit(train: Train, tmp_path: Path) -> None:
    lines = ["filepath\ttitle"]  # of files: open_clip's order of tars is another in each run
    for number in range(128):
        Image.new("RGB", (32, 32), (number, 255 - number, 7)).save(tmp_path / f"{number}.png")
        lines.append(f"{tmp_path}/{number}.png\tpicture {number}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    flags = ("--train-data", str(tmp_path / "list.csv"), "--dataset-type", "csv")
    assert_same(train(launcher.main, *flags, name="launched"), train(stock.main, *flags, name="stock"))


def reference(scenes: Path, loss_of: Callable[[dict[str, Any], Any], torch.Tensor], *, siglip: bool) -> list[float]:
    """The losses of a plain loop over the product's own loader, with open_clip's model, optimizer and schedule."""
    stock.random_seed(0, 0)
    given = {"init_logit_scale": np.log(10), "init_logit_bias": -10} if siglip else {}
    model, transform, _ = open_clip.create_model_and_transforms(
        "graphbuild-tiny", aug_cfg={"scale": (1.0, 1.0)}, output_dict=True, **given
    )
    tokenizer = open_clip.get_tokenizer("graphbuild-tiny")
    stock.random_seed(0, 0)
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for n, p in named if not any(p is other for other in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    schedule, found = cosine_lr(optimizer, 1e-3, 2, STEPS), []
    dataset = graph_webdataset(
        f"{scenes}/shards/{{00000..00002}}.tar", batch_size=64, shuffle=5000, partial=False, transform=transform
    )
    model.train()
    for step, batch in enumerate(dataset):
        schedule(step)
        optimizer.zero_grad()
        loss = loss_of(batch, model(batch["image"], tokenizer(batch["caption"])))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        found.append(loss.item())
    return found


KINDS = [
    ("dense", {"tau_s": 0.2}, ("--graph-tau-s", "0.2")),
    ("edges", {"tau_s": 0.2}, ("--graph-tau-s", "0.2")),
    ("mask", {"mask": 0.7}, ("--graph-threshold", "0.7")),
    ("positives", {"positive": 0.7}, ("--graph-threshold", "0.7")),
]
CASES = [(*kind, siglip) for kind in KINDS for siglip in (False, True)]
CASES += [("hard", {"hard": 0.7}, ("--graph-threshold", "0.7"), False)]
SHARE = ("--graph-tau-s", "calibrated", "--graph-other-view", "0.8")
CASES += [("edges", {"tau_s": "calibrated", "other_view": 0.8}, SHARE, False)]


@pytest.mark.parametrize(("kind", "options", "flags", "siglip"), CASES)
def test_the_loss_curve_is_that_of_a_plain_loop(
    train: Train, losses: list[float], scenes: Path, kind: str, options: Any, flags: Any, siglip: bool
) -> None:
    if siglip and kind in ("dense", "edges"):
        options, flags = {"threshold": 0.7}, ("--graph-threshold", "0.7")
    product = SigLIPLoss(**options) if siglip else CLIPLoss(**options)

    def loss_of(batch: dict[str, Any], out: Any) -> torch.Tensor:
        if siglip:
            product.scale, product.bias = out["logit_scale"], out["logit_bias"]
        else:
            product.tau = 1 / out["logit_scale"]
        fields = {name: value for name, value in batch.items() if kind != "edges" or name != "embedding"}
        return product(out["image_features"], out["text_features"], Targets.from_batch(fields, 0.2))

    given = ["--graph", str(scenes), "--graph-targets", kind, *flags, *(["--siglip"] if siglip else [])]
    train(launcher.main, *given)
    assert len(losses) == STEPS
    expected = reference(scenes, loss_of, siglip=siglip)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(losses)) == STEPS


def test_accumulated_batches_are_one_joint_batch(train: Train, losses: list[float], scenes: Path) -> None:
    train(launcher.main, "--graph", str(scenes), name="whole")
    whole = losses.copy()
    losses.clear()
    train(launcher.main, "--graph", str(scenes), "--batch-size", "16", "--accum-freq", "4", name="parts")
    assert len(losses) == 4 * STEPS
    np.testing.assert_allclose(np.array(losses).reshape(STEPS, 4), np.array(whole)[:, None].repeat(4, 1), rtol=2e-4)
    np.testing.assert_allclose(losses[:4], whole[:1] * 4, rtol=1e-5)


def test_a_resumed_run_ends_as_one_that_never_stopped(train: Train, scenes: Path, tmp_path: Path) -> None:
    given = ["--graph", str(scenes), "--epochs", "2", "--save-frequency", "1"]
    whole = train(launcher.main, *given, name="whole")
    first = tmp_path / "whole/checkpoints/epoch_1.pt"
    assert_same(whole, train(launcher.main, *given, "--resume", str(first), name="resumed"))


@pytest.mark.parametrize("batches", ["random", "window"])
def test_only_what_is_selected_is_trained_on(
    train: Train, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: str
) -> None:
    path, seen = tmp_path / "half.parquet", []
    select_store(Store(str(scenes)), "x", {"where": "row % 2 = 0"}, str(path))
    with_text = launcher._with_text

    def recorded(batch: dict[str, Any], tokenizer: Any) -> Any:
        seen.extend(batch["row"].tolist())
        return with_text(batch, tokenizer)

    monkeypatch.setattr(launcher, "_with_text", recorded)
    train(launcher.main, "--graph", str(scenes), "--graph-batches", batches, "--graph-selection", str(path))
    assert len(seen) == len(set(seen)) >= 64
    assert all(row % 2 == 0 for row in seen)


@pytest.mark.parametrize("batches", ["window", "walk"])
def test_neighbours_come_in_one_batch(
    train: Train, losses: list[float], scenes: Path, batches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, seen = SampleGraph.open(str(scenes)), {}
    found: list[np.ndarray[Any, Any]] = []
    targets = launcher._Batches.targets

    def recorded(self: launcher._Batches, samples: int) -> Targets:
        found.append(self._pending[0]["node"].numpy())
        return targets(self, samples)

    monkeypatch.setattr(launcher._Batches, "targets", recorded)
    for way in ("random", batches):
        found.clear()
        train(launcher.main, "--graph", str(scenes), "--graph-batches", way, name=way)
        seen[way] = np.mean([np.isin(graph.neighbors(nodes)[0], nodes).sum() / len(nodes) for nodes in found])
    assert seen[batches] > 1.5 * seen["random"]


def test_bfloat16_is_near_float32_and_open_clip_s_own_evaluations_run(
    train: Train, losses: list[float], scenes: Path, tmp_path: Path
) -> None:
    train(launcher.main, "--graph", str(scenes))
    exact = losses.copy()
    losses.clear()
    for number in range(1000):
        folder = tmp_path / f"imagenet/{number:04}"
        folder.mkdir(parents=True)
        if number < 3:
            Image.new("RGB", (40, 40), (number * 80, 9, 9)).save(folder / "0.png")
        else:
            (folder / "0.png").symlink_to(tmp_path / "imagenet/0000/0.png")
    train(
        launcher.main,
        *("--graph", str(scenes), "--precision", "amp_bf16", "--val-data", f"{scenes}/shards/00003.tar"),
        *("--imagenet-val", str(tmp_path / "imagenet"), "--zeroshot-frequency", "1"),
        name="half",
    )
    np.testing.assert_allclose(losses, exact, rtol=0.02)
    metrics = json.loads((tmp_path / "half/checkpoints/results.jsonl").read_text().splitlines()[-1])
    assert metrics["num_samples"] == 120
    assert 0 <= metrics["image_to_text_R@5"] <= 1
    assert "imagenet-zeroshot-val-top1" in metrics


RANK = """
import sys, torch, open_clip, open_clip_train.main as stock
import graphbuild.open_clip as launcher
config, out, *flags = sys.argv[1:]
open_clip.add_model_config(config)
forward, seen = launcher.GraphLoss.forward, []
def recorded(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
    value = forward(self, image_features, text_features, logit_scale, logit_bias, output_dict)
    names = ("embedding", "row", "node", "neighbors", "similarities", "background", "node_count")
    batch = {name: torch.cat([each[name] for each in self.batches._pending]) for name in names}
    features = {"image": image_features, "text": text_features, "scale": logit_scale, "bias": logit_bias}
    seen.append({k: v if v is None else v.detach().clone() for k, v in
                 {**features, **batch, "loss": value["contrastive_loss"]}.items()})
    return value
launcher.GraphLoss.forward = recorded
parallel = torch.nn.parallel.DistributedDataParallel  # open_clip names its device, which DDP refuses of a CPU
torch.nn.parallel.DistributedDataParallel = lambda model, device_ids=None, **named: parallel(model, **named)
assert launcher.main(flags) in (None, 0)
torch.save(seen, f"{out}.{torch.distributed.get_rank()}")
"""


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--local-loss", "--gather-with-grad"),
        ("--graph-tau-s", "calibrated"),
        ("--gather-with-grad", "--graph-targets", "mask", "--graph-threshold", "0.7"),
        ("--graph-targets", "hard"),
        ("--siglip",),
        ("--siglip", "--graph-targets", "mask", "--graph-threshold", "0.7", "--accum-freq", "2"),
    ],
)
def test_two_ranks_have_the_loss_of_one_process_on_their_joint_batch(
    scenes: Path, tiny: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    from tests.open_clip.conftest import FLAGS

    (tmp_path / "rank.py").write_text(RANK)
    given = [*FLAGS, "--batch-size", "32", "--dist-backend", "gloo", "--logs", str(tmp_path), "--name", "run"]
    given += ["--graph", str(scenes), "--train-data", f"{scenes}/shards/{{00000..00003}}.tar", *flags]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--", str(tmp_path / "rank.py"), str(tiny), str(tmp_path / "seen"), *given],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"seen.{rank}") for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) > 2
    for step in zip(*ranks, strict=True):
        features, fields = (
            ("image", "text", "embedding"),
            ("node", "neighbors", "similarities", "background", "node_count"),
        )
        joint = {name: torch.cat([each[name] for each in step]) for name in (*features, *fields)}
        joint |= {name: joint[name].double() for name in features}
        rows = torch.cat([each["row"] for each in step])
        assert len(set(rows.tolist())) == len(rows), "no sample is twice in a joint batch"
        scale, bias = step[0]["scale"].double(), step[0]["bias"]
        kind = {"mask": 0.7} if "mask" in flags else {"hard": 0.5} if "hard" in flags else {}
        product: Any
        if "--siglip" in flags:
            product = SigLIPLoss(threshold=None if kind else 0.5, **kind)
            product.scale, product.bias = scale, bias.double()
        else:
            tau_s = "calibrated" if "calibrated" in flags else 0.1
            product = CLIPLoss(tau_s=None if kind else tau_s, **kind)
            product.tau = 1 / scale
        expected = product(joint["image"], joint["text"], Targets.from_batch(joint)).item()
        if "--siglip" in flags or "--local-loss" in flags:
            assert np.mean([each["loss"].item() for each in step]) == pytest.approx(expected, rel=1e-5)
        else:  # each rank has the whole joint batch's
            assert [each["loss"].item() for each in step] == pytest.approx([expected] * 2, rel=1e-5)


def refused(main: Callable[..., Any], train: Train, *flags: str, name: str = "refused") -> GraphbuildError:
    with pytest.raises(GraphbuildError) as caught:
        train(main, *flags, name=name)
    return caught.value


def test_what_cannot_be_combined_is_refused_before_anything_is_made(train: Train, scenes: Path, tmp_path: Path) -> None:
    for flags, told in (
        (("--dataset-resampled",), "--dataset-resampled cannot be combined with --graph"),
        (("--model", "coca_ViT-B-32"), "--model coca_ViT-B-32 cannot be combined"),
        (("--dataset-type", "csv"), "--dataset-type csv cannot be combined"),
        (("--distill-model", "ViT-B-32"), "--distill-model ViT-B-32 cannot be combined"),
        (("--siglip", "--graph-targets", "hard"), "--graph-targets hard is of CLIP's loss"),
    ):
        assert told in str(refused(launcher.main, train, "--graph", str(scenes), *flags))
    assert "--graph-tau-s needs --graph" in str(refused(launcher.main, train, "--graph-tau-s", "0.3"))
    assert not (tmp_path / "refused").exists()
    # An epoch that is no step, and a store without a graph.
    error = refused(launcher.main, train, "--graph", str(scenes), "--accum-freq", "9", name="few")
    assert isinstance(error, ConfigError)
    assert "fewer than --accum-freq 9" in str(error)
    assert "has no finished graph" in str(refused(launcher.main, train, "--graph", str(tmp_path), name="none"))


def test_tars_of_another_graph_or_with_other_captions_are_refused_by_name(
    train: Train, scenes: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(scenes, other)
    given = ("--graph", str(other), "--train-data", f"{other}/shards/{{00000..00002}}.tar")
    tar = other / "shards/00001.tar"
    content = tar.read_bytes()
    place = content.index(b".txt") // 512 * 512 + 512  # the first caption, of which a letter is exchanged
    tar.write_bytes(content[:place] + b"#" + content[place + 1 :])
    error = refused(launcher.main, train, *given, name="changed")
    assert isinstance(error, InputError)
    assert f"{tar} has changed since it was embedded" in str(error)
    tar.write_bytes(content)
    train(launcher.main, *given, name="restored")
    tar.write_bytes(content + bytes(10240))
    error = refused(launcher.main, train, *given, name="longer")
    assert isinstance(error, ShardError)
    assert f"{tar} has" in str(error)
    tar.write_bytes(content)
    manifest = other / "manifest.json"
    found = json.loads(manifest.read_text())
    found["graph"]["fingerprint"] = "another"
    manifest.write_text(json.dumps(found))
    error = refused(launcher.main, train, *given, name="other graph")
    assert "was exported from another graph" in str(error) or "manifest.json" in str(error)


def test_a_store_without_tars_asks_for_them(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("caption\na dog\na cat\na tree\n")
    store = Store(str(tmp_path / "store"))
    recipe = Recipe(embed=Embed(captions=str(tmp_path / "list.csv")), index=Index(k=2))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, recipe, store, runner)
    with pytest.raises(ConfigError, match="name tars by --train-data"):
        launcher.main(["--graph", store.url, "--model", "graphbuild-tiny"])


def test_a_version_with_other_hooks_is_refused_with_those_that_work(
    train: Train, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "create_task", lambda args: None, raising=False)
    told = str(refused(launcher.main, train, "--graph", str(scenes)))
    assert "--graph works with open_clip_torch 3.0.0 to 3.3.0" in told
    monkeypatch.delattr(stock, "create_task")
    monkeypatch.setattr(stock, "get_data", lambda args: None)
    assert "open_clip_train.main.get_data(args) is not" in str(refused(launcher.main, train, "--graph", str(scenes)))


def test_it_leaves_open_clip_as_it_was(train: Train, scenes: Path) -> None:
    before = stock.get_data, stock.create_loss
    train(launcher.main, "--graph", str(scenes), "--graph-captions", "draw")
    assert (stock.get_data, stock.create_loss) == before
