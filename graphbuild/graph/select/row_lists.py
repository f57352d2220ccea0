"""Lists of samples that people bring or `mine` and `match` write, as rows of a store.

- .parquet: by its column row, else key, else uid; where it has a column keep, true or false or 1 or 0, that says which
  lines are meant.
- .npy: rows, or DataComp's uids (dtype "u8,u8"), or strings as of a .txt.
- .txt: a key or a uid a line.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists.derived import about
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.graph.select.sample_columns import SampleColumns
from graphbuild.store.files import local_file, read_array

logger = logging.getLogger(__name__)

KINDS = "a .parquet with a column row, key or uid; a .npy of rows or uids; or a .txt of keys or uids"


def read_list(url: str, graph: SampleGraph) -> pl.DataFrame:
    """A list's lines, with one of the columns row, key, uid, and what else a parquet has.

    Raises:
        InputError: it is missing, of another kind, or was made for another graph.
    """
    with local_file(url) as path:
        try:
            if path.suffix == ".parquet":
                return _parquet(url, path, graph)
            lines = read_array(url) if path.suffix == ".npy" else _lines(path)
        except (pa.ArrowException, pl.exceptions.PolarsError, ValueError, EOFError, OSError) as error:
            raise InputError(f"{url} cannot be read ({error})", f"give {KINDS}") from None
    if lines.dtype.names and len(lines.dtype.names) == 2:
        high, low = (lines[name].tolist() for name in lines.dtype.names)
        return pl.DataFrame({"uid": [f"{a:016x}{b:016x}" for a, b in zip(high, low, strict=True)]})
    if lines.ndim != 1 or lines.dtype.kind not in "iuU":
        raise InputError(f"{url} holds {lines.dtype} {list(lines.shape)}", f"give {KINDS}")
    return pl.DataFrame({"key" if lines.dtype.kind == "U" else "row": lines})


def rows_of(lines: pl.DataFrame, url: str, graph: SampleGraph, columns: SampleColumns) -> NDArray[np.bool_]:
    """Which rows the lines of a list name, bool [N]. Those that name no sample with a node are counted in a warning.

    Raises:
        InputError: none of them names one.
    """
    named = np.zeros(len(graph.sample_nodes()), bool)
    name = next(one for one in ("row", "key", "uid") if one in lines.columns)
    wanted = lines[name].drop_nulls().unique()
    if name == "row":
        rows = wanted.to_numpy()
        known = rows[(rows >= 0) & (rows < len(named))]
        known = known[graph.sample_nodes()[known] >= 0]
        named[known] = True
        missing = len(rows) - len(known)
    else:
        missing = _by_name(wanted.cast(pl.String), name, named, columns)
    if len(wanted) and missing == len(wanted):
        raise InputError(
            f"{url}: none of its {len(wanted):,} lines names a sample of {graph.url} ({name} {wanted[0]!r})",
            "give a list of this store's samples: keys and rows are in samples/*.parquet, uids in the samples' JSON",
        )
    if missing:
        logger.warning("%s: %d of %d lines name no sample with a usable caption", url, missing, len(wanted))
    return named


def _by_name(wanted: pl.Series, name: str, named: NDArray[np.bool_], columns: SampleColumns) -> int:
    """Mark the samples of these keys or uids; returns how many of them are no sample's."""
    left = wanted
    for frame in columns.frames([name]):
        found = frame.filter(pl.col(name).cast(pl.String).is_in(wanted.implode()))
        named[found["row"].to_numpy()] = True
        left = left.filter(~left.is_in(found[name].cast(pl.String).implode()))
    uids = left.str.contains("^[0-9a-f]{32}$")
    if name == "key" and len(left) == len(wanted) and uids.all():
        try:
            return _by_name(wanted, "uid", named, columns)
        except ConfigError:
            return len(left)
    return len(left)


def _parquet(url: str, path: Path, graph: SampleGraph) -> pl.DataFrame:
    made_for = about(path).get("graph")
    if made_for not in (None, graph.fingerprint):
        raise InputError(f"{url} was made for another graph than that of {graph.url}", "make it again on this store")
    lines = pl.read_parquet(path)
    if not {"row", "key", "uid"} & set(lines.columns):
        raise InputError(f"{url} has the columns {', '.join(lines.columns)}", f"give {KINDS}")
    if made_for is not None:
        return lines  # `match` writes null for the row of a node whose samples are gone
    checks = {"row": _whole, "keep": _true_or_false}
    return lines.with_columns(check(url, lines[name]) for name, check in checks.items() if name in lines.columns)


def _whole(url: str, given: pl.Series) -> pl.Series:
    """Rows as int64, of any numbers: pandas makes floats of integers where one is missing."""
    if not given.dtype.is_numeric():
        raise InputError(
            f"{url}: its column row is {given.dtype}, not numbers", "write rows as integers, or name the column key"
        )
    whole = given.cast(pl.Int64, strict=False)
    bad = (whole.is_null() | (whole != given)).arg_true()
    if len(bad):
        said = "null" if given[bad[0]] is None else given[bad[0]]
        raise InputError(
            f"{url}: row is {said} in line {bad[0] + 1:,} of {len(given):,}",
            "write rows as whole numbers, and leave out lines without one",
        )
    return whole


def _true_or_false(url: str, given: pl.Series) -> pl.Series:
    numbers = given.dtype.is_numeric()
    if given.dtype != pl.Boolean and not (numbers and ((given == 0) | (given == 1)).all()):
        raise InputError(
            f"{url}: its column keep is {given.dtype}, and not true or false" + ", or 1 or 0" * numbers,
            "write it as true and false, or leave the column out",
        )
    return given.cast(pl.Boolean)


def _lines(path: Path) -> NDArray[Any]:
    if path.suffix != ".txt":
        raise ValueError(f"its name ends in {path.suffix or 'nothing'}")
    return np.array([line for line in path.read_text("utf-8-sig").splitlines() if line], str)
