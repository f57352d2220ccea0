"""The engines that graphbuild's encoder is measured against, besides sentence-transformers: those that are installed.

Each encodes texts by the weights of graphbuild's default encoder on THREADS threads, and is given graphbuild's own
order: shortest text first, batches of 1,024 tokens, its best of 1,024 and 4,096. fastembed batches as it likes.

    pip install onnx onnxruntime openvino nncf fastembed
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder
from graphbuild.nodes.encoder.tokens import batches, tokenize

THREADS = len(os.sched_getaffinity(0))
BATCH_TOKENS = 1024
INPUTS = ["input_ids", "attention_mask"]
Vectors = np.ndarray
Encode = Callable[[list[str]], Vectors]
FOLDER = find_encoder(DEFAULT_ENCODER).folder
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


def padded(texts: list[str]) -> Iterator[tuple[Vectors, list[Vectors]]]:
    """(which texts, [ids, mask]) of each batch, padded to its longest text."""
    tokens = tokenize(TOKENIZER, texts, 256)
    for chosen in batches(tokens.lengths, BATCH_TOKENS):
        mask = np.arange(tokens.lengths[chosen].max()) < tokens.lengths[chosen, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate([tokens.ids[tokens.starts[at] :][: tokens.lengths[at]] for at in chosen])
        yield chosen, [ids, mask.astype(np.int64)]


def encoder(hidden_of: Callable[[list[Vectors]], Vectors]) -> Encode:
    """Mean pooling and unit norm around what gives token vectors [count, size, 384]."""

    def encode(texts: list[str]) -> Vectors:
        out = np.empty((len(texts), 384), np.float32)
        for chosen, inputs in padded(texts):
            summed = (hidden_of(inputs) * inputs[1][..., None]).sum(1)
            out[chosen] = summed / np.linalg.norm(summed, axis=1, keepdims=True)
        return out

    return encode


def peers(cache: Path, calibration: list[str]) -> dict[str, Encode]:
    """Every installed peer, ready; cache: a folder for the exported model; calibration: texts that are not measured."""
    found: dict[str, Encode] = {}
    model = cache / "model.onnx"
    if find_spec("onnxruntime") and find_spec("onnx"):
        export(model)
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(model, cache / "int8.onnx", per_channel=True)
        found["ONNX Runtime, float32"] = onnx(model)
        found["ONNX Runtime, int8"] = onnx(cache / "int8.onnx")
    if find_spec("openvino") and model.exists():
        found["OpenVINO, float32"] = openvino(model, "f32")
        found["OpenVINO, bfloat16"] = openvino(model, "bf16")
    if find_spec("nncf") and model.exists():
        found["OpenVINO, int8, calibrated (NNCF)"] = openvino(model, "bf16", calibration)
    if find_spec("fastembed") and model.exists():
        found["fastembed, float32"] = fastembed(model)
    return found


def export(path: Path) -> None:
    bert = AutoModel.from_pretrained(FOLDER, attn_implementation="eager").eval()

    class Hidden(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return bert(input_ids=ids, attention_mask=mask).last_hidden_state

    model = Hidden()
    model.bert = bert
    ids = torch.arange(1000, 1048).view(4, 12)
    axes = {name: {0: "texts", 1: "tokens"} for name in [*INPUTS, "last_hidden_state"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (ids, torch.ones_like(ids)),
            path,
            input_names=INPUTS,
            output_names=["last_hidden_state"],
            dynamic_axes=axes,
            dynamo=False,
        )


def onnx(model: Path) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return encoder(lambda inputs: session.run(["last_hidden_state"], dict(zip(INPUTS, inputs, strict=True)))[0])


def openvino(model: Path, precision: str, calibration: list[str] | None = None) -> Encode:
    from openvino import Core

    core = Core()
    network: Any = core.read_model(model)
    if calibration:
        import nncf

        dataset = nncf.Dataset([inputs for _, inputs in padded(calibration)])
        network = nncf.quantize(network, dataset, model_type=nncf.ModelType.TRANSFORMER)
    settings = {"INFERENCE_NUM_THREADS": THREADS, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    return encoder(lambda inputs: request.infer(inputs, share_inputs=True)[0])


def fastembed(model: Path) -> Encode:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    for path in FOLDER.glob("*.json"):
        shutil.copy(path, model.parent)
    TextEmbedding.add_custom_model(
        model="local",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local"),
        dim=384,
        model_file=model.name,
    )
    known = TextEmbedding("local", specific_model_path=str(model.parent), threads=THREADS, cuda=False)
    return lambda texts: np.stack(list(known.embed(texts, batch_size=64)))
