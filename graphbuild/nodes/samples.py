"""Samples on their way to nodes: the columns of what scan writes and of samples/, and what is rejected, with why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from graphbuild.store import layout
from graphbuild.store.store import Writer

CONTENT_CHARACTERS = 10_000  # of a rejected caption, kept

MEMBER = pa.struct([("extension", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("text", pa.string()),
        ("hash_high", pa.uint64()),
        ("hash_low", pa.uint64()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("members", pa.list_(MEMBER)),
    ]
)
PLURAL = [pa.field("sample", pa.int32()), pa.field("weight", pa.float32())]
"""What scan adds in shards where a sample has several captions, a row each: its place in the shard, and the weight."""
REJECTED = pa.schema(
    [("position", pa.int64()), ("key", pa.string()), ("reason", pa.string()), ("content", pa.string())]
)
NO_NODE = -1
READY = "ready vectors"  # the encoder's name, of vectors that were given
COLUMNS = ["row", "key", "node", "caption", "image_offset", "image_size", "members"]
MORE = "more_captions"
MORE_TYPE = pa.list_(pa.struct([("caption", pa.string()), ("node", pa.int64()), ("weight", pa.float32())]))
"""Of samples/, where a sample has several captions: those behind the first, whose weight is in the column `weight`."""


def sample_places(scan: pa.Table) -> np.ndarray[Any, Any]:
    """The place in its shard of the sample of each caption [n] of a table of scan."""
    return scan["sample"].to_numpy() if "sample" in scan.column_names else np.arange(len(scan))


def write_rejected(stage: str, shard: str, rejected: Sequence[tuple[Any, ...]], writer: Writer) -> None:
    """What a stage has turned away of a shard, if anything: (position, key, reason, content) of each."""
    if rejected:
        rows = [(p, k, r, None if c is None else c[:CONTENT_CHARACTERS]) for p, k, r, c in rejected]
        columns = dict(zip(REJECTED.names, zip(*rows, strict=True), strict=True))
        writer.table(f"{layout.REJECTED.format(stage)}/{shard}.parquet", pa.table(columns, schema=REJECTED))
