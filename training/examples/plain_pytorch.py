"""X-Sample training in a plain PyTorch loop.

`python training/examples/plain_pytorch.py 'demo/shards/*.tar' --steps 20`
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from small import TARS, encoder, run, two_views
from torch import nn

from graphbuild.torch import GraphLoader, XSampleLoss, graph_webdataset


def main(tars: str, steps: int, batch_size: int = 64) -> nn.Module:
    """Train for some steps, print the loss of each, and return the encoder."""
    random.seed(0)
    torch.manual_seed(0)
    model, criterion = encoder(), XSampleLoss(tau=0.1, tau_s=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset = graph_webdataset(tars, batch_size=batch_size, transform=two_views, partial=False, equal_ranks=True)
    loader = GraphLoader(dataset)  # options of DataLoader, such as num_workers=8; its state_dict goes into checkpoints
    for step, batch in zip(range(steps), epochs_of(loader), strict=False):
        loss = criterion(*model(torch.cat(batch["image"])).chunk(2), batch["embedding"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")
    return model


def epochs_of(loader: GraphLoader) -> Iterator[dict[str, Any]]:
    """Epoch after epoch, each in an order of its own."""
    for epoch in count(loader.epoch):
        loader.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    run(main, TARS)
