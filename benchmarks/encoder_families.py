"""Families of encoders: whether they run, packed or padded, how fast, how near to sentence-transformers' own encode.

Models have random weights, 6 layers of width 384 (as MiniLM) and the default encoder's tokenizer, so that only the
architecture differs; captions are those of the demo's scenes, or the lines of --texts. Each rate is the best of
--rounds, by the CPU seconds of one thread, and the ratio is to sentence-transformers' encode at its defaults in the
same run. A family that cannot be had or run is told with the reason.

    python benchmarks/encoder_families.py --captions 1000 --texts captions.txt
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import make_scenes
from graphbuild.machine.threads import torch_threads
from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model
from graphbuild.nodes.encoder.model import _packed
from graphbuild.nodes.fidelity import cosine

WIDTH, DEPTH, HEADS = 384, 6, 12
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
DECODER = {**SIZE, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {  # name: configuration, its arguments, pooling
    "BERT": ("BertConfig", SIZE, "mean"),
    "RoBERTa": ("RobertaConfig", {**SIZE, "pad_token_id": 0, "max_position_embeddings": 520}, "mean"),
    "MPNet": ("MPNetConfig", {**SIZE, "pad_token_id": 0}, "mean"),
    "DistilBERT": ("DistilBertConfig", {"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS}, "mean"),
    "ModernBERT": ("ModernBertConfig", {**SIZE, "pad_token_id": 0}, "cls"),
    "Qwen3-like": ("Qwen3Config", DECODER, "lasttoken"),
    "Gemma-like": ("Gemma3TextConfig", DECODER, "mean"),
    "CLIP text": ("CLIPTextConfig", {**SIZE, "max_position_embeddings": 256}, "mean"),
    "T5 encoder": ("T5Config", {"d_model": WIDTH, "num_layers": DEPTH, "num_heads": HEADS, "d_ff": 4 * WIDTH}, "mean"),
}


def saved(folder: Path, name: str) -> Path:
    """A model of a family with random weights, as sentence-transformers saves it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_encoder(DEFAULT_ENCODER).folder)
    torch.manual_seed(0)
    if name == "static":
        module = StaticEmbedding(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), embedding_dim=WIDTH)
        SentenceTransformer(modules=[module], device="cpu").save(str(folder))
        return folder
    kind, arguments, pooling = FAMILIES[name]
    if pooling == "lasttoken":
        tokenizer.padding_side = "left"
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **arguments)
    base = folder / "base"
    make = transformers.T5EncoderModel if kind == "T5Config" else transformers.AutoModel.from_config
    make(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = SentenceTransformer(
        modules=[Transformer(str(base), max_seq_length=128), Pooling(WIDTH, pooling)], device="cpu"
    )
    model.save(str(folder / "model"))
    return folder / "model"


def best(run: Callable[[], object], rounds: int) -> float:
    """The least CPU seconds of several runs."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1_000)
    parser.add_argument("--texts", type=Path, help="a file with a caption a line, in place of the demo's")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    given = options.texts.read_text().splitlines() if options.texts else map(caption, make_scenes(4 * options.captions))
    texts = list(dict.fromkeys(given))[: options.captions]
    print(f"| family | runs | captions/CPU s | x sentence-transformers | mean cosine | least |\n|{'---|' * 6}")
    for name in [*FAMILIES, "static"]:
        with tempfile.TemporaryDirectory() as folder, torch_threads(1):
            try:
                encoder = find_encoder(str(saved(Path(folder), name)))
                model = open_model(encoder, "cpu", "float32")
                found = model.encode(texts).vectors
                own = SentenceTransformer(str(encoder.folder), device="cpu")
                cosines = cosine(model.reference(texts), found)
                seconds = best(lambda: model.encode(texts), options.rounds)  # noqa: B023 - run at once
                others = best(lambda: own.encode(texts, show_progress_bar=False), options.rounds)  # noqa: B023
            except Exception as error:  # noqa: BLE001 - told
                print(f"| {name} | no: {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | | |")
                continue
            way = "static" if model.is_static else "packed" if _packed(encoder, "cpu", "float32") else "padded"
            rate, ratio = len(texts) / seconds, others / seconds
            print(f"| {name} | {way} | {rate:,.0f} | {ratio:.2f} | {np.mean(cosines):.6f} | {np.min(cosines):.6f} |")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{len(texts):,} captions, float32, CPU seconds of one thread; {versions}")


if __name__ == "__main__":
    main()
