"""NeighborBatches and columns under a real SentenceTransformerTrainer, against the stored files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.torch import NeighborBatchSampler
from tests.conftest import MakeOnce
from tests.training.conftest import make_scenes_store

sentence_transformers = pytest.importorskip("graphbuild.torch.sentence_transformers")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="session")
def store(make_once: MakeOnce) -> str:
    return str(make_once("scenes", make_scenes_store))


@pytest.fixture(scope="module")
def graph(store: str) -> SampleGraph:
    return SampleGraph.open(store)


def stored_neighbors(store: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(Path(store).glob("graph/*.neighbors.npy"))])


def edges_in(batches: list[list[int]], neighbors: np.ndarray) -> int:
    return sum(int(j) in batch for batch in map(set, batches) for i in batch for j in neighbors[i])


class Rows(nn.Module):
    """A loss that notes the rows of each batch, by their texts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, features: list[dict[str, Tensor]], labels: Any) -> Tensor:
        self.seen.append([tuple(tokens.tolist()) for tokens in features[0]["input_ids"].split(1)])
        anchors, positives = (self.model(part)["sentence_embedding"] for part in features)
        return torch.nn.functional.cross_entropy(anchors @ positives.T, torch.arange(len(anchors)))


def trained(graph: SampleGraph, folder: Path, resume: Path | None = None) -> tuple[list[list[int]], list[float]]:
    """Rows of each batch and the losses, of two epochs; row i's text is the word w{i}."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{row}": row for row in range(len(graph))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        batch_sampler=partial(sentence_transformers.NeighborBatches, graph=graph, sampler={"group": 4}),
        per_device_train_batch_size=16,
        num_train_epochs=2,
        dataloader_drop_last=True,
        save_steps=1,
        logging_steps=1,
        seed=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = Rows(model)
    data = Dataset.from_dict({name: list(words) for name in ("anchor", "positive")})
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=loss)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return loss.seen, losses


@pytest.mark.slow
def test_the_trainer_takes_the_batches_of_the_graph_also_after_a_resume(graph: SampleGraph, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    seen, losses = trained(graph, tmp_path)
    sampler = NeighborBatchSampler(graph, 16, nodes=np.arange(len(graph)), group=4, seed=3, drop_last=True)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += [[(row,) for row in rows] for rows in sampler]
    assert [[tuple(np.ravel(row)) for row in batch] for batch in seen] == expected
    step = len(sampler) + 3
    rest, all_losses = trained(graph, tmp_path / "again", tmp_path / f"checkpoint-{step}")
    assert rest == seen[step:]
    assert all_losses == losses


def test_batches_hold_graph_neighbours(graph: SampleGraph, store: str) -> None:
    made = sentence_transformers.NeighborBatches(range(len(graph)), graph=graph, batch_size=16, drop_last=True, seed=3)
    batches, neighbors = list(made), stored_neighbors(store)
    assert len(batches) == len(made) == len(graph) // 16
    assert all(len(batch) == 16 for batch in batches)
    used = np.concatenate(batches)
    assert len(np.unique(used)) == len(used)
    shuffled = np.random.default_rng(0).permutation(used).reshape(-1, 16).tolist()
    assert edges_in(batches, neighbors) > 2 * edges_in(shuffled, neighbors) > 0
    made.set_epoch(1)
    assert list(made) != batches
    with pytest.raises(ConfigError, match="2 rows for"):
        sentence_transformers.NeighborBatches([0, 1], graph=graph, batch_size=16, drop_last=True)


@pytest.mark.parametrize(("skip", "count"), [(1, 3), (5, 3)])
def test_hard_negatives_are_the_texts_of_the_rank_window(graph: SampleGraph, store: str, skip: int, count: int) -> None:
    table = pq.read_table(sorted(Path(store).glob("nodes/*.parquet"))).to_pylist()
    texts = {row["node"]: row["text"] for row in table}
    data = sentence_transformers.columns(store, graph, skip=skip, count=count)
    assert list(data) == ["anchor", "positive", *(f"negative_{n}" for n in range(1, count + 1))]
    rows = list(zip(*data.values(), strict=True))
    assert len(rows) == len(texts)
    for node, (row, neighbors) in enumerate(zip(rows, stored_neighbors(store), strict=True)):
        wanted = [node, neighbors[0], *neighbors[skip : skip + count]]
        assert list(row) == [texts[int(n)] for n in wanted]


def test_ranks_that_no_list_has_are_refused(graph: SampleGraph, store: str) -> None:
    with pytest.raises(ConfigError, match=r"skip = 7, count = 2, and k = 8"):
        sentence_transformers.columns(store, graph, skip=7)
