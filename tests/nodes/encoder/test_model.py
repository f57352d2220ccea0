"""Encoders against sentence-transformers' own `encode` in float32, for each family of models that runs packed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from other_device import other_device
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from transformers.models.bert.modeling_bert import BertEmbeddings

from graphbuild.errors import ConfigError
from graphbuild.nodes.encoder import DEFAULT_ENCODER, Model, find_encoder, open_model, packed
from graphbuild.nodes.encoder.model import CPU_TOKENS, _packed, fastest_precision
from graphbuild.nodes.encoder.packed import PackedBert
from graphbuild.nodes.encoder.tokens import batches, equal_batches, tokenize
from graphbuild.nodes.fidelity import cosine
from graphbuild.runner import partly

SMALL = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
VOCABULARY = 30_522
SHARED_HEADS = {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": VOCABULARY}
FAMILIES = {
    "bert": (BertModel, lambda: BertConfig(**SMALL, vocab_size=VOCABULARY)),
    "xlm-roberta": (XLMRobertaModel, lambda: XLMRobertaConfig(**SMALL, vocab_size=VOCABULARY, pad_token_id=1)),
    "mpnet": (MPNetModel, lambda: MPNetConfig(**SMALL, vocab_size=VOCABULARY)),
    "distilbert": (
        DistilBertModel,
        lambda: DistilBertConfig(dim=48, n_heads=4, n_layers=2, hidden_dim=96, vocab_size=VOCABULARY),
    ),
    "modernbert": (  # every other layer sees 8 tokens to either side
        ModernBertModel,
        lambda: ModernBertConfig(
            **SMALL, vocab_size=VOCABULARY, pad_token_id=0, local_attention=16, global_attn_every_n_layers=2
        ),
    ),
    "qwen3": (Qwen3Model, lambda: Qwen3Config(**SMALL, **SHARED_HEADS)),
    "gemma3_text": (  # layers that see the 8 tokens before, and layers that see all
        Gemma3TextModel,
        lambda: Gemma3TextConfig(
            **SMALL, **SHARED_HEADS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "gpt2": (GPT2Model, lambda: GPT2Config(n_embd=48, n_head=4, n_layer=2, vocab_size=VOCABULARY)),
    "t5": (
        T5EncoderModel,
        lambda: T5Config(d_model=48, d_kv=12, d_ff=96, num_heads=4, num_layers=2, vocab_size=VOCABULARY),
    ),
}
VNNI = "vnni" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
INT8 = pytest.param("int8", marks=pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra int8"))
WORDS = [
    "a",
    "red",
    "fox",
    "jumps",
    "over",
    "lighthouse",
    "keepers",
    "painting",
    "seven",
    "boats",
    "Zürich",
    "東京",
    "!",
]


def captions(count: int, longest: int = 25) -> list[str]:
    random = np.random.default_rng(7)
    return [" ".join(random.choice(WORDS, random.integers(1, longest))) for _ in range(count)]


def saved(folder: Path, family: str, pooling: str, *more: torch.nn.Module, longest: int = 32) -> Path:
    """A small encoder of random weights, large enough that attention and position matter, saved to a folder."""
    kind, config = FAMILIES[family]
    torch.manual_seed(1)
    model = kind(config())
    for name, weights in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(weights, std=0.2)
    model.save_pretrained(folder / "bare")
    AutoTokenizer.from_pretrained(find_encoder(DEFAULT_ENCODER).folder).save_pretrained(folder / "bare")
    transformer = Transformer(str(folder / "bare"), max_seq_length=longest)
    whole = SentenceTransformer(modules=[transformer, Pooling(48, pooling_mode=pooling), *more, Normalize()])
    whole.save_pretrained(str(folder / "whole"))
    return folder / "whole"


@pytest.mark.parametrize(
    ("family", "pooling", "is_packed"),
    [
        ("bert", "mean", True),
        ("bert", "cls", True),
        ("xlm-roberta", "mean", True),
        ("mpnet", "max", True),
        ("distilbert", "mean", True),
        ("modernbert", "cls", True),
        ("qwen3", "lasttoken", True),
        ("gemma3_text", "mean", True),
        ("gpt2", "lasttoken", True),
        ("t5", "mean", False),
        ("bert", "weightedmean", False),
    ],
)
def test_vectors_are_those_of_sentence_transformers(tmp_path, family, pooling, is_packed):
    folder = saved(tmp_path, family, pooling)
    encoder = find_encoder(str(folder))
    model = open_model(encoder, "cpu", "float32")
    assert (_packed(encoder, "cpu", "float32") is not None) == is_packed
    texts = captions(300, longest=50)
    partly.begin()
    found = model.encode(texts)
    assert partly.done() == pytest.approx(1), "batch by batch"
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found.vectors.astype(np.float32), expected, atol=5e-4)  # float16's step
    assert found.vectors.dtype == np.float16
    assert found.truncated == sum(len(ids) > 32 for ids in model.whole.tokenizer(texts)["input_ids"]) > 0
    assert found.tokens <= found.computed
    low = open_model(find_encoder(str(folder)), "cpu", "bfloat16").encode(texts).vectors.astype(np.float64)
    assert ((low * expected).sum(1) / np.linalg.norm(low, axis=1)).mean() > 0.999


@pytest.mark.parametrize("change", ["another sum", "another name"])
def test_a_transformers_that_computes_otherwise_is_noticed_said_and_followed(tmp_path, monkeypatch, caplog, change):
    if change == "another sum":
        own = BertEmbeddings.forward
        monkeypatch.setattr(
            BertEmbeddings, "forward", lambda self, *rest, **named: 0.9 * own(self, *rest, **named) + 0.1
        )
    else:  # before it gets here
        monkeypatch.setattr(packed, "_layer", lambda layer, heads, dtype: layer.renamed)
    folder = saved(tmp_path, "bert", "mean")
    texts = captions(20)
    found = open_model(find_encoder(str(folder)), "cpu", "float32").encode(texts).vectors
    assert "computes it otherwise than graphbuild's packed forward" in caplog.text
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-4)


@pytest.mark.parametrize(("bfloat16", "precision"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_that_only_emulates_bfloat16_multiplies_float16(monkeypatch, bfloat16, precision):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
    )
    assert fastest_precision("cuda") == precision


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_attention_never_asks_for_kernels_that_are_planned_for_each_shape(tmp_path, monkeypatch, family):
    cudnn, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **options):
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments, **options)

    model = open_model(find_encoder(str(saved(tmp_path, family, "mean"))), "cpu", "float32")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model.encode(captions(5))
    model.reference(captions(5))
    assert cudnn
    assert not any(cudnn)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_packed_runs_on_another_device(tmp_path, family):
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    whole = kind(config()).eval()
    tokens = tokenize(AutoTokenizer.from_pretrained(find_encoder(DEFAULT_ENCODER).folder), captions(40), 32)
    here, rows = PackedBert(whole, "mean", dtype=torch.float32, rows=256).pooled(tokens)
    with other_device() as device:
        there, rows_there = PackedBert(whole.to(device), "mean", dtype=torch.float32, rows=256).pooled(tokens)
        assert there.device == device
        torch.testing.assert_close(there.cpu(), here)
    assert rows_there == rows


@pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra int8")
@pytest.mark.parametrize(("family", "pooling"), [("bert", "cls"), ("xlm-roberta", "mean"), ("mpnet", "max")])
def test_int8_is_near_float32_for_each_family(tmp_path, family, pooling):
    folder = saved(tmp_path, family, pooling)
    texts = captions(300, longest=50)
    model = open_model(find_encoder(str(folder)), "cpu", "int8")
    partly.begin()
    found = model.encode(texts)
    assert partly.done() == pytest.approx(1)
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    cosines = cosine(found.vectors, expected)
    assert cosines.mean() > 0.995
    assert cosines.min() > 0.98
    assert found.computed == found.tokens
    assert found.truncated > 0


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra int8")
def test_int8_of_the_default_encoder_keeps_a_mean_cosine_of_0_995():
    found = default("int8").encode(captions(200))
    cosines = cosine(found.vectors, default("int8").reference(captions(200)))
    assert 0.995 < cosines.mean() < 0.99999  # else its products are not of 8 bits


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("openvino"), reason="needs the extra int8")
def test_signals_are_heard_after_int8_encoders_are_gone():
    """As when a DataLoader's worker ends. In a process of its own, for the fault is its end."""
    script = """
import faulthandler, os, signal
from transformers import BertConfig, BertModel
from graphbuild.nodes.encoder.int8 import Int8
faulthandler.enable()  # gives signals a stack of their own, as Ray does
config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=30)
models = [Int8(BertModel(config), "mean") for _ in range(2)]
while models:
    models.pop(0)
signal.signal(signal.SIGCHLD, lambda *_: print("heard", flush=True))
os.kill(os.getpid(), signal.SIGCHLD)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "heard\n"), ran.stderr


def test_int8_is_refused_where_it_cannot_run(tmp_path):
    with pytest.raises(ConfigError, match=r"CPUs only" if find_spec("openvino") else r"pip install"):
        open_model(find_encoder(DEFAULT_ENCODER), "cuda", "int8")
    if find_spec("openvino"):
        with pytest.raises(ConfigError, match=r"none of bert, .* with ordinary pooling"):
            open_model(find_encoder(str(saved(tmp_path, "distilbert", "mean"))), "cpu", "int8")


def test_a_dense_layer_after_pooling_is_applied(tmp_path):
    folder = saved(tmp_path, "bert", "mean", Dense(48, 20, activation_function=torch.nn.Tanh()))
    found = open_model(find_encoder(str(folder)), "cpu", "float32").encode(captions(20)).vectors
    expected = SentenceTransformer(str(folder), device="cpu").encode(captions(20))
    assert found.shape == (20, 20)
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-4)


def test_a_static_encoder_is_told_and_agrees(tmp_path, caplog):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(find_encoder(DEFAULT_ENCODER).folder).backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32), Normalize()]).save(str(tmp_path / "s"))
    with caplog.at_level("INFO", "graphbuild"):
        model = open_model(find_encoder(str(tmp_path / "s")), "cpu")
        model.encode(captions(2))
    assert [record.message for record in caplog.records] == [f"encoder   loading {tmp_path}/s"]  # once a process
    assert model.is_static
    assert not default("float32").is_static
    expected = SentenceTransformer(str(tmp_path / "s"), device="cpu").encode(captions(50), normalize_embeddings=True)
    np.testing.assert_allclose(model.reference(captions(50)), expected, atol=1e-6)
    found = model.encode(captions(50)).vectors.astype(np.float64)
    assert (found * expected).sum(1).min() > 0.999


def default(precision: str = "auto", **options: object) -> Model:
    return open_model(find_encoder(DEFAULT_ENCODER), "cpu", precision, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default encoder with its first two layers alone: products of the same shapes, and fewer of them."""
    folder = tmp_path_factory.mktemp("two") / "layers"
    whole = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu")
    transformer = whole[0].model
    transformer.encoder.layer = transformer.encoder.layer[:2]
    transformer.config.num_hidden_layers = 2
    whole.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), INT8])
