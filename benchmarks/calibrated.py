"""Shares of the other view asked for and got with tau_s="calibrated", by batch size; and what the calibration costs.

Got: mean and deviation over anchors of the share in X-Sample's target (two views), each anchor's a mean over --batches
random batches of a store's nodes, softmax in float64 of the similarities that the batch is given. Dense: of embeddings;
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
ANCHORS = 256  # of a batch
PIXELS, STEP = 64, 1_024


def stored(graph: SampleGraph, nodes: np.ndarray, sketch: bool = False) -> BatchEdges:
    fields = (nodes, *graph.neighbors(nodes), graph.background(nodes), *([graph.sketches(nodes)] if sketch else []))
    return BatchEdges(*map(torch.from_numpy, fields), node_count=len(graph))


def shares(values: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of anchors 0..A-1 of similarities [A, B]: the other view's share, the perplexity, the part at G < 0.3."""
    others = values.astype(np.float64)
    np.fill_diagonal(others, -np.inf)
    masses = np.exp((others - 1) / tau)
    share = 1 / (1 + 2 * masses.sum(axis=1))
    each = masses * share[:, None]
    entropy = -share * np.log(share) - 2 * (each * np.log(np.maximum(each, 1e-300))).sum(axis=1)
    low = (masses * (others < 0.3)).sum(axis=1) / masses.sum(axis=1)
    return share, np.exp(entropy), low


def batch_of(graph: SampleGraph, size: int, random: np.random.Generator, neighbors: bool) -> np.ndarray:
    if not neighbors:
        return random.choice(len(graph), size, replace=False)
    chosen: dict[int, None] = {}
    while len(chosen) < size:
        anchor = int(random.integers(len(graph)))
        chosen.update(dict.fromkeys([anchor, *graph.neighbors(anchor)[0][:7].tolist()]))
    return np.array(list(chosen)[:size])


def row(graph: SampleGraph, size: int, batches: int, asked: float) -> list[str]:
    random = np.random.default_rng(size)
    found: dict[str, list[np.ndarray]] = {}

    def note(name: str, *values: np.ndarray) -> None:
        found.setdefault(name, []).append(np.stack(values))

    anchors = np.sort(random.choice(len(graph), min(ANCHORS, size // 2), replace=False))
    for kind in ("random", "neighbors"):
        for _ in range(batches):
            nodes = batch_of(graph, size, random, kind == "neighbors")
            if kind == "random":  # the same anchors in each batch
                nodes = np.concatenate([anchors, np.setdiff1d(nodes, anchors)[: size - len(anchors)]])
            few = slice(len(anchors))
            vectors = graph.embeddings(nodes)
            dense = vectors[few] @ vectors.T
            edges = stored(graph, nodes)
            tau, _ = calibrated(
                edges.similarities[few], edges.background[few], len(graph), images=size, other_view=asked, slots=2
            )
            tau = tau.double().numpy()
            note(kind, *shares(dense, tau))
            if kind == "neighbors":
                continue
            note("fixed", *shares(dense, np.full((len(anchors), 1), 0.1)))
            for name in ("sketch", "edges"):
                targets = Targets(edges=stored(graph, nodes, sketch=name == "sketch"))
                given, _ = targets.tempered("calibrated", asked, size, 2)
                note(name, *shares(given.block()[few].numpy(), tau))
    share = {name: np.mean([one[0] for one in all_], axis=0) for name, all_ in found.items()}
    spread = {name: np.mean([one[1:] for one in all_], axis=(0, 2)) for name, all_ in found.items()}
    return [
        f"{size:,}",
        f"{share['fixed'].mean():.3f} ± {share['fixed'].std():.3f}",
        *(f"{share[name].mean():.3f} ± {share[name].std():.3f}" for name in ("random", "sketch", "edges", "neighbors")),
        f"{spread['random'][0]:.1f}",
        f"{spread['random'][1]:.0%}, {spread['fixed'][1]:.0%}",
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
    parser.add_argument("--batches", type=int, default=8)
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
                    print(f"| {' | '.join(row(graph, size, options.batches, asked))} |", flush=True)
    cost(graph)


if __name__ == "__main__":
    main()
