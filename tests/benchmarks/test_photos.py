"""Photos with found captions: which caption a photo gets, the data that is made of them, and the form for one GPU."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments import photos, photos_gpu
from graphbuild.errors import InputError
from graphbuild.torch import BatchEdges, CLIPLoss, NTXentLoss, Targets, XSampleLoss
from graphbuild.torch.calibration import calibrated

ROOT = Path(__file__).parents[2]
CLASSES = list(photos.MENTIONS)
pytestmark = pytest.mark.usefixtures("one_thread")


def captions() -> list[str]:
    about = [f"a {name} in picture {number}" for name in CLASSES for number in range(20)]
    return about + [f"people at table {number}" for number in range(200)] + ["a dog and a cat", "Dogs!", "dogged work"]


@pytest.mark.parametrize(
    ("caption", "classes"),
    [
        ("Two CATS on a mat", ["cat"]),
        ("a category of its own", []),
        ("a dog on a boat", ["dog", "ship"]),
        ("a train car", ["automobile"]),
    ],
)
def test_a_caption_mentions_a_class_by_whole_words(caption: str, classes: list[str]) -> None:
    assert photos.mentioned(caption) == classes


def test_the_pool_has_captions_of_one_class_or_none_as_many_as_wanted() -> None:
    pool = photos.pool_of([*captions(), *captions()], 100)
    assert {name: len(listed) for name, listed in pool.items()} == {"": 100, **dict.fromkeys(CLASSES, 10)}
    assert all(photos.mentioned(text) == [name] for name, listed in pool.items() if name for text in listed)
    assert len(set(pool[""])) == 100
    assert photos.pool_of(list(reversed(captions())), 100) == pool
    with pytest.raises(InputError, match="frog"):
        photos.pool_of([text for text in captions() if "frog" not in text], 100)


def test_captions_are_relevant_as_often_as_asked_and_nested_over_the_shares() -> None:
    pool = photos.pool_of(captions(), 100)
    classes = [CLASSES[number % 10] for number in range(2000)]
    drawn = {p: photos.drawn_captions(pool, classes, p, random.Random(5)) for p in (0.0, 0.1, 0.3, 1.0)}
    for p, texts in drawn.items():
        fits = [photos.mentioned(text) == [kind] for text, kind in zip(texts, classes, strict=True)]
        assert abs(np.mean(fits) - p) < 0.03
        assert all(fit or photos.mentioned(text) == [] for fit, text in zip(fits, texts, strict=True))
    for row in zip(*drawn.values(), strict=True):
        assert len(set(row)) <= 2  # its own relevant one and its other one
    changed = [one != other for one, other in zip(drawn[0.1], drawn[0.3], strict=True)]
    assert all(drawn[0.1][row] == drawn[0.0][row] for row in np.flatnonzero(changed))


# --- the whole path, on archives made here --------------------


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Archives of 10 x 10 and 10 x 3 pictures of noise around a colour of their class, and a list of captions."""
    monkeypatch.setattr(photos, "FOR_TRAINING", 70)
    monkeypatch.setattr(photos, "FOR_PROBES", 20)
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        with tarfile.open(tmp_path / f"cifar_{split}.tar.xz", "w:xz") as archive:
            for place, name in enumerate(CLASSES):
                for number in range(count):
                    shown = np.clip(25 * place + rng.integers(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                    content = io.BytesIO()
                    Image.fromarray(shown).save(content, "JPEG", quality=95)
                    info = tarfile.TarInfo(f"{split}/{name}/{number:04d}.jpg")
                    info.size = content.tell()
                    archive.addfile(info, io.BytesIO(content.getvalue()))
    pq.write_table(pa.table({"caption": captions()}), tmp_path / "captions.parquet")
    return tmp_path


@pytest.mark.slow
def test_a_recipe_with_photos_is_run_once_on_draws_of_its_seeds_and_its_differences_are_told(
    given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"images": "photos", "train": 40, "test": 30, "probe": 20, "pixels": 32, "k": 9, "draw": "seed"}
    recipe: dict[str, Any] = {
        "title": "Small",
        "data": {
            "classes": data,
            "half": {**data, "relevance": 0.5},
            "held": {**data, "relevance": 0.5, "validation": True, "test": 10},
        },
        "base": {"method": "xsample", "width": 8, "pixels": 32, "batch_size": 20, "epochs": 1, "held_out": 0},
        "forms": {"reduced": {"seeds": 2}},
        "order": "seeds",
        "groups": [
            {
                "name": "half",
                "data": "half",
                "variants": {
                    "SupCon": {"data": "classes", "method": "supcon"},
                    "calibrated": {"other_view": 0.6},
                    "uniform": {"targets": "uniform", "other_view": 0.6},
                    "validation": {"data": "held", "method": "clip"},
                },
            }
        ],
        "measures": ["linear class", "target's other view"],
        "baselines": ["SupCon"],
    }
    path = given / "small.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    options: dict[str, Any] = {
        "recipes": [path], "cifar": given, "captions": given / "captions.parquet",
        "work": given / "work", "results": given / "results",
    }  # fmt: skip
    experiments.run(**options)
    lines = [json.loads(line) for line in (given / "results" / "small.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["variant"]) for line in lines] == [
        (seed, variant) for seed in (0, 1) for variant in recipe["groups"][0]["variants"]
    ]
    shares = {(line["variant"], line["seed"]): line["metrics"]["target's other view"] for line in lines}
    assert shares["uniform", 0] == pytest.approx(0.6, abs=1e-4)
    assert shares["calibrated", 1] == pytest.approx(0.6, abs=0.1)
    drawn = set()
    for folder in (given / "work" / "data").glob("*/store/shards"):
        tars = sorted(folder.glob("*.tar"))
        with tarfile.open(tars[0]) as archive:
            texts = {m.name: archive.extractfile(m).read().decode() for m in archive if m.name.endswith(("txt", "cls"))}  # type: ignore[union-attr]
        kinds = [texts[name] for name in sorted(texts) if name.endswith("cls")]
        fits = [
            photos.mentioned(texts[name.replace("cls", "txt")]) == [kind]
            for name, kind in zip((n for n in sorted(texts) if n.endswith("cls")), kinds, strict=True)
        ]
        assert len(fits) == 40
        assert 0.25 < np.mean(fits) < 0.75 or all(fits)
        drawn.add(tuple(kinds))
    assert len(drawn) == 2  # a draw for each seed, the same for all variants
    capsys.readouterr()
    experiments.run(**options)
    assert "small: 8 of 8 runs are finished" in capsys.readouterr().out
    experiments.write_summary([path], results=given / "results", plots=False)
    told = (given / "results" / "small.md").read_text()
    mine, base = (
        [line["metrics"]["linear class"] for line in lines if line["variant"] == v] for v in ("uniform", "SupCon")
    )
    mean = 50 * (mine[0] - base[0] + mine[1] - base[1])
    assert f"| uniform | {mean:+.1f} (" in told


# --- the form for one GPU --------------------


@pytest.mark.parametrize("arm", ["simclr", "clip", "clip calibrated", "xsample calibrated"])
def test_the_losses_of_the_gpu_form_are_graphbuild_s(arm: str) -> None:
    generator, count, k = torch.Generator().manual_seed(0), 12, 5
    z = torch.randn(3, count, 8, generator=generator)
    vectors = torch.nn.functional.normalize(torch.randn(count, 6, generator=generator))
    near = torch.rand(count, k, generator=generator).sort(descending=True).values / 2 + 0.3
    neighbors = torch.stack([torch.randperm(40, generator=generator)[:k] for _ in range(count)])
    background = torch.tensor([[0.1, 0.1]]).repeat(count, 1)
    edges = BatchEdges(torch.arange(count), neighbors, near, background, None, 0.1, 40)
    with_texts = arm.startswith("clip")
    taus = calibrated(edges, images=count, other_view=0.6, slots=1 if with_texts else 2)[0][:, 0]
    target = photos_gpu.soft_target(vectors, taus if "calibrated" in arm else None, 1 if with_texts else 2)
    found = photos_gpu.loss_of(arm, [z[0], z[1]], z[2] if with_texts else None, torch.tensor(10.0), target)
    told = Targets(embeddings=vectors, calibration=edges)
    if with_texts:
        loss = CLIPLoss(0.1, tau_s="calibrated" if "calibrated" in arm else None)
        expected = (loss(z[0], z[2], told) + loss(z[1], z[2], told)) / 2
    else:
        expected = (
            XSampleLoss(0.1, "calibrated")(z[0], z[1], told) if "calibrated" in arm else NTXentLoss(0.1)(z[0], z[1])
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_gpu_form_runs_with_torch_alone_and_goes_on_where_it_stopped(given: Path) -> None:
    data, results = given / "photos.pt", given / "gpu.jsonl"
    photos_gpu.prepare(data, given, given / "captions.parquet", photos=40, tests=30, draw=0, work=given / "work")
    alone = (
        "import sys, runpy\n"
        "class Others:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('graphbuild', 'pyarrow', 'yaml', 'PIL', 'scipy', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Others())\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    command = [sys.executable, "-c", alone, str(ROOT / "benchmarks/experiments/photos_gpu.py"), "run", str(data)]
    options = ["--results", str(results), "--epochs", "2", "--width", "8"]
    for seeds in ("1", "1", "2"):
        subprocess.run([*command, *options, "--seeds", seeds], check=True, capture_output=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    cells = [("simclr", None), *((arm, p) for p in photos_gpu.SHARES for arm in photos_gpu.ARMS)]
    assert [(line["arm"], line["p"], line["seed"]) for line in lines] == [
        (*cell, seed) for seed in (0, 1) for cell in cells
    ]
    assert np.mean([line["linear class"] for line in lines]) > 0.3  # colours are easy; chance is 0.1