def test_a_text_has_the_same_bytes_in_any_batch(two_layers, precision):
    if precision == "int8" and not VNNI:
        pytest.skip("OpenVINO's sums depend on the batch where the CPU has no 8-bit products (VNNI)")
    # A sum of bfloat16 in another order shows in any text. Where they are emulated, a few texts are enough.
    few = precision == "bfloat16" and fastest_precision("cpu") != precision
    texts = captions(30 if few else 160, longest=60)
    model = default(precision) if precision == "int8" else open_model(find_encoder(str(two_layers)), "cpu", precision)
    together = model.encode(texts).vectors
    random = np.random.default_rng(3)
    for count in (1, 2, 17, 25 if few else 90):
        chosen = random.permutation(len(texts))[:count]
        alone = model.encode([texts[at] for at in chosen]).vectors
        np.testing.assert_array_equal(alone.view(np.uint16), together[chosen].view(np.uint16))


@pytest.mark.parametrize(
    ("family", "pooling"), [("modernbert", "mean"), ("qwen3", "lasttoken"), ("gemma3_text", "mean")]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_text_has_the_same_bytes_in_any_batch_of_other_families(tmp_path, family, pooling, precision):
    texts = captions(60, longest=50)
    model = open_model(find_encoder(str(saved(tmp_path, family, pooling))), "cpu", precision)
    together = model.encode(texts).vectors
    for chosen in (range(1), range(40, 60), range(59, 0, -3)):
        alone = model.encode([texts[at] for at in chosen]).vectors
        np.testing.assert_array_equal(alone.view(np.uint16), together[list(chosen)].view(np.uint16))


@pytest.mark.parametrize("family", ["bert", "mpnet", "qwen3"])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path, family):
    texts = captions(300, longest=50)  # several batches
    model = open_model(find_encoder(str(saved(tmp_path, family, "mean"))), "cpu", "float32")
    one = model.encode(texts)
    partly.begin()
    three = model.encode(texts, threads=3)
    assert partly.done() == pytest.approx(1)
    np.testing.assert_array_equal(three.vectors.view(np.uint16), one.vectors.view(np.uint16))
    assert (three.tokens, three.computed) == (one.tokens, one.computed)
    assert one.computed >= 3 * CPU_TOKENS


