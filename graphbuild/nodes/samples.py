"""Samples on their way to nodes: the columns of what scan writes, of what is rejected, and of samples/."""

from __future__ import annotations

import pyarrow as pa

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
REJECTED = pa.schema(
    [("position", pa.int64()), ("key", pa.string()), ("reason", pa.string()), ("content", pa.string())]
)
NO_NODE = -1
COLUMNS = ["row", "key", "node", "caption", "image_offset", "image_size", "members"]
