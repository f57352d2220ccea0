"""The size of an encoder, by the shapes of its weights and its config.json; no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from graphbuild.nodes.encoder.find import find_encoder
from graphbuild.nodes.matrix import is_matrix
from graphbuild.recipe import Recipe


@dataclass(frozen=True)
class EncoderFacts:
    d: int = 384  # of an embedding
    layers: float = 0.0  # weights of its layers: 2 FLOP each a token
    hidden: int = 384
    depth: int = 6
    bytes: float = 0.0  # of its files
    folder: Path | None = None


NO_ENCODER = EncoderFacts()
"""As of ready vectors."""
MINILM = EncoderFacts(layers=10.6e6, bytes=91e6)
"""The encoder of the calibration."""


def encoder_facts(recipe: Recipe) -> EncoderFacts:
    embed = recipe.embed
    if embed.is_ready or is_matrix(embed.encoder):
        return NO_ENCODER
    from safetensors import safe_open

    folder = find_encoder(embed.encoder, trusted=embed.trust_remote_code).folder
    layers = whole = 0.0
    for path in folder.rglob("*.safetensors"):
        whole += path.stat().st_size
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 no mapping
                shape = file.get_slice(name).get_shape()
                layers += math.prod(shape) if len(shape) == 2 and "embedding" not in name.lower() else 0
    configs = [path for path in (folder / "config.json", folder / "0_Transformer/config.json") if path.exists()]
    known = json.loads(configs[0].read_bytes()) if configs else {}
    hidden = int(known.get("hidden_size", 384))
    dense = sorted(folder.glob("*_Dense/config.json"))
    width = json.loads(dense[-1].read_bytes())["out_features"] if dense else hidden
    depth = int(known.get("num_hidden_layers", 0))
    return EncoderFacts(embed.dim or width, layers, hidden, depth, whole, folder)
