"""Probes against formulas written out in numpy, and on features whose content is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from graphbuild.errors import InputError


def mixture(n: int, classes: int, d: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points round a random centre for each class, which the seed leaves as they are: [n, d] and their classes."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = centres[y] + spread * rng.normal(size=(n, d))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def test_knn_is_the_vote_weighted_by_similarity_over_the_temperature() -> None:
    x, y = mixture(200, 4, 6, 1.5, 0)
    queries, _ = mixture(50, 4, 6, 1.5, 1)
    unit, asked = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in (x, queries))
    wanted = []
    for query in asked:
        similarity = unit @ query
        nearest = np.argsort(-similarity)[:7]
        votes = [np.exp(similarity[nearest] / 0.07)[y.numpy()[nearest] == label].sum() for label in range(4)]
        wanted.append(int(np.argmax(votes)))
    assert evaluate.knn(x, y, queries, 4, 7).tolist() == wanted


def test_linear_is_the_minimum_of_the_penalised_logistic_loss() -> None:
    x, y = mixture(150, 3, 5, 1.5, 0)
    queries, _ = mixture(400, 3, 5, 1.5, 1)
    mean, deviation = x.double().mean(0).numpy(), x.double().std(0).numpy()
    a, b = ((z.double().numpy() - mean) / deviation for z in (x, queries))

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        each = -log_softmax(a @ weight.T + bias, axis=1)[np.arange(150), y.numpy()]
        return float(each.mean() + 0.1 * (weight**2).sum() / 2)

    found = minimize(loss, np.zeros(18), tol=1e-9).x
    wanted = (b @ found[:15].reshape(3, 5).T + found[15:]).argmax(1)
    same = (evaluate.linear(x, y, queries, 3, 0.1).numpy() == wanted).mean()
    assert same >= 0.995  # a query on a border may fall to either side


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_is_the_nearest_mean_of_as_many_images_a_class_the_same_for_every_encoder(shots: int) -> None:
    """The draws follow from the labels and a fixed seed alone, whatever the features."""
    for seed in (0, 2):
        x, y = mixture(60, 3, 5, 1.0, seed)
        y = mixture(60, 3, 5, 1.0, 0)[1]
        queries, _ = mixture(40, 3, 5, 1.0, 1)
        guesses = evaluate.few_shot(x, y, queries, 3, shots)
        assert guesses.shape == (evaluate.DRAWS, 40)
        scaled = (x - x.mean(0)) / x.std(0)
        unit = scaled / scaled.norm(dim=1, keepdim=True)
        asked = (queries - x.mean(0)) / x.std(0)
        generator = torch.Generator().manual_seed(0)
        for guess in guesses:
            order = torch.randperm(60, generator=generator)
            drawn = torch.cat([order[y[order] == label][:shots] for label in range(3)])
            assert len(drawn) == 3 * shots
            means = torch.stack([unit[drawn][y[drawn] == label].mean(0) for label in range(3)])
            assert torch.equal(guess, (asked @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1))


def test_few_shot_is_perfect_on_separate_clusters_and_chance_on_noise() -> None:
    (x, y), (queries, truth) = mixture(300, 4, 16, 0.01, 0), mixture(200, 4, 16, 0.01, 1)
    assert evaluate.accuracy(evaluate.few_shot(x, y, queries, 4, 1), truth) == 1
    noise, more = torch.randn(300, 16), torch.randn(2000, 16)
    labels = torch.arange(2000) % 4
    assert abs(evaluate.accuracy(evaluate.few_shot(noise, y, more, 4, 5), labels) - 0.25) < 0.05


def test_a_probe_that_reads_the_background_fails_where_backgrounds_are_exchanged() -> None:
    """Features tell the background, which in training tells the kind; or they tell the kind."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 900)
    own, other = np.eye(4)[kinds], np.eye(4)[(kinds + 1) % 4]
    noisy = [torch.from_numpy(z + 0.05 * rng.normal(size=z.shape)).float() for z in (own, other)]
    names = [f"kind {kind}" for kind in kinds]
    labels = {
        part: {"kind": names[at]}
        for part, at in (("train", slice(0, 600)), ("test", slice(600, 900)), ("swapped", slice(600, 900)))
    }
    background = evaluate.probes(noisy[0][:600], {"test": noisy[0][600:], "swapped": noisy[1][600:]}, labels, "kind")
    assert background["linear kind"] > 0.99
    assert background["linear kind swapped"] < 0.01
    assert background["knn kind swapped"] < 0.01
    shape = evaluate.probes(noisy[0][:600], {"test": noisy[0][600:], "swapped": noisy[0][600:]}, labels, "kind")
    assert shape["linear kind"] == shape["linear kind swapped"] > 0.99


