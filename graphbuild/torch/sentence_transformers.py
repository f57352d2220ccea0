"""Neighbour-aware batches and hard negatives for SentenceTransformerTrainer, from a stored graph.

    graph = SampleGraph.open(store)
    arguments = SentenceTransformerTrainingArguments(batch_sampler=partial(NeighborBatches, graph=graph))
    SentenceTransformerTrainer(model, arguments, Dataset.from_dict(columns(store, graph)), loss=loss).train()

In such batches other rows' texts are near the anchor, and some are paraphrases: where those must not count as
negatives, use GISTEmbedLoss. `columns` holds the texts in memory; a sampler costs what NeighborBatchSampler does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sentence_transformers import DefaultBatchSampler

from graphbuild.errors import ConfigError
from graphbuild.torch.samplers import NeighborBatchSampler

if TYPE_CHECKING:
    from graphbuild.graph.sample_graph import SampleGraph


class NeighborBatches(DefaultBatchSampler):
    """Batches of groups of neighbours, for a data set whose row i is node i; each row once an epoch.

    The trainer deals the batches out to its ranks itself, sets epochs, and skips batches after a resume.

    Args:
        dataset, options: what the trainer gives: batch_size, drop_last, seed and others.
        graph: the SampleGraph.
        sampler: options of NeighborBatchSampler, such as {"group": 16}.

    Raises:
        ConfigError: the data set has another number of rows than the graph has nodes.
    """

    def __init__(
        self, dataset: Any, *, graph: SampleGraph, sampler: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        if len(dataset) != len(graph):
            raise ConfigError(
                f"{len(dataset)} rows for {len(graph)} nodes", "give row i the texts of node i: `columns`"
            )
        given = {"seed": self.seed, "drop_last": self.drop_last, "rank": 0, "ranks": 1, **(sampler or {})}
        self.neighbors = NeighborBatchSampler(graph, self.batch_size, nodes=np.arange(len(graph)), **given)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.neighbors.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.neighbors)

    def __len__(self) -> int:
        return len(self.neighbors)


def columns(store: str, graph: SampleGraph, skip: int = 3, count: int = 2) -> dict[str, list[str]]:
    """A row a node: its text for anchor, its nearest neighbour's for positive, and `count` others' for negatives.

    negative_1, negative_2, ... are the texts of ranks skip..skip+count-1, rank 0 the nearest. `graphbuild mine --what
    hard-negatives` chooses by similarity too (docs/how-to/mining.md). store: a folder, or a URL that polars reads.

    Raises:
        ConfigError: ranks that the lists of k neighbours do not have.
    """
    if not (skip >= 0 and count >= 0 and skip + count <= graph.k):
        raise ConfigError(f"skip = {skip}, count = {count}, and k = {graph.k}", "0 <= skip and skip + count <= k")
    texts = pl.scan_parquet(f"{store}/nodes/*.parquet").select("node", "text").sort("node").collect()["text"].to_numpy()
    neighbors, _ = graph.neighbors(np.arange(len(graph)))
    negatives = {f"negative_{n + 1}": neighbors[:, skip + n] for n in range(count)}
    nodes = {"anchor": np.arange(len(graph)), "positive": neighbors[:, 0], **negatives}
    return {name: texts[ids].tolist() for name, ids in nodes.items()}
