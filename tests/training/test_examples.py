"""The examples for other trainers, and the code that docs/how-to/trainers.md prints, on a real store."""

from __future__ import annotations

import copy
import importlib
import io
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphbuild import SampleGraph
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import encode_jpeg, make_scenes, render
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import graph_webdataset
from graphbuild.torch.sentence_transformers import columns

EXAMPLES = Path(__file__).parents[2] / "training" / "examples"
SCENES, TARS, K, BATCH = 180, 2, 8, 40
STEPS_OF_TWO_EPOCHS = 6  # an epoch has 180 // 40 = 4 batches


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tars of drawn scenes, brought through embed, index and export."""
    folder = tmp_path_factory.mktemp("examples") / "store"
    (folder / "shards").mkdir(parents=True)
    scenes = make_scenes(SCENES)
    for shard in range(TARS):
        with tarfile.open(folder / "shards" / f"{shard:05d}.tar", "w") as archive:
            for number in range(shard, SCENES, TARS):
                text = f"{caption(scenes[number])}, picture {number}".encode()
                for extension, content in (("jpg", encode_jpeg(render(scenes[number], 32))), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:05d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    recipe = Recipe(embed=Embed(shards=f"{folder}/shards/*.tar"), index=Index(k=K))
    opened = Store(str(folder))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index", "export"):
            run_verb(verb, recipe, opened, runner)
    return str(folder)


@pytest.fixture
def tars(store: str) -> str:
    return f"{store}/shards/*.tar"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example by name, as `python training/examples/NAME.py` finds its neighbours."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def printed_losses(capsys: pytest.CaptureFixture[str]) -> list[float]:
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(step) for _, step, _, _ in lines] == list(range(len(lines)))
    return [float(loss) for *_, loss in lines]


def changed(before: nn.Module, after: nn.Module) -> bool:
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert old.keys() == new.keys()
    return all(bool(torch.isfinite(new[name]).all()) and not torch.equal(old[name], new[name]) for name in old)


def embeddings_of(store: str, nodes: torch.Tensor) -> np.ndarray:
    """Unit embeddings of nodes in float64, from the store's files."""
    stored = np.concatenate([np.load(path) for path in sorted(Path(store).glob("nodes/*.npy"))]).astype(np.float64)
    chosen = stored[nodes.numpy()]
    return chosen / np.linalg.norm(chosen, axis=1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.fixture
def plain_losses(example: Any, tars: str, capsys: pytest.CaptureFixture[str]) -> list[float]:
    plain, encoder = example("plain_pytorch"), example("small").encoder
    torch.manual_seed(0)
    untrained = encoder()
    assert changed(untrained, plain.main(tars, STEPS_OF_TWO_EPOCHS, BATCH))
    return printed_losses(capsys)


def test_a_plain_loop_trains_with_the_x_sample_loss(
    example: Any, store: str, tars: str, plain_losses: list[float]
) -> None:
    small = example("small")
    random.seed(0)
    torch.manual_seed(0)
    model = small.encoder()
    batch = next(iter(graph_webdataset(tars, batch_size=BATCH, transform=small.two_views, partial=False)))
    with torch.no_grad():
        z = model(torch.cat(batch["image"])).double().numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    t = embeddings_of(store, batch["node"])
    cosines = t @ t.T
    np.fill_diagonal(cosines, 1)
    others = ~np.eye(2 * BATCH, dtype=bool)
    target = np.exp(np.tile(cosines, (2, 2)) / 0.1) * others
    target /= target.sum(axis=1, keepdims=True)
    logits = np.where(others, z @ z.T / 0.1, -1e9)
    expected = -(target * np.where(others, log_softmax(logits), 0)).sum(axis=1).mean()
    assert len(plain_losses) == STEPS_OF_TWO_EPOCHS
    assert plain_losses[0] == pytest.approx(expected, abs=0.002)  # the sidecar's embeddings are int8
    assert np.isfinite(plain_losses).all()


@pytest.mark.parametrize(("name", "package"), [("lightning_module", "lightning"), ("hf_trainer", "accelerate")])
def test_other_trainers_take_the_same_steps_as_the_plain_loop(
    example: Any,
    tars: str,
    plain_losses: list[float],
    name: str,
    package: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over two epochs: same batches, views, weights and losses."""
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    example(name).main(tars, STEPS_OF_TWO_EPOCHS, BATCH)
    assert printed_losses(capsys) == pytest.approx(plain_losses, abs=2e-3)


def test_the_sentence_transformers_example_trains(
    example: Any, store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    texts = columns(store, SampleGraph.open(store))
    torch.manual_seed(0)
    untrained = example("small").small_model(texts["anchor"])
    assert changed(untrained, example("sentence_transformers_batches").main(store, 3, BATCH))
    losses = printed_losses(capsys)
    assert len(losses) == 3
    assert np.isfinite(losses).all()


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "trainers.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
NEEDS = {
    "Lightning": ["lightning"],
    "transformers": ["accelerate"],
    "sentence-transformers": ["datasets", "accelerate"],
}


def test_every_trainer_has_its_code() -> None:
    assert {name: part.count("```") // 2 for name, part in SECTIONS.items()} == dict.fromkeys(SECTIONS, 1)
    assert "python -m graphbuild.open_clip" in SECTIONS["open_clip"]
    assert {*NEEDS, "plain PyTorch", "open_clip", "Neighbours as second views"} == set(SECTIONS)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "open_clip"])
def test_the_printed_code_trains_as_it_is_printed(
    example: Any, store: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder where the store is at out/, with `encoder`, `two_views` and `model` of the examples' small.py."""
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    code = re.search(r"```python\n(.*?)```", SECTIONS[name], re.S)
    assert code is not None
    (tmp_path / "out").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    small, texts = example("small"), columns(store, SampleGraph.open(store))
    torch.manual_seed(0)
    models = [small.encoder(), small.small_model(texts["anchor"])]
    before = copy.deepcopy(models)
    given = {"encoder": models[0], "model": models[1], "two_views": small.two_views, "view": small.one_view}
    exec(compile(code[1], f"{PAGE} {name}", "exec"), given)
    assert [changed(*pair) for pair in zip(before, models, strict=True)].count(True) == 1
