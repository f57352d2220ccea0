"""A look at a list before it is read: about how many rows, a sample of its captions, and how old it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from graphbuild.errors import InputError
from graphbuild.sources.paths import named_files
from graphbuild.sources.tables import CAPTION_ROLES, ENDING, TableSpec, read_chunks, unpacked
from graphbuild.store.remote import file_system, reaching

SAMPLE_ROWS, SAMPLE_BYTES = 2_000, 8 << 20
FRESH, KEPT_A_YEAR = 0.90, 0.94  # see expected_success


@dataclass(frozen=True)
class Known:
    """What is known of a list, read or published."""

    rows: int = 0  # about; exact of parquet; 0: not known
    year: int | None = None  # of its URLs
    tokens: float = 15.0  # of a caption, as MiniLM's
    characters: float = 65.0
    bytes: float = 0.0
    captions: float = 1.0  # of a row
    distinct: float = 1.0  # share of the sampled captions that differ
    assumed: tuple[str, ...] = ()


UNKNOWN = Known()
PUBLISHED = {
    "cc3m": Known(3_318_333, 2018, tokens=12.7, characters=54.0),
    "cc12m": Known(12_423_374, 2021, tokens=24.0, characters=106.0),
}
"""The training lists. cc3m's captions as counted in 4,000 of its validation list, of 10.3 words; cc12m's by their 20.2
words (Changpinyo et al. 2021, table 2) at as many tokens and characters a word."""
URL_BYTES = 110


def look(url: str, preset: str | None, columns: Mapping[str, str], rows: int | None, tokenizer: Path | None) -> Known:
    """What a few reads tell of a list; of one that is not there, what is published of its preset, or usual.

    rows: to be taken instead of those found. tokenizer: an encoder's folder.

    Raises:
        InputError: it cannot be read as asked; or is not there, and neither rows nor a preset tell its length.
    """
    usual = PUBLISHED.get(preset or "", UNKNOWN)
    usual = replace(usual, assumed=(f"{usual.tokens:g} tokens a caption",))
    try:
        parts = named_files(url, ENDING, "the list")
    except InputError:
        parts = [url]
    infos = [_info(part) for part in parts]
    if infos[0] is not None:
        known = _sampled(
            TableSpec(path=parts[0], preset=preset, columns=columns, plural=True), usual, infos[0], tokenizer
        )
        scale = sum(float((info or {}).get("size") or 0) for info in infos) / max(known.bytes, 1)
        if len(parts) > 1:  # the others are as the first, by their bytes
            known = replace(known, rows=round(known.rows * scale), bytes=known.bytes * scale)
    elif rows is None and not usual.rows:
        raise InputError(f"{url} does not exist", "check the path of the list, or give --rows")
    else:
        length = usual.characters + (URL_BYTES if "url" in columns else 0)
        count = usual.rows if rows is None else rows
        said = () if rows is not None else (f"{url} is not here: as many rows as the published list",)
        known = replace(usual, rows=count, bytes=count * length, assumed=(*said, *usual.assumed))
    return known if rows is None else replace(known, rows=rows, bytes=known.bytes * rows / max(known.rows, 1))


def _info(url: str) -> Mapping[str, Any] | None:
    files, path = file_system(url)
    with reaching(url):
        return files.info(path) if files.exists(path) else None


def _sampled(spec: TableSpec, usual: Known, info: Mapping[str, Any], tokenizer: Path | None) -> Known:
    size = float(info.get("size") or 0)
    rows = next(read_chunks(spec, chunk_rows=SAMPLE_ROWS)).rows.slice(0, SAMPLE_ROWS)
    values = [value for role in CAPTION_ROLES if role in rows.column_names for value in rows[role].to_pylist()]
    texts = [text or "" for value in values for text in (value if isinstance(value, list) else [value])]
    changed = info.get("mtime") or info.get("LastModified")
    when = datetime.fromtimestamp(changed, UTC) if isinstance(changed, int | float) else changed or datetime.now(UTC)
    headed = spec.preset is None and spec.name.removesuffix(".gz").removesuffix(".zst").endswith((".csv", ".tsv"))
    count, year = _rows(spec, size) - headed, usual.year or when.year
    known = replace(usual, rows=count, year=year, bytes=size)
    if not texts:
        return known
    tokens, characters = tokens_of(texts, tokenizer), sum(map(len, texts)) / len(texts)
    distinct = len({text.casefold() for text in texts}) / len(texts)
    several = len(texts) / len(rows)
    return replace(known, tokens=tokens, characters=characters, captions=several, distinct=distinct, assumed=())


def _rows(spec: TableSpec, size: float) -> int:
    """Rows of a list, a header too: by the footer of parquet; else lines, of which a long list has as many as its bytes
    by the mean length of its first ones."""
    files, path = file_system(spec.path)
    with reaching(spec.path), files.open(path, "rb") as file:
        if spec.name.endswith(".parquet"):
            return int(pq.ParquetFile(file, pre_buffer=False).metadata.num_rows)
        text = unpacked(spec.name, file).read(SAMPLE_BYTES)
        lines, read = text.count(b"\n"), file.tell()
    if len(text) < SAMPLE_BYTES:  # all of it, whose last line may lack its end
        return int(lines + (not text.endswith(b"\n")))
    return int(size * lines / read)


def tokens_of(texts: Sequence[str], folder: Path | None) -> float:
    """Mean tokens of texts, special ones included, by the encoder's tokenizer; by characters where it has none."""
    if folder is None or not (folder / "tokenizer.json").exists():
        return max(sum(map(len, texts)) / len(texts) / 5 + 2, 3)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return sum(len(found.ids) for found in tokenizer.encode_batch_fast(list(texts))) / len(texts)


def expected_success(year: int | None) -> float:
    """The share of a list's URLs that still give an image, by its age: 0.90 x 0.94^years.

    Drawn through what users of img2dataset reported of CC12M (2021): 79% in December 2022, 62% in October 2025, 64% in
    August 2026; and of CC3M (2018): 70% in January 2024 (issues 242 and 391 of img2dataset, 9 of conceptual-12m).
    """
    now = datetime.now(UTC)
    age = 0.0 if year is None else max(now.year + now.timetuple().tm_yday / 365 - year - 0.5, 0)
    return FRESH * math.pow(KEPT_A_YEAR, age)
