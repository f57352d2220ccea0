"""What frozen features know: linear, k-NN, few-shot and zero-shot probes, also where backgrounds are exchanged.

Hyper-parameters are chosen on a fifth of the train part, 10,000 images at most, never on a test part, from the same
choices for every encoder. `extract` and `evaluate` take labels from the members of a store's samples and put the probes
of several encoders beside each other. Their features lie in files, in float32, of which knn and linear hold PART rows
at once, and knn the queries: a label costs about 300 passes over them, five fits of its linear probe. `features_of` and
`probes` take images that are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import scaled
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from graphbuild.errors import InputError

NEIGHBOURS = (5, 20, 50)
KNN_TEMPERATURE = 0.07
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
VALIDATION_SHARE, VALIDATION_MOST = 0.2, 10_000
PART = 16_384  # features in memory at once
ASKED = 2048  # of them queries
CPU = torch.device("cpu")
SHOTS = (1, 5, 10)
DRAWS = 10  # of the few images, for few-shot probes


class Rows:
    """Rows of a matrix float32 [n, f] that lies in a file: chosen by index without reading, read part by part."""

    def __init__(self, values: NDArray[np.float32], rows: Tensor | None = None) -> None:
        self._values, self._rows = values, torch.arange(len(values)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chosen: Any) -> Rows:
        return Rows(self._values, self._rows[chosen])

    def split(self, size: int) -> Iterator[Tensor]:
        """As of a Tensor, but read one by one."""
        return (torch.from_numpy(self._values[rows.numpy()]) for rows in self._rows.split(size))


@dataclass(frozen=True)
class Features:
    """Of each encoder [n, f], float32 on the CPU; and of each label the values of the first images, up to n."""

    by_encoder: dict[str, Tensor | Rows]
    labels: dict[str, list[str]]


@dataclass(frozen=True)
class OtherImages:
    """Images that say which guesses are right: truths, a name for each; right, by such a name."""

    name: str
    truths: list[str]
    right: Mapping[str, set[str]]

    def accuracy(self, guesses: Sequence[str]) -> float:
        """Share of right guesses, one for each image."""
        return sum(map(set.__contains__, map(self.right.__getitem__, self.truths), guesses)) / len(guesses)


@torch.inference_mode()
def extract(
    encoders: Mapping[str, Any], batches: Iterable[Any], labels: Sequence[str], device: torch.device, folder: Path
) -> Features:
    """Features of every image, in the order of `batches`, in files of `folder`.

    Batches carry image, and the first ones what `values_of` reads of each label; those without a key have none.
    """
    values: dict[str, list[str]] = {label: [] for label in labels}
    for batch in batches:
        images = scaled(batch["image"].to(device))
        for name, encoder in encoders.items():
            with (folder / name).open("ab") as file:
                file.write(encoder(images).float().cpu().numpy().tobytes())
        for label in labels if "key" in batch else ():
            values[label] += values_of(batch, label)
    found = {name: np.memmap(folder / name, np.float32, "r") for name in encoders}
    return Features({name: Rows(found[name].reshape(-1, encoders[name].features)) for name in encoders}, values)


def members_of(labels: Sequence[str]) -> list[str]:
    """The members of a sample that hold labels: `.cls` is a member of its own, others are fields of json."""
    return list(dict.fromkeys(label[1:] if label.startswith(".") else "json" for label in labels))


def values_of(batch: dict[str, Any], label: str) -> list[str]:
    """The values of a label in the members of a batch; InputError where a sample has none."""
    if label.startswith("."):
        return [(value.decode() if isinstance(value, bytes) else str(value)).strip() for value in batch[label[1:]]]
    for key, fields in zip(batch["key"], batch["json"], strict=True):
        if label not in fields:
            raise InputError(
                f"sample {key} has no label {label!r} in its json member", f"--labels can be of {', '.join(fields)}"
            )
    return [str(fields[label]) for fields in batch["json"]]


def evaluate(
    train: Features, test: Features, others: Sequence[OtherImages] = (), device: torch.device = CPU
) -> list[dict[str, Any]]:
    """One row a label: classes, chance, and accuracy on the test part of knn and linear for each encoder.

    others: whose features stand behind those of the test part, in order; a row each, of the first label's probes.
    """
    rows: list[dict[str, Any]] = []
    for label, names in train.labels.items():
        held = test.labels[label]
        asked = [OtherImages(label, held, {value: {value} for value in held}), *(() if rows else others)]
        classes, (y, _) = numbered(names, held)
        if classes > len(names) / 2:
            raise InputError(f"label {label!r} has {classes} values: too many for classes", "correct --labels")
        kinds, sizes = sorted({*names, *held}), [len(one.truths) for one in asked]
        guesses = {"chance": y.mode().values.repeat(sum(sizes))}
        for encoder, x in train.by_encoder.items():
            queries = test.by_encoder[encoder][: sum(sizes)]
            for probe, choices in ((knn, NEIGHBOURS), (linear, PENALTIES)):
                here = partial(probe, device=device)
                guesses[f"{probe.__name__} {encoder}"] = _chosen_on_validation(here, choices, x, y, queries, classes)
        for place, one in enumerate(asked):
            parts = {name: [kinds[i] for i in all_.split(sizes)[place].tolist()] for name, all_ in guesses.items()}
            told = f"{label} on {one.name}" if place else label
            rows.append(
                {"label": told, "classes": classes} | {name: one.accuracy(part) for name, part in parts.items()}
            )
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


@torch.inference_mode()
def knn(
    x: Tensor | Rows, y: Tensor, queries: Tensor | Rows, classes: int, neighbours: int, device: torch.device = CPU
) -> Tensor:
    """Votes of the nearest neighbours weighted by exp(cosine / 0.07), as in Wu et al., arXiv 1805.01978.

    x: features float32 [n, f]. y: their classes, int64 [n] in 0..classes-1. queries: float32 [m, f]. device: where to
    compute. Returns the guessed classes, int64 [m].
    """
    asked = normalize(torch.cat(list(queries.split(PART)))).split(ASKED)
    best: list[tuple[Tensor, Tensor]] = [(torch.empty(len(few), 0), torch.empty(len(few), 0).long()) for few in asked]
    for part, truth in zip(x.split(PART), y.split(PART), strict=True):
        own = normalize(part.to(device)).T
        for number, few in enumerate(asked):
            similarity, place = (few.to(device) @ own).topk(min(neighbours, len(part)))
            near = torch.cat([best[number][0], similarity.cpu()], 1)
            votes = torch.cat([best[number][1], truth[place.cpu()]], 1)
            nearest, place = near.topk(min(neighbours, near.shape[1]))
            best[number] = nearest, votes.gather(1, place)
    similarity, voted = (torch.cat(parts) for parts in zip(*best, strict=True))
    votes = torch.zeros(len(queries), classes)
    return votes.scatter_add_(1, voted, torch.exp((similarity - 1) / KNN_TEMPERATURE)).argmax(1)


def linear(
    x: Tensor | Rows, y: Tensor, queries: Tensor | Rows, classes: int, penalty: float, device: torch.device = CPU
) -> Tensor:
    """Multinomial logistic regression with an L2 penalty on standardised features, fitted by L-BFGS; as `knn`.

    The loss and its gradient are sums over parts of x, so the fit is that of all of x at once.
    """
    mean = sum(part.double().sum(0) for part in x.split(PART)) / len(x)
    squares = sum((part - mean).square().sum(0) for part in x.split(PART))
    deviation = (squares / (len(x) - 1)).sqrt().float().clamp_min(1e-6).to(device)
    mean = mean.float().to(device)
    head = nn.Linear(len(mean), classes, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = penalty * head.weight.square().sum() / 2
        value.backward()
        for part, truth in zip(x.split(PART), y.split(PART), strict=True):
            logits = head((part.to(device) - mean) / deviation)
            of_part = cross_entropy(logits, truth.to(device), reduction="sum") / len(y)
            of_part.backward()
            value = value.detach() + of_part.detach()
        return value

    optimizer.step(loss)
    with torch.inference_mode():
        parts = (head((part.to(device) - mean) / deviation).argmax(1).cpu() for part in queries.split(PART))
        return torch.cat(list(parts))


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
    probe: Any, choices: Sequence[float], x: Tensor | Rows, y: Tensor, queries: Tensor | Rows, classes: int
) -> Tensor:
    """The guesses of a probe for queries, with the choice that does best on a fifth of x, fitted on all of x."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, kept = order.tensor_split([max(1, min(int(VALIDATION_SHARE * len(x)), VALIDATION_MOST))])
    held, kept = held.sort().values, kept.sort().values  # so that a file is read from front to back
    scores = [accuracy(probe(x[kept], y[kept], x[held], classes, choice), y[held]) for choice in choices]
    return probe(x, y, queries, classes, choices[scores.index(max(scores))])
