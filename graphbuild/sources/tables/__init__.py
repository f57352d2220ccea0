"""Reads URL lists and caption lists: parquet, CSV, TSV, JSONL (text also as .gz and .zst), at a path or a fsspec URL.

Every row of the file is delivered, or rejected with its position, a reason and its content. No type is
guessed: "007", "NA" and "null" stay text. One pass; memory is one chunk (`chunk_rows` rows or about 64 MiB,
whichever comes first) and, for parquet, the pages being decoded. `read_chunks` describes the dialects.
"""

from graphbuild.sources.tables.reader import ENDING, read_chunks, read_parts, unpacked, with_place
from graphbuild.sources.tables.spec import CAPTION_ROLES, FIELD_ROLE, PRESETS, WEIGHTS_ROLE, Chunk, TableSpec
from graphbuild.sources.tables.text import MAX_ROW_BYTES

__all__ = [
    "CAPTION_ROLES",
    "ENDING",
    "FIELD_ROLE",
    "MAX_ROW_BYTES",
    "PRESETS",
    "WEIGHTS_ROLE",
    "Chunk",
    "TableSpec",
    "read_chunks",
    "read_parts",
    "unpacked",
    "with_place",
]
