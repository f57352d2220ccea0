"""X-Sample training as a LightningModule. With several devices add `devices=8, strategy="ddp"`, and no more.

`pip install lightning`, then `python training/examples/lightning_module.py 'demo/shards/*.tar' --steps 20`.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from small import TARS, encoder, run, two_views
from torch import Tensor, nn

from graphbuild.torch import XSampleLoss
from graphbuild.torch.lightning import GraphDataModule


class XSample(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder(), XSampleLoss(tau=0.1, tau_s=0.1)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        loss = self.criterion(*self.encoder(torch.cat(batch["image"])).chunk(2), batch["embedding"])
        self.print(f"step {self.global_step}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.encoder.parameters(), lr=1e-3)


def main(tars: str, steps: int, batch_size: int = 64) -> nn.Module:
    """Train for some steps, print the loss of each, and return the encoder."""
    lightning.seed_everything(0)
    module = XSample()
    data = GraphDataModule(tars, batch_size=batch_size, transform=two_views)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    return module.encoder


if __name__ == "__main__":
    run(main, TARS)
