"""What one GPU does with graphbuild, in at most 10 minutes: first whether it is right, against float64, then how fast.

Needs torch and numpy alone, so it runs on a bare machine from a checkout. Exact search (benchmarks/knn_gpu.py), the
packed encoder on a BERT of random weights, X-Sample and CLIP with fixed and calibrated targets, and a ResNet-50 step
with and without targets. A check that fails ends the run before anything is timed. The results page goes to --out.

    python benchmarks/gpu.py --out results.md
    python benchmarks/gpu.py --device cpu --small        # the same code in miniature
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import knn_gpu

from graphbuild.knn import device as search
from graphbuild.nodes.encoder.packed import PackedBert
from graphbuild.nodes.encoder.tokens import Tokens
from graphbuild.torch import BatchEdges, CLIPLoss, NTXentLoss, Targets, XSampleLoss

OTHER_VIEW, K = 0.6, 32


# -- the encoder


class Bert(nn.Module):
    """The parts of a BERT by the names that transformers gives them, with random weights."""

    def __init__(self, width: int, depth: int, heads: int, words: int = 30_522) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=heads, model_type="bert")

        norm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings = _Named(
            word_embeddings=nn.Embedding(words, width), position_embeddings=nn.Embedding(512, width), LayerNorm=norm
        )
        self.encoder = _Named(layer=nn.ModuleList(_layer(width) for _ in range(depth)))

    def reference(self, ids: Tensor) -> Tensor:
        """The mean token vector [width] of one text, by the equations of BERT, in this module's own precision."""
        heads, places = self.config.num_attention_heads, torch.arange(len(ids), device=ids.device)
        hidden = self.embeddings.LayerNorm(
            self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(places)
        )
        for layer in self.encoder.layer:
            own = layer.attention.self
            query, key, value = (
                part(hidden).unflatten(1, (heads, -1)).transpose(0, 1) for part in (own.query, own.key, own.value)
            )
            weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[2])).softmax(dim=2)
            mixed = (weights @ value).transpose(0, 1).flatten(1)
            out = layer.attention.output
            hidden = out.LayerNorm(hidden + out.dense(mixed))
            inner = F.gelu(layer.intermediate.dense(hidden))
            hidden = layer.output.LayerNorm(hidden + layer.output.dense(inner))
        return hidden.mean(dim=0)


