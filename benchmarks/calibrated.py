"""Shares of the other view asked for and got with tau_s="calibrated", by batch size; and what the calibration costs.

Got: mean and deviation over anchors of the share in X-Sample's target (two views), each anchor's a mean over random
batches of a store's nodes, softmax in float64 of the similarities that the batch is given. Dense: of embeddings;
sketch and edges: stored lists completed. Neighbours: batches of random anchors with 7 of their nearest each, at the
temperature of random ones. Beside it what tau_s = 0.1 gives, and of what other images get, the part at G < 0.3.
Cost: seconds of the calibration beside those of a training step of 1,024 images, two views, on this machine.

    graphbuild embed STORE --vectors captions.npy && graphbuild index STORE
    python benchmarks/calibrated.py STORE [STORE ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from graphbuild import SampleGraph
from graphbuild.torch import BatchEdges, Targets, XSampleLoss
from graphbuild.torch.calibration import calibrated

SIZES = (64, 256, 1_024, 4_096, 8_192)
ANCHORS = 256
SPREAD = 16_384  # images in all batches of a size, or four batches
PIXELS, STEP = 64, 1_024


def stored(graph: SampleGraph, nodes: np.ndarray, sketch: bool = False) -> BatchEdges:
    fields = (nodes, *graph.neighbors(nodes), graph.background(nodes), *([graph.sketches(nodes)] if sketch else []))
    return BatchEdges(*map(torch.from_numpy, fields), node_count=len(graph))


def shares(values: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Of anchors, by their similarities [A, B - 1] to the other images: the other view's share, the perplexity, and the
    part at G < 0.3; [3, A]."""
    others = values.astype(np.float64)
    masses = np.exp((others - 1) / tau)
    share = 1 / (1 + 2 * masses.sum(axis=1))
    each = masses * share[:, None]
    entropy = -share * np.log(share) - 2 * (each * np.log(np.maximum(each, 1e-300))).sum(axis=1)
    low = (masses * (others < 0.3)).sum(axis=1) / masses.sum(axis=1)
    return np.stack([share, np.exp(entropy), low])


def neighbor_batch(graph: SampleGraph, size: int, random: np.random.Generator) -> np.ndarray:
    chosen: dict[int, None] = {}
    while len(chosen) < size:
        anchor = int(random.integers(len(graph)))
        chosen.update(dict.fromkeys([anchor, *graph.neighbors(anchor)[0][:7].tolist()]))
    return np.array(list(chosen)[:size])


def row(graph: SampleGraph, size: int, asked: float) -> list[str]:
    random = np.random.default_rng(size)
    found: dict[str, list[np.ndarray]] = {}
    anchors = np.sort(random.choice(len(graph), ANCHORS, replace=False))
    rest = np.setdiff1d(np.arange(len(graph)), anchors)

    def temperatures(nodes: np.ndarray) -> np.ndarray:
        return calibrated(stored(graph, nodes), images=size, other_view=asked, slots=2)[0].double().numpy()

    tau, queries = temperatures(anchors), graph.embeddings(anchors)
    for _ in range(max(4, SPREAD // size)):
        nodes = np.concatenate([anchors, random.choice(rest, size - 1, replace=False)])
        dense = queries @ graph.embeddings(nodes[ANCHORS:]).T
        found.setdefault("dense", []).append(shares(dense, tau))
        found.setdefault("fixed", []).append(shares(dense, np.full((ANCHORS, 1), 0.1)))
        for name in ("sketch", "edges"):
            targets = Targets(edges=stored(graph, nodes, sketch=name == "sketch"))
            given, _ = targets.tempered("calibrated", asked, size, 2)
            found.setdefault(name, []).append(shares(given.block()[:ANCHORS, ANCHORS:].numpy(), tau))
        near = neighbor_batch(graph, size, random)
        few = slice(min(ANCHORS, size))
        vectors = graph.embeddings(near)
        similar = vectors[few] @ vectors.T
        np.fill_diagonal(similar, -np.inf)
        found.setdefault("neighbours", []).append(shares(similar, temperatures(near[few])).mean(axis=1, keepdims=True))
    mean = {name: np.mean(values, axis=0) for name, values in found.items()}
    return [
        f"{size:,}",
        *(f"{mean[name][0].mean():.3f} ± {mean[name][0].std():.3f}" for name in ("fixed", "dense", "sketch", "edges")),
        f"{mean['neighbours'][0].mean():.2f}",
        f"{mean['dense'][1].mean():.1f}",
        f"{mean['dense'][2].mean():.0%}, {mean['fixed'][2].mean():.0%}",
    ]


def seconds_of(run: Callable[[], object], times: int) -> float:
    run()
    spent = []
    for _ in range(times):
        began = time.process_time()
        run()
        spent.append(time.process_time() - began)
    return float(np.median(spent))


def cost(graph: SampleGraph) -> None:
    """CPU seconds of a step of a network as small as the trainer's, the cheapest to be calibrated beside."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128))
    nodes = np.random.default_rng(0).choice(len(graph), min(STEP, len(graph)), replace=False)
    targets = Targets(embeddings=torch.from_numpy(graph.embeddings(nodes)), calibration=stored(graph, nodes))
    images = torch.randn(2 * len(nodes), 3, PIXELS, PIXELS)
    loss = XSampleLoss(tau_s=0.1)

    def step() -> None:
        loss(*model(images).chunk(2), targets).backward()

    whole, extra = seconds_of(step, 3), seconds_of(lambda: targets.tempered("calibrated", 0.6, len(nodes), 2), 20)
    print(
        f"\nA step of {len(nodes):,} images of {PIXELS} pixels with a network of four convolutions: {whole:.2f} CPU s;"
        f" the calibration: {1e3 * extra:.1f} CPU ms, {extra / whole:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--other-view", type=float, nargs="+", default=[0.6])
    options = parser.parse_args()
    names = ("B", "tau_s = 0.1", "dense", "sketch", "edges", "neighbours", "perplexity", "at G < 0.3: now, tau_s = 0.1")
    for store in options.stores:
        graph = SampleGraph.open(store)
        for asked in options.other_view:
            print(f"\n{store}: {len(graph):,} nodes, k = {graph.k}, {graph.encoder}; {asked} asked\n")
            print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
            for size in SIZES:
                if 2 * size <= len(graph):
                    print(f"| {' | '.join(row(graph, size, asked))} |", flush=True)
    cost(graph)


if __name__ == "__main__":
    main()
