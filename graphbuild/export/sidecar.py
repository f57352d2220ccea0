"""The sidecar of a shard: one Parquet row per sample of the tar, in tar order (docs/reference/format.md).

Reading promises columns that fit each other: one row a sample, keys unique, no value missing where a node is
named. It costs one request for the whole file and d + 6 k + about 100 bytes of memory a row (10,000 rows, d =
384, k = 64: 9 MB). Writers take the schema and the header from here, so that there is one definition of the
format.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from graphbuild.errors import ConfigError, ShardError
from graphbuild.graph import sketch
from graphbuild.graph.select.selection import Selection
from graphbuild.nodes.samples import MORE
from graphbuild.recipe import EmbeddingKind
from graphbuild.runner.stage import sealed
from graphbuild.store.remote import file_system, reaching
from graphbuild.store.store import FORMAT_VERSION

METADATA_KEY = b"graphbuild"
MAY_BE_NULL = ("caption", "image_offset", "image_size")  # where a sample has a node
BLOCK_BYTES = 1 << 18  # of a remote sidecar, fetched at once where single columns are read
PLURAL = ("weight", MORE)  # columns of sidecars where samples have several captions
EXPORT = "run `graphbuild export` again"


class TarIdentity(BaseModel):
    """The tar that a sidecar was written for: file name, size in bytes, sha256 of its content."""

    model_config = ConfigDict(frozen=True, strict=True)
    name: str
    bytes: int
    sha256: str


class SidecarHeader(BaseModel):
    """What the Parquet schema metadata says of a sidecar, as JSON under the key `graphbuild`.

    d: dimensions of an embedding; k: neighbours a node; graph: fingerprint of the graph that node ids refer
    to; tar: None where the samples did not come from a tar; rows: samples in the shard. chunk: in a tar of the
    clustered layout, how many samples behind each other are neighbours and are shuffled as one. sketch_steps: what a
    code of 1 is worth in each coordinate of a sketch (`graphbuild.graph.sketch.unpack`). image_member: the extension of
    the member that is a sample's image, None: `graphbuild.sources.tars.image_extension` says. node_count: of the graph.
    """

    model_config = ConfigDict(frozen=True, strict=True)
    format_version: int = FORMAT_VERSION
    encoder: str
    d: int
    k: int
    embeddings: EmbeddingKind
    graph: str
    shard: str
    tar: TarIdentity | None
    rows: int
    chunk: int | None = None
    sketch_steps: list[float] | None = None
    image_member: str | None = None
    node_count: int | None = None

    def metadata(self) -> dict[bytes, bytes]:
        """The schema metadata to write: `sidecar_schema(...).with_metadata(header.metadata())`."""
        absent = {name for name in ("image_member", "node_count") if getattr(self, name) is None}
        facts = self.model_dump(mode="json", exclude=absent)
        return {METADATA_KEY: json.dumps(sealed(facts)).encode()}


def sidecar_schema(d: int, k: int, embeddings: EmbeddingKind, *, plural: bool = False) -> pa.Schema:
    """The columns of a sidecar, without metadata.

    A sample without a usable caption has no node: all columns from the embedding to background_std are null
    there, and the caption, if none could be read. The value of an int8 embedding is `embedding *
    embedding_scale`; a float16 one has no scale; "sketch:64" has a column sketch instead (`graphbuild.graph.sketch`),
    "none" has neither. plural: a sample may have several captions; these columns are then of the first that has a node,
    `weight` is its weight, and MORE has the others, each with a weight, a caption and all columns of its node.

    Raises:
        ConfigError: d or k below 1, or an unknown kind of embeddings.
    """
    if d < 1 or k < 1:
        raise ConfigError(f"a sidecar needs d >= 1 and k >= 1, got d = {d}, k = {k}", "set --k to 1 or more")
    kinds: dict[str, list[pa.Field]] = {
        "int8": [pa.field("embedding", pa.list_(pa.int8(), d)), pa.field("embedding_scale", pa.float32())],
        "float16": [pa.field("embedding", pa.list_(pa.float16(), d))],
        "sketch:64": [pa.field("sketch", pa.list_(pa.uint8(), min(d, sketch.BYTES)))],
        "none": [],
    }
    if embeddings not in kinds:
        raise ConfigError(f"unknown kind of embeddings {embeddings!r}", f"use one of {', '.join(kinds)}")
    texts = [
        pa.field("node", pa.int64()),
        pa.field("caption", pa.string()),
        *kinds[embeddings],
        pa.field("neighbors", pa.list_(pa.uint32(), k)),
        pa.field("similarities", pa.list_(pa.float16(), k)),
        pa.field("background_mean", pa.float32()),
        pa.field("background_std", pa.float32()),
    ]
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        *texts,
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
    ]
    if plural:
        weight = pa.field("weight", pa.float32())
        fields += [weight, pa.field(MORE, pa.list_(pa.struct([weight, *texts])))]
    return pa.schema(fields)


@dataclass(frozen=True)
class Sidecar:
    """The columns of one sidecar; n rows in tar order. Where `node` is -1 the sample has none and the rest is
    zero.

    row int64 [n]; key object [n] (str); image_offset and image_size int64 [n], bytes in the tar, -1 where the tar holds
    no image for the sample. first_more int64 [n + 1]: samples may have several captions, t >= n in all; the first ones
    are texts 0..n-1 below, the others of sample i are texts n + first_more[i] .. n + first_more[i+1] - 1.

    caption object [t] (str or None); node int64 [t]; weight float32 [t], of a sample's captions 1 in all; embedding
    int8 or float16 [t, d], or None; sketch uint8 [t, 64 or fewer], or None; neighbors uint32 [t, k]; similarities
    float16 [t, k], descending; background float32 [t, 2], mean and deviation.
    """

    url: str
    header: SidecarHeader
    row: NDArray[np.int64]
    key: NDArray[np.object_]
    first_more: NDArray[np.int64]
    node: NDArray[np.int64]
    caption: NDArray[np.object_]
    weight: NDArray[np.float32]
    embedding: NDArray[np.int8] | NDArray[np.float16] | None
    sketch: NDArray[np.uint8] | None
    neighbors: NDArray[np.uint32]
    similarities: NDArray[np.float16]
    background: NDArray[np.float32]
    image_offset: NDArray[np.int64]
    image_size: NDArray[np.int64]

    @classmethod
    def read(cls, url: str, selection: Selection | None = None) -> Sidecar:
        """Read and check one sidecar from a path or any fsspec URL; of a selection, as if no other row had a node.

        Raises:
            ShardError: the file is missing, not a sidecar, of another format version, or contradicts itself.
        """
        files, path = file_system(url)
        with readable(url):
            content = pa.BufferReader(files.cat_file(path))
            table = pq.ParquetFile(content, page_checksum_verification=True).read(use_threads=False)
            header = _parse_header(url, table.schema.metadata)
            _check_columns(url, header, table.schema, table.num_rows)
            table = table if selection is None else selection.applied(table)
            columns, first_more = text_columns(table)
            background = [_numbers(columns[f"background_{name}"]) for name in ("mean", "std")]
            sidecar = cls(
                url=url,
                header=header,
                row=_numbers(columns["row"]),
                key=columns["key"].to_numpy(zero_copy_only=False),
                first_more=first_more,
                node=_numbers(columns["node"], absent=-1),
                caption=columns["caption"].to_numpy(zero_copy_only=False),
                weight=_numbers(columns["weight"]),
                embedding=_matrix(columns["embedding"]) if "embedding" in columns else None,
                sketch=_matrix(columns["sketch"]) if "sketch" in columns else None,
                neighbors=_matrix(columns["neighbors"]),
                similarities=_matrix(columns["similarities"]),
                background=np.stack(background, axis=1),
                image_offset=_numbers(columns["image_offset"], absent=-1),
                image_size=_numbers(columns["image_size"], absent=-1),
            )
        sidecar._check_values(columns)
        return sidecar

    def _check_values(self, columns: dict[str, pa.Array]) -> None:
        """Keys of a tar unique, of a list not; where a node is named nothing is missing and the embedding is usable."""
        if self.header.tar is not None:
            self._check_keys()
        named = self.node >= 0
        if not named[len(self.row) :].all() or (self.weight < 0).any():
            raise ShardError(f"{self.url}: one of {MORE} has no node, or a weight is negative", EXPORT)
        for name, column in columns.items():
            if name in MAY_BE_NULL or column.null_count == 0:
                continue
            gaps = named[: len(column)] & ~column.is_valid().to_numpy(zero_copy_only=False)
            if gaps.any():
                row = self.sample_of(int(gaps.argmax()))
                raise ShardError(f"{self.url}: {name} is null at row {row}, which has a node", EXPORT)
        if self.embedding is not None:
            usable = np.isfinite(self.embedding).all(axis=1) & (self.embedding != 0).any(axis=1)
            if (named & ~usable).any():
                row = self.sample_of(int((named & ~usable).argmax()))
                raise ShardError(f"{self.url}: the embedding of row {row} is zero or not finite", EXPORT)

    def sample_of(self, text: int) -> int:
        """The sample that has a text."""
        behind = text - len(self.row)
        return text if behind < 0 else int(np.searchsorted(self.first_more, behind, side="right")) - 1

    def texts_of(self, position: int) -> NDArray[np.int64]:
        """The texts of a sample, the first one first."""
        begin, end = self.first_more[position : position + 2] + len(self.row)
        return np.array([position, *range(begin, end)])

    def _check_keys(self) -> None:
        _, first = np.unique(self.key.astype(str), return_index=True)
        if len(first) != len(self.key):
            again = int(np.setdiff1d(np.arange(len(self.key)), first)[0])
            earlier = int(np.flatnonzero(self.key == self.key[again])[0])
            raise ShardError(
                f"{self.url}: key {self.key[again]!r} stands at row {earlier} and again at row {again}",
                "write the tar with each key once and its members side by side, then embed and export again",
            )


def read_columns(url: str, names: Sequence[str], others: Sequence[str] = ()) -> tuple[SidecarHeader, pa.Table]:
    """The header and some columns of a sidecar; of a remote one little else is fetched. others: columns, or parts of
    nested ones, that may be absent.

    Raises:
        ShardError: the file is missing or not a sidecar, a column is absent or of another type, or rows are missing.
    """
    files, path = file_system(url)
    with readable(url), files.open(path, "rb", block_size=BLOCK_BYTES) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False, page_checksum_verification=True)
        header = _parse_header(url, parquet.schema_arrow.metadata)
        table, schema = parquet.read(columns=[*names, *others], use_threads=False), parquet.schema_arrow
    plural = [name for name in PLURAL if others and MORE in schema.names]
    _check_columns(url, header, schema, table.num_rows, [*names, *plural])
    return header, table


@contextlib.contextmanager
def readable(url: str) -> Iterator[None]:
    """A missing or damaged file, or one that cannot be reached, as a ShardError that names it."""
    try:
        with reaching(url, ShardError):
            yield
    except FileNotFoundError:
        raise ShardError(
            f"{url}: there is no such sidecar",
            "run `graphbuild export` on the store, or name the sidecars' folder with `sidecars=`",
        ) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # Arrow calls damaged pages an OSError
        raise ShardError(f"{url}: not a readable Parquet file ({error})", EXPORT) from error


def text_columns(table: pa.Table) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
    """A sidecar's columns, those of MORE behind the samples' own, and where each sample's begin there, int64 [n + 1].

    The weight is 1 where samples have one caption each.
    """
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    every = pa.array(np.ones(len(table), np.float32))
    columns["weight"] = columns["weight"].fill_null(1) if "weight" in columns else every
    if MORE not in columns:
        return columns, np.zeros(len(table) + 1, np.int64)
    more = columns.pop(MORE)
    texts = more.flatten()
    for field in texts.type:
        if field.name in columns:
            columns[field.name] = pa.concat_arrays([columns[field.name], pc.struct_field(texts, field.name)])
    lengths = pc.fill_null(pc.list_value_length(more), 0).to_numpy(zero_copy_only=False)
    return columns, np.concatenate([[0], np.cumsum(lengths)])


def _parse_header(url: str, metadata: dict[bytes, bytes] | None) -> SidecarHeader:
    if not metadata or METADATA_KEY not in metadata:
        raise ShardError(f"{url}: a Parquet file without graphbuild's metadata", EXPORT)
    try:
        facts = json.loads(metadata[METADATA_KEY])
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ShardError(f"{url}: its metadata is no JSON object", EXPORT)
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{url}: sidecar of format version {version!r}; this graphbuild reads {FORMAT_VERSION}",
            "run `graphbuild export` with this version, or install the version that wrote the file",
        )
    try:
        header = SidecarHeader.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise ShardError(f"{url}: metadata field {name}: {problem['msg']}", EXPORT) from None
    if "checksum" in facts and json.dumps(sealed(facts)).encode() != metadata[METADATA_KEY]:
        raise ShardError(f"{url}: its metadata has changed (checksum differs)", EXPORT)
    return header


def _check_columns(
    url: str, header: SidecarHeader, schema: pa.Schema, rows: int, names: Sequence[str] | None = None
) -> None:
    """ShardError where columns (these, or any) are absent or of another type, or rows are missing."""
    types = dict(zip(schema.names, schema.types, strict=True))
    expected = sidecar_schema(header.d, header.k, header.embeddings, plural=MORE in types)
    for field in map(expected.field, expected.names if names is None else names):
        found = types.get(field.name, "absent")
        if found != field.type:
            raise ShardError(f"{url}: column {field.name} is {found}, expected {field.type}", EXPORT)
    if rows != header.rows:
        raise ShardError(f"{url}: {rows} rows, its header says {header.rows}", EXPORT)


def _numbers(column: pa.Array, absent: int = 0) -> NDArray[Any]:
    filled = column.fill_null(pa.scalar(absent, column.type)) if column.null_count else column
    return cast("NDArray[Any]", filled.to_numpy(zero_copy_only=False))


def _matrix(column: pa.FixedSizeListArray) -> NDArray[Any]:
    """[n, width] without a Python object a value; null lists become zeros."""
    width, values = column.type.list_size, column.values
    dtype = column.type.value_type.to_pandas_dtype()
    flat = np.frombuffer(values.buffers()[1] or b"", dtype=dtype)[values.offset :][: len(values)]
    matrix = flat.reshape(-1, width)[column.offset : column.offset + len(column)]
    if column.null_count:
        matrix = np.where(column.is_valid().to_numpy(zero_copy_only=False)[:, None], matrix, dtype(0))
    return matrix
