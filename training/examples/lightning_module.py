"""X-Sample training as a LightningModule.

`pip install lightning`, then `python training/examples/lightning_module.py 'demo/shards/*.tar' --steps 20`.
graphbuild splits the tars over ranks, and its losses gather over them. DDP waits for a rank that is out of batches,
so `equal_ranks` gives every rank equally many (docs/training.md, Loaders): add `devices=8, strategy="ddp"` and no more.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from small import encoder, two_views
from torch import Tensor, nn
from torch.utils.data import DataLoader

from graphbuild.torch import XSampleLoss, graph_webdataset


class XSample(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.criterion = XSampleLoss(tau=0.1, tau_s=0.1)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        z1, z2 = self.encoder(torch.cat(batch["image"])).chunk(2)
        loss = self.criterion(z1, z2, batch["embedding"])
        self.print(f"step {self.global_step}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.encoder.parameters(), lr=1e-3)


def main(tars: str, steps: int, batch_size: int = 64) -> nn.Module:
    """Train for some steps, print the loss of each, and return the encoder."""
    lightning.seed_everything(0)
    module = XSample()
    dataset = graph_webdataset(tars, batch_size=batch_size, transform=two_views, partial=False, equal_ranks=True)
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(dataset, batch_size=None))
    return module.encoder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars", help="tars with sidecars beside them: a glob or brace pattern")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    main(**vars(parser.parse_args()))