def test_less_than_a_twentieth_of_the_rows_computed_is_empty(tmp_path):
    """Of a small encoder: the batches depend on nothing but the tokenizer and the longest text."""
    folder = saved(tmp_path, "bert", "mean", longest=default().max_tokens)
    found = open_model(find_encoder(str(folder)), "cpu").encode(captions(2_000))
    assert found.computed < 1.05 * found.tokens


@pytest.mark.parametrize(("precision", "computed"), [("float32", 512 + 1024), ("bfloat16", 1024)])
def test_short_and_long_texts_share_a_batch_where_all_batches_are_alike(two_layers, precision, computed):
    model = open_model(find_encoder(str(two_layers)), "cpu", precision)
    assert model.encode(["a dog", "dog " * 100]).computed == computed


def test_a_query_has_the_vector_of_its_text_whatever_the_precision():
    whole = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu")
    for text in captions(3):
        expected = whole.encode(f"query: {text}", normalize_embeddings=True)
        for precision in ("float32", "bfloat16"):
            found = default(precision, prompt="query: ").query(text)
            np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-4)


def test_a_prompt_goes_before_each_text_and_dim_keeps_the_first_coordinates():
    whole = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu")
    expected = whole.encode(captions(30), prompt="query: ")[:, :100]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = default("float32", prompt="query: ", dim=100).encode(captions(30)).vectors
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-4)
    with pytest.raises(ConfigError, match=r"--dim 385.*has 384 dimensions"):
        default(dim=385).encode(["a"])


