"""A store of drawn scenes, brought through embed, index and export, for the tests of the trainer."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import encode_jpeg, make_scenes, render
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

TRAINING = Path(__file__).parents[2] / "training"
sys.path.insert(0, str(TRAINING))  # as `python training/train.py` finds its modules


@pytest.fixture(scope="session")
def scenes_store(make_once: Callable[[str, Callable[[Path], object]], Path]) -> str:
    """Four tars of 120 scenes of 48 pixels; json members say what they show. To be copied where a test changes it."""
    return str(make_once("scenes", make_scenes_store))


def make_scenes_store(folder: Path) -> None:
    (folder / "shards").mkdir()
    for number, scene in enumerate(make_scenes(480)):
        with tarfile.open(folder / "shards" / f"{number // 120:05d}.tar", "a") as archive:
            members = {
                "jpg": encode_jpeg(render(scene, 48)),
                "txt": caption(scene).encode(),
                "json": json.dumps(asdict(scene)).encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    recipe = Recipe(embed=Embed(shards=f"{folder}/shards/*.tar"), index=Index(k=8))
    opened = Store(str(folder))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index", "export"):
            run_verb(verb, recipe, opened, runner)
