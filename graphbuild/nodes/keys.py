"""Keys of vectors beside tars, and of samples: as 128-bit hashes, and as text again where one has to be named.

Vectors and samples are cut into groups, those of vectors first. A key counts VECTOR for each vector that has it and 1
for each sample, so one sum (graphbuild.nodes.distinct) tells both; and the place where it is first is its vector's, if
there is one. Costs 2 us a key. Memory: a hash for each, and the text of some 100,000 at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graphbuild.errors import InputError, public
from graphbuild.nodes.captions import hashes
from graphbuild.nodes.samples import REJECTED
from graphbuild.recipe import Embed
from graphbuild.runner.stage import records
from graphbuild.sources.paths import known_first, named_files, parts_of
from graphbuild.sources.tables import ENDING as LIST_ENDING
from graphbuild.sources.tables import TableSpec, read_chunks
from graphbuild.sources.vector_files import ENDING, is_array
from graphbuild.store.files import file_identities
from graphbuild.store.layout import shard_name
from graphbuild.store.remote import READERS
from graphbuild.store.store import Json, Store, Writer

Array = np.ndarray[Any, Any]
Keys = list[str | None]
Thing = TypeVar("Thing")
VECTOR = 1 << 32
TABLE_ROWS = 1 << 20  # of a row group, as pyarrow cuts them by itself


class Files(NamedTuple):
    """Files of vectors, and for each the list of its rows' keys; none where they are joined by order."""

    vectors: list[str]
    keys: list[str]


class Piece(NamedTuple):
    """Rows begin..end-1 of the keys of a file of vectors, which is of that number and has so many rows."""

    file: int
    vectors: str
    keys: str
    rows: int
    begin: int
    end: int


@dataclass(frozen=True)
class Group:
    """Vectors, by pieces of their files, or samples, by files of scan, that lie behind each other. first: how many do
    before it. column: of the vectors' keys."""

    rows: int
    first: int
    column: str = ""
    pieces: Sequence[Piece] = ()
    scans: Sequence[str] = ()

    def keys(self, store: Store) -> Iterator[Keys]:
        """The keys of its rows, some at a time; InputError as for `_of_piece`."""
        for piece in self.pieces:
            yield from _of_piece(piece, self.column)
        with ThreadPoolExecutor(READERS) as pool:
            each = map if store.is_local else pool.map  # threads that read local files keep 100 MB or more
            for begin in range(0, len(self.scans), READERS):
                yield from each(lambda path: _of_scan(path, store), self.scans[begin : begin + READERS])

    def hashes(self, store: Store) -> Array:
        """uint64 [rows, 2], zeros where there is no key."""
        found, end = np.zeros((self.rows, 2), np.uint64), 0
        for keys in self.keys(store):
            begin, end = end, end + len(keys)
            found[begin:end] = hashes(keys)
        return found

    def judge(self, store: Store, writer: Writer, counts: Array, of: Array, path: str) -> Json:
        """What the keys of its rows tell, as facts. counts: of each row's key, [rows]. of: of vectors whether a key is
        there for the first time, bool [rows], of samples the place of its vector, or -1, int64 [rows].

        Writes which vectors no sample has to `path`, a table for each file, by its number.
        """
        if not self.pieces:
            has_vector = of >= 0
            twice = has_vector & (counts % VECTOR > 1)
            return {"joined": int(has_vector.sum())} | self._least(store, twice)
        twice = counts >= 2 * VECTOR
        left, lost, end = [], counts % VECTOR == 0, 0
        for piece in self.pieces:
            begin, end = end, end + piece.end - piece.begin
            if count := int(lost[begin:end].sum()):
                left.append([piece.file, count])
                _write_left(path.format(shard_name(piece.file)), _left(piece, self.column, lost[begin:end]), writer)
        return {"left": left, "twice": int((twice & of).sum())} | self._least(store, twice)

    def _least(self, store: Store, marked: Array) -> Json:
        """Of the marked rows [rows], if there are any, the first key in order of text, and its first two places."""
        if not marked.any():
            return {}
        least, places, end = "", list[int](), 0
        for keys in self.keys(store):
            begin, end = end, end + len(keys)
            for row in np.flatnonzero(marked[begin:end]).tolist():
                key = str(keys[row])
                if not places or key < least:
                    least, places = key, []
                if key == least and len(places) < 2:
                    places.append(self.first + begin + row)
        return {"least": [least, places]}


def named(embed: Embed) -> Files:
    """The files that the options name, in order of name.

    Raises:
        InputError: they name none, or another number of files with keys than with vectors.
    """
    vectors = named_files(embed.vectors or "", ENDING, "--vectors")
    keys = []
    if embed.vector_keys is not None:
        keys = named_files(embed.vector_keys, LIST_ENDING, "--vector-keys")
    elif embed.key_column is not None:  # the vectors' own
        keys = [url for url in vectors if not is_array(url)]
    if (keys or embed.key_column is not None) and len(keys) != len(vectors):
        raise InputError(
            f"{len(vectors):,} files of vectors ({public(vectors[0])}, ...), and {len(keys):,} with their keys",
            "name a file of keys for each file of vectors by --vector-keys",
        )
    return Files(vectors, keys)


