"""Samples on their way from old tars to new ones: runs of old tars, each read once, from its begin to its end.

A run has two files, which are scratch. In MOVED lie its samples as they will lie in the new tars, in order of place, so
that those of one new tar are one range of bytes. ROWS has an Arrow stream for each new tar, a row a sample, behind
int64 [tars + 1, 2]: where the stream of each begins, and where its samples begin in MOVED.

At most one file is open that is read, and one that is written. Memory: the rows of a run or a new tar, and AT_ONCE
pieces. A new tar costs three reads a run, or more where the run's part of it is longer than a piece.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from graphbuild.errors import StageError
from graphbuild.export.tarwriter import copied_bytes, copies, pieces
from graphbuild.store.layout import shard_name
from graphbuild.store.sharded import Array
from graphbuild.store.store import Store, Writer

KEY = "{:012d}"  # of a row, in the new tars
SCRATCH = "_work_clustered"
MOVED = f"{SCRATCH}/{{}}.moved"
ROWS = f"{SCRATCH}/{{}}.rows"
AT_ONCE = 8  # pieces that are read side by side
Part = tuple[pa.Table, str]
Columns = Callable[[pa.Table], pa.Table]


def write_run(writer: Writer, name: str, parts: Sequence[Part], bounds: Array, columns: Columns) -> None:
    """Write the run of some old tars: the samples of each, in its order, and its URL.

    samples: the columns of samples/, and place, int64. bounds: the first place of each new tar, and the last one's end.
    columns: what a sidecar says of samples, here with the new key, and places in the sample's own bytes. As `copies`.
    """
    place = np.concatenate([samples["place"].to_numpy() for samples, _ in parts])
    lengths = np.concatenate([copied_bytes(samples, KEY.format(0)) for samples, _ in parts])
    order, begins, ends = laid_out(place, lengths)
    tables: list[pa.Table] = []
    with writer.file(MOVED.format(name), durable=False) as path, path.open("r+b") as file:
        for samples, url in parts:
            keys = [KEY.format(row) for row in samples["row"].to_pylist()]
            own = slice(first := sum(map(len, tables)), first + len(samples))
            images, sums = np.full((2, len(samples)), -1), np.empty(len(samples), np.uint32)
            for i, (copy, *image) in enumerate(copies(samples, url, keys)):
                file.seek(begins[own][i])
                file.write(copy)
                images[:, i], sums[i] = image, zlib.crc32(copy)
            offsets, sizes = (pa.array(values, mask=values < 0) for values in images)
            samples = samples.drop_columns(["key", "image_offset", "image_size"])
            samples = _with(samples, key=pa.array(keys, pa.string()), image_offset=offsets, image_size=sizes)
            tables.append(_with(columns(samples), place=place[own], bytes=lengths[own], sum=sums))
    rows = pa.concat_tables(tables, promote_options="default").combine_chunks()  # some have several captions a sample
    cuts = np.searchsorted(place[order], bounds)
    with writer.file(ROWS.format(name), durable=False) as path, path.open("r+b") as file:
        streams = [file.seek(16 * len(cuts))]
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                with pa.ipc.new_stream(file, rows.schema) as stream:
                    stream.write_table(rows.take(pa.array(order[begin:end])))
            streams.append(file.tell())
        file.seek(0)
        file.write(np.stack([streams, np.concatenate([[0], ends])[cuts]], axis=1).tobytes())


def laid_out(place: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Samples [n] in order of place: their order, and where each begins, in their own order; and the ends, in that."""
    order = np.argsort(place)
    ends = np.cumsum(lengths[order])
    begins = np.empty(len(order), np.int64)
    begins[order] = ends - lengths[order]
    return order, begins, ends


def read_rows(store: Store, runs: int, number: int) -> pa.Table:
    """The rows of new tar `number` in so many runs, a run behind the other, each in order of place.

    Columns: those that were written, and where each sample lies: run, and begin, in its MOVED; bytes; sum, its crc32.
    """
    names = [ROWS.format(shard_name(run)) for run in range(runs)]
    heads = store.ranges(names, [16 * number] * runs, [16 * number + 32] * runs)
    begins, ends = np.frombuffer(b"".join(heads), np.int64).reshape(runs, 2, 2).transpose(1, 0, 2)
    some = np.flatnonzero(begins[:, 0] < ends[:, 0])
    contents = store.ranges([names[run] for run in some], begins[some, 0].tolist(), ends[some, 0].tolist())
    tables = []
    for run, content in zip(some, contents, strict=True):
        rows = pa.ipc.open_stream(content).read_all()
        lengths = rows["bytes"].to_numpy()
        tables.append(_with(rows, run=np.full(len(rows), run), begin=begins[run, 1] + np.cumsum(lengths) - lengths))
    return pa.concat_tables(tables, promote_options="default")


def copy_samples(store: Store, rows: pa.Table, targets: Array, path: Path) -> None:
    """Write samples [n], by `read_rows`, to these places of a file, int64 [n]; StageError for one that was damaged."""
    run, begins, lengths, sums = (rows[name].to_numpy() for name in ("run", "begin", "bytes", "sum"))
    ends, apart = begins + lengths, run << 50
    spans = list(pieces(begins + apart, ends + apart))  # each of one run, whose part lies in one piece
    with path.open("r+b") as file:
        for some in (spans[i : i + AT_ONCE] for i in range(0, len(spans), AT_ONCE)):
            places = [(MOVED.format(shard_name(run[i])), int(begins[i]), int(ends[stop - 1])) for i, stop in some]
            contents = store.ranges(*map(list, zip(*places, strict=True)))
            for (name, first, _), content, span in zip(places, contents, some, strict=True):
                for i in range(*span):
                    copy = memoryview(content)[begins[i] - first : ends[i] - first]
                    if zlib.crc32(copy) != sums[i]:
                        raise StageError(
                            f"{store.display(name)} was damaged after it was written, at byte {begins[i]:,}",
                            f"delete the folder {store.display(SCRATCH)} and run the same command again",
                        )
                    file.seek(targets[i])
                    file.write(copy)


def _with(table: pa.Table, **columns: Array | pa.Array) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return table
