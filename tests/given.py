"""What pages take for granted, made in the working folder for test_pages.py; each returns names for the page's Python.

`out` is there before: a store over six tars of scenes in `out/shards`. So is `other`, over two of them.
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import webdataset
from torch import nn

import graphbuild.torch
from graphbuild import SampleGraph
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import BACKGROUNDS, encode_jpeg, make_scenes, render
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

TARS, SAMPLES, K, BATCH = 6, 96, 32, 64  # SAMPLES of a tar; all samples fill nine batches
Names = dict[str, Any]


def make_stores(folder: Path) -> None:
    """`out`, and `other`, in which each sample has two captions."""
    scenes = make_scenes(TARS * SAMPLES)
    for name, tars, members in (("out", TARS, "txt"), ("other", 2, "txt;json:recaption")):
        (folder / name / "shards").mkdir(parents=True)
        for tar in range(tars):
            with webdataset.TarWriter(f"{folder}/{name}/shards/{tar:05d}.tar", mtime=0) as writer:
                for number in range(tar * SAMPLES, (tar + 1) * SAMPLES):
                    writer.write({"__key__": f"{number:04d}", **sample_of(scenes[number])})
        recipe = Recipe(embed=Embed(shards=f"{folder}/{name}/shards/*.tar", caption_member=members), index=Index(k=K))
        with Runner(workers=0) as runner:
            for verb in ("embed", "index", "export"):
                run_verb(verb, recipe, Store(f"{folder}/{name}"), runner)


def sample_of(scene: Any) -> Names:
    """A sample's members; its labels have a second caption, and the width of an original that there is not."""
    labels = {**asdict(scene), "recaption": caption(replace(scene, seed=scene.seed + 1)), "width": scene.seed % 400}
    number = list(BACKGROUNDS).index(scene.background)
    return {"jpg": encode_jpeg(render(scene, 64)), "txt": caption(scene), "json": labels, "cls": number}


def copies(*names: str, of: str = "out") -> None:
    for name in names:
        shutil.copytree(of, name)


def tars(name: str) -> None:
    shutil.copytree("out/shards", name, ignore=shutil.ignore_patterns("*.parquet", "*.json"))


def nothing() -> Names:
    return {}


def demo() -> Names:
    """The demo's store, and none in `out`."""
    Path("out").rename("demo")
    return {}


def loop() -> Names:
    """What a reader's training loop over `out` has."""
    graph, data = SampleGraph.open("out"), graphbuild.torch.GraphDataset("out/shards/*.tar", image_pixels=32)
    batch = data.collate([data[row] for row in range(BATCH)])
    views = dict(zip(("z1", "z2", "images", "texts"), torch.randn(4, BATCH, 8), strict=True))
    public = {name: getattr(graphbuild.torch, name) for name in graphbuild.torch.__all__}
    names = {**public, **views, "graph": graph, "batch": batch, "nodes": batch["node"].numpy(), "dataset": data}
    more = {"SampleGraph": SampleGraph, "DataLoader": torch.utils.data.DataLoader, "np": np, "torch": torch}
    return {**names, **more, "epochs": 1}


def loaders() -> Names:
    names = loop()
    sampler = names["NeighborBatchSampler"](names["graph"], BATCH, nodes=names["dataset"].nodes)
    state = names["GraphLoader"](names["dataset"], sampler, num_workers=2).state_dict()
    return {**names, "checkpoint": {"loader": state}}


def losses() -> Names:
    tars("data/tars")
    names = loop()
    towers = {"image_tower": lambda images: names["images"], "text_tower": lambda captions: names["texts"]}
    return {**names, **towers, "two_views": lambda image: (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))}


def readme() -> Names:
    tars("cc3m")
    shutil.rmtree("out")
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8))
    return {"model": model, "augment": lambda images: images.float() / 255}