def test_hyper_parameters_are_chosen_on_a_fifth_of_the_train_part_which_the_probe_then_does_not_see() -> None:
    x, y = torch.arange(100).float()[:, None], torch.arange(100) % 2
    queries = torch.arange(-50, 0).float()[:, None]
    calls = []

    def probe(x: torch.Tensor, y: torch.Tensor, queries: torch.Tensor, classes: int, choice: float) -> torch.Tensor:
        calls.append(({*x[:, 0].tolist()}, {*queries[:, 0].tolist()}, choice))
        right = (queries[:, 0] % 2).long()
        return right if choice == 2 else 1 - right  # the second choice is right, as long as it is asked

    assert torch.equal(evaluate._chosen_on_validation(probe, (1, 2, 3), x, y, queries, 2), (queries[:, 0] % 2).long())
    *trials, (fitted, asked, choice) = calls
    assert (fitted, asked, choice) == (set(range(100)), set(range(-50, 0)), 2)
    assert [choice for *_, choice in trials] == [1, 2, 3]
    for fitted, asked, _ in trials:
        assert len(asked) == 20
        assert fitted == set(range(100)) - asked


@pytest.mark.parametrize("probe", ["linear", "knn", "5-shot"])
def test_a_guess_does_not_depend_on_what_else_is_asked(probe: str) -> None:
    """So nothing of a test part reaches a probe but the image that it guesses."""
    (x, y), (queries, truth) = mixture(300, 4, 8, 2.0, 0), mixture(200, 4, 8, 2.0, 1)
    labels = {
        "train": {"class": [str(value) for value in y.tolist()]},
        "test": {"class": [str(value) for value in truth.tolist()]},
        "other": {"class": ["0"] * 500},
    }
    alone = evaluate.probes(x, {"test": queries}, labels, "class")
    among = evaluate.probes(x, {"test": queries, "other": 9 + torch.randn(500, 8)}, labels, "class")
    assert alone[f"{probe} class"] == among[f"{probe} class"]


def test_probes_of_other_labels_are_linear_only() -> None:
    x, y = mixture(200, 3, 4, 0.1, 0)
    labels = {"class": [str(value) for value in y.tolist()], "parity": [str(value % 2) for value in y.tolist()]}
    found = evaluate.probes(x, {"test": x}, {"train": labels, "test": labels}, "class")
    assert set(found) == {"linear class", "linear parity", "knn class", "1-shot class", "5-shot class", "10-shot class"}
    assert found["linear class"] == 1


def test_zero_shot_takes_the_text_of_highest_cosine() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    images = torch.tensor([[2.0, 1.0], [0.3, 0.4], [-1.0, 0.1]])
    assert evaluate.zero_shot(images, texts, ["dog", "cat"], ["dog", "cat", "dog"]) == pytest.approx(2 / 3)


