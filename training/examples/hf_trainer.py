"""X-Sample training with transformers.Trainer.

`pip install accelerate`, then `python training/examples/hf_trainer.py 'demo/shards/*.tar' --steps 20`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from small import encoder, two_views
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from graphbuild.torch import XSampleLoss, graph_webdataset


class XSampleTrainer(Trainer):
    criterion = XSampleLoss(tau=0.1, tau_s=0.1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        z = model(torch.cat(inputs["image"]))
        loss = self.criterion(*z.chunk(2), inputs["embedding"])
        return (loss, {"z": z}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """Batches come ready and are already split over ranks: accelerate must not split them again."""
        loader = DataLoader(self.train_dataset, batch_size=None, num_workers=self.args.dataloader_num_workers)
        loader.set_epoch = self.train_dataset.set_epoch  # the Trainer calls it before each epoch
        return loader


def main(tars: str, steps: int, batch_size: int = 64) -> nn.Module:
    """Train for some steps, print the loss of each, and return the encoder."""
    set_seed(0)
    model = encoder()
    arguments = TrainingArguments(
        "runs/hf_trainer",
        max_steps=steps,
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = graph_webdataset(tars, batch_size=batch_size, transform=two_views, partial=False, equal_ranks=True)
    trainer = XSampleTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step'] - 1}  loss {entry['loss']:.4f}")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars", help="tars with sidecars beside them: a glob or brace pattern")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    main(**vars(parser.parse_args()))
