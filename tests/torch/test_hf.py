"""A real transformers.Trainer on graphbuild's batches: epochs and resumes, against the batches read without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.torch import GraphDataset, NeighborBatchSampler, Targets, XSampleLoss, graph_webdataset
from graphbuild.torch.graph_loader import GraphLoader
from tests.conftest import MakeOnce
from tests.training.conftest import make_scenes_store

pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from graphbuild.torch.hf import GraphCollator, GraphTrainerMixin, fewest_batches

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
ROOT = Path(__file__).parents[2]
BATCH, EPOCH, STEPS = 60, 8, 20  # of four tars of 120 scenes


@pytest.fixture(scope="session")
def scenes(make_once: MakeOnce) -> str:
    return str(make_once("scenes", make_scenes_store))


def words(captions: list[str], **options: Any) -> dict[str, Tensor]:
    """A tokenizer: the number of words of each caption."""
    assert options == {"padding": True, "truncation": True, "return_tensors": "pt"}
    return {"input_ids": torch.tensor([[len(caption.split())] for caption in captions])}


class Recorder(GraphTrainerMixin, Trainer):
    """Notes the keys and the loss of each batch."""

    def graph_loss(self, model: nn.Module, batch: dict[str, Any], targets: Targets) -> Any:
        z = model(batch["image"].flatten(1) / 255)
        loss = XSampleLoss()(z, z + 0.1, targets)
        assert batch["input_ids"].flatten().tolist() == [len(caption.split()) for caption in batch["caption"]]
        self.__dict__.setdefault("seen", []).append((batch["key"], loss.item()))
        return loss


def parts(scenes: str, kind: str, **options: Any) -> tuple[Any, Any]:
    tars = f"{scenes}/shards/*.tar"
    if kind == "stream":
        return graph_webdataset(tars, batch_size=BATCH, image_pixels=8, partial=False, **options), None
    dataset, graph = GraphDataset(tars, image_pixels=8), SampleGraph.open(scenes)
    return dataset, NeighborBatchSampler(graph, BATCH, nodes=dataset.nodes, **options)


def trainer_of(scenes: str, kind: str, folder: Path, changed: dict[str, Any] | None = None, **options: Any) -> Recorder:
    dataset, sampler = parts(scenes, kind, **(changed or {}))
    model = nn.Linear(3 * 8 * 8, 4)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(model.bias)
    given = {"max_steps": STEPS, "save_steps": 1, "logging_steps": 1, **options}
    arguments = TrainingArguments(
        str(folder),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    return Recorder(
        model,
        arguments,
        train_dataset=dataset,
        batch_sampler=sampler,
        data_collator=GraphCollator(dataset if kind == "neighbours" else None, words),
    )


def seen_by(trainer: Recorder, resume: Path | None = None) -> list[tuple[list[str], float]]:
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer.seen


def expected(scenes: str, kind: str, workers: int) -> list[list[str]]:
    loader, keys = GraphLoader(*parts(scenes, kind), num_workers=workers), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        keys += [batch["key"] for batch in loader]
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["stream", "neighbours"])
def test_a_resumed_run_has_the_batches_and_losses_of_the_uninterrupted_one(
    scenes: str, tmp_path: Path, kind: str, workers: int
) -> None:
    """Saved in the first epoch, at its end, and in the third; of the sampler also with other workers."""
    options = {"dataloader_num_workers": workers}
    whole = seen_by(trainer_of(scenes, kind, tmp_path, **options))
    assert [keys for keys, _ in whole] == expected(scenes, kind, workers)[:STEPS]
    assert len({json.dumps(keys) for keys, _ in whole}) == STEPS
    for step in (3, EPOCH, 2 * EPOCH + 1):
        again = trainer_of(scenes, kind, tmp_path / "again", **options)
        assert seen_by(again, tmp_path / f"checkpoint-{step}") == whole[step:]
        assert again.state.epoch == pytest.approx(STEPS / EPOCH)
    other = trainer_of(scenes, kind, tmp_path / "other", dataloader_num_workers=workers + 2)
    if kind == "neighbours":
        assert seen_by(other, tmp_path / "checkpoint-3") == whole[3:]
    else:
        with pytest.raises(ConfigError, match=f"workers = {max(workers, 1)}, and here it is {workers + 2}"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.slow
def test_a_checkpoint_that_was_resumed_goes_on_too(scenes: str, tmp_path: Path) -> None:
    whole = seen_by(trainer_of(scenes, "stream", tmp_path))
    seen_by(trainer_of(scenes, "stream", tmp_path / "again", max_steps=12), tmp_path / "checkpoint-9")
    last = trainer_of(scenes, "stream", tmp_path / "last")
    assert seen_by(last, tmp_path / "again" / "checkpoint-11") == whole[11:]
    with pytest.raises(ConfigError, match="seed = 0, and here it is 1"):
        trainer_of(scenes, "stream", tmp_path / "wrong", {"seed": 1}).train(
            resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-11")
        )


def test_accumulated_batches_are_resumed_too(scenes: str, tmp_path: Path) -> None:
    """Eight batches of an epoch in steps of three: 3, 3 and 2."""
    options = {"gradient_accumulation_steps": 3, "max_steps": 6}
    whole = seen_by(trainer_of(scenes, "stream", tmp_path, **options))
    assert [keys for keys, _ in whole] == expected(scenes, "stream", 0)[: 2 * EPOCH]
    rest = seen_by(trainer_of(scenes, "stream", tmp_path / "again", **options), tmp_path / "checkpoint-4")
    assert rest == whole[EPOCH + 3 :]


@pytest.mark.slow
def test_ranks_have_each_batch_once_also_after_a_resume(scenes: str, tmp_path: Path) -> None:
    """Two processes under DDP."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, "-m", "tests.torch.test_hf", scenes, str(tmp_path)], check=True, cwd=ROOT, timeout=300)
    for kind in ("stream", "neighbours"):
        runs = [json.loads((tmp_path / f"{kind}{rank}.json").read_text()) for rank in range(2)]
        for rank in runs:
            assert rank["rest"] == rank["whole"][6:]
            assert len(rank["whole"]) == EPOCH
        for epoch in (slice(0, EPOCH // 2), slice(EPOCH // 2, EPOCH)):
            keys = [key for rank in runs for keys, _ in rank["whole"][epoch] for key in keys]
            assert len(keys) == len(set(keys)) == EPOCH * BATCH


def on_a_rank(scenes: str, folder: Path) -> None:
    """Two epochs of four batches of each rank, and the rest of it after a resume in the second."""
    rank = os.environ["RANK"]
    for kind in ("stream", "neighbours"):
        changed: dict[str, Any] = {"equal_ranks": True} if kind == "stream" else {}
        options = {"max_steps": EPOCH, "ddp_backend": "gloo"}
        whole = seen_by(trainer_of(scenes, kind, folder / kind, changed, **options))
        again = trainer_of(scenes, kind, folder / "again", changed, save_strategy="no", **options)
        rest = seen_by(again, folder / kind / "checkpoint-6")
        (folder / f"{kind}{rank}.json").write_text(json.dumps({"whole": whole, "rest": rest}))
        if kind == "stream":
            with pytest.raises(ConfigError, match="equal_ranks=False on several ranks"):
                trainer_of(scenes, kind, folder / "unequal").get_train_dataloader()


def test_without_skipping_data_the_epoch_begins_again(scenes: str, tmp_path: Path) -> None:
    whole = seen_by(trainer_of(scenes, "stream", tmp_path))
    again = trainer_of(scenes, "stream", tmp_path / "again", ignore_data_skip=True)
    keys = [keys for keys, _ in islice(seen_by(again, tmp_path / "checkpoint-11"), EPOCH)]
    assert keys == [keys for keys, _ in whole[EPOCH : 2 * EPOCH]]


def test_a_sampler_trains_whole_epochs(scenes: str, tmp_path: Path) -> None:
    trainer = trainer_of(scenes, "neighbours", tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="no")
    assert [keys for keys, _ in seen_by(trainer)] == expected(scenes, "neighbours", 0)[: 2 * EPOCH]


def test_every_epoch_has_the_batches_of_the_one_with_fewest() -> None:
    class Stream:
        def batches_per_epoch(self, workers: int, epoch: int) -> int:
            return [7, 5, 6, 0][epoch]

    assert [fewest_batches(Stream(), 0, total) for total in (7, 8, 10, 11)] == [7, 5, 5, 5]
    with pytest.raises(ConfigError, match="epoch 3 has no batch"):
        fewest_batches(Stream(), 0, 16)


def test_other_datasets_and_collators_without_one_are_refused(scenes: str, tmp_path: Path) -> None:
    trainer = trainer_of(scenes, "stream", tmp_path)
    trainer.train_dataset = [1, 2]
    with pytest.raises(ConfigError, match=r"train_dataset is <class 'list'>"):
        trainer.get_train_dataloader()
    with pytest.raises(ConfigError, match="pass it the GraphDataset"):
        GraphCollator()([{"key": "a"}])


def test_a_collator_gives_the_dataset_batch_and_what_its_tokenizer_makes(scenes: str) -> None:
    dataset, _ = parts(scenes, "neighbours")
    samples = dataset.__getitems__([3, 1])
    plain, collated = dataset.collate(samples), GraphCollator(dataset, words)(samples)
    assert GraphCollator(dataset)(samples).keys() == plain.keys()
    assert collated.keys() == plain.keys() | {"input_ids"}
    assert collated["key"] == plain["key"]
    assert collated["input_ids"].flatten().tolist() == [len(caption.split()) for caption in plain["caption"]]


if __name__ == "__main__":
    on_a_rank(sys.argv[1], Path(sys.argv[2]))