def test_a_models_own_default_prompt_is_used(tmp_path):
    folder = saved(tmp_path, "bert", "mean")
    whole = SentenceTransformer(str(folder), device="cpu", prompts={"passage": "passage: "})
    whole.default_prompt_name = "passage"
    whole.save_pretrained(str(tmp_path / "prompted"))
    prompted, plain = (open_model(find_encoder(str(path)), "cpu") for path in (tmp_path / "prompted", folder))
    own = prompted.encode(captions(5)).vectors
    np.testing.assert_array_equal(own, plain.encode([f"passage: {text}" for text in captions(5)]).vectors)
    np.testing.assert_allclose(own.astype(np.float32), prompted.reference(captions(5)), atol=0.02)


def test_token_ids_are_the_tokenizers_own_with_truncation_counted():
    tokenizer = AutoTokenizer.from_pretrained(find_encoder(DEFAULT_ENCODER).folder)
    texts = [*captions(50, longest=40), "", "word " * 3_000]
    own = tokenizer(texts, truncation=True, max_length=20)["input_ids"]
    tokens = tokenize(tokenizer, texts, 20)
    np.testing.assert_array_equal(tokens.lengths, [len(ids) for ids in own])
    np.testing.assert_array_equal(tokens.ids, np.concatenate(own))
    assert tokens.truncated == sum(len(ids) > 20 for ids in tokenizer(texts)["input_ids"])


def test_batches_hold_every_text_once_within_the_budget():
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 300, random.integers(1, 200))
        found = batches(lengths, 256)
        assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
        assert all(lengths[chosen].sum() <= 256 or len(chosen) == 1 for chosen in found)
        equal = equal_batches(lengths, 256)
        assert sorted(np.concatenate(equal).tolist()) == list(range(len(lengths)))
        assert all(lengths[chosen].sum() <= 256 or len(chosen) == 1 for chosen in equal)
        assert all(len(set(lengths[chosen].tolist())) == 1 for chosen in equal)
