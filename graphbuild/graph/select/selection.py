"""A selection: which rows of a store, and which of their captions, a loader, an export or a trainer takes.

STORE/selections/NAME.parquet has a line for each row of the store (docs/how-to/selections.md). It holds for the graph
that it was made from, and is refused on another. To whoever reads samples, a row that is left out is one without a
node. Memory: a bit a row. Reading takes one pass over two columns.
"""

from __future__ import annotations

import os
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists.derived import about
from graphbuild.nodes.samples import MORE, NO_NODE
from graphbuild.store.files import open_parts
from graphbuild.store.store import Json, Store

FOLDER = "selections"
WHAT = "selection"
CAPTIONS = "captions"


class Selection:
    """A selection that was read: `rows` of the store, `kept` of them, the fingerprint of its `graph`, and its own.

    Raises:
        InputError: the file is missing, damaged, or no selection.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        try:
            with open_parts(self.url) as stream:
                told = about(stream)
                if told.get("what") != WHAT:
                    raise InputError(f"{self.url} is no selection", "make one by `graphbuild select`")
                parquet = pq.ParquetFile(stream, page_checksum_verification=True)
                names = parquet.schema_arrow.names
                table = parquet.read([name for name in ("keep", CAPTIONS) if name in names], use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{self.url} cannot be read ({error})", "make it again by `graphbuild select`") from None
        keep = table["keep"].to_numpy()
        self.graph: str = told["graph"]
        self.rows, self.kept = len(keep), int(keep.sum())
        self._bits = np.packbits(keep, bitorder="little")
        self._partial, self._chosen = np.empty(0, np.int64), pa.array([], pa.list_(pa.uint8()))
        if CAPTIONS in table.column_names:  # where samples have several
            chosen = table[CAPTIONS].combine_chunks()
            self._partial, self._chosen = np.flatnonzero(chosen.is_valid()), chosen.drop_null()
        flat = np.asarray(self._chosen.flatten()), np.asarray(self._chosen.value_lengths())
        parts = [self.graph.encode(), self._bits, self._partial, *flat]
        self.fingerprint = sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]

    @classmethod
    def of(cls, given: Selection | str | os.PathLike[str] | None, graph: str, holder: str) -> Selection | None:
        """The selection that an argument names, by a file's path or URL, or is.

        Raises:
            ConfigError: it was made from another graph than that of this fingerprint, which is the holder's.
        """
        selection = cls(given) if isinstance(given, str | os.PathLike) else given
        if selection is not None and selection.graph != graph:
            raise ConfigError(
                f"{selection.url} was made for another graph than that of {holder}",
                "make it again with `graphbuild select` on that store: rows and nodes may be others",
            )
        return selection

    def keeps(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Whether rows [n] are kept, bool [n]."""
        places = np.asarray(rows, np.int64)
        return np.asarray(self._bits[places >> 3] >> (places & 7).astype(np.uint8) & 1, bool)

    def nodes(self, nodes: ArrayLike) -> NDArray[np.int64]:
        """The nodes of all rows [N], with -1 for those that are left out; ConfigError for another number of rows."""
        every = np.array(nodes, np.int64)
        if len(every) != self.rows:
            raise ConfigError(
                f"{self.url} is of {self.rows:,} rows; nodes are given of {len(every):,}",
                "pass the nodes of all rows, graph.sample_nodes(); a GraphDataset takes the selection itself",
            )
        every[~self.keeps(np.arange(self.rows))] = NO_NODE
        return every

    def applied(self, samples: pa.Table) -> pa.Table:
        """Rows of samples/ or of a sidecar, as if those that are left out had no node, and captions never been there.

        samples: any columns, `row` and `node` among them.
        """
        row = samples["row"].to_numpy()
        if MORE in samples.column_names and len(self._partial) and np.isin(row, self._partial).any():
            samples = self._of_captions(samples, row)
        node = pc.if_else(pa.array(self.keeps(row)), samples["node"].combine_chunks(), pa.scalar(None, pa.int64()))
        return samples.set_column(samples.column_names.index("node"), "node", node)

    def _of_captions(self, samples: pa.Table, row: NDArray[np.int64]) -> pa.Table:
        """The same with the first chosen caption of each sample in front, and only the other chosen ones behind it."""
        more = samples[MORE].combine_chunks()
        behind = pc.fill_null(pc.list_value_length(more), 0).to_numpy(zero_copy_only=False)
        first_more = len(row) + np.concatenate([[0], np.cumsum(behind)])
        weights = np.concatenate([pc.fill_null(one, 1) for one in (samples["weight"], _field(more, "weight"))])
        texts, offsets = [], [0]
        for i, (number, count) in enumerate(zip(row.tolist(), behind.tolist(), strict=True)):
            own = np.array([i, *range(first_more[i], first_more[i] + count)])
            place = int(np.searchsorted(self._partial, number))
            if place < len(self._partial) and self._partial[place] == number:
                own = own[self._chosen[place].values.to_numpy()]
                total = weights[own].sum()
                weights[own] = weights[own] / total if total else 1 / len(own)
            texts.append(own)
            offsets.append(offsets[-1] + len(own) - 1)
        fronts, others = (pa.array(np.concatenate(part)) for part in ([t[:1] for t in texts], [t[1:] for t in texts]))
        fields = {}
        for field in more.type.value_type:
            every = pa.concat_arrays([samples[field.name].combine_chunks().cast(field.type), _field(more, field.name)])
            if field.name == "weight":
                every = pa.array(weights, field.type)
            place = samples.column_names.index(field.name)
            samples = samples.set_column(place, samples.schema.field(place), every.take(fronts))
            fields[field] = every.take(others)
        inner = pa.StructArray.from_arrays(list(fields.values()), fields=list(fields))
        kept = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, type=more.type)
        return samples.set_column(samples.column_names.index(MORE), MORE, kept)


def _field(more: pa.ListArray, name: str) -> pa.Array:
    return pc.struct_field(more.flatten(), name)


def decided_by(store: Store, name: str | None) -> tuple[Json, Json]:
    """What the selection that a recipe names, if any, adds to the settings of a task, and to what it was built from."""
    selection = selection_of(store, name)
    return ({}, {}) if selection is None else ({"selection": name}, {"selection": selection.fingerprint})


def selection_of(store: Store, name: str | None) -> Selection | None:
    """The selection that a command names, if any: by a path or URL that ends in .parquet, or as one of the store's.

    Raises:
        InputError, ConfigError: as `Selection`, and where it was made for another graph.
    """
    if name is None:
        return None
    graph: Json = store.manifest().get("graph", {})
    url = name if name.endswith(".parquet") else store.display(f"{FOLDER}/{name}.parquet")
    return Selection.of(url, graph.get("fingerprint", ""), store.url)
