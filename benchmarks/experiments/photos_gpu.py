"""F on one GPU in ten minutes: ResNet-18, 10,000 photos, p = 1 and 0.1, four arms. Training needs torch alone.

    python -m benchmarks.experiments.photos_gpu prepare photos.pt --cifar FOLDER --captions FILE  # with graphbuild
    python benchmarks/experiments/photos_gpu.py run photos.pt --results photos.jsonl    # on the GPU; again: goes on

`prepare` makes the photos' stores with graphbuild and takes out what training reads: images, vectors of the captions,
and of each photo the temperature at which it keeps a share of 0.6 of its target. `run` appends a JSON line a run:
SimCLR, then CLIP, CLIP and X-Sample with calibrated targets at each p. It begins no run after --minutes.

Sized for an H100 or H200 at 20,000 views a second: seven runs of 60 epochs, 1.2 million views each. Not run on one yet.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, log_softmax, normalize

SHARES = (1.0, 0.1)  # p
ARMS = ("clip", "clip calibrated", "xsample calibrated")
OTHER_VIEW, BATCH, TAU, PROJECTION = 0.6, 256, 0.1, 128
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
LUMA = (0.299, 0.587, 0.114)


def prepare(path: Path, cifar: Path, captions: Path, photos: int, tests: int, draw: int, work: Path) -> None:
    """Write what `run` reads: images uint8 [n, 3, 32, 32], labels; for each p vectors [n, d] and temperatures [n]."""
    import numpy as np

    from benchmarks.experiments.photos import draw_of, photos_of
    from benchmarks.experiments.sources import Data
    from benchmarks.experiments.sources import prepare as prepare_store
    from graphbuild import SampleGraph
    from graphbuild.torch.batch_edges import BatchEdges
    from graphbuild.torch.calibration import calibrated

    found: dict[str, Any] = {"draw": draw, "batch": min(BATCH, photos)}
    for share in SHARES:
        k = min(64, photos - 1)
        data = Data(images="photos", train=photos, test=tests, probe=10, pixels=32, k=k, relevance=share, draw=draw)
        prepared = prepare_store(data, work, cifar, captions)
        graph = SampleGraph.open(str(prepared.store))
        nodes = graph.sample_nodes()
        stored = map(torch.from_numpy, (nodes, *graph.neighbors(nodes), graph.background(nodes)))
        edges = BatchEdges(*stored, None, 0.1, len(graph))
        taus = {
            arm: calibrated(edges, images=found["batch"], other_view=OTHER_VIEW, slots=slots)[0][:, 0].float()
            for arm, slots in (("clip calibrated", 1), ("xsample calibrated", 2))
        }
        vectors = torch.from_numpy(graph.embeddings(nodes).astype(np.float16))
        found[str(share)] = {"vectors": vectors, "taus": taus}
    for part, numbers in (("train", draw_of(photos, draw)[0]), ("test", list(range(tests)))):
        shown = photos_of(cifar / f"cifar_{part}.tar.xz", numbers)
        found[part] = [shown.images, shown.labels["class"]]
    torch.save(found, path)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., arXiv 1512.03385) with the stem for small images: 3 x 3, no pooling."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage in range(4):
            for block in range(2):
                layers.append(Block(channels, width * 2**stage, 2 if stage and not block else 1))
                channels = width * 2**stage
        self.layers, self.features = nn.Sequential(*layers), channels

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean(dim=(2, 3))


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        same = stride == 1 and channels_in == channels
        short = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.short = nn.Identity() if same else short

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.short(x))


def view_of(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, P, P] in [-1, 1] cropped (20% and more), flipped, recoloured; one in five gray."""
    count, draws = len(images), torch.rand(9, len(images), generator=generator, device=images.device)
    side = (0.2 + 0.8 * draws[0]).sqrt()
    aspect = torch.exp((2 * draws[1] - 1) * math.log(4 / 3)).sqrt()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width * torch.where(draws[2] < 0.5, 1.0, -1.0), height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * draws[3] - 1), (1 - height) * (2 * draws[4] - 1)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    view = grid_sample(images, grid, padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (1 + 0.4 * (2 * draws[5:8] - 1))[:, :, None, None, None]
    saturation = saturation.masked_fill((draws[8] < 0.2)[:, None, None, None], 0)
    luma = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    gray = (view * luma).sum(1, keepdim=True)
    view = gray + saturation * (view - gray)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    view = mean + contrast * (view - mean)
    return (brightness * (view + 1) - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def soft_target(vectors: Tensor, taus: Tensor | None, views: int) -> Tensor:
    """[V B, V B] of unit vectors [B, d] at temperatures [B]; one-hot without. Of two views there is no self slot."""
    count = len(vectors)
    own = torch.eye(count, device=vectors.device)
    if taus is None:
        return own if views == 1 else own.repeat(2, 2).fill_diagonal_(0)
    logits = ((vectors @ vectors.T) * (1 - own) + own) / taus[:, None]
    if views == 1:
        return logits.softmax(1)
    logits = logits.repeat(2, 2).fill_diagonal_(-math.inf)
    return logits.softmax(1)


def loss_of(arm: str, views: list[Tensor], texts: Tensor | None, scale: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of the target and the softmax of cosines: between all views, or of each view and the texts."""
    first, second = (normalize(view.float()) for view in views)
    if texts is None:
        every = torch.cat([first, second])
        logits = (every @ every.T * scale).fill_diagonal_(torch.finfo(torch.float32).min / 2)
        return -(target * log_softmax(logits, 1)).sum(1).mean()
    words = normalize(texts.float())
    sides = [side for view in (first, second) for side in (view @ words.T, words @ view.T)]
    return torch.stack([-(target * log_softmax(scale * side, 1)).sum(1).mean() for side in sides]).mean()


def train(
    data: dict[str, Any], arm: str, share: float, seed: int, epochs: int, width: int, device: torch.device
) -> Any:
    """The trained encoder of an arm."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    images, batch = data["train"][0].to(device), data["batch"]
    encoder = ResNet18(width).to(device, memory_format=torch.channels_last)
    head = nn.Sequential(
        nn.Linear(encoder.features, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, PROJECTION)
    ).to(device)
    vectors = normalize(data[str(share)]["vectors"].float()).to(device)
    taus = data[str(share)]["taus"].get(arm)
    taus = None if taus is None else taus.to(device)
    words = nn.Linear(vectors.shape[1], PROJECTION).to(device) if arm.startswith("clip") else None
    log_scale = nn.Parameter(torch.tensor(math.log(1 / TAU), device=device), requires_grad=words is not None)
    modules = [module for module in (encoder, head, words) if module is not None]
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-2},
        {"params": [*(p for p in parameters if p.ndim < 2), log_scale], "weight_decay": 0.0},
    ]
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        place = step % (len(images) // batch)
        if place == 0:
            order = torch.randperm(len(images), generator=generator, device=device)
        chosen = order[place * batch : (place + 1) * batch]
        shown = images[chosen].float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            views = torch.cat([view_of(shown, generator) for _ in range(2)])
            projected = list(head(encoder(views)).chunk(2))
            texts = None if words is None else words(vectors[chosen])
        target = soft_target(vectors[chosen], None if taus is None else taus[chosen], 1 if words else 2)
        loss = loss_of(arm, projected, texts, log_scale.clamp(max=math.log(100)).exp(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return encoder.eval()


@torch.inference_mode()
def features_of(encoder: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    parts = (part.to(device).float() / 127.5 - 1 for part in images.split(1000))
    return torch.cat([encoder(part.contiguous(memory_format=torch.channels_last)).float() for part in parts])


def linear(x: Tensor, y: Tensor, queries: Tensor, penalty: float) -> Tensor:
    """The guesses for queries of a logistic regression on standardised features."""
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, queries = (x - mean) / deviation, (queries - mean) / deviation
    head = nn.Linear(x.shape[1], int(y.max()) + 1, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(x), y) + penalty * head.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return head(queries).argmax(1)


def accuracy(x: Tensor, y: Tensor, test: Tensor, truth: Tensor) -> float:
    """Of the linear probe, its penalty chosen on a fifth of x."""
    held = len(x) // 5
    scores = [(linear(x[held:], y[held:], x[:held], one) == y[:held]).float().mean().item() for one in PENALTIES]
    guesses = linear(x, y, test, PENALTIES[scores.index(max(scores))])
    return (guesses == truth).float().mean().item()


def run(path: Path, results: Path, epochs: int, seeds: int, width: int, minutes: float) -> None:
    """Append a line of each run that `results` does not have."""
    began, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.load(path, map_location="cpu", weights_only=True)
    kinds = sorted(set(data["train"][1]))
    truth = {
        part: torch.tensor([kinds.index(kind) for kind in data[part][1]], device=device) for part in ("train", "test")
    }
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    cells = [("simclr", SHARES[0]), *((arm, share) for share in SHARES for arm in ARMS)]
    for seed in range(seeds):
        for arm, share in cells:
            name = {"arm": arm, "p": None if arm == "simclr" else share, "seed": seed, "draw": data["draw"]}
            name |= {"epochs": epochs, "width": width}
            if any(name.items() <= line.items() for line in done):
                continue
            if time.time() - began > 60 * minutes:
                print(f"no run is begun after {minutes:g} minutes: the same command goes on")
                return
            started = time.time()
            encoder = train(data, arm, share, seed, epochs, width, device)
            x, test = (features_of(encoder, data[part][0], device) for part in ("train", "test"))
            score = accuracy(x, truth["train"], test, truth["test"])
            of = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            line = {**name, "linear class": score, "seconds": round(time.time() - started, 1), "device": of}
            with results.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(f"{arm}, p {name['p']}, seed {seed}: {100 * score:.1f}%, {line['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="F on one GPU")
    verbs = parser.add_subparsers(required=True)
    made, ran = verbs.add_parser("prepare"), verbs.add_parser("run")
    for verb in (made, ran):
        verb.add_argument("path", type=Path)
    made.add_argument("--cifar", type=Path, required=True, help="folder of cifar_train.tar.xz and cifar_test.tar.xz")
    made.add_argument("--captions", type=Path, required=True, help="parquet with the column caption")
    for name, default in (("photos", 10_000), ("tests", 6_000), ("draw", 0)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--work", type=Path, default=Path("runs/experiments/data"))
    made.set_defaults(verb=prepare)
    ran.add_argument("--results", type=Path, default=Path("photos_gpu.jsonl"))
    for name, default in (("epochs", 60), ("seeds", 3), ("width", 64)):
        ran.add_argument(f"--{name}", type=int, default=default)
    ran.add_argument("--minutes", type=float, default=9.0, help="begin no run after so long")
    ran.set_defaults(verb=run)
    given = vars(parser.parse_args())
    given.pop("verb")(**given)


if __name__ == "__main__":
    main()
