"""What selections cost: the verb at CC12M's size, and the loaders' speed with half of the samples kept.

    python benchmarks/selections.py verb FOLDER [--rows 12400000]       makes a store there, about 3 GB, of drawn lists
    python benchmarks/selections.py loader STORE 'TARS' [--rounds 5]    any finished store with its tars

The verb runs as a user runs it, start-up included. The loader's rates are samples delivered a second, of whole epochs,
in turn with a selection of every second row and without one; a ratio is of the best of each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from graphbuild.graph.select.rules import select_store
from graphbuild.store.layout import NEIGHBORS, SAMPLES, SIMILARITIES, shard_name
from graphbuild.store.shards import Shard, write_shards
from graphbuild.store.store import Store, Writer
from graphbuild.torch import GraphDataset, graph_webdataset

SHARD, K = 10_000, 4
RULES = {
    "degree and similarity": "nearest > 0.5 AND degree >= 2",
    "captions": "caption LIKE '%dog%'",
    "rows": "row % 2 = 0",
}
WORDS = "a dog cat runs on the beach red house of old man in park with tree"


def make_store(store: Store, rows: int) -> None:
    """A store of `rows` samples, each with a node of its own, as far as `select` reads it."""
    draw = np.random.default_rng(0)
    words = np.array(WORDS.split())
    writer, shards = Writer(store), []
    for first in range(0, rows, SHARD):
        name, count = shard_name(first // SHARD), min(SHARD, rows - first)
        texts = words[draw.integers(0, len(words), (count, 9))]
        own = np.arange(first, first + count)
        table = {"key": own.astype(str), "caption": [" ".join(text) for text in texts], "node": own, "row": own}
        writer.table(SAMPLES.format(name), pa.table({**table, "image_size": draw.integers(1_000, 90_000, count)}))
        writer.array(NEIGHBORS.format(name), draw.integers(0, rows, (count, K)).astype(np.uint32))
        writer.array(SIMILARITIES.format(name), np.sort(draw.random((count, K)))[:, ::-1].astype(np.float16))
        shards.append(Shard(name, first, count, first, count, None))
    entries = {"embeddings": {"d": 8, "encoder": "none"}, "graph": {"k": K, "fingerprint": "made"}, "recall": {}}
    stages = {name: {"tasks": 0, "counts": {}, "fingerprint": ""} for name in ("assign", "certify")}
    store.write_json("manifest.json", {**write_shards(store, shards), **entries, "stages": stages})


def verb(folder: str, rows: int) -> None:
    store = Store(folder)
    if not store.exists("manifest.json"):
        make_store(store, rows)
    for what, rule in RULES.items():
        begin = time.monotonic()
        command = [str(Path(sys.executable).with_name("graphbuild")), "select", folder, "timed", "--where", rule]
        subprocess.run(command, check=True, capture_output=True)
        size = (Path(folder) / "selections/timed.parquet").stat().st_size
        print(f"{what}: {time.monotonic() - begin:.1f} s for {rows:,} rows, {size / rows:.3f} bytes a row")


def loader(store: str, tars: str, rounds: int) -> None:
    half = Path(store) / "selections/half.parquet"
    select_store(Store(store), "half", {"where": "row % 2 = 0"})
    sidecars = None if tars.startswith(store) else f"{store}/shards"
    for what in ("stream", "data set"):
        best = {}
        for _ in range(rounds):
            for name, selection in (("whole", None), ("half", half)):
                if what == "stream":
                    batches = graph_webdataset(
                        tars, sidecars=sidecars, batch_size=64, image_pixels=224, selection=selection
                    )
                    begin = time.monotonic()
                    samples = sum(len(batch["key"]) for batch in batches)
                else:
                    data = GraphDataset(tars, sidecars=sidecars, image_pixels=224, selection=selection)
                    begin = time.monotonic()
                    order = np.random.default_rng(0).permutation(len(data))
                    samples = sum(
                        len(data.collate(data.__getitems__(order[at : at + 64].tolist()))["key"])
                        for at in range(0, len(order), 64)
                    )
                best[name] = max(best.get(name, 0.0), samples / (time.monotonic() - begin))
        whole, kept = best["whole"], best["half"]
        print(f"{what}: {whole:.0f} samples/s of all, {kept:.0f} of a half: {kept / whole:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verb", "loader"])
    parser.add_argument("place")
    parser.add_argument("tars", nargs="?")
    parser.add_argument("--rows", type=int, default=12_400_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.what == "verb":
        verb(given.place, given.rows)
    else:
        loader(given.place, given.tars, given.rounds)
