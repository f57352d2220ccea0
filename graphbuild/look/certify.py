"""`graphbuild certify`: the certificate of a graph in files, as anybody's tool wrote them; no store, no Ray.

.npy files are mapped; of others the whole array is read.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse

from graphbuild.errors import ConfigError, InputError, QualityError
from graphbuild.graph.recall.certificate import certify_graph
from graphbuild.machine.terminal import echo
from graphbuild.machine.versions import version_of
from graphbuild.sources.vector_files import shapes_of, take_rows
from graphbuild.store.files import file_identity, local_file
from graphbuild.store.mapped import map_array
from graphbuild.store.store import Json, json_text

Array = np.ndarray[Any, Any]


def certify_files(
    vectors: str,
    neighbors: str,
    similarities: str | None,
    *,
    queries: str | None,
    columns: tuple[str, str, str],
    json_to: str | None,
    min_recall: float | None,
    **options: Any,
) -> None:
    """Print the certificate, and write it as JSON to a file; where that is -, to stdout, and the lines go to stderr.

    columns: of vectors, neighbours and similarities, in parquet and .npz. options: those of `certify_graph`.

    Raises:
        InputError: a file cannot be read, or they do not belong together.
        QualityError: the structure is broken, or recall is under `min_recall`.
    """
    if json_to not in (None, "-") and not Path(str(json_to)).absolute().parent.is_dir():
        raise ConfigError(f"--json {json_to} lies in no folder", "name a file in a folder that is there")
    given = _vectors(vectors, columns[0])
    asked = None if queries is None else _vectors(queries, columns[0])
    lists, values, over = _lists(neighbors, columns[1])
    if over not in (None, len(given)):
        raise InputError(
            f"{neighbors} is over {over:,} nodes, and {vectors} has {len(given):,}", "give what is of one graph"
        )
    if similarities is not None:
        dense, of_matrix, cols = _lists(similarities, columns[2], np.nan)
        values = dense if cols is None else of_matrix
    try:
        certificate = certify_graph(given, lists, values, queries=asked, ordered=over is None, **options)
    except InputError as error:
        raise InputError(f"{similarities or neighbors}: {error.cause}", error.fix) from None
    broken, k = [fault["fault"] for fault in certificate["faults"]], certificate["k"]
    low = min_recall is not None and certificate["recall"] < min_recall
    files = {"vectors": vectors, "neighbors": neighbors, "similarities": similarities, "queries": queries}
    certificate["files"] = {name: file_identity(url) for name, url in files.items() if url is not None}
    certificate |= {"min_recall": min_recall, "passed": not (broken or low), "graphbuild": version_of("graphbuild")}
    for line in lines(certificate):
        echo(line, err=json_to == "-")
    if json_to == "-":
        sys.stdout.write(json_text(certificate).decode())
    elif json_to is not None:
        Path(json_to).write_bytes(json_text(certificate))
    if broken:
        raise QualityError(
            f"{neighbors} is broken: {', '.join(broken)}",
            "add --with-self if every list is meant to name its own node, which is left out then"
            if "self" in broken
            else "make the graph anew, or repair the lists named above",
        )
    if low:
        raise QualityError(
            f"{neighbors}: recall@{k} is {certificate['recall']:.4f}, under the floor of {min_recall}",
            "let its engine search more; or lower --min-recall, only if that recall is good enough for you",
        )


def lines(certificate: Json) -> Iterator[str]:
    """The certificate as people read it."""
    c, values = certificate, certificate["similarities"]
    yield f"graph     {c['lists']:,} lists of {c['k']}, of {c['nodes']:,} vectors of {c['width']}"
    as_what = f"; they are {values['form']}, off by {values['median_error']:.4f} in the median" if values else ""
    yield f"metric    {c['metric']} (by {c['metric_found_by']}{as_what})"
    for fault in c["faults"]:
        of = f" of {fault['of_sampled']:,} sampled" if "of_sampled" in fault else ""
        yield f"BAD       {fault['fault']}: list {fault['first']} {fault['says']} ({fault['lists']:,}{of} do)"
    if not c["faults"]:
        yield "structure no fault"
    interval = f"95%: {c['recall_95_low']:.4f} to {c['recall_95_high']:.4f}"
    yield f"recall@{c['k']} {c['recall']:.4f} ({interval}), of {c['sampled_nodes']:,} nodes searched by brute force"
    what = "mean_distance_excess" if c["metric"] == "l2" else "mean_similarity_deficit"
    yield f"deficit   {c[what]:.4f} ({what.replace('_', ' ')})"
    if c["nearest_first"] is not None:
        yield f"order     {c['nearest_first']:.4f} of these lists have the nearest first"
    if c["worst_nodes"]:
        yield "worst     " + ", ".join(f"{one['node']}: {one['recall']:.4f}" for one in c["worst_nodes"])


def _vectors(url: str, column: str) -> Array:
    if url.lower().endswith(".npy"):
        return _mapped(url)
    return take_rows(url, column, np.arange(shapes_of([url], column)[0][0]), needed=True)


def _mapped(url: str) -> Array:
    with local_file(url) as path:  # a copy of a remote file stays mapped when its name goes
        try:
            return map_array(path)
        except (ValueError, OSError) as error:
            raise InputError(f"{url} is not a whole .npy file ({error})", "write it with numpy.save") from None


def _lists(url: str, column: str, fill: float = -1) -> tuple[Array, Array | None, int | None]:
    """Lists [n, k], shorter ones with `fill` at their end; of a sparse matrix also its values, and its columns."""
    kind = url.lower().rpartition(".")[2]
    if kind == "npy":
        return _mapped(url), None, None
    if kind not in ("npz", "parquet"):
        raise InputError(f"{url} is no .npy, .npz or parquet file", "write the lists in one of these")
    try:
        with local_file(url) as path:
            return (
                _sparse_or_array(path, url, column, fill)
                if kind == "npz"
                else (_parquet(path, url, column, fill), None, None)
            )
    except (pa.ArrowException, zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise InputError(f"{url} is truncated or damaged ({error})", "fetch or write the file again") from None


def _sparse_or_array(path: Path, url: str, column: str, fill: float) -> tuple[Array, Array | None, int | None]:
    with np.load(path) as file:
        if "format" not in file:
            name = column if column in file else file.files[0]
            if name != column and len(file.files) > 1:
                raise _no_column(url, column, file.files)
            return file[name], None, None
    matrix = scipy.sparse.load_npz(path).tocsr()
    lengths, values = np.diff(matrix.indptr), matrix.data
    lists = _padded(lengths, matrix.indices, fill)
    is_graph = len(values) and (values != values[0]).any()  # else it says only which pairs there are
    return lists, _padded(lengths, values, np.nan) if is_graph else None, matrix.shape[1]


def _parquet(path: Path, url: str, column: str, fill: float) -> Array:
    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise _no_column(url, column, file.schema_arrow.names)
    read = file.read([column]).column(0).combine_chunks()
    if not hasattr(read.type, "value_type"):
        raise InputError(f"{url}: column {column!r} is {read.type}", "give a column of lists of numbers")
    lengths = pc.fill_null(pc.list_value_length(read), 0).to_numpy(zero_copy_only=False)
    return _padded(lengths, pc.fill_null(read.flatten(), fill).to_numpy(zero_copy_only=False), fill)


def _padded(lengths: Array, flat: Array, fill: float) -> Array:
    k = int(lengths.max(initial=0))
    if (lengths == k).all():
        return flat.reshape(len(lengths), k)
    padded = np.full((len(lengths), k), fill, np.result_type(flat.dtype, np.int8 if fill == -1 else np.float16))
    padded[np.arange(k) < lengths[:, None]] = flat
    return padded


def _no_column(url: str, column: str, names: list[str]) -> InputError:
    told = ", ".join(map(repr, names[:50]))
    return InputError(
        f"{url} has no column {column!r}, or several arrays; it has {told}",
        "name the lists' one by --neighbor-column or --similarity-column",
    )
