"""open_clip with soft targets: a loss for the place of `open_clip.create_loss(args)`.

open_clip calls its loss with the model's outputs alone, so the embeddings of a batch reach it beforehand, with the
batch:

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", output_dict=True)
    loss = SoftTargetClipLoss(tau_s=0.1)
    dataset = graph_webdataset(tars, batch_size=256, transform=preprocess, partial=False)
    for images, texts in loss.follow(DataLoader(dataset, batch_size=None), open_clip.get_tokenizer("ViT-B-32")):
        sum(loss(**model(images, texts), output_dict=True).values()).backward()

That is `main` with `--model ViT-B-32`; without, a small model stands in for it. open_clip_train takes the same loss
(`train_one_epoch`'s argument, in later versions `CLIPTask(model, loss)`) if its data loader sets `loss.embeddings` for
each batch; not with --accum-freq above 1, which joins the features of several batches.

`python training/examples/open_clip_soft_targets.py 'demo/shards/*.tar' --steps 20`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from small import Clip, hashed_words, one_view
from torch import Tensor, nn
from torch.utils.data import DataLoader

from graphbuild.torch import CLIPLoss, graph_webdataset


class SoftTargetClipLoss(nn.Module):
    """open_clip's ClipLoss, with the softmax of the captions' cosines / tau_s for target; gathers over ranks itself."""

    def __init__(self, tau_s: float = 0.1) -> None:
        super().__init__()
        self.loss = CLIPLoss(tau_s=tau_s)
        self.embeddings: Tensor | None = None

    def follow(self, batches: Iterable[dict[str, Any]], tokenizer: Callable[[list[str]], Tensor]) -> Iterator[Any]:
        """open_clip's batches (images, texts); the embeddings of the last one given are those of the next call."""
        for batch in batches:
            self.embeddings = batch["embedding"]
            yield batch["image"], tokenizer(batch["caption"])

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        if self.embeddings is None:
            raise RuntimeError("the loss has no embeddings: take batches from SoftTargetClipLoss.follow")
        self.loss.tau = 1 / logit_scale  # the model's own, learned scale
        loss = self.loss(image_features, text_features, self.embeddings.to(image_features.device))
        return {"contrastive_loss": loss} if output_dict else loss


def main(tars: str, steps: int, batch_size: int = 64, model: str | None = None) -> nn.Module:
    """Train for some steps of one epoch, print the loss of each, and return the model."""
    torch.manual_seed(0)
    network, transform, tokenizer = Clip(), one_view, hashed_words
    if model is not None:
        import open_clip

        network, _, transform = open_clip.create_model_and_transforms(model, output_dict=True)
        tokenizer = open_clip.get_tokenizer(model)
    loss, optimizer = SoftTargetClipLoss(), torch.optim.AdamW(network.parameters(), lr=1e-3)
    dataset = graph_webdataset(tars, batch_size=batch_size, transform=transform, partial=False)
    batches = loss.follow(DataLoader(dataset, batch_size=None), tokenizer)
    for step, (images, texts) in zip(range(steps), batches, strict=False):
        total = sum(loss(**network(images, texts), output_dict=True).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        print(f"step {step}  loss {total.item():.4f}")
    return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tars", help="tars with sidecars beside them: a glob or brace pattern")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--model", help="an open_clip model, such as ViT-B-32")
    main(**vars(parser.parse_args()))
