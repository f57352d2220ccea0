"""A look at a list before it is read: about how many rows, a sample of its captions and hosts, and how old it is."""

from __future__ import annotations

import gzip
import math
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from graphbuild.errors import InputError
from graphbuild.remote import file_system, reaching
from graphbuild.tables import TableSpec, read_chunks

SAMPLE_ROWS, SAMPLE_BYTES, PLACES = 2_000, 1 << 20, 8
HOSTS, DNS_SECONDS = 64, 2.0
FRESH, KEPT_A_YEAR = 0.90, 0.94  # see expected_success


@dataclass(frozen=True)
class Known:
    """rows: about, exact of parquet. distinct: share of the sampled captions that differ. year: of the file."""

    rows: int
    bytes: float
    captions: tuple[str, ...]
    urls: tuple[str, ...]
    distinct: float
    year: int


def look(url: str, preset: str | None, columns: Mapping[str, str]) -> Known | None:
    """What a few reads tell of a list; None when it is not there. InputError when it cannot be read as asked."""
    files, path = file_system(url)
    with reaching(url):
        if not files.exists(path):
            return None
        info = files.info(path)
    size = float(info.get("size") or 0)
    spec = TableSpec(path=url, preset=preset, columns=columns)
    rows = next(read_chunks(spec, chunk_rows=SAMPLE_ROWS)).rows.slice(0, SAMPLE_ROWS)
    captions = [text or "" for text in rows["caption"].to_pylist()] if "caption" in rows.column_names else []
    urls = rows["url"].to_pylist() if "url" in rows.column_names else []
    changed = info.get("mtime") or info.get("LastModified")
    when = datetime.fromtimestamp(changed, UTC) if isinstance(changed, int | float) else changed or datetime.now(UTC)
    folded = {text.casefold() for text in captions}
    headed = preset is None and url.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    distinct = len(folded) / len(captions) if captions else 1.0
    return Known(_rows(url, size) - headed, size, tuple(captions), tuple(urls), distinct, when.year)


def _rows(url: str, size: float) -> int:
    """Rows of a list: by the footer of parquet; else bytes by the mean length of the lines at some places of it."""
    import pyarrow.parquet as pq

    files, path = file_system(url)
    with reaching(url), files.open(path, "rb") as file:
        if url.lower().endswith(".parquet"):
            return int(pq.ParquetFile(file, pre_buffer=False).metadata.num_rows)
        if url.lower().endswith(".gz"):
            plain = gzip.GzipFile(fileobj=file).read(PLACES * SAMPLE_BYTES)
            packed = file.tell()
            if len(plain) < PLACES * SAMPLE_BYTES:
                return plain.count(b"\n")
            return int(size / packed * plain.count(b"\n"))
        if size <= PLACES * SAMPLE_BYTES:
            return int(file.read().count(b"\n"))
        read = lines = 0
        for place in range(PLACES):
            file.seek(int(place * (size - SAMPLE_BYTES) / (PLACES - 1)))
            block = file.read(SAMPLE_BYTES)
            read, lines = read + len(block), lines + block.count(b"\n")
    if not lines:
        raise InputError(f"{url} has no line end in {read:,} bytes read", "check the list's format")
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


def resolved_hosts(urls: Sequence[str]) -> tuple[int, int]:
    """How many of at most HOSTS of the URLs' hosts have an address, and of how many, within DNS_SECONDS.

    (0, n) also where this machine has no name server; a host that takes longer counts as without.
    """
    hosts = list(dict.fromkeys(found[1] for url in urls if (found := re.match(r"https?://([^/:?#@]+)", url or ""))))
    hosts = hosts[:: max(len(hosts) // HOSTS, 1)][:HOSTS]
    resolved: set[str] = set()

    def resolve(host: str) -> None:
        try:
            socket.getaddrinfo(host, 443)
        except (OSError, UnicodeError):
            return
        resolved.add(host)

    threads = [threading.Thread(target=resolve, args=(host,), daemon=True) for host in hosts]
    end = time.monotonic() + DNS_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    return len(resolved), len(hosts)
