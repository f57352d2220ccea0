"""The trainer as a user starts it, on a small store of drawn shapes whose captions name shape, colour and
ground."""

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from graphbuild.sidecar import SidecarHeader, TarIdentity, quantize_int8, sidecar_schema

EPOCHS = 6
REPOSITORY = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that share cores with others wait for each other
KINDS = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}
GROUNDS = {"snow": (235, 235, 240), "night": (20, 20, 45), "sand": (215, 180, 130)}


def draw(kind: str, colour: str, ground: str, rng: np.random.Generator) -> bytes:
    pixels = int(rng.integers(40, 64))
    noise = rng.integers(-12, 13, (pixels, pixels, 3))
    image = Image.fromarray((np.array(GROUNDS[ground]) + noise).clip(0, 255).astype(np.uint8))
    pen, size = ImageDraw.Draw(image), pixels * rng.uniform(0.35, 0.55)
    x, y = rng.uniform(0, pixels - size, 2)
    box, fill = (x, y, x + size, y + size), COLOURS[colour]
    if kind == "circle":
        pen.ellipse(box, fill)
    elif kind == "square":
        pen.rectangle(box, fill)
    elif kind == "triangle":
        pen.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], fill)
    else:
        pen.rectangle((x + 0.35 * size, y, x + 0.65 * size, y + size), fill)
        pen.rectangle((x, y + 0.35 * size, x + size, y + 0.65 * size), fill)
    stream = io.BytesIO()
    image.save(stream, "jpeg")
    return stream.getvalue()


def write_store(folder: Path, shards: int, samples: int, d: int = 32, k: int = 4) -> Path:
    """Captions are embedded as the sum of a direction a word, so captions that share words are similar."""
    rng = np.random.default_rng(0)
    words = {word: rng.normal(size=d) for word in (*KINDS, *COLOURS, *GROUNDS)}
    (folder / "shards").mkdir(parents=True)
    for shard in range(shards):
        rows = np.arange(shard * samples, (shard + 1) * samples)
        tar, labels = folder / "shards" / f"{shard:05d}.tar", []
        with tarfile.open(tar, "w") as archive:
            for row in rows:
                label = {
                    name: str(rng.choice(tuple(values)))
                    for name, values in (("kind", KINDS), ("colour", COLOURS), ("background", GROUNDS))
                }
                labels.append(label)
                image = draw(label["kind"], label["colour"], label["background"], rng)
                for extension, content in (("jpg", image), ("json", json.dumps(label).encode())):
                    info = tarfile.TarInfo(f"{row:06d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        values, scale = quantize_int8(np.stack([sum(words[word] for word in label.values()) for label in labels]))
        header = SidecarHeader(
            encoder="words",
            d=d,
            k=k,
            embeddings="int8",
            graph="drawn",
            shard=tar.stem,
            tar=TarIdentity(name=tar.name, bytes=tar.stat().st_size, sha256=""),
            rows=samples,
        )
        schema = sidecar_schema(d, k, "int8").with_metadata(header.metadata())
        columns: dict[str, Any] = {
            "row": rows,
            "key": [f"{row:06d}" for row in rows],
            "node": rows,
            "caption": [f"a {label['colour']} {label['kind']} on {label['background']}" for label in labels],
            "embedding": list(values),
            "embedding_scale": scale,
            "neighbors": [[0] * k] * samples,
            "similarities": [[np.float16(0)] * k] * samples,
            "background_mean": [0.0] * samples,
            "background_std": [1.0] * samples,
            "image_offset": [512] * samples,
            "image_size": [100] * samples,
        }
        pq.write_table(pa.table(columns, schema=schema), tar.with_suffix(".graph.parquet"))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("drawn") / "store", shards=4, samples=160)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "training")
    return importlib.import_module("train")


def command(store: Path, run_dir: Path) -> list[str]:
    options = {
        "--run-dir": run_dir,
        "--labels": "kind,colour,background",
        "--epochs": EPOCHS,
        "--batch-size": 32,
        "--pixels": 32,
        "--shuffle": 200,
    }
    flags = [str(text) for option in options.items() for text in option]
    return [str(REPOSITORY / "training" / "train.py"), str(store), *flags]


def start(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir) if "loss" in record]


@pytest.fixture(scope="module")
def whole_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; output.txt holds what it printed."""
    run_dir = tmp_path_factory.mktemp("whole")
    (run_dir / "output.txt").write_text(start(command(store, run_dir)))
    return run_dir


def test_the_loss_falls_and_the_probe_beats_chance_and_an_untrained_encoder(whole_run: Path) -> None:
    curve = losses(whole_run)
    assert len(curve) == EPOCHS * 15
    assert np.mean(curve[-15:]) < np.mean(curve[:15]) - 0.2
    rows = {record["label"]: record for record in metrics(whole_run) if "label" in record}
    assert set(rows) == {"kind", "colour", "background"}
    for label in ("colour", "background"):
        assert rows[label]["linear trained"] > rows[label]["chance"] + 0.3
    trained, untrained = (
        np.mean([row[f"{name} {encoder}"] for row in rows.values() for name in ("knn", "linear")])
        for encoder in ("trained", "untrained")
    )
    assert trained > untrained + 0.03
    assert "linear untrained" in (whole_run / "output.txt").read_text()  # the final table
    assert json.loads((whole_run / "config.json").read_text())["epochs"] == EPOCHS


def test_a_killed_run_goes_on_with_the_same_losses(store: Path, whole_run: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, *command(store, tmp_path)], stdout=subprocess.DEVNULL, env=ONE_THREAD)
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and '"epoch": 2' in path.read_text()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(losses(tmp_path)) < len(losses(whole_run))
    output = start(command(store, tmp_path))
    assert f"epoch 1/{EPOCHS}" not in output
    assert metrics(tmp_path) == metrics(whole_run)
    assert not list(tmp_path.glob("*.tmp"))


def test_mistakes_are_explained(store: Path, tmp_path: Path, trainer: ModuleType) -> None:
    for options, message in (
        ({"batch_size": 5000}, "lower --batch-size"),
        ({"held_out": 4}, "--held-out must leave one"),
        ({"labels": "kind", "held_out": 0}, "set --held-out to 1"),
        ({"labels": "size"}, "no label 'size'"),
    ):
        with pytest.raises(SystemExit, match=message):
            trainer.main(str(store), tmp_path / message, **{"epochs": 1, "pixels": 16, **options})


def test_a_run_of_other_settings_is_not_continued(store: Path, tmp_path: Path, trainer: ModuleType) -> None:
    trainer.main(str(store), tmp_path, epochs=1, pixels=16)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match="trained with other seed"):
        trainer.main(str(store), tmp_path, epochs=1, pixels=16, seed=1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_two_ranks_train_in_step(store: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start([*launcher, *command(store, tmp_path)])
    # Three train shards over two ranks: rank 1 has one, 160 samples, so both take 5 steps of 32 an epoch.
    assert len(losses(tmp_path)) == EPOCHS * 5
    assert metrics(tmp_path)[-1]["label"] == "background"
