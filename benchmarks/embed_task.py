"""Where the time of a task of `graphbuild embed` goes: reading texts, tokenising, encoding, writing; by cProfile.

One worker, the default encoder, one shard of captions as a parquet file has them; the second of two runs counts, whose
model is loaded. What is neither encoded nor tokenised is what overlapping it with the arithmetic could save.

    python benchmarks/embed_task.py CAPTIONS.parquet [--count 10000]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from pathlib import Path

import polars as pl
from embed import read_captions

from graphbuild.nodes import encode, number, scan
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import perform
from graphbuild.store.store import Store

PARTS = {
    "reading texts": ("store.py", "table"),
    "tokenising": ("tokens.py", "tokenize"),
    "encoding, tokenising included": ("model.py", "encode"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    texts = read_captions(options.captions, options.count)
    with tempfile.TemporaryDirectory() as folder:
        captions = Path(folder) / "captions.parquet"
        pl.DataFrame({"caption": texts}).write_parquet(captions)
        recipe = Recipe(embed=Embed(captions=str(captions), shard_size=options.count, device="cpu"))
        store = Store(str(Path(folder) / "store"))
        with Runner(workers=0) as runner:
            for stage in (scan.STAGE, number.NUMBER, number.ASSIGN, encode.STAGE):
                runner.run(stage, recipe, store)
        (task,) = encode.plan(recipe, store)
        with cProfile.Profile() as profile:
            perform(encode.STAGE, task, store)
    raw = {(Path(file).name, name): times[3] for (file, _, name), times in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    whole = raw["stage.py", "perform"]
    shares = {part: raw[place] / whole for part, place in PARTS.items()}
    shares["writing, checksums and records"] = 1 - shares["reading texts"] - shares["encoding, tokenising included"]
    print(f"{len(texts):,} captions in {whole:.2f} s\n\n| part | share of the time |\n|---|---|")
    for part, share in shares.items():
        print(f"| {part} | {share:.2%} |")


if __name__ == "__main__":
    main()
