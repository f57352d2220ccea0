"""The size of an encoder, by the shapes of its weights and its config.json; no weight is read."""

from __future__ import annotations

import json
import math

from graphbuild.encoder.find import find_encoder
from graphbuild.matrix import is_matrix
from graphbuild.recipe import Recipe
from graphbuild.store import Json


def encoder_facts(recipe: Recipe) -> Json:
    """d, and the size of the encoder's layers, by the shapes of its weights and its config.json."""
    embed = recipe.embed
    if embed.vectors is not None:
        return {"d": 384, "layers": 0.0}
    if is_matrix(embed.encoder):
        return {"d": 384, "layers": 0.0, "encoder_bytes": 0.0}
    from safetensors import safe_open

    folder = find_encoder(embed.encoder).folder
    layers = whole = 0.0
    for path in folder.rglob("*.safetensors"):
        whole += path.stat().st_size
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 no mapping
                shape = file.get_slice(name).get_shape()
                layers += math.prod(shape) if len(shape) == 2 and "embedding" not in name.lower() else 0
    config = next(
        (path for path in (folder / "config.json", folder / "0_Transformer/config.json") if path.exists()), None
    )
    known = json.loads(config.read_bytes()) if config else {}
    hidden = int(known.get("hidden_size", 384))
    dense = sorted(folder.glob("*_Dense/config.json"))
    width = json.loads(dense[-1].read_bytes())["out_features"] if dense else hidden
    return {
        "folder": folder,
        "d": embed.dim or width,
        "layers": layers,
        "hidden": hidden,
        "depth": int(known.get("num_hidden_layers", 0)),
        "encoder_bytes": whole,
    }
