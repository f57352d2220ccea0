"""Prompts by name, and encoders that bring code: real models in folders, with and without trust."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from graphbuild.errors import ConfigError
from graphbuild.job.verbs import run_verb
from graphbuild.nodes.encoder import find_encoder
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.conftest import MakeOnce

PROMPTS = {"query": "search for: ", "passage": "text: "}
TEXTS = ["a red kite", "two dogs run", "a boat at sea", "grass", "the old house", "wet stones"]
CODE = """
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, *arguments, **named):
        found = super().forward(*arguments, **named)
        found.last_hidden_state = found.last_hidden_state * SIGNS
        return found

import torch
SIGNS = torch.tensor([1.0, -1.0] * 16)
"""


def fill(folder: Path) -> None:
    """A small BERT with random weights, as sentence-transformers saves it, with two prompts of its own."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz:"]
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    bert = folder / "bert"
    bert.mkdir()
    (folder / "vocabulary.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=dict(zip(vocabulary, range(len(vocabulary)), strict=True))).save_pretrained(bert)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], prompts=PROMPTS, device="cpu")
    model.save(str(folder / "model"))


@pytest.fixture(scope="session")
def plain(make_once: MakeOnce) -> Path:
    return make_once("small_bert", fill) / "model"


@pytest.fixture
def own(plain: Path, tmp_path: Path) -> Path:
    """The same, with code that turns every second coordinate round."""
    folder = Path(shutil.copytree(plain, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def embed(store: Path, encoder: Path, *, force: bool = False, **changes: object) -> np.ndarray:
    """The vectors of TEXTS in a store."""
    source = store.parent / "texts.csv"
    if not source.exists():
        source.write_text("caption\n" + "\n".join(TEXTS) + "\n")
    opened = Store(str(store))
    given = {"captions": str(source), "encoder": str(encoder), "precision": "float32", "device": "cpu", **changes}
    with Runner(workers=0) as runner:
        run_verb("embed", resolve(opened, "embed", given), opened, runner, force=force)
    return np.load(store / "nodes/00000.npy").astype(np.float32)


def test_a_prompt_by_name_is_the_text_that_the_encoder_has_for_it(plain: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(plain), device="cpu")
    for name, text in PROMPTS.items():
        expected = model.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
        found = embed(tmp_path / name, plain, prompt_name=name)
        assert np.abs(found - expected).max() < 1e-3
        assert np.array_equal(embed(tmp_path / f"{name} by text", plain, prompt=text), found)
        assert Store(str(tmp_path / name)).manifest()["embeddings"]["prompt"] == text
    with pytest.raises(ConfigError, match="prompt: search for:  -> text: "):
        embed(tmp_path / "query", plain, prompt_name="passage")
    assert np.array_equal(
        embed(tmp_path / "query", plain, prompt_name="passage", force=True),
        np.load(tmp_path / "passage/nodes/00000.npy"),
    )


def test_a_prompt_that_there_is_not_is_refused_with_those_there_are(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no prompt 'title'; it has .*'passage', 'query'"):
        embed(tmp_path / "s", plain, prompt_name="title")
    with pytest.raises(ConfigError, match="exclude each other"):
        embed(tmp_path / "s", plain, prompt_name="query", prompt="x")
    assert not (tmp_path / "s").exists()


def test_code_runs_only_where_it_is_trusted_and_changed_code_is_another_encoder(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"brings code of its own.*own\.OwnConfig") as error:
        embed(tmp_path / "s", own)
    assert "--trust-remote-code" in error.value.fix
    found = embed(tmp_path / "s", own, trust_remote_code=True)
    model = SentenceTransformer(str(own), device="cpu", trust_remote_code=True)
    assert np.abs(found - model.encode(TEXTS, normalize_embeddings=True)).max() < 1e-3
    assert "trust_remote_code" not in (tmp_path / "s/recipe.yaml").read_text()
    with pytest.raises(ConfigError, match="brings code of its own"):
        embed(tmp_path / "s", own)
    before = find_encoder(str(own), trusted=True).identity
    (own / "own.py").write_text(CODE.replace("[1.0, -1.0]", "[-1.0, 1.0]"))
    find_encoder.cache_clear()
    assert find_encoder(str(own), trusted=True).identity != before
    with pytest.raises(ConfigError, match="encoder"):
        embed(tmp_path / "s", own, trust_remote_code=True)


def test_code_of_another_repository_is_refused(own: Path, tmp_path: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "somebody/else--own.OwnModel"
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="takes code from another repository"):
        embed(tmp_path / "s", own, trust_remote_code=True)


def test_a_module_that_is_not_of_sentence_transformers_is_code_too(own: Path, tmp_path: Path) -> None:
    modules = json.loads((own / "modules.json").read_text())
    modules[1]["type"] = "own.Pooling"
    (own / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"own\.Pooling"):
        embed(tmp_path / "s", own)


def test_an_encoder_without_code_may_be_trusted_and_is_the_same(plain: Path, tmp_path: Path) -> None:
    assert np.array_equal(embed(tmp_path / "s", plain), embed(tmp_path / "s", plain, trust_remote_code=True))
