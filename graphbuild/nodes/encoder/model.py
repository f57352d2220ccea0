"""An encoder on one device: texts to unit-norm vectors at the precision that the device is fastest at.

Models run packed (graphbuild.nodes.encoder.packed): BERT-like ones by a forward pass of graphbuild's own, others by
transformers' layers. What cannot runs through sentence-transformers, batched by tokens. Texts are not normalised here
beyond what the encoder's own tokenizer does. Memory: the weights, and a batch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from graphbuild.errors import ConfigError, install_extra
from graphbuild.machine.cpu import cpu_features
from graphbuild.machine.threads import torch_threads
from graphbuild.machine.versions import version_of
from graphbuild.nodes.encoder.find import Encoder
from graphbuild.nodes.encoder.tokens import Ints, batches, tokenize
from graphbuild.recipe import Precision
from graphbuild.runner import partly

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from graphbuild.nodes.encoder.int8 import Int8
    from graphbuild.nodes.encoder.packed import Packed

CPU_TOKENS, GPU_TOKENS = 1024, 65_536  # a batch
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet")  # that have a packed forward here
POOLINGS = ("cls", "lasttoken", "mean", "max")
CHECKED = ["a", "two dogs", "two dogs run over the wet grass", "A red kite, high over the sea; 3 boats below!"]
logger = logging.getLogger(__name__)
Half = np.ndarray[Any, np.dtype[np.float16]]
Single = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Encoded:
    """vectors: float16 [n, d], unit norm; NaN of a text of which the encoder makes none. tokens: read. computed: rows
    of the matrix products, empty ones included. truncated: texts longer than the encoder reads."""

    vectors: Half
    tokens: int
    computed: int
    truncated: int


@dataclass(frozen=True)
class Model:
    """An encoder ready on a device. prompt: put before each text; None: the model's own default. dim: the first
    coordinates kept, for encoders trained so that these stand alone (Matryoshka); None: all."""

    encoder: Encoder
    device: str
    precision: str
    prompt: str | None = None
    dim: int | None = None

    @property
    def whole(self) -> SentenceTransformer:
        """The sentence-transformers model: in float32 where its copy runs packed, else as it runs."""
        return _load(self.encoder, self.device, "float32" if is_bert_like(self.encoder) else self.precision)

    @property
    def is_static(self) -> bool:
        """Whether the encoder only adds up vectors of tokens, without context: quick, and much coarser."""
        return type(self.whole[0]).__name__ == "StaticEmbedding"

    @property
    def max_tokens(self) -> int | None:
        return None if self.is_static else self.whole.max_seq_length

    def encode(self, texts: Sequence[str], threads: int = 1) -> Encoded:
        """Unit-norm vectors of texts, in order, the same on any number of threads, which a packed model on a CPU takes.
        ConfigError when dim > d."""
        prompted = [self._prompt() + text for text in texts]
        tokenizer = self.whole.tokenizer
        with torch_threads(1), attention_of_any_shape():
            if not hasattr(tokenizer, "backend_tokenizer"):  # none of the fast ones: told apart by characters
                vectors, computed = self._encode_whole(prompted, np.array([len(text) for text in prompted]))
                return Encoded(_half(vectors), computed, computed, 0)
            tokens = tokenize(tokenizer, prompted, self.max_tokens or 1 << 30)
            packed = _packed(self.encoder, self.device, self.precision)
            if packed is None:
                vectors, computed = self._encode_whole(prompted, tokens.lengths)
            else:
                pooled, computed = packed.pooled(tokens, threads)
                vectors = self._finished(_after_pooling(self.whole, pooled).float())
        return Encoded(_half(vectors), len(tokens.ids), computed, tokens.truncated)

    def _encode_whole(self, prompted: Sequence[str], lengths: Ints) -> tuple[Single, int]:
        """By sentence-transformers, in batches of a budget of tokens: vectors [n, d], and the tokens computed."""
        whole = _load(self.encoder, self.device, self.precision)
        budget = CPU_TOKENS if self.device == "cpu" and not self.is_static else GPU_TOKENS
        found, order, computed = [], [], 0
        for chosen in batches(lengths, budget):
            batch = [prompted[at] for at in chosen]
            vectors = whole.encode(
                batch, prompt="", batch_size=len(batch), show_progress_bar=False, convert_to_tensor=True
            )
            found.append(self._finished(vectors.float()))
            order.append(chosen)
            computed += int(lengths[chosen].max()) * len(batch)
            partly.add(lengths[chosen].sum() / lengths.sum())
        return np.concatenate(found)[np.argsort(np.concatenate(order))], computed

    def reference(self, texts: Sequence[str]) -> Single:
        """The same by sentence-transformers' own `encode` in float32: unit-norm vectors, float32 [n, d]."""
        return self._by(_load(self.encoder, self.device, "float32"), texts)

    def query(self, text: str) -> Half:
        """One text's [d], `encode`'s but for rounding, in the time of its own tokens and not of a full batch."""
        vector: Half = _half(self._by(self.whole, [text]))[0]
        return vector

    def _by(self, whole: SentenceTransformer, texts: Sequence[str]) -> Single:
        with torch_threads(1), attention_of_any_shape():
            vectors = whole.encode(  # few at a time, of like lengths: all of a batch have the length of its longest
                list(texts), prompt=self._prompt(), batch_size=4, show_progress_bar=False, convert_to_tensor=True
            )
            return self._finished(vectors.float())

    def _prompt(self) -> str:
        if self.prompt is not None:
            return self.prompt
        whole = self.whole
        return str(whole.prompts.get(whole.default_prompt_name or "", ""))

    def _finished(self, vectors: torch.Tensor) -> Single:
        import torch

        if self.dim is not None and self.dim > vectors.shape[1]:
            raise ConfigError(
                f"--dim {self.dim}: {self.encoder.name} has {vectors.shape[1]} dimensions", "give a smaller --dim"
            )
        array: Single = torch.nn.functional.normalize(vectors[:, : self.dim], dim=1).cpu().numpy()
        return array


