"""What a request to `graphbuild explore` takes on a graph of CC12M's size, and the memory of the process that serves.

FOLDER is a store with a graph, as `ladder.py job` leaves one of 12.4 million captions; an empty folder becomes that of
benchmarks/graph.py with `--nodes` (random lists and vectors, k = 64, d = 384: 17 GB). A store of ready vectors, as
`ladder.py run --keep` leaves one, gets a sample and a caption a node. Requests begin with an empty page cache. Images
are left out: each is one read of a tar.

The map is made when it is first asked for. What it costs by the number of nodes, and what it is worth: layout.py.

    python benchmarks/explore.py FOLDER
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from urllib.parse import quote
from urllib.request import HTTPCookieProcessor, build_opener

import numpy as np
import polars as pl
from graph import LARGE, empty_page_cache, make_store

from graphbuild.look.catalog import Catalog
from graphbuild.store.layout import SAMPLES, TEXTS, TEXTS_ROWS
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Store

REQUESTS = 50
WORDS = ("red", "blue", "small", "two", "dog", "cat", "beach", "snow", "city", "woman", "tree", "car", "bird", "old")


def add_samples(store: Store, captions: Path | None) -> None:
    """A sample and a caption a node, as if the default encoder had made the vectors: captions in order, or else eight
    of WORDS each."""
    manifest, rng = store.manifest(), np.random.default_rng(1)
    store.fs.makedirs(store.path("samples"), exist_ok=True)
    given = pl.read_parquet(captions, columns=["caption"])["caption"] if captions else None
    for shard in shards_of(store, manifest):
        rows = np.arange(shard.first_node, shard.first_node + shard.nodes)
        if given is not None:
            texts = given[int(rows[0]) : int(rows[-1]) + 1].to_list()
        else:
            texts = [" ".join(words) for words in rng.choice(WORDS, (len(rows), 8))]
            texts = [f"{text} {row}" for text, row in zip(texts, rows.tolist(), strict=True)]
        none = pl.Series([None] * len(rows), dtype=pl.UInt64)
        keys = [f"{row:09}" for row in rows.tolist()]
        samples = {"row": rows, "key": keys, "node": rows, "caption": texts, "image_offset": none, "image_size": none}
        pl.DataFrame(samples).write_parquet(store.path(SAMPLES.format(shard.name)))
        pl.DataFrame({"node": rows, "samples": np.ones(len(rows), np.uint32), "text": texts}).write_parquet(
            store.path(TEXTS.format(shard.name)), row_group_size=TEXTS_ROWS
        )
    recipe = Path(store.path("recipe.yaml"))
    if recipe.exists():  # with an encoder a text can be searched for
        recipe.write_text(re.sub(r"^  vectors: .*\n", "", recipe.read_text(), flags=re.MULTILINE))
    store.write_json("manifest.json", manifest | {"stages": manifest["stages"] | {"assign": {}}})


def asked_of(store: Store) -> pl.DataFrame:
    """`key` and `caption` of REQUESTS samples, of any shards."""
    rng = np.random.default_rng(3)
    shards = rng.choice([shard.name for shard in shards_of(store, store.manifest())], REQUESTS)
    tables = [pl.read_parquet(store.path(SAMPLES.format(name)), columns=["key", "caption"]) for name in shards]
    return pl.concat([table.sample(1, seed=int(seed)) for seed, table in enumerate(tables)])


def found_by_texts(store: Store, texts: list[str], count: int = 10) -> float:
    """The share of the nodes nearest to these texts that a search finds; those of equal similarity are as good."""
    catalog = Catalog(store)
    asked = np.stack([catalog._model.query(text) for text in texts]).astype(np.float32)
    best = np.full((len(asked), count), -1.0, np.float32)
    for begin in range(0, len(catalog.graph), 65_536):
        rows = catalog.graph.embeddings(np.arange(begin, min(begin + 65_536, len(catalog.graph))))
        best = np.sort(np.concatenate([best, asked @ rows.T], axis=1), axis=1)[:, -count:]
    lengths = np.linalg.norm(asked, axis=1)
    found = [catalog._vectors.nearest(query, 24)[1][:count] for query in asked]
    return float(np.mean([s >= b[0] / length - 1e-6 for s, b, length in zip(found, best, lengths, strict=True)]))


def own_megabytes(process: int) -> float:
    """Memory of a process that is not files mapped into it."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1.024 / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=LARGE)
    parser.add_argument("--captions", type=Path, help="parquet with a column `caption`: those of nodes without samples")
    options = parser.parse_args()
    store = Store(str(options.folder))
    if "graph" not in (store.read_json("manifest.json") or {}):
        store = make_store(options.folder, options.nodes, content=True)
    if not {"scan", "assign"} & store.manifest()["stages"].keys():
        add_samples(store, options.captions)
    nodes, some = node_count(store.manifest()), asked_of(store)
    keys, texts = cycle(some["key"].to_list()), cycle([" ".join(text.split()[:6]) for text in some["caption"]])
    empty_page_cache(options.folder)
    begin = time.perf_counter()
    program = str(Path(sys.executable).with_name("graphbuild"))
    with subprocess.Popen([program, "explore", store.url, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[1]
        signed_in, base = build_opener(HTTPCookieProcessor()), address.partition("?")[0]
        signed_in.open(address).close()
        ready = time.perf_counter() - begin
        signed_in.open(f"{base}api/0/search?text={quote(next(texts))}").close()  # waits for the encoder
        print(f"{nodes:,} nodes; ready after {ready:.1f} s, for texts after {time.perf_counter() - begin:.1f} s\n")
        print("| request | first, ms | median, ms | p95, ms | memory then, MB |\n|---|---|---|---|---|", flush=True)
        rng = np.random.default_rng(2)
        kinds: dict[str, tuple[Callable[[], str], int]] = {
            "a node's neighbours": (lambda: f"api/0/node/{rng.integers(nodes)}", REQUESTS),
            "a key": (lambda: f"api/0/key?key={next(keys)}", REQUESTS),
            "a text": (lambda: f"api/0/search?text={quote(next(texts))}", REQUESTS),
            "the map, made": (lambda: "api/0/map", 1),
            "the map": (lambda: "api/0/map", REQUESTS),
            "a million places": (
                lambda: f"api/0/places?begin={rng.integers(10) * (nodes // 20)}&count=1000000",
                20,
            ),
            "colours by community": (lambda: "api/0/colour?by=community", 20),
            "colours by length, made": (lambda: "api/0/colour?by=LENGTH(caption)", 1),
            "near-duplicates, made": (lambda: "api/0/duplicates", 1),
            "near-duplicates": (lambda: "api/0/duplicates", REQUESTS),
            "what a pointer rests on": (lambda: f"api/0/node/{rng.integers(nodes)}?count=1", REQUESTS),
        }
        for kind, (path, count) in kinds.items():
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                asked = base + path()
                while True:
                    with signed_in.open(asked) as answer:
                        answer.read()
                    if answer.status != 202:  # a job goes on
                        break
                times.append(1_000 * (time.perf_counter() - begin))
            rest = [f"{number:,.0f}" for number in np.quantile(times[1:], [0.5, 0.95])] if count > 1 else ["", ""]
            numbers = [f"{times[0]:,.0f}", *rest, f"{own_megabytes(server.pid):,.0f}"]
            print(f"| {kind} | {' | '.join(numbers)} |", flush=True)
        server.terminate()
    words = [" ".join(text.split()[:6]) for text in some["caption"]]
    share = found_by_texts(store, words)
    print(f"\nOf the ten nodes nearest to each of these {len(words)} texts, {share:.0%} are found.")


if __name__ == "__main__":
    main()
