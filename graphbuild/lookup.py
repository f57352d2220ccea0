"""Looking things up in a finished store: a sample by its key, and the neighbours of a sample or of any text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from graphbuild.encoder import find_encoder, open_model
from graphbuild.errors import InputError
from graphbuild.graph import SampleGraph
from graphbuild.matrix import is_matrix
from graphbuild.recipe import Recipe, resolve
from graphbuild.sharded import Array
from graphbuild.state import require
from graphbuild.store import Json, Store
from graphbuild.text import usable_text


@dataclass(frozen=True)
class Neighbor:
    """A node near the asked one: its similarity, how many samples have it, its text and one sample's key."""

    node: int
    similarity: float
    samples: int
    text: str | None


def find_sample(store: Store, key: str) -> Json:
    """The sample of that key: row, key, node, caption. InputError when there is none, or several."""
    require(store, "certify", "index")
    found = []
    for shard in store.manifest()["shards"]:
        table = pl.from_arrow(store.table(f"samples/{shard['shard']}.parquet", ["row", "key", "node", "caption"]))
        assert isinstance(table, pl.DataFrame)
        found += [{**row, "shard": shard["shard"]} for row in table.filter(pl.col("key") == key).to_dicts()]
    if not found:
        raise InputError(
            f"no sample of {store.url} has the key {key!r}",
            "keys are listed in samples/*.parquet; or search by --text",
        )
    if len(found) > 1:
        rows = ", ".join(f"row {sample['row']} in shard {sample['shard']}" for sample in found[:5])
        raise InputError(f"{len(found)} samples have the key {key!r} ({rows})", "search by --text instead")
    if found[0]["node"] is None:
        raise InputError(
            f"sample {key!r} has no usable caption, so no node",
            f"see rejected/scan/{found[0]['shard']}.parquet",
        )
    return found[0]


def neighbors_of_node(store: Store, node: int, count: int) -> list[Neighbor]:
    graph = SampleGraph.open(store.url)
    ids, similarities = graph.neighbors(np.array([node]))
    return _described(store, ids[0, :count], similarities[0, :count])


def neighbors_of_text(store: Store, text: str, count: int) -> list[Neighbor]:
    """Nodes nearest to any text, by one exact pass over the embeddings with the store's own encoder."""
    normalized, reason = usable_text(text)
    if normalized is None:
        raise InputError(f"--text {text[:40]!r}: {reason}", "give some words to search by")
    recipe: Recipe = resolve(store, "embed", {})
    if recipe.embed.vectors is not None or is_matrix(recipe.embed.encoder):
        raise InputError(
            f"{store.url} was built from ready vectors or a matrix, so there is no encoder for --text",
            "ask for a KEY instead",
        )
    graph = SampleGraph.open(store.url)
    embed = recipe.embed
    model = open_model(find_encoder(embed.encoder), "cpu", embed.precision, embed.prompt, embed.dim)
    query = model.encode([normalized]).vectors[0].astype(np.float32)
    query /= np.linalg.norm(query)
    ids = np.arange(len(graph))
    scores = np.concatenate(
        [graph.embeddings(part) @ query for part in np.array_split(ids, max(len(ids) // 65_536, 1))]
    )
    best = np.lexsort((ids, -scores))[:count]
    return _described(store, best, scores[best])


def _described(store: Store, nodes: Array, similarities: Array) -> list[Neighbor]:
    starts = [
        (shard["first_node"], shard["nodes"], shard["shard"]) for shard in store.manifest()["shards"] if shard["nodes"]
    ]
    firsts = np.array([start for start, _, _ in starts])
    tables: dict[str, Json] = {}
    result = []
    for node, similarity in zip(nodes.tolist(), similarities.tolist(), strict=True):
        first, _, shard = starts[int(np.searchsorted(firsts, node, side="right")) - 1]
        if shard not in tables:
            tables[shard] = store.table(f"nodes/{shard}.parquet").to_pydict()
        at = node - first
        result.append(Neighbor(node, similarity, tables[shard]["samples"][at], tables[shard]["text"][at]))
    return result


def printable(text: str | None, width: int = 100) -> str:
    """A caption on one terminal line: white space as one space, control and formatting characters as a replacement
    mark, cut at `width`."""
    words = " ".join((text or "(no text)").split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return shown if len(shown) <= width else shown[: width - 3] + "..."