def _half(vectors: Single) -> Half:
    """As float16; NaN for what is no direction: zeros, infinities, and what is too short to have been scaled."""
    none = ~(np.linalg.norm(vectors, axis=1, keepdims=True) > 0.5)
    return np.where(none, np.nan, vectors).astype(np.float16)


def open_model(
    encoder: Encoder, device: str, precision: Precision = "auto", prompt: str | None = None, dim: int | None = None
) -> Model:
    """An encoder on a device; the weights are loaded once a process. ConfigError when they cannot be."""
    chosen = fastest_precision(device) if precision == "auto" else precision
    model = Model(encoder, device, chosen, prompt, dim)
    if chosen == "int8":
        _check_int8(model)
    pooling = next((module for module in model.whole if type(module).__name__ == "Pooling"), None)
    if model._prompt() and pooling is not None and not pooling.include_prompt:
        raise ConfigError(
            f"{encoder.name} leaves the prompt out of its pooling, which is not supported", "give no --prompt"
        )
    return model


def _check_int8(model: Model) -> None:
    if importlib.util.find_spec("openvino") is None:
        raise ConfigError("--precision int8 needs OpenVINO", f"{install_extra('int8')}, or leave --precision away")
    if model.device != "cpu":
        raise ConfigError("--precision int8 runs on CPUs only", "use --device cpu, or leave --precision away")
    if _packed(model.encoder, "cpu", "int8") is None:
        raise ConfigError(
            f"--precision int8: {model.encoder.name} is none of {', '.join(FAMILIES)} with ordinary pooling",
            "leave --precision away",
        )


def fastest_precision(device: str) -> str:
    """bfloat16 where the hardware multiplies it (GPUs since Ampere; CPUs with AVX-512 BF16, AMX or ARM's BF16); else
    float16 on a GPU, which would only emulate bfloat16, and float32 on a CPU."""
    import torch

    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    able = cpu_features()
    return "bfloat16" if any(able[name] for name in able if name.endswith("bf16")) else "float32"