def embedding() -> Names:
    """Vectors by key, by the order of files, in the tars, and as clip-retrieval writes them."""
    for name in ("tars", "emb", "meta", "emb_in_order", "img_emb", "metadata"):
        Path(name).mkdir()
    draw = np.random.default_rng(0)
    for tar in range(TARS):
        vectors = draw.standard_normal((SAMPLES, 16)).astype(np.float32)
        keys = [f"{number:04d}" for number in range(tar * SAMPLES, (tar + 1) * SAMPLES)]
        with webdataset.TarWriter(f"tars/{tar:05d}.tar", mtime=0) as writer:
            for key, vector in zip(keys, vectors, strict=True):
                writer.write({"__key__": key, "txt": f"picture {key}", "npy": vector})
        for path in (f"emb/{tar}.npy", f"emb_in_order/{tar}.npy", f"img_emb/img_emb_{tar}.npy"):
            np.save(path, vectors)
        pl.DataFrame({"key": keys}).write_parquet(f"meta/{tar}.parquet")
        pl.DataFrame({"image_path": keys}).write_parquet(f"metadata/metadata_{tar}.parquet")
        pl.DataFrame({"key": keys, "embedding": vectors}).write_parquet(f"emb/{tar}.parquet")
    return {}


def questions() -> Names:
    for path in ("questions.csv", "coco_val.csv"):
        pl.DataFrame({"caption": ["two red stars", "a blue ring on grass"]}).write_csv(path)
    tars("coco_val")
    return {}


def mining() -> Names:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    copies("answers")
    copies("questions", of="other")
    names = loop()
    model = importlib.import_module("small").small_model(pl.read_parquet("out/nodes/*.parquet")["text"].to_list())
    args = SentenceTransformerTrainingArguments("trained", max_steps=2, report_to=[])
    training = {"model": model, "args": args, "loss": MultipleNegativesRankingLoss(model)}
    views = {"z_image": names["images"], "z_text": names["texts"], "tau": 0.1}
    return {**names, **training, **views, "SentenceTransformerTrainer": SentenceTransformerTrainer}


def selections() -> Names:
    rows = TARS * SAMPLES
    return {"difficulty": np.random.default_rng(0).random(rows), "allowed": np.arange(rows) % 2 == 0}


def sources() -> Names:
    """Tars, and a dataset of parquet files with images."""
    tars("tars")
    shutil.rmtree("out")
    Path("my-dataset/data").mkdir(parents=True)
    for number in range(2):
        rows = [sample_of(scene) for scene in make_scenes(40, seed=number)]
        columns = {"image": [row["jpg"] for row in rows], "caption": [row["txt"] for row in rows]}
        pl.DataFrame(columns).write_parquet(f"my-dataset/data/train-{number:05d}.parquet")
    return {}


def trainer() -> Names:
    """The demo's store, two more, and folders of images as ImageNet-9 and ObjectNet have them."""
    copies("demo", "cc3m", "imagenet", "STORE")
    names = list(BACKGROUNDS)
    for folder in ("bg_challenge/mixed_same/val", "bg_challenge/mixed_rand/val", "objectnet-1.0/images"):
        for number, scene in enumerate(make_scenes(40)):
            path = Path(folder) / f"{names.index(scene.background):02d}_{scene.background}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_jpeg(render(scene, 64)))
    Path("objectnet-1.0/mappings").mkdir()
    folders = {f"{number:02d}_{name}": name.title() for number, name in enumerate(names)}
    for path, value in {
        "in_to_in9.json": {str(number): number for number in range(len(names))},
        "objectnet-1.0/mappings/folder_to_objectnet_label.json": folders,
        "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json": {name.title(): name for name in names},
    }.items():
        Path(path).write_text(json.dumps(value))
    Path("imagenet_names.txt").write_text("\n".join(names))
    return {}


def format_() -> Names:
    """A store by that name, in whose folder the page's last code is; its samples have two captions."""
    import numpy
    import polars

    copies("STORE", of="other")
    copies("shards", of="other/shards")
    return {"numpy": numpy, "polars": polars}


def benchmarks(root: Path = Path(__file__).parents[1]) -> Names:
    shutil.copytree(root / "benchmarks", "benchmarks")
    return {}
