"""The examples for other trainers, on a real store: what they train with, against formulas written out in float64."""

from __future__ import annotations

import importlib
import io
import random
import tarfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from graphbuild import SampleGraph
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import encode_jpeg, make_scenes, render
from graphbuild.job.steps import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import graph_webdataset

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


def clip_loss(image: Any, text: Any, scale: Any, cosines: np.ndarray, tau_s: float) -> Any:
    """Soft CLIP in float64: the mean over both directions of the cross entropy with softmax(cosines / tau_s)."""
    image, text = (z / z.norm(dim=1, keepdim=True) for z in (image, text))
    target = torch.softmax(torch.from_numpy(cosines) / tau_s, dim=1)
    logits = scale * image @ text.T
    return -(target * (torch.log_softmax(logits, 1) + torch.log_softmax(logits.T, 1))).sum(1).mean() / 2


def test_the_open_clip_loss_is_clip_with_the_captions_softmax_for_target(example: Any, store: str, tars: str) -> None:
    module = example("open_clip_soft_targets")
    loss = module.SoftTargetClipLoss(tau_s=0.1)
    batches = iter(graph_webdataset(tars, batch_size=BATCH, image_pixels=8, partial=False))
    seen: list[dict[str, Any]] = []
    handed = loss.follow((seen.append(batch) or batch for batch in batches), lambda captions: captions)
    for seed in range(2):
        images, captions = next(handed)
        assert torch.equal(images, seen[-1]["image"])
        assert captions == seen[-1]["caption"]
        rng = torch.Generator().manual_seed(seed)
        image, text = torch.nn.functional.normalize(torch.randn(2, BATCH, 16, generator=rng, dtype=float), dim=2)
        image.requires_grad_()
        scale = torch.tensor(17.0, dtype=float, requires_grad=True)
        given = seen[-1]["embedding"].double().numpy()
        given /= np.linalg.norm(given, axis=1, keepdims=True)
        stored = embeddings_of(store, seen[-1]["node"])
        assert np.abs(given @ given.T - stored @ stored.T).max() < 0.01  # int8 in the sidecar
        expected = clip_loss(image, text, scale, given @ given.T, 0.1)
        wanted = torch.autograd.grad(expected, [image, scale])
        found = loss(image_features=image, text_features=text, logit_scale=scale, output_dict=True)
        assert list(found) == ["contrastive_loss"]
        assert found["contrastive_loss"].item() == pytest.approx(expected.item(), abs=1e-5)
        assert torch.equal(loss(image, text, scale), found["contrastive_loss"])
        for gradient, expected_gradient in zip(
            torch.autograd.grad(found["contrastive_loss"], [image, scale]), wanted, strict=True
        ):
            assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_the_open_clip_example_trains_all_its_parameters(
    example: Any, tars: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("open_clip_soft_targets")
    torch.manual_seed(0)
    untrained = example("small").Clip()
    assert changed(untrained, module.main(tars, 3, BATCH))
    losses = printed_losses(capsys)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    with pytest.raises(RuntimeError, match="follow"):
        module.SoftTargetClipLoss()(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(1.0))


def test_the_open_clip_loss_stands_for_open_clips_own(example: Any) -> None:
    """The same loss as open_clip.ClipLoss where every caption is unlike the others and tau_s is small."""
    open_clip = pytest.importorskip("open_clip")
    loss = example("open_clip_soft_targets").SoftTargetClipLoss(tau_s=0.01)
    next(iter(loss.follow([{"embedding": torch.eye(12), "image": None, "caption": None}], lambda captions: captions)))
    image, text = torch.nn.functional.normalize(torch.randn(2, 12, 16), dim=2)
    expected = open_clip.ClipLoss()(image, text, torch.tensor(14.0))
    assert loss(image, text, torch.tensor(14.0)).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.fixture
def sentences(example: Any) -> ModuleType:
    return example("sentence_transformers_batches")


def stored_neighbors(store: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(Path(store).glob("graph/*.neighbors.npy"))])


def edges_in(batches: list[list[int]], neighbors: np.ndarray) -> int:
    return sum(int(j) in batch for batch in map(set, batches) for i in batch for j in neighbors[i])


def test_sentence_transformers_batches_hold_graph_neighbours(sentences: ModuleType, store: str, tmp_path: Path) -> None:
    """The trainer's own get_batch_sampler makes the sampler, with the arguments it would give."""
    pytest.importorskip("accelerate")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    graph = SampleGraph.open(store)
    trainer = object.__new__(SentenceTransformerTrainer)  # its __init__ needs `datasets`
    trainer.args = SentenceTransformerTrainingArguments(
        str(tmp_path), batch_sampler=partial(sentences.NeighborBatches, graph=graph)
    )
    made = trainer.get_batch_sampler(list(range(len(graph))), batch_size=16, drop_last=True, seed=3)
    batches, neighbors = list(made), stored_neighbors(store)
    assert len(batches) == len(made) == len(graph) // 16
    assert all(len(batch) == 16 for batch in batches)
    used = np.concatenate(batches)
    assert len(np.unique(used)) == len(used)
    shuffled = np.random.default_rng(0).permutation(used).reshape(-1, 16).tolist()
    assert edges_in(batches, neighbors) > 2 * edges_in(shuffled, neighbors) > 0
    made.set_epoch(1)
    assert list(made) != batches
    with pytest.raises(ValueError, match="rows for"):
        trainer.get_batch_sampler([0, 1], batch_size=16, drop_last=True)


@pytest.mark.parametrize(("skip", "count"), [(1, 3), (5, 3)])
def test_hard_negatives_are_the_texts_of_the_rank_window(
    sentences: ModuleType, store: str, skip: int, count: int
) -> None:
    table = pq.read_table(sorted(Path(store).glob("nodes/*.parquet"))).to_pylist()
    texts = {row["node"]: row["text"] for row in table}
    data = sentences.columns(store, SampleGraph.open(store), skip=skip, count=count)
    assert list(data) == ["anchor", "positive", *(f"negative_{n}" for n in range(1, count + 1))]
    rows = list(zip(*data.values(), strict=True))
    assert len(rows) == len(texts)
    for node, (row, neighbors) in enumerate(zip(rows, stored_neighbors(store), strict=True)):
        wanted = [node, neighbors[0], *neighbors[skip : skip + count]]
        assert list(row) == [texts[int(n)] for n in wanted]


def test_the_sentence_transformers_example_trains(
    sentences: ModuleType, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    untrained = sentences.small_model(sentences.columns(store, SampleGraph.open(store))["anchor"])
    assert changed(untrained, sentences.main(store, 3, BATCH))
    losses = printed_losses(capsys)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
