"""A tiny open_clip model, a store of drawn scenes, and open_clip's flags for both. Runs with `make test-open-clip`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeOnce
from tests.training.conftest import make_scenes_store

if find_spec("open_clip_train") is None:  # it has an environment of its own
    collect_ignore_glob = ["test_*.py"]

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
FLAGS = [
    *("--model", "graphbuild-tiny", "--batch-size", "64", "--epochs", "1", "--workers", "0", "--lr", "1e-3"),
    *("--beta2", "0.98", "--eps", "1e-6", "--warmup", "2", "--precision", "fp32", "--log-every-n-steps", "1"),
    *("--aug-cfg", "scale=(1.0,1.0)"),
]


@pytest.fixture(scope="session")
def scenes(make_once: MakeOnce) -> Path:
    """Four tars of 120 scenes, their graph and sidecars beside them."""
    return make_once("scenes", make_scenes_store)


@pytest.fixture(scope="session", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    path = tmp_path_factory.mktemp("models") / "graphbuild-tiny.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path


@pytest.fixture
def train(tmp_path: Path, scenes: Path, one_thread: None) -> Callable[..., dict[str, torch.Tensor]]:
    """`train(main, *flags)` in this process, on the scenes' first three tars; returns the weights at its end."""

    def run(main: Callable[[list[str]], Any], *flags: str, name: str = "run") -> dict[str, torch.Tensor]:
        given = [*FLAGS, "--logs", str(tmp_path), "--name", name, *flags]
        if "--train-data" not in given:
            given += ["--train-data", f"{scenes}/shards/{{00000..00002}}.tar"]
        assert main(given) in (None, 0)
        weights = max((tmp_path / name / "checkpoints").glob("epoch_*.pt"))
        return dict(torch.load(weights, weights_only=False)["state_dict"])

    return run
