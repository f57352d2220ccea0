"""Sentence encoders: find one, and turn texts into unit-norm vectors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphbuild.nodes.encoder.find import Encoder, find_encoder, prompt_of
    from graphbuild.nodes.encoder.model import Encoded, Model, open_model
    from graphbuild.recipe import DEFAULT_ENCODER

__all__ = ["DEFAULT_ENCODER", "Encoded", "Encoder", "Model", "find_encoder", "open_model", "prompt_of"]

_OF_FIND = ("Encoder", "find_encoder", "prompt_of")


def __getattr__(name: str) -> Any:  # the packed forward needs torch alone
    if name not in __all__:
        raise AttributeError(f"module 'graphbuild.nodes.encoder' has no attribute {name!r}")
    module = (
        "recipe" if name == "DEFAULT_ENCODER" else "nodes.encoder.find" if name in _OF_FIND else "nodes.encoder.model"
    )
    return getattr(import_module(f"graphbuild.{module}"), name)
