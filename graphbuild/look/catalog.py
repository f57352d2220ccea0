"""A finished store by key, node or text: its samples, texts, neighbours and images, without loading it whole.

A look-up of a sample reads the table of the shard that it falls into (SHARDS of them stay in memory) and one image's
bytes, that of a node's text one row group (GROUPS stay). A key is first looked for in the shards whose range of keys
holds it; the ranges come from the parquet files' footers, read once. By vector: by_vector.py.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.by_vector import VectorSearch
from graphbuild.graph.certify import require_graph
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.nodes.captions import usable_text
from graphbuild.nodes.encoder import find_encoder, open_model, prompt_of
from graphbuild.nodes.matrix import is_matrix
from graphbuild.nodes.samples import MORE
from graphbuild.recipe import Recipe, resolve
from graphbuild.sources.images import MAX_PIXELS, upright_rgb
from graphbuild.sources.ranges import TarRanges
from graphbuild.store.layout import SAMPLES, TEXTS, TEXTS_ROWS
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store

SHARDS, GROUPS, READERS = 32, 128, 8
FOOTERS = 64  # of files with texts that stay parsed, 0.7 MB each of 250,000 nodes
COLUMNS = ["row", "key", "node", "caption", "image_offset", "image_size", MORE]


@dataclass(frozen=True)
class Sample:
    """One sample: its row, key and caption; node: None without a usable caption. image: (shard's number, offset,
    bytes) of its image in the tar, None where there is none to be read. more: its further captions."""

    row: int
    key: str
    node: int | None
    caption: str | None
    image: tuple[int, int, int] | None
    more: tuple[str, ...] = ()

    @property
    def captions(self) -> str | None:
        """All of them, as one text to be shown."""
        return " \N{MIDDLE DOT} ".join([self.caption, *self.more]) if self.caption is not None else None


@dataclass(frozen=True)
class Neighbor:
    """A node near the asked one: its similarity, how many samples have it, and its text (None of ready vectors)."""

    node: int
    similarity: float
    samples: int
    text: str | None


class Catalog:
    """Look-ups in a store whose graph is finished. Errors: ConfigError without one, InputError for what is not there.

    graph: its SampleGraph. Threads may share a Catalog.
    """

    def __init__(self, store: Store) -> None:
        require_graph(store)
        self.store = store
        self.graph = SampleGraph.open(store.url)
        self._shards = shards_of(store, store.manifest())
        self._with_nodes = np.flatnonzero(self._shards.column("nodes"))
        self._first_nodes = self._shards.column("first_node")[self._with_nodes]
        self._one_reads, self._one_encodes = threading.Lock(), threading.Lock()
        self._samples = functools.lru_cache(SHARDS)(self._read_samples)
        self._texts = functools.lru_cache(GROUPS)(self._read_texts)
        self._footers = functools.lru_cache(FOOTERS)(store.footer)

    # -- samples

    def sample(self, key: str) -> Sample:
        """The sample of that key; InputError when there is none, or several."""
        found = self.samples(key)
        if not found:
            raise InputError(
                f"no sample of {self.store.url} has the key {key!r}",
                f"keys are listed in {self.store.display('samples/')}*.parquet; or ask by {self._others}",
            )
        if len(found) > 1:
            rows = ", ".join(f"row {sample.row}: node {sample.node}" for sample in found[:5])
            raise InputError(f"{len(found)} samples have the key {key!r} ({rows})", f"ask by {self._others}")
        return found[0]

    def samples(self, key: str) -> list[Sample]:
        """All samples of that key; of tars that are gone only where there are no others."""
        found: dict[bool, list[Sample]] = {False: [], True: []}
        gone = set(self.store.manifest().get("gone", []))
        for number, (name, keys) in enumerate(zip(self._shards.names, self._key_ranges, strict=True)):
            if keys is None or keys[0] <= key <= keys[1]:
                table = self._samples(number)
                found[name in gone] += [self._sample(number, at) for at in _positions(table["key"], key)]
        return found[False] or found[True]

    def sample_of(self, node: int) -> Sample | None:
        """The first sample of a node; None of ready vectors, which have no samples."""
        return next(self.samples_of(node), None)

    def samples_of(self, node: int, shards: int | None = None) -> Iterator[Sample]:
        """The samples of a node in order, those of so many shards from its own on; none of ready vectors."""
        own = self._shard_of(node)
        if self.has_samples and not self.graph.gone[node]:
            for number in range(len(self._shards))[own:][:shards]:  # not in its own where that tar is gone
                yield from (self._sample(number, at) for at in self._positions_of(node, number))

    def _positions_of(self, node: int, number: int) -> list[int]:
        """Where a node's samples are in a shard."""
        table = self._samples(number)
        positions = _positions(table["node"], node)
        if MORE in table.column_names:
            more = table[MORE].combine_chunks()
            behind = _positions(pa.chunked_array([pc.struct_field(more.flatten(), "node")]), node)
            positions = sorted(positions + pc.list_parent_indices(more).take(pa.array(behind, pa.int64())).to_pylist())
        return positions

    def image(self, sample: Sample | None, pixels: int) -> bytes | None:
        """The sample's image as a new JPEG of at most [pixels, pixels]; None without a sample, or
        when it has none that can be read.

        Raises:
            ShardError, ImageError: the tar is gone, or its bytes are no image.
        """
        if sample is None or sample.image is None:
            return None
        number, offset, size = sample.image
        with self._one_reads:
            content = self._tars.read(*(np.array([value]) for value in (number, offset, offset + size)))[0]
        small = upright_rgb(io.BytesIO(content), max_pixels=MAX_PIXELS, least=pixels)
        small.thumbnail((pixels, pixels))
        made = io.BytesIO()
        small.save(made, "JPEG", quality=85)
        return made.getvalue()

    # -- nodes

    def describe(self, nodes: Any, similarities: Any) -> list[Neighbor]:
        """Nodes with their similarities, texts and numbers of samples."""
        ids: list[int] = np.asarray(nodes).tolist()
        groups = [self._group_of(node) for node in ids]
        distinct = sorted(set(groups))
        with ThreadPoolExecutor(READERS) as readers:  # neighbours lie in many shards, and each read waits for a disk
            tables = dict(zip(distinct, readers.map(self._texts, distinct), strict=True))
        found = []
        for node, group, similarity in zip(ids, groups, np.asarray(similarities).tolist(), strict=True):
            table = tables[group]
            told = table.slice(node - table["node"][0].as_py(), 1).to_pylist()[0]
            found.append(Neighbor(node, similarity, told["samples"], told["text"]))
        return found

    def neighbors(self, node: int, count: int) -> list[Neighbor]:
        ids, similarities = self.graph.neighbors(np.array([node]))
        return self.describe(ids[0, :count], similarities[0, :count])

    def search(self, text: str, count: int) -> list[Neighbor]:
        """The nodes nearest to any text, by the store's own encoder; exact up to by_vector.EXACT_NODES nodes."""
        normalized, reason = usable_text(text)
        if normalized is None:
            raise InputError(
                f"the text {text[:40]!r} cannot be searched for: {reason}", "give some words to search by (--text)"
            )
        with self._one_encodes:
            vector = self._model.query(normalized)
        if np.isnan(vector).any():
            raise InputError(f"the encoder gives no vector for {text[:40]!r}", "give other words to search by (--text)")
        return self.describe(*self._vectors.nearest(vector, count))

    @cached_property
    def searchable(self) -> bool:
        """Whether there is an encoder for `search`: not of ready vectors or a matrix."""
        return not self._recipe.embed.is_ready and not is_matrix(self._recipe.embed.encoder)

    def ask(
        self, count: int, *, key: str | None = None, text: str | None = None, node: int | None = None
    ) -> tuple[Sample | None, list[Neighbor]]:
        """Neighbours of a key, a text or a node, and its sample, if it is one; ConfigError unless just one is given."""
        if sum(given is not None for given in (key, text, node)) != 1:
            if not self.has_samples:
                raise ConfigError(
                    "give --node: ready vectors have neither keys nor texts", "node i is row i of the file"
                )
            raise ConfigError(
                f"give {'a KEY, --text' if self.searchable else 'a KEY'} or --node, one of them",
                f"keys are listed in {self.store.display('samples/')}*.parquet",
            )
        if text is not None:
            return None, self.search(text, count)
        sample = self.sample(key) if key is not None else None
        if sample is not None:
            if sample.node is None:
                raise InputError(
                    f"sample {key!r} has no usable caption, or its tar is gone, so it has no node",
                    "see rejected/scan/ and rejected/assign/, and `gone` in manifest.json",
                )
            node = sample.node
        assert node is not None
        return sample or self.sample_of(node), self.neighbors(node, count)

    # -- how

    @cached_property
    def _others(self) -> str:
        """What to ask by where a key does not do."""
        return "--node or --text" if self.searchable else "--node"

    @cached_property
    def _recipe(self) -> Recipe:
        return resolve(self.store, "embed", {})

    @cached_property
    def _vectors(self) -> VectorSearch:
        return VectorSearch(self.graph)

    @cached_property
    def _model(self) -> Any:
        embed = self._recipe.embed
        if not self.searchable:
            raise ConfigError(
                f"{self.store.url} was built from ready vectors or a matrix, so there is no encoder for a text",
                "ask by KEY, or by node (--node)" if self.has_samples else "ask by node (--node)",
            )
        return open_model(find_encoder(embed.encoder), "cpu", embed.precision, prompt_of(embed), embed.dim)

    @cached_property
    def has_samples(self) -> bool:
        return bool({"scan", "assign"} & self.store.manifest()["stages"].keys())

    @property
    def has_texts(self) -> bool:
        """Whether nodes have texts; ready vectors have none."""
        return bool(self._texts(self._group_of(0))["text"].null_count == 0)

    @cached_property
    def has_images(self) -> bool:
        """Whether the samples of the first tar have images; a caption list and ready vectors have none."""
        tars = np.flatnonzero(self._shards.table["tar_url"].is_valid())
        if not len(tars):
            return False
        offsets = self._samples(int(tars[0]))["image_offset"]
        return bool(offsets.null_count < len(offsets))

    @cached_property
    def _key_ranges(self) -> list[tuple[str, str] | None]:
        if not self.has_samples:
            raise InputError(
                f"{self.store.url} was built from ready vectors, which have no keys", "ask by node (--node)"
            )
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda name: key_range(self.store, name), self._shards.names))

    @cached_property
    def _tars(self) -> TarRanges:
        urls = self._shards.table["tar_url"].to_pylist()
        return TarRanges([self.store.resolve(url) if url else "" for url in urls])

    def _shard_of(self, node: int) -> int:
        if not 0 <= node < len(self.graph):
            raise InputError(f"node id {node} is not in 0..{len(self.graph) - 1}", "use ids of this store's nodes")
        return int(self._with_nodes[int(np.searchsorted(self._first_nodes, node, side="right")) - 1])

    def _group_of(self, node: int) -> tuple[int, int]:
        """The shard in which a node's text lies, and the row group in it."""
        number = self._shard_of(node)
        return number, (node - self._shards[number].first_node) // TEXTS_ROWS

    def _read_samples(self, number: int) -> pa.Table:
        return self.store.table(SAMPLES.format(self._shards.names[number]), COLUMNS)

    def _read_texts(self, group: tuple[int, int]) -> pa.Table:
        number, at = group
        name = TEXTS.format(self._shards.names[number])
        return self.store.row_group(name, ["node", "samples", "text"], at * TEXTS_ROWS, self._footers(name))

    def _sample(self, number: int, at: int) -> Sample:
        values = self._samples(number).slice(at, 1).to_pylist()[0]
        offset, size = values.pop("image_offset"), values.pop("image_size")
        has_image = offset is not None and self._shards[number].tar
        more = tuple(one["caption"] for one in values.pop(MORE, None) or ())
        return Sample(**values, image=(number, offset, size) if has_image else None, more=more)


def key_range(store: Store, shard: str) -> tuple[str, str] | None:
    """Least and greatest key of a shard, from its parquet footer; None when that does not tell."""
    metadata = store.footer(SAMPLES.format(shard))
    column = metadata.schema.to_arrow_schema().get_field_index("key")
    found = [metadata.row_group(group).column(column).statistics for group in range(metadata.num_row_groups)]
    if any(one is None or not one.has_min_max for one in found):
        return None
    return (min(one.min for one in found), max(one.max for one in found)) if found else ("", "")


def _positions(column: pa.ChunkedArray, value: object) -> list[int]:
    found: list[int] = pc.indices_nonzero(pc.equal(column, pa.scalar(value, column.type))).to_pylist()
    return found


def printable(text: str | None, width: int = 100) -> str:
    """A caption on one terminal line: white space as one space, control and formatting characters as a replacement
    mark, cut at `width`."""
    words = " ".join((text or "(no text)").split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return shown if len(shown) <= width else shown[: width - 3] + "..."
