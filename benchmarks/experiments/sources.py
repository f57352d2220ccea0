"""Data of the experiments, made once: tars and their store through graphbuild's own commands, and labelled images.

A folder FOLDER/<fingerprint>/ holds store/ (with the training tars in store/shards), probe.npz and test.npz (images
and labels), for scenes swapped.npz (the test scenes on other backgrounds), for icons gallery.npz (for retrieval), and
prompts.json and .npy (the embedded names of classes, for zero-shot). Images are made or read one by one; the labelled
sets are held whole: 12 KB an image of 64 pixels.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.experiments.icons import write_icons
from benchmarks.experiments.labelled import LabelledImages, decoded
from benchmarks.experiments.photos import MENTIONS, TEMPLATE, write_cifar, write_photos, write_tars
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import ATTRIBUTES, BACKGROUNDS, KINDS, Scene, encode_jpeg, make_scenes, render
from graphbuild.errors import StageError

GRAPHBUILD = (sys.executable, "-c", "from graphbuild.cli import main; main()")
WORDS, WORDS_DIM = "words", 384  # the encoder that knows words, not meanings: a random vector for each token
SCENES_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to prepare. Numbers of images; probe: training images whose labels the probes get.

    usual_background: share of the scenes that are put on the background usual for their kind; the others have any.
    permuted: every training scene has another one's caption, a control: a graph of the same shape that knows nothing.
    encoder: a name or folder as for `graphbuild embed`, or "words". dim: first coordinates kept.
    Of photos (benchmarks/experiments/photos.py): relevance: the share whose caption mentions their class; None: class
    prompts. draw: which photos are trained on, with which captions. validation: test on photos of the training archive.
    Of icons (benchmarks/experiments/icons.py): draw: which authors' icons are trained on; test: the gallery's number;
    shared: train on names alone that so many authors have.
    """

    images: Literal["scenes", "cifar", "photos", "icons"]
    train: int
    test: int
    probe: int
    pixels: int
    k: int
    usual_background: float = 0.0
    permuted: bool = False
    encoder: str | None = None
    dim: int | None = None
    shard_size: int = 1000
    relevance: float | None = None
    draw: int | None = None
    validation: bool = False
    shared: int | None = None

    @property
    def main_label(self) -> str:
        return "kind" if self.images == "scenes" else "class"

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields; of those that came later the ones that are set, so that other data keep their fingerprints."""
        later = ("relevance", "draw", "validation", "shared")
        return {name: value for name, value in asdict(self).items() if name not in later or value not in (None, False)}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.decisive)


@dataclass(frozen=True)
class Prepared:
    """A folder that `prepare` has finished."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def labelled(self) -> dict[str, LabelledImages]:
        """probe (to fit on), test, and for scenes swapped."""
        names = ("probe", "test", "swapped")
        paths = [self.folder / f"{name}.npz" for name in names]
        return {path.stem: LabelledImages.load(path) for path in paths if path.exists()}

    def gallery(self) -> LabelledImages | None:
        """Of icons, those that are looked for among each other."""
        path = self.folder / "gallery.npz"
        return LabelledImages.load(path) if path.exists() else None

    def prompts(self) -> dict[str, Tensor]:
        """Of each value of the main label its embedding, float32 [d], unit norm."""
        names = json.loads((self.folder / "prompts.json").read_text())
        rows = torch.from_numpy(np.load(self.folder / "prompts.npy")).float()
        return dict(zip(names, torch.nn.functional.normalize(rows), strict=True))


