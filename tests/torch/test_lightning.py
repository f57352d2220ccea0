"""GraphDataModule under a real lightning.Trainer: epochs, ranks and resumes, against the batches read without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.torch import GraphDataset, NeighborBatchSampler, XSampleLoss, graph_webdataset
from tests.conftest import MakeOnce
from tests.training.conftest import make_scenes_store

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from graphbuild.torch.lightning import GraphDataModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROOT = Path(__file__).parents[2]
BATCH, EPOCHS = 60, 3  # of four tars of 120 scenes, 480 in all


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the workers of stock loaders that a trainer left in the middle of an epoch, when they are collected."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.fixture(scope="session")
def scenes(make_once: MakeOnce) -> str:
    return str(make_once("scenes", make_scenes_store))


class Recorder(lightning.LightningModule):
    """Notes the keys and the loss of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3 * 8 * 8, 4)
        torch.nn.init.normal_(self.encoder.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.encoder.bias)
        self.seen: list[tuple[int, list[str], float]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        z = self.encoder(batch["image"].flatten(1) / 255)
        loss = XSampleLoss()(z, z + 0.1, batch["embedding"])
        self.seen.append((self.current_epoch, batch["key"], loss.item()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data_of(scenes: str, kind: str, workers: int = 0, **options: Any) -> GraphDataModule:
    graph = {"graph": SampleGraph.open(scenes), "sampler": {"drop_last": True}} if kind == "neighbours" else {}
    loader = {"num_workers": workers}
    tars = f"{scenes}/shards/*.tar"
    return GraphDataModule(tars, batch_size=BATCH, image_pixels=8, loader=loader, **graph, **options)


def fit(data: Any, folder: Path, resume: Path | None = None, **options: Any) -> list[tuple[int, list[str], float]]:
    module = Recorder()
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "max_epochs": EPOCHS,
            "strategy": "ddp" if "RANK" in os.environ else "auto",
            "enable_checkpointing": False,
            **options,
        },
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    return module.seen


def expected(scenes: str, kind: str, workers: int) -> list[tuple[int, list[str]]]:
    """Epoch and keys of each batch, read by the loaders alone."""
    tars = f"{scenes}/shards/*.tar"
    batches = []
    if kind == "stream":
        dataset: Any = graph_webdataset(tars, batch_size=BATCH, partial=False, equal_ranks=True)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
        sampler = dataset
    else:
        dataset = GraphDataset(tars)
        sampler = NeighborBatchSampler(SampleGraph.open(scenes), BATCH, nodes=dataset.nodes, drop_last=True)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches += [(epoch, batch["key"]) for batch in loader]
    return batches


def everything(scenes: str, kind: str, workers: int, folder: Path) -> list[tuple[int, list[str], float]]:
    """The uninterrupted run; it leaves a checkpoint a step."""
    every_step = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return fit(data_of(scenes, kind, workers), folder, callbacks=[every_step], enable_checkpointing=True)


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("stream", 0),
        ("neighbours", 0),
        *(pytest.param(kind, 2, marks=pytest.mark.slow) for kind in ("stream", "neighbours")),
    ],
)
def test_a_resumed_run_has_the_batches_and_losses_of_the_uninterrupted_one(
    scenes: str, tmp_path: Path, one_thread: None, kind: str, workers: int
) -> None:
    """Saved in the first epoch, at its end, and in the second; of the sampler also with other workers."""
    whole = everything(scenes, kind, workers, tmp_path)
    assert [(epoch, keys) for epoch, keys, _ in whole] == expected(scenes, kind, workers)
    assert len({json.dumps(keys) for _, keys, _ in whole}) == len(whole)
    for taken in (4, len(whole) // EPOCHS, len(whole) // EPOCHS + 5):
        rest = fit(data_of(scenes, kind, workers), tmp_path, tmp_path / f"step={taken}.ckpt")
        assert rest == whole[taken:]
    other = data_of(scenes, kind, workers + 2)
    checkpoint = tmp_path / "step=4.ckpt"
    if kind == "neighbours":
        assert fit(other, tmp_path, checkpoint) == whole[4:]
    else:
        with pytest.raises(ConfigError, match=f"workers = {max(workers, 1)}, and here it is {workers + 2}"):
            fit(other, tmp_path, checkpoint)


def test_the_data_module_itself_goes_on_by_its_state(scenes: str) -> None:
    """Lightning loads the loader's own state too; other code may have the module's alone."""
    first, second = data_of(scenes, "stream"), data_of(scenes, "stream")
    for data in (first, second):
        assert data.state_dict() == {}
        data.setup("fit")
    whole = [batch["key"] for batch in first.train_dataloader()]
    batches = iter(first.train_dataloader())
    assert [next(batches)["key"] for _ in range(3)] == whole[:3]
    second.load_state_dict(first.state_dict())
    assert [batch["key"] for batch in second.train_dataloader()] == whole[3:]


@pytest.mark.slow
def test_ranks_have_equally_many_batches_and_each_sample_once_also_after_a_resume(scenes: str, tmp_path: Path) -> None:
    """Two processes under DDP."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "-m", "tests.torch.test_lightning", scenes, str(tmp_path)], check=True, cwd=ROOT, timeout=300
    )
    for kind in ("stream", "neighbours"):
        runs = [json.loads((tmp_path / f"{kind}{rank}.json").read_text()) for rank in range(2)]
        assert len(runs[0]["whole"]) == len(runs[1]["whole"]) == EPOCHS * (480 // (2 * BATCH))
        for rank in runs:
            assert rank["rest"] == rank["whole"][6:]
        for epoch in range(EPOCHS):
            keys = [key for rank in runs for number, keys, _ in rank["whole"] if number == epoch for key in keys]
            assert len(keys) == len(set(keys)) == 480 // (2 * BATCH) * 2 * BATCH


def on_a_rank(scenes: str, folder: Path) -> None:
    for kind in ("stream", "neighbours"):
        whole = everything(scenes, kind, 0, folder / kind)
        rest = fit(data_of(scenes, kind), folder, folder / kind / "step=6.ckpt")
        (folder / f"{kind}{os.environ['RANK']}.json").write_text(json.dumps({"whole": whole, "rest": rest}))


def test_options_of_a_sampler_need_a_graph() -> None:
    with pytest.raises(ConfigError, match="without graph"):
        GraphDataModule("x.tar", batch_size=2, sampler={"group": 4})


def test_without_lightning_the_module_names_the_package_to_install() -> None:
    check = """
import sys
import graphbuild.torch
assert not {"lightning", "transformers", "sentence_transformers", "torchdata"} & set(sys.modules)
sys.modules["lightning"] = None
import graphbuild.torch.lightning
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert "ConfigError: lightning cannot be imported" in done.stderr
    assert "-> pip install lightning" in done.stderr


if __name__ == "__main__":
    on_a_rank(sys.argv[1], Path(sys.argv[2]))
