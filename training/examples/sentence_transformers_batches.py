"""Neighbour-aware batches and hard negatives for SentenceTransformerTrainer, from a stored graph.

`pip install datasets accelerate`, then `python training/examples/sentence_transformers_batches.py demo --steps 20`.
"""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from small import run, small_model
from transformers import set_seed

from graphbuild import SampleGraph
from graphbuild.torch.sentence_transformers import NeighborBatches, columns


def main(store: str, steps: int, batch_size: int = 64) -> SentenceTransformer:
    """Train for some steps, print the loss of each, and return the model."""
    set_seed(0)
    graph = SampleGraph.open(store)
    texts = columns(store, graph)
    model = small_model(texts["anchor"])
    arguments = SentenceTransformerTrainingArguments(
        "runs/sentence_transformers",
        batch_sampler=partial(NeighborBatches, graph=graph),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, arguments, Dataset.from_dict(texts), loss=loss)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step'] - 1}  loss {float(entry['loss']):.4f}")
    return model


if __name__ == "__main__":
    run(main, "a store with a graph, made from captions")
