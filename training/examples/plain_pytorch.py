"""X-Sample training in a plain PyTorch loop.

`python training/examples/plain_pytorch.py 'demo/shards/*.tar' --steps 20`
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from small import encoder, two_views
from torch import nn
from torch.utils.data import DataLoader

from graphbuild.torch import XSampleLoss, graph_webdataset


def main(tars: str, steps: int, batch_size: int = 64) -> nn.Module:
    """Train for some steps, print the loss of each, and return the encoder."""
    random.seed(0)
    torch.manual_seed(0)
    model, criterion = encoder(), XSampleLoss(tau=0.1, tau_s=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(islice(batches(tars, batch_size, epochs=steps), steps)):
        z1, z2 = model(torch.cat(batch["image"])).chunk(2)
        loss = criterion(z1, z2, batch["embedding"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")
    return model


def batches(tars: str, batch_size: int, epochs: int) -> Iterator[dict[str, Any]]:
    """The batches of some epochs, each in an order of its own."""
    dataset = graph_webdataset(tars, batch_size=batch_size, transform=two_views, partial=False, equal_ranks=True)
    loader = DataLoader(dataset, batch_size=None)  # batches come ready; num_workers is up to you
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tars", help="tars with sidecars beside them: a glob or brace pattern")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    main(**vars(parser.parse_args()))
