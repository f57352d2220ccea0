"""What frozen features know: linear, k-NN, few-shot and zero-shot probes, also where backgrounds are exchanged.

Hyper-parameters are chosen on a fifth of the train part, never on a test part, from the same choices for every
encoder. All features are held in memory, in float32; a label costs five fits of its linear probe. `extract` and
`evaluate` take labels from the json members of a store's samples and put the probes of several encoders beside each
other; `features_of` and `probes` take images that are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from models import scaled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from graphbuild.errors import InputError

NEIGHBOURS = (5, 20, 50)
KNN_TEMPERATURE = 0.07
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
VALIDATION_SHARE = 0.2
SHOTS = (1, 5, 10)
DRAWS = 10  # of the few images, for few-shot probes


@dataclass(frozen=True)
class Features:
    """Of each encoder [n, features], float32 on the CPU; and of each label n values."""

    by_encoder: dict[str, Tensor]
    labels: dict[str, list[str]]


@torch.inference_mode()
def extract(
    encoders: Mapping[str, nn.Module], batches: Iterable[dict[str, Any]], labels: Sequence[str], device: torch.device
) -> Features:
    """Features of every image, in the order of `batches`, which carry image and json."""
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    values: dict[str, list[str]] = {label: [] for label in labels}
    for batch in batches:
        images = scaled(batch["image"].to(device))
        for name, encoder in encoders.items():
            features[name].append(encoder(images).float().cpu())
        for label in labels:
            values[label] += values_of(batch, label)
    return Features({name: torch.cat(parts) for name, parts in features.items()}, values)


def values_of(batch: dict[str, Any], label: str) -> list[str]:
    """The values of a label in the json members of a batch; InputError where a sample has none."""
    for key, fields in zip(batch["key"], batch["json"], strict=True):
        if label not in fields:
            raise InputError(
                f"sample {key} has no label {label!r} in its json member", f"--labels can be of {', '.join(fields)}"
            )
    return [str(fields[label]) for fields in batch["json"]]


def evaluate(train: Features, test: Features) -> list[dict[str, Any]]:
    """One row a label: classes, chance, and accuracy on the test part of knn and linear for each encoder."""
    rows = []
    for label, names in train.labels.items():
        classes, (y_train, y_test) = numbered(names, test.labels[label])
        if classes > len(names) / 2:
            raise InputError(f"label {label!r} has {classes} values: too many for classes", "correct --labels")
        commonest = y_train.mode().values
        row: dict[str, Any] = {"label": label, "classes": classes, "chance": accuracy(commonest, y_test)}
        for encoder, x_train in train.by_encoder.items():
            x_test = test.by_encoder[encoder]
            for probe, choices in ((knn, NEIGHBOURS), (linear, PENALTIES)):
                predicted = _chosen_on_validation(probe, choices, x_train, y_train, x_test, classes)
                row[f"{probe.__name__} {encoder}"] = accuracy(predicted, y_test)
        rows.append(row)
    return rows


def numbered(*parts: Sequence[str]) -> tuple[int, list[Tensor]]:
    """How many classes the values of all parts name, and each part's as int64 numbers, in the order of the names."""
    classes = sorted({value for part in parts for value in part})
    number = {name: index for index, name in enumerate(classes)}
    return len(classes), [torch.tensor([number[value] for value in part]) for part in parts]


@torch.inference_mode()
def features_of(encoder: nn.Module, images: Tensor, device: torch.device, batch_size: int = 512) -> Tensor:
    """Features float32 [n, features] on the CPU of images uint8 [n, 3, H, W], with running statistics."""
    encoder.eval()
    return torch.cat([encoder(scaled(part.to(device))).float().cpu() for part in images.split(batch_size)])


