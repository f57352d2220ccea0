"""Queries to a graph from outside it: a caption list, vectors, or another store's samples, some thousand at a time.

Captions are normalised and encoded as the store's own; vectors must be of its encoder as far as names, weights and
widths tell. What cannot be a query is rejected with its reason. Memory: BLOCK queries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from graphbuild.errors import ConfigError
from graphbuild.graph.lists.derived import captions
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.machine.gpus import gpu_here
from graphbuild.nodes.captions import fill_template, normalize, template_fields, usable_text
from graphbuild.nodes.encoder import find_encoder, open_model, prompt_of
from graphbuild.nodes.matrix import is_matrix
from graphbuild.nodes.samples import READY
from graphbuild.recipe import resolve
from graphbuild.sources.paths import named_files, part_inputs
from graphbuild.sources.tables import ENDING, TableSpec, read_parts
from graphbuild.sources.vector_files import ENDING as VECTOR_ENDING
from graphbuild.sources.vector_files import is_array, shapes_of, take_rows, unit_or_fault
from graphbuild.store.files import file_identities
from graphbuild.store.layout import VECTORS
from graphbuild.store.sharded import Array, node_array
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)
BLOCK = 4_096
QUERY = pa.schema([("query", pa.int64()), ("query_key", pa.string()), ("query_caption", pa.string())])


class Block(NamedTuple):
    """about: columns QUERY of each. texts: normalised, None where there is none. vectors: float16 [n, d], unit norm;
    None where they were not asked for."""

    about: pa.Table
    texts: list[str | None]
    vectors: Array | None


@dataclass
class Queries:
    """inputs: the identity of each file. blocks: reads them all, once. rejected: rows as of `write_rejected`, of what
    was read so far. has_texts: whether a query may equal a node by its text."""

    inputs: dict[str, str]
    blocks: Callable[[], Iterator[Block]]
    has_texts: bool
    rejected: list[tuple[Any, ...]] = field(default_factory=list)


def caption_queries(
    graph: SampleGraph,
    path: str,
    *,
    caption_column: str = "caption",
    key_column: str | None = None,
    vectors: bool = True,
) -> Queries:
    """Each row of a caption list is a query; its number is its position.

    Raises:
        ConfigError: the store has no encoder, or the one that is found here is another than its nodes'.
        InputError: as of `read_parts`.
    """
    store, urls = Store(graph.url), named_files(path, ENDING, "--captions")
    roles = {"caption": caption_column, **({"key": key_column} if key_column else {})}
    template = resolve(store, "embed", {}).embed.template
    model = _model(store) if vectors else None
    found = Queries(part_inputs("captions", file_identities(urls).values()), lambda: blocks(), has_texts=True)

    def blocks() -> Iterator[Block]:
        for _, _, chunk in read_parts(TableSpec(path=urls[0], columns=roles), urls, chunk_rows=BLOCK):
            for position, reason, content in zip(*chunk.rejected.to_pydict().values(), strict=True):
                found.rejected.append((position, None, reason, content))
            keys = chunk.rows["key"].to_pylist() if key_column else [None] * len(chunk.rows)
            rows, texts = [], []
            for row in zip(chunk.rows["position"].to_pylist(), keys, chunk.rows["caption"].to_pylist(), strict=True):
                text, reason = usable_text(row[2] if template_fields(template) else fill_template(template, row[2]))
                if text is None:
                    found.rejected.append((row[0], row[1], reason, row[2]))
                else:
                    rows.append(row)
                    texts.append(text)
            encoded = model().encode(texts).vectors if model is not None and texts else None
            lacking = [] if encoded is None else np.flatnonzero(np.isnan(encoded).any(axis=1)).tolist()
            yield _block(found, rows, texts, encoded, dict.fromkeys(lacking, "the encoder makes no vector of it"))

    return found


def vector_queries(
    graph: SampleGraph, path: str, *, vector_column: str = "embedding", key_column: str | None = None
) -> Queries:
    """Each row of files of vectors is a query; its number is its row.

    Raises:
        ConfigError: keys are asked of files that have none. InputError: a file cannot be read, or of another width.
    """
    store, urls = Store(graph.url), named_files(path, VECTOR_ENDING, "--vectors")
    shapes = shapes_of(urls, vector_column)
    for url, (_, other) in zip(urls, shapes, strict=True):
        if other not in (0, graph.d):
            raise ConfigError(f"{url} holds vectors of {other} numbers; those of {store.url} have {graph.d}", SAME)
    if key_column and any(is_array(url) for url in urls):
        raise ConfigError("--key-column: .npy and .npz files have no keys", "give parquet, or leave it out")
    logger.info("%-9s %s has vectors of %s: nothing tells whether these are", "matching", store.url, _name(store))
    found = Queries(part_inputs("vectors", file_identities(urls).values()), lambda: blocks(), has_texts=False)

    def blocks() -> Iterator[Block]:
        begin = 0
        for url, (count, _) in zip(urls, shapes, strict=True):
            keys = _keys(url, key_column) if key_column else [None] * count
            for first in range(0, count, BLOCK):
                rows = np.arange(first, min(first + BLOCK, count))
                encoded, faults = unit_or_fault(take_rows(url, vector_column, rows, needed=False))
                about = [(begin + row, keys[row], None) for row in rows.tolist()]
                yield _block(found, about, [None] * len(rows), encoded, faults)
            begin += count

    return found


def store_queries(graph: SampleGraph, url: str, *, vectors: bool = True) -> Queries:
    """Each caption of another store's samples, or each of its ready vectors, is a query; its number is its row there.

    Raises:
        ConfigError: the other store has no nodes, is this one, or has vectors of another encoder.
    """
    store, other = Store(graph.url), Store(url)
    theirs = other.manifest().get("embeddings")
    if theirs is None or not other.manifest().get("shards"):
        raise ConfigError(f"{other.url} has no nodes", f"run `graphbuild embed {other.url}` first")
    if other.url == store.url:
        raise ConfigError(f"--store {other.url} is the store itself", "use `graphbuild mine --what duplicates`")
    if vectors:
        _check_same(store, other, theirs)
    named = other.url.rstrip("/").rpartition("/")[2]
    found = Queries({"store": f"{named}, {theirs['fingerprint']}"}, lambda: blocks(), theirs["encoder"] != READY)

    def blocks() -> Iterator[Block]:
        nodes = node_array(other, shards_of(other, other.manifest()), VECTORS)
        for table in captions(other, ["row", "key", "node", "caption"]):
            for begin in range(0, len(table), BLOCK):
                part = table.slice(begin, BLOCK)
                shown = part["caption"].to_pylist()
                about = list(zip(part["row"].to_pylist(), part["key"].to_pylist(), shown, strict=True))
                texts = [None if caption is None else normalize(caption) for caption in shown]
                yield _block(found, about, texts, nodes.take(part["node"].to_numpy()) if vectors else None, {})

    return found


SAME = "give queries of the store's own encoder, at its width"


def _block(
    found: Queries, rows: list[tuple[Any, ...]], texts: list[Any], vectors: Array | None, faults: dict[int, str]
) -> Block:
    """The queries whose vector has no fault; the others are rejected."""
    found.rejected += [(rows[at][0], rows[at][1], why, rows[at][2]) for at, why in sorted(faults.items())]
    sound = [at for at in range(len(rows)) if at not in faults]
    columns = [pa.array([rows[at][place] for at in sound], field.type) for place, field in enumerate(QUERY)]
    return Block(pa.table(columns, QUERY), [texts[at] for at in sound], None if vectors is None else vectors[sound])


def _keys(url: str, column: str) -> list[str | None]:
    parts = read_parts(TableSpec(path=url, columns={"key": column}), [url])
    return [key for _, _, chunk in parts for key in chunk.rows["key"].to_pylist()]


def _model(store: Store) -> Callable[[], Any]:
    """What opens the encoder of a store's nodes."""
    embed, told = resolve(store, "embed", {}).embed, store.manifest()["embeddings"]
    if embed.is_ready or is_matrix(embed.encoder):
        raise ConfigError(
            f"{store.url} was built from ready vectors or a matrix, so there is no encoder for captions",
            "give the queries' vectors by --vectors or --store; without --threshold, leaks compare texts alone",
        )
    encoder = find_encoder(embed.encoder)
    if encoder.sha256 != told["weights_sha256"]:
        raise ConfigError(
            f"{encoder.identity} is another encoder than that of {store.url}: {_name(store)}",
            "install the encoder that its nodes were made with",
        )
    device = "cuda" if embed.device != "cpu" and gpu_here() else "cpu"
    return lambda: open_model(encoder, device, embed.precision, prompt_of(embed), embed.dim)


def _check_same(store: Store, other: Store, theirs: Json) -> None:
    """ConfigError unless two stores' vectors are of one encoder, as far as they tell."""
    own = store.manifest()["embeddings"]
    which = "weights_sha256" if own.get("weights_sha256") and theirs.get("weights_sha256") else "encoder"
    differ = [name for name in (which, "prompt", "d") if own.get(name) != theirs.get(name)]
    if differ:
        told = " and ".join(f"{name} {_told(theirs, name)}, not {_told(own, name)}" for name in differ)
        raise ConfigError(f"--store {other.url} has vectors of another encoder: {told}", SAME)
    if own["encoder"] == READY:
        logger.info("%-9s both stores have ready vectors: nothing tells whether one encoder made them", "matching")


def _told(entry: Json, name: str) -> str:
    return f"{entry.get(name)!r}"[:20] + (f" ({entry['encoder']})" if name == "weights_sha256" else "")


def _name(store: Store) -> str:
    told = store.manifest()["embeddings"]
    return f"{told['encoder']} ({(told['weights_sha256'] or 'no weights known')[:16]})"
