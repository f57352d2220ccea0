"""A tiny open_clip model, a store of drawn scenes, and open_clip's flags for both. Runs with `make test-open-clip`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeOnce
from tests.training.conftest import make_scenes_store

open_clip = pytest.importorskip("open_clip", reason="open_clip has its own environment: make test-open-clip")
pytest.importorskip("open_clip_train", reason="open_clip has its own environment: make test-open-clip")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
FLAGS = [
    *("--model", "graphbuild-tiny", "--batch-size", "64", "--epochs", "1", "--workers", "0", "--lr", "1e-3"),
    *("--warmup", "2", "--precision", "fp32", "--log-every-n-steps", "1"),
    *("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"),  # nothing drawn: each image is seen as it is
]


@pytest.fixture(scope="session")
def scenes(make_once: MakeOnce) -> Path:
    """Four tars of 120 scenes, their graph and sidecars beside them."""
    return make_once("scenes", make_scenes_store)


@pytest.fixture(scope="session", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "graphbuild-tiny.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(tmp_path: Path, scenes: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """`train(main, *flags)` in this process, on the scenes' first three tars; returns the weights at its end."""

    def run(main: Callable[[list[str]], Any], *flags: str, name: str = "run") -> dict[str, torch.Tensor]:
        given = [*FLAGS, "--logs", str(tmp_path), "--name", name, *flags]
        if "--train-data" not in given:
            given += ["--train-data", f"{scenes}/shards/{{00000..00002}}.tar"]
        assert main(given) in (None, 0)
        weights = max((tmp_path / name / "checkpoints").glob("epoch_*.pt"))
        return dict(torch.load(weights, weights_only=False)["state_dict"])

    return run