def probes(
    train: Tensor, tests: Mapping[str, Tensor], labels: Mapping[str, Mapping[str, Sequence[str]]], main: str
) -> dict[str, float]:
    """Accuracies on each of `tests` (name to features [n, f]) of probes that are fitted on `train` alone.

    labels: of "train" and of each test part, the values of each label. The label `main` gets all probes, the others
    the linear one.

    Returns:
        "linear LABEL", and for main "knn LABEL", "S-shot LABEL"; on a part other than "test" with its name behind.
    """
    found: dict[str, float] = {}
    queries = torch.cat(list(tests.values()))
    for label, values in labels["train"].items():
        classes, (y, *truths) = numbered(values, *(labels[part][label] for part in tests))
        guesses = {"linear": _chosen_on_validation(linear, PENALTIES, train, y, queries, classes)}
        if label == main:
            guesses["knn"] = _chosen_on_validation(knn, NEIGHBOURS, train, y, queries, classes)
            guesses |= {f"{shots}-shot": few_shot(train, y, queries, classes, shots) for shots in SHOTS}
        for probe, guess in guesses.items():
            parts = guess.split([len(x) for x in tests.values()], dim=-1)
            for part, predicted, truth in zip(tests, parts, truths, strict=True):
                found[f"{probe} {label}" + (f" {part}" if part != "test" else "")] = accuracy(predicted, truth)
    return found


def few_shot(x: Tensor, y: Tensor, queries: Tensor, classes: int, shots: int) -> Tensor:
    """Nearest class mean (cosine) of `shots` labelled images a class, for several draws: int64 [DRAWS, m].

    x, y, queries: as of `knn`.
    Features are standardised by all of x, which needs no label. A class with fewer images gives those it has.
    """
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, queries = normalize((x - mean) / deviation), normalize((queries - mean) / deviation)
    generator = torch.Generator().manual_seed(0)
    guesses = []
    for _ in range(DRAWS):
        order = torch.randperm(len(x), generator=generator)
        chosen = [order[y[order] == number][:shots] for number in range(classes)]
        means = torch.stack([x[few].mean(0) if len(few) else torch.zeros_like(x[0]) for few in chosen])
        guesses.append((queries @ normalize(means).T).argmax(1))
    return torch.stack(guesses)


@torch.inference_mode()
def zero_shot(images: Tensor, texts: Tensor, classes: Sequence[str], truth: Sequence[str]) -> float:
    """Accuracy of the nearest class text (cosine). images [n, p] and texts [classes, p] in the space they share."""
    guesses = (normalize(images) @ normalize(texts).T).argmax(1)
    return accuracy(guesses, torch.tensor([list(classes).index(value) for value in truth]))


def knn(x: Tensor, y: Tensor, queries: Tensor, classes: int, neighbours: int) -> Tensor:
    """Votes of the nearest neighbours weighted by exp(cosine / 0.07), as in Wu et al., arXiv 1805.01978.

    x: features float32 [n, f]. y: their classes, int64 [n] in 0..classes-1. queries: float32 [m, f]. Returns the
    guessed classes, int64 [m].
    """
    similarity, nearest = (normalize(queries) @ normalize(x).T).topk(min(neighbours, len(x)))
    votes = torch.zeros(len(queries), classes)
    votes.scatter_add_(1, y[nearest], torch.exp((similarity - 1) / KNN_TEMPERATURE))
    return votes.argmax(1)


def linear(x: Tensor, y: Tensor, queries: Tensor, classes: int, penalty: float) -> Tensor:
    """Multinomial logistic regression with an L2 penalty on standardised features, fitted by L-BFGS; as `knn`."""
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, queries = (x - mean) / deviation, (queries - mean) / deviation
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(x), y) + penalty * head.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    with torch.inference_mode():
        return head(queries).argmax(1)


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Share of right guesses; predicted [n], or [draws, n] for the mean over draws; truth [n]."""
    return (predicted == truth).float().mean().item()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, accuracies in percent."""
    columns = list(rows[0])
    cells = [columns] + [
        [f"{100 * value:.1f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _chosen_on_validation(
    probe: Any, choices: Sequence[float], x: Tensor, y: Tensor, queries: Tensor, classes: int
) -> Tensor:
    """The guesses of a probe for queries, with the choice that does best on a fifth of x, fitted on all of x."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, kept = order.tensor_split([max(1, int(VALIDATION_SHARE * len(x)))])
    scores = [accuracy(probe(x[kept], y[kept], x[held], classes, choice), y[held]) for choice in choices]
    return probe(x, y, queries, classes, choices[scores.index(max(scores))])
