"""X-Sample training with transformers.Trainer.

`pip install accelerate`, then `python training/examples/hf_trainer.py 'demo/shards/*.tar' --steps 20`.
"""

from __future__ import annotations

from typing import Any

import torch
from small import TARS, encoder, run, two_views
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from graphbuild.torch import Targets, XSampleLoss, graph_webdataset
from graphbuild.torch.hf import GraphTrainerMixin


class XSampleTrainer(GraphTrainerMixin, Trainer):
    def graph_loss(self, model: nn.Module, batch: dict[str, Any], targets: Targets) -> Tensor:
        return XSampleLoss(tau=0.1, tau_s=0.1)(*model(torch.cat(batch["image"])).chunk(2), targets)


def main(tars: str, steps: int, batch_size: int = 64) -> nn.Module:
    """Train for some steps, print the loss of each, and return the encoder."""
    set_seed(0)
    model = encoder()
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "weight_decay": 0.01}  # as the plain loop has it
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments("runs/hf_trainer", max_steps=steps, learning_rate=1e-3, seed=0, **plain, **quiet)
    dataset = graph_webdataset(tars, batch_size=batch_size, transform=two_views, partial=False, equal_ranks=True)
    trainer = XSampleTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step'] - 1}  loss {float(entry['loss']):.4f}")
    return model


if __name__ == "__main__":
    run(main, TARS)