def fingerprint(values: object) -> str:
    """Of anything that JSON can hold: the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def prepare(
    data: Data, folder: Path, cifar: Path | None = None, captions: Path | None = None, icons: Path | None = None
) -> Prepared:
    """Make what is missing of `data` under `folder`. cifar: the folder of cifar_train.tar.xz and cifar_test.tar.xz.
    captions: a list of captions, parquet with the column caption. icons: the tar of the npm package @iconify/json.

    Raises:
        ConfigError: no such images, or CIFAR, captions or icons without their place.
        StageError: a graphbuild command failed.
    """
    root = folder / data.fingerprint
    done = root / "data.json"
    if done.exists():
        return Prepared(root)
    root.mkdir(parents=True, exist_ok=True)
    shards = root / "store" / "shards"
    if not shards.exists():
        temporary = root / "shards.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if data.images == "scenes":
            _write_scenes(data, root, temporary)
        elif data.images == "icons":
            write_icons(data, root, temporary, icons)
        else:
            (write_cifar if data.images == "cifar" else write_photos)(data, root, temporary, cifar, captions)
        shards.parent.mkdir(exist_ok=True)
        temporary.rename(shards)
    source: dict[str, Any] = {"shards": f"{shards}/*.tar", **_encoder(data, root)}
    if data.images == "cifar":
        source |= {"caption_member": "cls", "class_names": str(root / "classes.txt"), "template": TEMPLATE}
    elif data.relevance is not None:
        source = {"shards": f"{shards}/*.tar", "vector_member": "npy"}
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"embed": source, "index": {"k": data.k}}))
    graphbuild("run", recipe, root / "store")
    _embed_prompts(data, root)
    done.write_text(json.dumps(asdict(data), indent=2) + "\n")
    return Prepared(root)


def scenes_of(data: Data, count: int, seed: int) -> list[Scene]:
    """Scenes, a share of them on the background that is usual for their kind, as in photographs of the world."""
    rng = random.Random(f"backgrounds {seed}")
    names = tuple(BACKGROUNDS)
    scenes = []
    for scene in make_scenes(count, seed):
        usual = names[KINDS.index(scene.kind) % len(names)]
        scenes.append(replace(scene, background=usual) if rng.random() < data.usual_background else scene)
    return scenes


def other_background(scene: Scene) -> str:
    """One of the backgrounds that the scene does not have, by its seed."""
    return random.Random(f"swap {scene.seed}").choice([name for name in BACKGROUNDS if name != scene.background])


def _write_scenes(data: Data, root: Path, shards: Path) -> None:
    train = scenes_of(data, data.train, SCENES_SEED)
    test = scenes_of(data, data.test, SCENES_SEED + 1)

    captions = [caption(scene) for scene in train]
    if data.permuted:
        random.Random("permuted captions").shuffle(captions)

    def samples() -> Iterator[dict[str, bytes]]:
        for scene, text in zip(train, captions, strict=True):
            labels = {name: getattr(scene, name) for name in ATTRIBUTES}
            picture = encode_jpeg(render(scene, data.pixels))
            yield {"jpg": picture, "txt": text.encode(), "json": json.dumps(labels).encode()}

    write_tars(shards, samples(), data.shard_size)
    for name, scenes in (("probe", train[: data.probe]), ("test", test)):
        _save_scenes(root / f"{name}.npz", scenes, [None] * len(scenes), data.pixels)
    _save_scenes(root / "swapped.npz", test, [other_background(scene) for scene in test], data.pixels)


def _save_scenes(path: Path, scenes: Sequence[Scene], backgrounds: Sequence[str | None], pixels: int) -> None:
    """Pictures and what they show: with another background, that one."""
    pictures = [
        encode_jpeg(render(scene, pixels, background=background))
        for scene, background in zip(scenes, backgrounds, strict=True)
    ]
    shown = [
        scene if background is None else replace(scene, background=background)
        for scene, background in zip(scenes, backgrounds, strict=True)
    ]
    labels = {name: [str(getattr(scene, name)) for scene in shown] for name in ATTRIBUTES}
    decoded(pictures, labels, pixels).save(path)


def _encoder(data: Data, root: Path) -> dict[str, Any]:
    """The fields of a recipe's embed section that say which encoder."""
    named = str(_words_encoder(root / WORDS)) if data.encoder == WORDS else data.encoder
    return {name: value for name, value in (("encoder", named), ("dim", data.dim)) if value is not None}


def _words_encoder(folder: Path) -> Path:
    """A sentence-transformers model whose texts are means of random vectors, one a token: similar means same words."""
    if folder.exists():
        return folder
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    from graphbuild.nodes.encoder.find import find_encoder
    from graphbuild.recipe import DEFAULT_ENCODER

    tokenizer = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu").tokenizer
    vectors = torch.randn(len(tokenizer), WORDS_DIM, generator=torch.Generator().manual_seed(0))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors.numpy())]).save(str(folder))
    return folder


def _embed_prompts(data: Data, root: Path) -> None:
    """The values of the main label in words, embedded by the store's own encoder; once for all data of photos."""
    if data.images == "photos":
        prompts = {name: TEMPLATE.format(name) for name in MENTIONS}
    elif data.images == "scenes":
        prompts = {kind: f"A {kind}" for kind in KINDS}
    elif data.images == "icons":
        prompts = {name: name for name in (root / "classes.txt").read_text().splitlines()}
    else:
        names = (root / "classes.txt").read_text().split()
        prompts = {name: TEMPLATE.format(name) for name in names}
    place = root.parent / f"photos-prompts-{fingerprint(_encoder(data, root))}" if data.images == "photos" else root
    place.mkdir(exist_ok=True)
    if not (place / "prompts.json").exists():
        _write_prompts(prompts, _encoder(data, root), place)
    for name in ("prompts.npy", "prompts.json") if place != root else ():
        shutil.copy(place / name, root / name)


def _write_prompts(prompts: dict[str, str], encoder: dict[str, Any], place: Path) -> None:
    listed, folder = place / "prompts.csv", place / "prompts"
    with listed.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["caption"])
        writer.writerows([text] for text in prompts.values())
    graphbuild("embed", folder, "--captions", listed, *(f"--{name}={value}" for name, value in encoder.items()))
    vectors = np.concatenate([np.load(path) for path in sorted((folder / "nodes").glob("*.npy"))])
    if len(vectors) != len(prompts):
        raise StageError(
            f"{folder} has {len(vectors)} nodes for {len(prompts)} prompts", "give each class its own name"
        )
    np.save(place / "prompts.npy", vectors)
    (place / "prompts.json").write_text(json.dumps(list(prompts)) + "\n")


def graphbuild(*arguments: str | Path) -> None:
    """One graphbuild command, in a process of its own; what it says is shown where it fails."""
    command = [*GRAPHBUILD, *map(str, arguments), "--workers", "0", "--progress", "plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        said = shlex.join(["graphbuild", *command[3:]])
        raise StageError(f"`{said}` ended with {done.returncode}", f"its last words: {told}")
