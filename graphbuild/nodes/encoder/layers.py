"""Encoders that have no packed forward of their own here, over packed tokens by transformers' own layers.

transformers takes attention by a name (its AttentionInterface). Under the name here, attention and its masks are those
of its `sdpa`, made for each run of texts of one length; all other layers see the rows of all texts at once, with each
text's positions. So causal, sliding and two-way attention, shared heads and rotary positions are the library's.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graphbuild.nodes.encoder.packed import Packed, Run

NAME = "graphbuild_packed"
_batch = threading.local()  # runs: of the packed batch that this thread computes


class PackedLayers(Packed):
    """A transformers model, from now on with attention of that name, and its pooling.

    Raises:
        TypeError or ValueError: the model takes no positions, or attention under no other name.
    """

    def __init__(self, model: Any, tokenizer: Any, pooling: str, *, rows: int) -> None:
        inputs = inspect.signature(model.forward).parameters
        if "position_ids" not in inputs:
            raise TypeError("it takes no position_ids")
        self.with_types = "token_type_ids" in inputs and "token_type_ids" in tokenizer.model_input_names
        super().__init__(pooling, rows=rows, device=model.device, dtype=model.dtype)
        self.model = model
        model.config.use_cache = False
        model.set_attn_implementation(NAME)

    def _forward(self, ids: Tensor, places: Tensor, runs: list[Run]) -> Tensor:
        _batch.runs = runs
        inputs = {"input_ids": ids, "position_ids": places}
        inputs["attention_mask"] = torch.ones_like(ids)  # else transformers guesses where texts begin
        if self.with_types:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        try:
            found = self.model(**{name: given[None] for name, given in inputs.items()})
        finally:
            _batch.runs = None
        hidden: Tensor = found.last_hidden_state[0]
        return hidden


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Outputs [1, rows, heads, width] of queries [1, heads, rows, width]; attention_mask: by the length of a text."""
    runs: list[Run] | None = getattr(_batch, "runs", None)
    if runs is None:
        outputs: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return outputs
    mixed = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    for at, count, size in runs:
        part = slice(at, at + count * size)
        q, k, v = (
            states[0, :, part].view(states.shape[1], count, size, states.shape[3]).transpose(0, 1)
            for states in (query, key, value)
        )
        mixed[0, part] = sdpa_attention_forward(module, q, k, v, attention_mask[size], **options)[0].flatten(0, 1)
    return mixed, None


def _masks(**options: Any) -> Any:
    runs: list[Run] | None = getattr(_batch, "runs", None)
    if runs is None:
        return sdpa_mask(**options)
    own = {**options, "batch_size": 1, "attention_mask": None}
    return {size: sdpa_mask(**(own | {"q_length": size, "kv_length": size})) for _, _, size in runs}


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _masks)