def given(embed: Embed, store: Store) -> tuple[Files, dict[str, str]]:
    """The files that the options name, first those that the store knows, in its order; and the identity of each."""
    files = named(embed)
    identities = file_identities([*files.vectors, *files.keys])
    done = records(store, "number").get("all", {"inputs": {}})["inputs"]
    vectors = list(known_first({url: identities[url] for url in files.vectors}, parts_of(done, "vectors")))
    beside = dict(zip(files.vectors, files.keys, strict=True)) if files.keys else {}
    return Files(vectors, [beside[url] for url in vectors if beside]), identities


def in_groups(files: Files, rows: Sequence[int], column: str, scans: Mapping[str, int], most: int) -> list[Group]:
    """Groups of at most so many vectors, and behind them of samples, unless a tar has more. rows: of each file of
    vectors. scans: samples of each file of scan."""
    pieces = [
        Piece(number, vectors, keys, count, begin, min(begin + most, count))
        for number, (vectors, keys, count) in enumerate(zip(*files, rows, strict=True))
        for begin in range(0, max(count, 1), most)
    ]
    groups: list[Group] = []
    first = 0
    for own in grouped(((piece, piece.end - piece.begin) for piece in pieces), most):
        size = sum(piece.end - piece.begin for piece in own)
        groups.append(Group(size, first, column, pieces=own))
        first += size
    first = 0
    for paths in grouped(scans.items(), most):
        size = sum(scans[path] for path in paths)
        groups.append(Group(size, first, scans=paths))
        first += size
    return groups


def grouped(sizes: Iterable[tuple[Thing, float]], most: float) -> list[list[Thing]]:
    """Things that lie behind each other, with their sizes, in groups of at most that size, unless one has more."""
    groups: list[list[Thing]] = [[]]
    held = 0.0
    for thing, size in sizes:
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0.0
        groups[-1].append(thing)
        held += size
    return groups


def _of_scan(path: str, store: Store) -> Keys:
    keys: Keys = store.table(path, ["key"])["key"].to_pylist()
    return keys


def _of_piece(piece: Piece, column: str) -> Iterator[Keys]:
    """The keys of a piece, None where a row has none; InputError where the file has not as many as there are vectors.
    All before the piece is read too."""
    end = 0
    for chunk in read_chunks(TableSpec(path=piece.keys, columns={"key": column})):
        begin, end = end, end + len(chunk.rows) + len(chunk.rejected)
        keys = np.full(end - begin, None)
        keys[chunk.rows["position"].to_numpy() - begin] = chunk.rows["key"].to_pylist()
        yield keys[max(piece.begin - begin, 0) : max(piece.end - begin, 0)].tolist()
    if end != piece.rows:
        raise InputError(
            f"{public(piece.vectors)} has {piece.rows:,} vectors, and {public(piece.keys)} {end:,} keys",
            "give a key for each vector, in order",
        )


def _left(piece: Piece, column: str, lost: Array) -> Iterator[pa.Table]:
    """The rows of a piece [n] that are lost: position in their file, key, why, and the file's name."""
    name, end = public(piece.vectors).rsplit("/", 1)[-1], 0
    for keys in _of_piece(piece, column):
        begin, end = end, end + len(keys)
        rows = np.flatnonzero(lost[begin:end])
        own = [keys[row] for row in rows.tolist()]
        why = ["no key" if key is None else "no sample has its key" for key in own]
        yield pa.table([piece.begin + begin + rows, own, why, [name] * len(own)], schema=REJECTED)


def _write_left(path: str, tables: Iterable[pa.Table], writer: Writer) -> None:
    """Write tables behind each other, as `Writer.table` does one of all their rows; a row group's are held."""
    options = {"compression": "zstd", "write_page_checksum": True}
    with writer.file(path) as local, pq.ParquetWriter(local, REJECTED, **options) as file:
        held = REJECTED.empty_table()
        for table in tables:
            held = pa.concat_tables([held, table])
            while len(held) >= TABLE_ROWS:
                file.write_table(held[:TABLE_ROWS].combine_chunks())
                held = held[TABLE_ROWS:]
        if len(held):
            file.write_table(held.combine_chunks())


def move_left(moved: Mapping[str, Sequence[str]], store: Store, writer: Writer) -> None:
    """Write each of these tables anew, of those that are parts of it."""
    for path, parts in moved.items():
        sizes = [(part, store.footer(part)) for part in parts]
        tables = (
            store.row_group(part, REJECTED.names, row, footer)
            for part, footer in sizes
            for row in range(0, footer.num_rows, TABLE_ROWS)
        )
        _write_left(path, tables, writer)
