"""Exact k nearest neighbours on one GPU: graphbuild's device search against torch matmul + topk. Needs torch alone.

Vectors are random mixtures on the GPU (the time of an exact search depends on them little). First the lists of 1,000
nodes are compared with a float64 search, ties aside; then both are timed, best of three, in the same process.

    python benchmarks/knn_gpu.py --nodes 2900000 --width 384 --k 64
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from graphbuild.knn import device
from graphbuild.knn.products import unit


def vectors(nodes: int, width: int, place: str) -> torch.Tensor:
    generator = torch.Generator(place).manual_seed(0)
    centres = torch.randn(max(nodes // 100, 1), width, device=place, generator=generator)
    x = torch.empty(nodes, width, device=place, dtype=torch.float16)
    for first in range(0, nodes, 100_000):
        part = x[first : first + 100_000]
        chosen = torch.randint(len(centres), (len(part),), device=place, generator=generator)
        noise = torch.randn(len(part), width, device=place, generator=generator)
        part.copy_(torch.nn.functional.normalize(centres[chosen] + noise, dim=1))
    return x


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [n, d] and scales float32 [n] of float16 vectors on their device, as in `graphbuild.knn.codes`."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(x), device=x.device)
    for at in range(0, len(x), device.ROWS):
        exact = unit(x[at : at + device.ROWS])
        scales[at : at + device.ROWS] = exact.abs().amax(dim=1) / 127
        codes[at : at + device.ROWS] = torch.round(exact / scales[at : at + device.ROWS, None]).to(torch.int8)
    return codes, scales


def plain(x: torch.Tensor, first: int, rows: int, k: int, columns: int = 65_536) -> torch.Tensor:
    """The same by matmul and topk in float16, block by block: ids [rows, k]."""
    best = torch.full((rows, k), -torch.inf, device=x.device, dtype=x.dtype)
    ids = torch.zeros((rows, k), device=x.device, dtype=torch.int64)
    own = torch.arange(first, first + rows, device=x.device)
    for at in range(0, len(x), columns):
        tile = x[first : first + rows] @ x[at : at + columns].T
        inside = torch.nonzero((own >= at) & (own < at + tile.shape[1])).squeeze(1)
        tile[inside, own[inside] - at] = -torch.inf
        top, where = tile.topk(min(k, tile.shape[1]), dim=1)
        best, kept = torch.cat([best, top], dim=1).topk(k, dim=1)
        ids = torch.cat([ids, where + at], dim=1).gather(1, kept)
    return ids


def check(x: torch.Tensor, found: torch.Tensor, k: int) -> float:
    """Recall@k of candidate lists [n, c] of nodes 0..n-1, by float64 similarity with tolerance 1e-6."""
    exact = torch.nn.functional.normalize(x[: len(found)].double(), dim=1)
    true = torch.full((len(found), k), -torch.inf, device=x.device, dtype=torch.float64)
    own = torch.arange(len(found), device=x.device)
    for at in range(0, len(x), 65_536):
        tile = exact @ torch.nn.functional.normalize(x[at : at + 65_536].double(), dim=1).T
        inside = torch.nonzero((own >= at) & (own < at + tile.shape[1])).squeeze(1)
        tile[inside, own[inside] - at] = -torch.inf
        true = torch.cat([true, tile.topk(min(k, tile.shape[1]), dim=1).values], dim=1).topk(k, dim=1).values
    others = torch.nn.functional.normalize(x[found.reshape(-1)].double(), dim=1).reshape(*found.shape, -1)
    scores = torch.einsum("nd,ncd->nc", exact, others).topk(k, dim=1).values
    return float((scores >= true[:, -1:] - 1e-6).double().mean())


def seconds(call: object, place: str) -> float:
    times = []
    for _ in range(3):
        if place == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()  # type: ignore[operator]
        if place == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2_900_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument(
        "--queries", type=int, default=262_144, help="rows timed; the whole takes nodes / queries times it"
    )
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    x = vectors(options.nodes, options.width, options.device)
    length, queries = min(2 * options.k + 16, options.nodes - 1), min(options.queries, options.nodes)
    codes, scales = encode(x)
    whole = device.Side(0, codes, scales, torch.full_like(scales, -torch.inf))

    def own(rows: int) -> torch.Tensor:
        part = device.Side(0, *(values[:rows] for values in whole[1:]))
        return torch.cat([found for _, found in device.search(part, whole, length)])

    recall = check(x, own(min(1_000, queries)), options.k)
    mine = seconds(lambda: own(queries), options.device)
    theirs = seconds(
        lambda: [plain(x, at, min(8_192, queries - at), options.k) for at in range(0, queries, 8_192)], options.device
    )
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result = {"device": name, "nodes": options.nodes, "width": options.width, "k": options.k, "queries": queries}
    result |= {
        "recall": recall,
        "seconds": mine,
        "whole_seconds": mine * options.nodes / queries,
        "ratio": theirs / mine,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