def test_features_are_those_of_the_encoder_in_eval_mode() -> None:
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12))
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)
    found = evaluate.features_of(encoder.train(), images, torch.device("cpu"), batch_size=3)
    wanted = (images.flatten(1).double() / 127.5 - 1) / np.sqrt(1 + 1e-5)
    assert torch.allclose(found.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("part", [37, 64, 200])
def test_probes_that_read_features_part_by_part_from_a_file_are_those_of_all_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: int
) -> None:
    (x, y), (queries, _) = mixture(200, 4, 6, 1.5, 0), mixture(90, 4, 6, 1.5, 1)
    wanted = evaluate.knn(x, y, queries, 4, 7), evaluate.linear(x, y, queries, 4, 0.01)
    x.numpy().tofile(tmp_path / "x")
    queries.numpy().tofile(tmp_path / "queries")
    stored, asked = (
        evaluate.Rows(np.memmap(tmp_path / name, np.float32, "r").reshape(-1, 6)) for name in ("x", "queries")
    )
    monkeypatch.setattr(evaluate, "PART", part)
    monkeypatch.setattr(evaluate, "ASKED", 11)
    assert torch.equal(evaluate.knn(stored, y, asked, 4, 7), wanted[0])
    assert (evaluate.linear(stored, y, asked, 4, 0.01) == wanted[1]).float().mean() >= 0.98  # borders
    order = torch.randperm(200)
    assert torch.equal(evaluate.knn(stored[order], y[order], asked, 4, 7), wanted[0])


def test_rows_of_a_file_are_read_only_where_they_are_asked_for(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    rows = evaluate.Rows(values)[torch.tensor([5, 2, 19, 0])]
    assert len(rows) == 4
    parts = [part.tolist() for part in rows[1:].split(2)]
    assert parts == [values[[2, 19]].tolist(), values[[0]].tolist()]


def test_a_streamed_probe_holds_a_part_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 rows of 64 numbers in parts of 1,000: no tensor of the fit is larger than one."""
    monkeypatch.setattr(evaluate, "PART", 1000)
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 2, 30_000))
    x = rng.normal(size=(30_000, 64)).astype(np.float32) + y.numpy()[:, None].astype(np.float32)
    largest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                largest = max(largest, found.numel())
            return found

    with Watched():
        guesses = evaluate.linear(evaluate.Rows(x), y, evaluate.Rows(x[:500]), 2, 1e-2)
    assert largest <= 1000 * 64
    assert (guesses == y[:500]).float().mean() > 0.99


def test_other_images_are_right_by_their_map() -> None:
    """Guesses of the classes dog, cat, car; a folder of pets takes two of them, one of kites none."""
    x, y = mixture(300, 3, 5, 0.1, 0)
    names = [("dog", "cat", "car")[label] for label in y.tolist()]
    own, other = x[:40], x[40:100]
    truths = ["pets" if name in ("dog", "cat") else "vehicles" for name in names[40:100]]
    images = evaluate.OtherImages("mixed", truths, {"pets": {"dog", "cat"}, "vehicles": {"bus"}})
    train = evaluate.Features({"e": x}, {".cls": names, "is_car": [str(name == "car") for name in names]})
    held = {label: values[:40] for label, values in train.labels.items()}
    rows = evaluate.evaluate(train, evaluate.Features({"e": torch.cat([own, other])}, held), [images])
    assert [row["label"] for row in rows] == [".cls", ".cls on mixed", "is_car"]
    assert (rows[0]["linear e"], rows[2]["linear e"]) == (1, 1)
    assert rows[1]["linear e"] == rows[1]["knn e"] == pytest.approx(truths.count("pets") / 60)


def test_labels_are_fields_of_json_or_members_of_their_own() -> None:
    batch = {"key": ["a", "b"], "json": [{"kind": 1}, {"kind": "x"}], "cls": [b"7\n", b"12"]}
    assert evaluate.values_of(batch, "kind") == ["1", "x"]
    assert evaluate.values_of(batch, ".cls") == ["7", "12"]
    assert evaluate.members_of(["kind", ".cls", "colour"]) == ["json", "cls"]
    with pytest.raises(InputError, match=r"(?s)sample a has no label 'colour'.*kind"):
        evaluate.values_of(batch, "colour")
