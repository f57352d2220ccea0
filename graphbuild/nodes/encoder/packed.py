"""Encoders over packed tokens; the forward pass of BERT-like ones (BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MPNet).

A batch is one array of tokens, text after text, shortest text first, without padding. Linear layers see all its rows
at once; attention runs over each run of texts of one length, so it needs no mask. Batches of texts of a kind, short or
not, always have the same number of rows, the last ones empty, and the fused attention takes each text by itself (a
batched product may take another path for another count): so a text's embedding is the same to the last bit in any batch
(tests/nodes/encoder).
Cost: 2 x (weights of the layers) FLOP a token, and attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphbuild.nodes.encoder.tokens import Ints, Tokens, batches
from graphbuild.runner import partly

Norm = tuple[Tensor, Tensor, float]
Affine = tuple[Tensor, Tensor]
Run = tuple[int, int, int]
"""First row, texts, and tokens a text, of texts of one length."""


SHORT, SHORT_ROWS = 64, 512
"""Tokens of a short text at most, and of a batch of such."""


class Packed(ABC):
    """An encoder's transformer and pooling.

    rows: tokens a batch; a longer text has a batch of its own length. Short texts have batches of SHORT_ROWS where
    these cost no more a token: in float32 on a CPU.
    """

    first_position = 0

    def __init__(self, pooling: str, *, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.pooling, self.rows, self.device = pooling, rows, device
        self.short_rows = min(rows, SHORT_ROWS) if device.type == "cpu" and dtype == torch.float32 else rows

    @abstractmethod
    def _forward(self, ids: Tensor, places: Tensor, runs: list[Run]) -> Tensor:
        """Token vectors [rows, d] of ids and positions [rows]."""

    def pooled(self, tokens: Tokens, threads: int = 1) -> tuple[Tensor, int]:
        """Pooled token vectors, float32 [n, d], on the model's device; and the rows computed for them.

        threads: of a CPU, each of which computes batches of its own, and all of such a batch.
        """
        threads = threads if self.device.type == "cpu" else 1
        # By a text's own length, so that its bytes depend on no other text; where all batches are alike, in one kind.
        short = (tokens.lengths <= SHORT) & (self.short_rows < self.rows)
        kinds = ((np.flatnonzero(short), self.short_rows), (np.flatnonzero(~short), self.rows))
        chosen = [(some[at], rows) for some, rows in kinds for at in batches(tokens.lengths[some], rows)]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as others:
            parts = list((others.map if threads > 1 else map)(lambda batch: self._batch(tokens, *batch), chosen))
        place = torch.from_numpy(np.argsort(np.concatenate([texts for texts, _ in chosen]))).to(self.device)
        return torch.cat([found for found, _ in parts])[place], sum(computed for _, computed in parts)

    @torch.inference_mode()  # which holds for one thread
    def _batch(self, tokens: Tokens, chosen: Ints, rows: int) -> tuple[Tensor, int]:
        """Pooled vectors of those texts, and the rows computed."""
        lengths = tokens.lengths[chosen]
        total = int(lengths.sum())
        runs = _runs(lengths)
        ids = np.zeros(max(rows, total), dtype=np.int64)
        places = np.zeros_like(ids)
        offsets = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids[:total] = tokens.ids[np.repeat(tokens.starts[chosen], lengths) + offsets]
        places[:total] = self.first_position + offsets
        hidden = self._forward(torch.from_numpy(ids).to(self.device), torch.from_numpy(places).to(self.device), runs)
        parts = [pool(hidden[at : at + count * size].view(count, size, -1), self.pooling) for at, count, size in runs]
        partly.add(total / len(tokens.ids))
        return torch.cat(parts), len(ids)


class PackedBert(Packed):
    """A BERT-like encoder, copied from a transformers model at the given dtype."""

    def __init__(self, model: nn.Module, pooling: str, *, dtype: torch.dtype, rows: int) -> None:
        super().__init__(pooling, rows=rows, device=next(model.parameters()).device, dtype=dtype)
        config: Any = model.config
        embeddings: Any = model.embeddings
        encoder: Any = model.encoder
        self.dtype = dtype
        self.heads: int = config.num_attention_heads
        self.activation: Callable[[Tensor], Tensor] = encoder.layer[0].intermediate.intermediate_act_fn
        self.first_position = 0 if config.model_type == "bert" else embeddings.padding_idx + 1
        self.words: Tensor = embeddings.word_embeddings.weight
        self.positions: Tensor = embeddings.position_embeddings.weight
        if hasattr(embeddings, "token_type_embeddings"):
            self.positions = self.positions + embeddings.token_type_embeddings.weight[0]
        self.norm = _norm(embeddings.LayerNorm, torch.float32)
        self.layers = [_layer(layer, self.heads, dtype) for layer in encoder.layer]
        self.position_bias: Callable[[Tensor], Tensor] | None = getattr(encoder, "compute_position_bias", None)
        self.biases: dict[int, Tensor] = {}

    def _forward(self, ids: Tensor, places: Tensor, runs: list[Run]) -> Tensor:
        hidden = _normalized(self.words[ids].float() + self.positions[places].float(), self.norm).to(self.dtype)
        for qkv, out, norm, up, down, norm_2 in self.layers:
            hidden = _normalized(hidden + F.linear(self._attention(F.linear(hidden, *qkv), runs), *out), norm)
            hidden = _normalized(hidden + F.linear(self.activation(F.linear(hidden, *up)), *down), norm_2)
        return hidden

    def _attention(self, qkv: Tensor, runs: list[Run]) -> Tensor:
        width = qkv.shape[1] // 3
        mixed = torch.zeros(len(qkv), width, dtype=qkv.dtype, device=qkv.device)
        for at, count, size in runs:
            part = qkv[at : at + count * size].view(count, size, 3, self.heads, width // self.heads)
            query, key, value = part.permute(2, 0, 3, 1, 4)
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(size), scale=1.0)
            mixed[at : at + count * size] = result.transpose(1, 2).reshape(count * size, width)
        return mixed

    def _bias(self, size: int) -> Tensor | None:
        """MPNet's bias of relative positions, [1, heads, size, size]."""
        if self.position_bias is not None and size not in self.biases:
            self.biases[size] = self.position_bias(torch.empty(1, size, 1, device=self.device)).to(self.dtype)
        return self.biases.get(size)


