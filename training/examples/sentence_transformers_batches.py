"""Neighbour-aware batches and hard negatives for sentence-transformers, from a stored graph.

`NeighborBatches` goes where SentenceTransformerTrainer takes a batch sampler, `columns` is its data set:

    graph = SampleGraph.open(store)
    arguments = SentenceTransformerTrainingArguments(batch_sampler=partial(NeighborBatches, graph=graph))
    SentenceTransformerTrainer(model, arguments, Dataset.from_dict(columns(store, graph)), loss=loss).train()

`main` runs the same parts in a plain loop, which needs no `datasets`. In such batches other rows' texts are near the
anchor, some are paraphrases: give each row one negative and use GISTEmbedLoss where those must not count as negatives.

`python training/examples/sentence_transformers_batches.py demo --steps 20`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from graphbuild import SampleGraph
from graphbuild.torch import NeighborBatchSampler


class NeighborBatches(DefaultBatchSampler):
    """Batches of groups of neighbours, for a data set whose row i is node i; each row once an epoch."""

    def __init__(self, dataset: Any, *, graph: SampleGraph, group: int = 8, **options: Any) -> None:
        super().__init__(dataset, **options)
        if len(dataset) != len(graph):
            raise ValueError(f"{len(dataset)} rows for {len(graph)} nodes: give row i the texts of node i")
        self.neighbors = NeighborBatchSampler(
            graph,
            self.batch_size,
            group=group,
            nodes=np.arange(len(graph)),
            seed=self.seed,
            drop_last=self.drop_last,
            rank=0,
            ranks=1,  # the trainer deals the batches out to its ranks itself
        )

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.neighbors.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.neighbors)

    def __len__(self) -> int:
        return len(self.neighbors)


def columns(store: str, graph: SampleGraph, skip: int = 3, count: int = 2) -> dict[str, list[str]]:
    """A row a node: its text for anchor, its nearest neighbour's for positive, ranks skip..skip+count-1 for negatives.

    Rank 0 is the nearest. `graphbuild mine --what hard-negatives` chooses by similarity too (docs/mining.md).
    """
    texts = pl.scan_parquet(f"{store}/nodes/*.parquet").select("node", "text").sort("node").collect()["text"].to_numpy()
    neighbors, _ = graph.neighbors(np.arange(len(graph)))
    negatives = {f"negative_{n + 1}": neighbors[:, skip + n] for n in range(count)}
    nodes = {"anchor": np.arange(len(graph)), "positive": neighbors[:, 0], **negatives}
    return {name: texts[ids].tolist() for name, ids in nodes.items()}


def small_model(texts: list[str]) -> SentenceTransformer:
    """The mean of learned word vectors; put any SentenceTransformer in its place."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=64)], device="cpu")


def main(store: str, steps: int, batch_size: int = 64) -> SentenceTransformer:
    """Train for some steps of one epoch, print the loss of each, and return the model."""
    torch.manual_seed(0)
    graph = SampleGraph.open(store)
    data = columns(store, graph)
    model = small_model(data["anchor"])
    loss = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = NeighborBatches(data["anchor"], graph=graph, batch_size=batch_size, drop_last=True)
    for step, rows in zip(range(steps), sampler, strict=False):
        features = [model.preprocess([texts[row] for row in rows]) for texts in data.values()]
        value = loss(features, labels=None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        print(f"step {step}  loss {value.item():.4f}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", help="a store with a graph, made from captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    main(**vars(parser.parse_args()))
