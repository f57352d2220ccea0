"""The captions of a shard on their way from scan to nodes: gathered sample by sample, cut into shards, written.

`_state/scan/<shard>.parquet` has a row a caption (SCHEMA), and PLURAL where a sample has several. Memory: the captions
and texts of a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from graphbuild.nodes.captions import CLASS_MARK, Found, hashes, usable_text
from graphbuild.nodes.samples import PLURAL, SCHEMA
from graphbuild.store.layout import SCANNED
from graphbuild.store.store import Writer


@dataclass
class CaptionRows:
    """Captions that can be nodes, those of a sample side by side: counts[i] of sample i. text None: the sample has no
    such caption. Lists of numbers and texts: objects for each sample would cost more than the texts."""

    keys: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(
        self, found: Iterable[Sequence[Found]], keys: Iterable[str | None], positions: Iterable[int], *, every: bool
    ) -> list[tuple[Any, ...]]:
        """Take the captions of samples; returns what is rejected. every: also samples without a usable caption."""
        rejected = []
        for captions, key, position in zip(found, keys, positions, strict=True):
            before = len(self.texts)
            for content, reason, weight in captions:
                text, why = usable_text(content) if reason is None else (None, reason)
                if text is None or key is None:
                    rejected.append((position, key, why or "no key", content))
                else:
                    self.captions.append(content)
                    self.texts.append(text)
                    self.weights.append(weight)
            if every and len(self.texts) == before:
                content, reason, _ = captions[0]
                self.captions.append(content if reason is None else None)
                self.texts.append(None)
                self.weights.append(1.0)
            if len(self.texts) > before:
                self.keys.append(str(key))
                self.counts.append(len(self.texts) - before)
        return rejected

    def firsts(self) -> CaptionRows:
        """The first caption of each sample alone."""
        places = np.cumsum([0, *self.counts])[:-1].tolist()
        of_texts: list[list[Any]] = [self.captions, self.texts, self.weights]
        return CaptionRows(self.keys, [1] * len(places), *([values[i] for i in places] for values in of_texts))

    def cut(self, samples: int) -> CaptionRows:
        """The first samples, which are taken away here."""
        captions = sum(self.counts[:samples])
        sizes = [samples, samples, captions, captions, captions]
        lists: list[list[Any]] = [self.keys, self.counts, self.captions, self.texts, self.weights]
        taken = CaptionRows(*(values[:size] for values, size in zip(lists, sizes, strict=True)))
        for values, size in zip(lists, sizes, strict=True):
            del values[:size]
        return taken

    def write(self, shard: str, places: Mapping[str, Sequence[Any]], writer: Writer, *, of_classes: bool) -> None:
        """A row a caption. A sample's key, image and members stand in each of its rows.

        of_classes: captions and texts may have marks of `kept_apart`, which tell nodes apart and are not written.
        """
        samples = np.repeat(np.arange(len(self.keys), dtype=np.int32), np.array(self.counts, np.int64))
        hashed = hashes(self.texts)
        shown = [self.captions, self.texts]
        if of_classes:
            shown = [[text and CLASS_MARK.sub("", text) for text in texts] for texts in shown]
        own: dict[str, Any] = {
            "caption": shown[0],
            "text": shown[1],
            "hash_high": hashed[:, 0],
            "hash_low": hashed[:, 1],
            "sample": samples,
            "weight": self.weights,
        }
        plural = len(samples) > len(self.keys)
        columns = {}
        for column in [*SCHEMA, *PLURAL] if plural else SCHEMA:
            if column.name in own:
                columns[column.name] = pa.array(own[column.name], column.type)
            else:
                given = self.keys if column.name == "key" else places.get(column.name, [None] * len(self.keys))
                values = pa.array(given, column.type)
                columns[column.name] = values.take(pa.array(samples)) if plural else values
        writer.table(SCANNED.format(shard), pa.table(columns))