def pool(hidden: Tensor, pooling: str) -> Tensor:
    """Text vectors, float32 [count, d], of token vectors [count, size, d]: first, last, mean or largest."""
    if pooling in ("cls", "lasttoken"):
        return hidden[:, 0 if pooling == "cls" else -1].float()
    return hidden.float().mean(1) if pooling == "mean" else hidden.float().amax(1)


def _layer(layer: Any, heads: int, dtype: torch.dtype) -> tuple[Affine, Affine, Norm, Affine, Affine, Norm]:
    if hasattr(layer.attention, "attn"):  # MPNet's names
        inner = layer.attention.attn
        query, key, value, out, norm = inner.q, inner.k, inner.v, inner.o, layer.attention.LayerNorm
    else:
        inner = layer.attention.self
        query, key, value = inner.query, inner.key, inner.value
        out, norm = layer.attention.output.dense, layer.attention.output.LayerNorm
    scale = (query.weight.shape[0] // heads) ** -0.5
    weight = torch.cat([query.weight * scale, key.weight, value.weight])
    bias = torch.cat([query.bias * scale, key.bias, value.bias])
    return (
        (weight.detach().to(dtype), bias.detach().to(dtype)),
        _affine(out, dtype),
        _norm(norm, dtype),
        _affine(layer.intermediate.dense, dtype),
        _affine(layer.output.dense, dtype),
        _norm(layer.output.LayerNorm, dtype),
    )


def _affine(linear: Any, dtype: torch.dtype) -> Affine:
    return linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)


def _norm(norm: Any, dtype: torch.dtype) -> Norm:
    return norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps


def _normalized(hidden: Tensor, norm: Norm) -> Tensor:
    weight, bias, eps = norm
    return F.layer_norm(hidden, weight.shape, weight, bias, eps)


def _runs(lengths: Ints) -> list[Run]:
    """Each run of texts of one length; lengths ascend."""
    sizes, counts = np.unique(lengths, return_counts=True)
    firsts = np.cumsum(sizes * counts) - sizes * counts
    return list(zip(firsts.tolist(), counts.tolist(), sizes.tolist(), strict=True))
