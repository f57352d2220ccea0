"""The sha256 of files, by which records, tars and copies are told apart."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import IO


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return stream_sha256(file)


def stream_sha256(file: IO[bytes] | io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
