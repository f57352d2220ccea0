"""BERT-like encoders with 8-bit matrix products, by OpenVINO (the extra `[int8]`), on one CPU thread.

Weights are rounded to 8 bits, a scale a row; activations as they come, a scale to GROUP of them: there is nothing to
calibrate. A batch holds texts of one length: nothing is padded, and on a CPU with 8-bit products (VNNI) a text's
embedding is the same to the last bit in any batch (tests/nodes/encoder); on others OpenVINO's sums follow the batch.
Conversion takes seconds a process; OpenVINO's own tool for it would report to its makers.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphbuild.nodes.encoder.packed import pool
from graphbuild.nodes.encoder.tokens import Tokens, equal_batches
from graphbuild.runner import partly

GROUP = 64
BATCH_TOKENS = 4096


class Int8:
    """A transformer that takes token ids, rounded to 8 bits, and the pooling of its token vectors."""

    def __init__(self, transformer: nn.Module, pooling: str) -> None:
        self.pooling = pooling
        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        }
        model = _converted(transformer)
        _round_weights(model)
        self.request = _core().compile_model(model, "CPU", settings).create_infer_request()

    def pooled(self, tokens: Tokens, threads: int = 1) -> tuple[Tensor, int]:
        """Pooled token vectors, float32 [n, d]; and the tokens computed for them: none is padding. On one thread."""
        parts, order = [], []
        for chosen in equal_batches(tokens.lengths, BATCH_TOKENS):
            ids = tokens.ids[tokens.starts[chosen, None] + np.arange(tokens.lengths[chosen[0]])]
            hidden = self.request.infer([ids], share_inputs=True)[0]
            parts.append(pool(torch.from_numpy(hidden), self.pooling))
            order.append(chosen)
            partly.add(ids.size / len(tokens.ids))
        pooled = torch.cat(parts)
        return pooled[np.argsort(np.concatenate(order))], len(tokens.ids)


@cache
def _core() -> Any:
    """The one of this process. A Core gives its thread another stack for signals, and takes it back when it goes: after
    two that do not go in the order last come, first gone the next signal ends the process."""
    import openvino

    return openvino.Core()


class _Tokens(nn.Module):
    """A transformer as a function of nothing but token ids [count, size]."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.transformer(input_ids=input_ids).last_hidden_state
        return hidden


def _converted(transformer: nn.Module) -> Any:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():  # of tracing: that sizes become constants, which tests/nodes/encoder refute
        warnings.simplefilter("ignore")
        decoder = TorchScriptPythonDecoder(_Tokens(transformer).eval(), example_input=torch.arange(27).view(3, 9))
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


def _round_weights(model: Any) -> None:
    """Put each linear layer's weights [out, in] as int8 x a float32 scale a row: what OpenVINO multiplies in 8 bits."""
    from openvino import opset13 as ops

    for product in model.get_ops():
        if product.get_type_name() != "MatMul":
            continue
        weights = product.input(1).get_source_output().get_node()
        if weights.get_type_name() != "Constant" or not product.get_attributes()["transpose_b"]:
            continue
        scale = np.abs(weights.data).max(axis=1, keepdims=True) / np.float32(127)
        rounded = np.rint(weights.data / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.int8)
        product.input(1).replace_source_output(ops.multiply(ops.convert(ops.constant(rounded), "f32"), scale).output(0))
