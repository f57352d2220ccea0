"""Anchors and their candidates: the captions of a store with its neighbour lists, or the queries of a list of `match`.

Memory: the texts of all nodes, once one is asked for; all pairs of a list of `match`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graphbuild.errors import InputError
from graphbuild.graph.lists.derived import about, captions, slices
from graphbuild.graph.lists.duplicates import similarities
from graphbuild.graph.sample_graph import Ids, SampleGraph
from graphbuild.store.files import local_file
from graphbuild.store.layout import TEXTS
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store

Array = NDArray[Any]
Scorer = Callable[[list[str], list[str]], Array]


@dataclass
class Anchors:
    """Some captions, those of a sample side by side: row [n], node [n] (-1 of queries), their text, if it is needed."""

    row: Ids
    node: Ids
    text: Array | None

    def pairs(self) -> tuple[Ids, Ids]:
        """Places of each caption and of each other one of its sample; of itself where there is none."""
        begin, end = (np.searchsorted(self.row, self.row, side=side) for side in ("left", "right"))
        at = np.repeat(np.arange(len(self.row)), end - begin)
        other = np.arange(len(at)) - np.repeat(np.cumsum(end - begin) - (end - begin), end - begin) + begin[at]
        kept = (at != other) | ((end - begin) == 1)[at]
        return at[kept], other[kept]

    def text_of(self, part: slice, at: Ids) -> list[str]:
        assert self.text is not None
        return list(self.text[part][at])


class Lists:
    """The stored lists as candidates of each caption."""

    def __init__(self, graph: SampleGraph) -> None:
        self.graph, self.k = graph, graph.k

    @cached_property
    def _texts(self) -> pa.Array:
        store = Store(self.graph.url)
        names = shards_of(store, store.manifest()).with_nodes.names
        parts = [store.table(TEXTS.format(name), ["text"])["text"].cast(pa.large_string()) for name in names]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks]).combine_chunks()

    @property
    def has_texts(self) -> bool:
        return bool(self._texts[0].is_valid)

    def texts(self, nodes: Ids) -> Array:
        """The text of each node, objects [n]."""
        return np.asarray(self._texts.take(pa.array(nodes)).to_numpy(zero_copy_only=False))

    def anchors(self, *, with_texts: bool) -> Iterator[Anchors]:
        for table in captions(Store(self.graph.url)):
            row, node = table["row"].to_numpy(), table["node"].to_numpy()
            yield Anchors(row, node, self.texts(node) if with_texts else None)

    def candidates(self, anchors: Anchors, part: slice) -> tuple[Array, Array]:
        """Ids [n, k] and similarities float32 [n, k] of a part of the anchors, descending."""
        return self.graph.neighbors(anchors.node[part])

    def least(self, anchors: Anchors, one: Ids, other: Ids, score: Scorer | None) -> Array:
        """Of each anchor the least score, or similarity, of its pairs."""
        found = np.full(len(anchors.row), np.inf, np.float32)
        for part in slices(len(one)):
            i, j = one[part], other[part]
            if score is not None:
                values = score(anchors.text_of(slice(None), i), anchors.text_of(slice(None), j))
            else:
                values = similarities(self.graph, anchors.node[i], anchors.node[j])
            np.minimum.at(found, i, values)
        return found


class Matches(Lists):
    """A list of `match` as candidates of its queries: a list that is too short has similarities of -2 at its end."""

    def __init__(self, graph: SampleGraph, path: str) -> None:
        super().__init__(graph)
        with local_file(path) as file:
            try:
                told = about(file)
                names = ["query", "query_caption", "rank", "node", "similarity"]
                table = pq.read_table(file, columns=names) if told.get("what") == "neighbors" else None
            except (pa.ArrowException, ValueError) as error:
                raise InputError(f"--matches {path} is no whole parquet file ({error})", "write it again") from None
        if table is None:
            raise InputError(
                f"--matches {path} is no list of neighbours", "write it by `graphbuild match --what neighbors`"
            )
        if told["graph"] != graph.fingerprint:
            raise InputError(f"--matches {path} is of another graph", "write it again by `graphbuild match`")
        rank = table["rank"].to_numpy()
        self.k = int(rank.max(initial=1))
        begins = np.flatnonzero(rank == 1)
        self._ids = np.zeros((len(begins), self.k), np.int64)
        self._similarities = np.full((len(begins), self.k), -2, np.float32)
        place = np.cumsum(rank == 1) - 1
        self._ids[place, rank - 1] = table["node"].to_numpy()
        self._similarities[place, rank - 1] = table["similarity"].to_numpy()
        self._row = table["query"].to_numpy()[begins]
        self._captions = table["query_caption"].take(pa.array(begins))

    @property
    def has_texts(self) -> bool:
        return super().has_texts and self._captions.null_count == 0

    def anchors(self, *, with_texts: bool) -> Iterator[Anchors]:
        texts = self._captions.to_numpy(zero_copy_only=False) if with_texts else None
        yield Anchors(self._row, np.full(len(self._row), -1), texts)

    def candidates(self, anchors: Anchors, part: slice) -> tuple[Array, Array]:
        return self._ids[part], self._similarities[part]
