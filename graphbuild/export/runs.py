"""Samples on their way from old tars to new ones: runs of old tars, each read once, from its begin to its end.

A run has two files, which are scratch. In MOVED lie its samples as they will lie in the new tars, in order of place, so
that those of one new tar are one range of bytes. ROWS has an Arrow stream for each new tar, a row a sample, behind
int64 [tars + 1, 2]: where the stream of each begins, and where its samples begin in MOVED.

No more files are open than one that is read and one that is written. Memory: the rows of a run or a new tar, and
PIECE_BYTES. A new tar costs three reads a run, or more where the run's part of it is longer than PIECE_BYTES.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from graphbuild.errors import StageError
from graphbuild.export.tarwriter import PIECE_BYTES, copied_bytes, copies
from graphbuild.store.layout import shard_name
from graphbuild.store.sharded import Array
from graphbuild.store.store import Store, Writer

KEY = "{:012d}"  # of a row, in the new tars
RUNS = 256
RUN_SAMPLES = 400_000
SCRATCH = "_work_clustered"
MOVED = f"{SCRATCH}/{{}}.moved"
ROWS = f"{SCRATCH}/{{}}.rows"


def cut(first_rows: Array, samples: int) -> list[tuple[int, int]]:
    """The old tars (begin, end) of each run: RUNS of them, or more where those would have over RUN_SAMPLES samples.

    first_rows: int64 [S], ascending, of the samples' rows in each tar.
    """
    length = max(min(-(-samples // RUNS), RUN_SAMPLES), 1)
    begins = np.unique(first_rows // length, return_index=True)[1].tolist()
    return list(itertools.pairwise([*begins, len(first_rows)]))


def write_run(
    writer: Writer,
    name: str,
    parts: Sequence[tuple[pa.Table, str]],
    columns: Callable[[pa.Table], pa.Table],
    bounds: Array,
) -> None:
    """Write the run of some old tars, each given as its samples, in its order, and its URL.

    samples: the columns of samples/, and place, int64. columns: what the new tar's sidecar says of samples, whose key
    is the new one, and whose image lies in the sample. bounds: the first place of each new tar, and the last's end.

    Raises:
        ShardError: a tar is gone, cannot be read, or has other members than those.
    """
    place = np.concatenate([samples["place"].to_numpy() for samples, _ in parts])
    lengths = np.concatenate([copied_bytes(samples, KEY.format(0)) for samples, _ in parts])
    order = np.argsort(place)
    ends = np.cumsum(lengths[order])
    begins = np.empty(len(place), np.int64)
    begins[order] = ends - lengths[order]
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
        streams = [16 * len(cuts)]
        file.seek(streams[0])
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                with pa.ipc.new_stream(file, rows.schema) as stream:
                    stream.write_table(rows.take(pa.array(order[begin:end])))
            streams.append(file.tell())
        file.seek(0)
        file.write(np.stack([streams, np.concatenate([[0], ends])[cuts]], axis=1).tobytes())


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
    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def copy_samples(store: Store, rows: pa.Table, targets: Array, path: Path) -> None:
    """Write the samples that `read_rows` tells of to these places of a file, int64 [n].

    Raises:
        StageError: a sample is not what was written.
    """
    run, begins, lengths, sums = (rows[name].to_numpy() for name in ("run", "begin", "bytes", "sum"))
    until, first = np.cumsum(lengths), 0
    with path.open("r+b") as file:
        while first < len(rows):
            end = int(np.searchsorted(until, until[first] - lengths[first] + PIECE_BYTES, side="right"))
            end = max(end, first + 1)
            heads = first + np.unique(run[first:end], return_index=True)[1]
            lasts = np.array([*heads[1:], end]) - 1
            names = [MOVED.format(shard_name(run[i])) for i in heads]
            contents = store.ranges(names, begins[heads].tolist(), (begins + lengths)[lasts].tolist())
            for head, last, name, content in zip(heads, lasts, names, map(memoryview, contents), strict=True):
                for i in range(head, last + 1):
                    copy = content[begins[i] - begins[head] :][: lengths[i]]
                    if zlib.crc32(copy) != sums[i]:
                        raise StageError(
                            f"{store.display(name)} was damaged after it was written, at byte {begins[i]:,}",
                            f"delete the folder {store.display(SCRATCH)} and run the same command again",
                        )
                    file.seek(targets[i])
                    file.write(copy)
            first = end


def _with(table: pa.Table, **columns: Array | pa.Array) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return table