class _Named(nn.Module):
    def __init__(self, /, **parts: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def _layer(width: int) -> nn.Module:
    def dense(rows: int, columns: int) -> nn.Linear:
        linear = nn.Linear(rows, columns)
        nn.init.normal_(linear.weight, std=rows**-0.5)
        return linear

    def norm() -> nn.LayerNorm:
        return nn.LayerNorm(width, eps=1e-12)

    return _Named(
        attention=_Named(
            self=_Named(query=dense(width, width), key=dense(width, width), value=dense(width, width)),
            output=_Named(dense=dense(width, width), LayerNorm=norm()),
        ),
        intermediate=_Named(dense=dense(width, 4 * width), intermediate_act_fn=F.gelu),
        output=_Named(dense=dense(4 * width, width), LayerNorm=norm()),
    )


def captions(count: int) -> Tokens:
    """Random token ids of texts as long as CC3M's captions are: 5 to 40 tokens, 13 in the mean."""
    random = np.random.default_rng(0)
    lengths = np.clip(5 + random.geometric(1 / 8, count), 5, 40).astype(np.int64)
    return Tokens(random.integers(1_000, 30_000, int(lengths.sum())), lengths, 0)


def encoder(place: str, *, small: bool) -> tuple[str, dict[str, object]]:
    torch.manual_seed(0)
    width, depth, heads = (64, 2, 4) if small else (384, 6, 12)
    model, tokens = Bert(width, depth, heads).to(place).eval(), captions(24 if small else 200_000)
    rows, checked = (256 if small else 65_536), 20
    exact = Bert(width, depth, heads).to(place).double().eval()
    exact.load_state_dict(model.state_dict())
    ids = torch.from_numpy(tokens.ids).to(place)
    some = Tokens(tokens.ids[: tokens.starts[checked]], tokens.lengths[:checked], 0)
    with torch.inference_mode():
        wanted = torch.stack([exact.reference(ids[a : a + n]) for a, n in zip(some.starts, some.lengths, strict=True)])
    facts: dict[str, object] = {}
    for name, dtype, least in (("float32", torch.float32, 0.999999), ("bfloat16", torch.bfloat16, 0.999)):
        packed = PackedBert(model, "mean", dtype=dtype, rows=rows)
        cosine = F.cosine_similarity(packed.pooled(some)[0].double(), wanted).min().item()
        require(cosine > least, f"encoding in {name}: a cosine of {cosine:.6f} to float64")
        facts[f"least cosine, {name}"] = f"{cosine:.6f}"
        seconds = knn_gpu.seconds(lambda packed=packed: packed.pooled(tokens), place)
        products = 2 * len(tokens.ids) * depth * 12 * width**2
        facts[f"texts/s, {name}"] = f"{len(tokens.lengths) / seconds:,.0f}"
        facts[f"share of the products' rate, {name}"] = f"{products / seconds / rate(place, dtype, small=small):.2f}"
    return f"encoding, a BERT of {depth} layers of {width}", facts


def rate(place: str, dtype: torch.dtype, *, small: bool) -> float:
    """Operations a second of one large matrix product."""
    size = 128 if small else 8_192
    a, b = torch.randn(2, size, size, device=place).to(dtype)
    return 2 * size**3 / knn_gpu.seconds(lambda: a @ b, place)


# -- losses


class Graph:
    """Exact lists of random vectors in clusters, and what a store keeps beside them."""

    def __init__(self, nodes: int, width: int, place: str) -> None:
        random = np.random.default_rng(0)
        topics = random.normal(size=(max(nodes // 8, 2), width)) + 0.3
        vectors = topics[random.integers(0, len(topics), nodes)] + 1.2 * random.normal(size=(nodes, width))
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        similar = self.vectors @ self.vectors.T
        np.fill_diagonal(similar, -2)
        order = np.argsort(-similar, axis=1)
        self.ids, rest = order[:, :K], np.take_along_axis(similar, order[:, K:-1], axis=1)
        self.similarities = np.take_along_axis(similar, self.ids, axis=1)
        self.background = np.stack([rest.mean(axis=1), rest.std(axis=1)], axis=1)
        self.place = place

    def batch(self, nodes: np.ndarray) -> tuple[np.ndarray, Targets]:
        def there(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64)).to(self.place)

        lists = map(there, (nodes, self.ids[nodes], self.similarities[nodes], self.background[nodes]))
        stored = BatchEdges(*lists, node_count=len(self.vectors))
        return self.vectors[nodes], Targets(embeddings=there(self.vectors[nodes]), calibration=stored)


def losses(place: str, *, small: bool) -> tuple[str, dict[str, object]]:
    size, width = (64, 16) if small else (1_024, 128)
    graph, random = Graph(1_000 if small else 8_000, 32, place), np.random.default_rng(1)
    z = random.normal(size=(2, size, width))
    vectors, targets = graph.batch(random.choice(len(graph.vectors), size, replace=False))
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, 1)
    unit = z / np.linalg.norm(z, axis=2, keepdims=True)
    both = np.concatenate(unit)
    soft, logits = np.tile(similar, (2, 2)) / 0.1, both @ both.T / 0.1
    np.fill_diagonal(soft, -1e9)
    np.fill_diagonal(logits, -1e9)
    clip = log_softmax(similar / 0.1), log_softmax(unit[0] @ unit[1].T / 0.07), log_softmax(unit[1] @ unit[0].T / 0.07)
    wanted = {
        "X-Sample": -(np.exp(log_softmax(soft)) * log_softmax(logits)).sum() / len(both),
        "CLIP, soft": -(np.exp(clip[0]) * (clip[1] + clip[2])).sum() / size / 2,
    }
    given = [torch.from_numpy(part).float().to(place) for part in z]
    facts: dict[str, object] = {}
    for name, loss in (("X-Sample", XSampleLoss(0.1, 0.1)), ("CLIP, soft", CLIPLoss(0.07, 0.1))):
        found = loss(*given, targets).item()
        require(abs(found / wanted[name] - 1) < 1e-5, f"{name}: {found} where float64 has {wanted[name]}")
        facts[f"{name}, off float64 by"] = f"{abs(found / wanted[name] - 1):.0e}"
    calibrated, shares = XSampleLoss(0.1, "calibrated", other_view=OTHER_VIEW), []
    for _ in range(8 if small else 24):
        _, of_batch = graph.batch(random.choice(len(graph.vectors), size, replace=False))
        calibrated(*given, of_batch)
        shares.append(calibrated.target_facts["other_view"].item())
    share = float(np.mean(shares))
    require(abs(share - OTHER_VIEW) < 0.03, f"calibrated targets: {share} for the other view of {OTHER_VIEW} asked for")
    facts[f"other view's share, {OTHER_VIEW} asked"] = f"{share:.3f}"
    return f"losses, B = {size}", facts


def log_softmax(rows: np.ndarray) -> np.ndarray:
    top = rows.max(axis=1, keepdims=True)
    return rows - top - np.log(np.exp(rows - top).sum(axis=1, keepdims=True))


# -- a step


class Bottleneck(nn.Module):
    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()

        def conv(a: int, b: int, size: int, step: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, size, step, size // 2, bias=False), nn.BatchNorm2d(b))

        self.inner = nn.Sequential(
            conv(entering, width, 1), nn.ReLU(), conv(width, width, 3, stride), nn.ReLU(), conv(width, 4 * width, 1)
        )
        same = stride == 1 and entering == 4 * width
        self.short = nn.Identity() if same else conv(entering, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.short(x))


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Sequential:
    """He et al., arXiv 1512.03385, with a projection to 128 in place of the classes."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    parts.append(nn.MaxPool2d(3, 2, 1))
    entering = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            parts.append(Bottleneck(entering, width << stage, 2 if stage and not number else 1))
            entering = 4 * (width << stage)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, 128))


def step(place: str, *, small: bool) -> tuple[str, dict[str, object]]:
    """A training step with each loss, in turns, and what targets add to it."""
    size, side = (8, 32) if small else (256, 224)
    torch.manual_seed(0)
    model = (resnet50((1, 1), 8) if small else resnet50()).to(place, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(2 * size, 3, side, side, device=place).to(memory_format=torch.channels_last)
    graph = Graph(400 if small else 4_000, 32, place)
    _, targets = graph.batch(np.arange(size))
    kinds = {
        "NT-Xent, no targets": (NTXentLoss(0.1), None),
        "X-Sample, fixed": (XSampleLoss(0.1, 0.1), targets),
        "X-Sample, calibrated": (XSampleLoss(0.1, "calibrated"), targets),
    }

    def take(loss: nn.Module, known: Targets | None) -> None:
        for _ in range(1 if small else 10):
            with torch.autocast(place, torch.bfloat16):
                z = model(images)
            optimizer.zero_grad(set_to_none=True)
            loss(z[:size], z[size:], known).backward()
            optimizer.step()

    seconds = dict.fromkeys(kinds, math.inf)
    for _ in range(3):
        for name, kind in kinds.items():
            seconds[name] = min(seconds[name], knn_gpu.seconds(lambda kind=kind: take(*kind), place))
    plain = seconds["NT-Xent, no targets"]
    facts: dict[str, object] = {f"{name}, x the plain step": f"{found / plain:.3f}" for name, found in seconds.items()}
    facts["images/s, plain"] = f"{2 * size * (1 if small else 10) / plain:,.0f}"
    return f"a ResNet-50 step, B = {size}, {side} pixels, bfloat16", facts


# -- search


def exact_search(place: str, *, small: bool) -> tuple[str, dict[str, object]]:
    nodes, queries = (2_000, 500) if small else (2_900_000, 131_072)
    x = knn_gpu.vectors(nodes, 384, place)
    codes, scales = knn_gpu.encode(x)
    whole = search.Side(0, codes, scales, torch.full_like(scales, -torch.inf))

    def own(rows: int) -> Tensor:
        part = search.Side(0, *(values[:rows] for values in whole[1:]))
        return torch.cat([found for _, found in search.search(part, whole, 2 * K + 16)])

    recall = knn_gpu.check(x, own(min(1_000, queries)), K)
    require(recall == 1, f"exact search: recall {recall} against float64")
    mine = knn_gpu.seconds(lambda: own(queries), place)
    theirs = knn_gpu.seconds(
        lambda: [knn_gpu.plain(x, at, min(8_192, queries - at), K) for at in range(0, queries, 8_192)], place
    )
    return f"exact search, {nodes:,} x 384, k = {K}", {
        "recall of candidates, float64": f"{recall:.6f}",
        "x matmul and topk in float16": f"{theirs / mine:.2f}",
        "seconds for all nodes": f"{mine * nodes / queries:,.1f}",
        "10^12 operations/s of int8": f"{2 * nodes * queries * 384 / mine / 1e12:,.2f}",
    }


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"wrong: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a miniature, in seconds on a CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    place = options.device
    lines = [f"# graphbuild on {torch.cuda.get_device_name() if place == 'cuda' else place}", ""]
    lines += [f"torch {torch.__version__}; `benchmarks/gpu.py`", "", "| | |", "|---|---|"]
    for part in (losses, encoder, exact_search, step):
        title, facts = part(place, small=options.small)
        for name, value in facts.items():
            lines.append(f"| {title}: {name} | {value} |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