@contextlib.contextmanager
def attention_of_any_shape() -> Iterator[None]:
    """Attention without cuDNN's kernels, torch's first choice on Hopper and Blackwell: it plans them anew, for tens of
    milliseconds or more, for each number of texts and tokens, of which every batch has new ones."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@lru_cache(maxsize=2)
def _load(encoder: Encoder, device: str, precision: str) -> SentenceTransformer:
    logger.info("%-9s loading %s", "encoder", encoder.name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if device == "cpu" else "true")
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        return SentenceTransformer(
            str(encoder.folder),
            device=device,
            trust_remote_code=encoder.code is not None,
            model_kwargs={"use_safetensors": True, "dtype": getattr(torch, precision)},
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"the encoder in {encoder.folder} cannot be loaded ({error})",
            "choose a sentence-transformers model with --encoder",
        ) from error


@lru_cache(maxsize=2)
def _packed(encoder: Encoder, device: str, precision: str) -> Packed | Int8 | None:
    """The encoder over packed tokens; None where it does not run so."""
    import torch

    from graphbuild.nodes.encoder.int8 import Int8
    from graphbuild.nodes.encoder.packed import PackedBert

    is_bert = is_bert_like(encoder)
    whole = _load(encoder, device, "float32" if is_bert or precision == "int8" else precision)
    transformer = getattr(whole[0], "model", None)
    pooling = getattr(whole[1], "pooling_mode", None) if len(whole) > 1 else None
    if not hasattr(whole.tokenizer, "backend_tokenizer") or transformer is None or pooling not in POOLINGS:
        return None
    config, rows = transformer.config, CPU_TOKENS if device == "cpu" else GPU_TOKENS
    if not is_bert:
        return None if precision == "int8" else _packed_layers(whole, transformer, pooling, rows)
    if getattr(config, "is_decoder", False) or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    if precision == "int8":
        return Int8(transformer, pooling)
    if _as_own(whole, partial(PackedBert, transformer, pooling, dtype=torch.float32, rows=CPU_TOKENS)) is None:
        logger.warning(
            "%s: transformers %s computes it otherwise than graphbuild's packed forward, so it runs padded, slower",
            encoder.folder,
            version_of("transformers"),
        )
        return None
    return PackedBert(transformer, pooling, dtype=getattr(torch, precision), rows=rows)


def _packed_layers(whole: SentenceTransformer, transformer: Any, pooling: str, rows: int) -> Packed | None:
    def make() -> Packed:
        from graphbuild.nodes.encoder.layers import PackedLayers  # which older releases of transformers lack parts for

        return PackedLayers(transformer, whole.tokenizer, pooling, rows=rows)

    before = getattr(transformer.config, "_attn_implementation", None)
    found = _as_own(whole, make)
    if found is None and getattr(transformer.config, "_attn_implementation", None) != before:
        transformer.set_attn_implementation(before)
    return found


def _as_own(whole: SentenceTransformer, make: Callable[[], Packed]) -> Packed | None:
    """The packed model, where it gives what the library's own gives, on one batch. It reads the parts of a transformer
    by names that are not promised."""
    import torch

    own = whole.encode(CHECKED, prompt="", show_progress_bar=False, convert_to_tensor=True)
    try:
        packed = make()
        found = packed.pooled(tokenize(whole.tokenizer, CHECKED, whole.max_seq_length or 1 << 30))[0]
        found = _after_pooling(whole, found)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    precise = next(whole.parameters()).dtype == torch.float32
    least = (1e-3 if precise else 3e-2) * float(own.abs().max().nan_to_num())
    same = found.shape == own.shape and torch.allclose(found.float(), own.float(), rtol=0, atol=least, equal_nan=True)
    return packed if same else None


def is_bert_like(encoder: Encoder) -> bool:
    """By what config.json calls the architecture; it lies in the folder itself or in that of the first module."""
    for path in (encoder.folder / "config.json", encoder.folder / "0_Transformer" / "config.json"):
        if path.is_file():
            return json.loads(path.read_bytes()).get("model_type") in FAMILIES
    return False


def _after_pooling(whole: SentenceTransformer, pooled: torch.Tensor) -> torch.Tensor:
    """What the model does with the pooled vectors: a dense layer, a norm, or nothing."""
    import torch

    features = {"sentence_embedding": pooled}
    with torch.inference_mode():
        for module in list(whole)[2:]:
            vectors = features["sentence_embedding"]
            features["sentence_embedding"] = vectors.to(
                next((each.dtype for each in module.parameters()), vectors.dtype)
            )
            features = module(features)
    return features["sentence_embedding"]
