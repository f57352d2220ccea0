"""Sentence encoders: find one, and turn texts into unit-norm vectors."""

from graphbuild.nodes.encoder.find import Encoder, find_encoder, prompt_of
from graphbuild.nodes.encoder.model import Encoded, Model, open_model
from graphbuild.recipe import DEFAULT_ENCODER

__all__ = ["DEFAULT_ENCODER", "Encoded", "Encoder", "Model", "find_encoder", "open_model", "prompt_of"]
