"""A short probe of this machine, by which the table of rates (rates.py) is scaled: products, random reads, interpreted
code, hashing and the disk. Under a second beside the import of torch, and 150 MB of memory.

All but the disk is CPU time of one thread, so that other programs on the machine lengthen it little.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROUNDS = 5
TOKENS, HIDDEN, WIDE = 1_024, 384, 1_536  # a product of the default encoder
TABLE_ROWS, READ_ROWS = 100_000, 20_000  # 77 MB: more than most caches hold
BLOCK_BYTES, DISK_BLOCKS = 1 << 20, 16


@dataclass(frozen=True)
class Probe:
    """CPU seconds: of a FLOP of products in float32 and in the encoder's precision here, of a row of 384 float16 read
    at random, of one small record to JSON and back, of a byte of sha256. And bytes a second written and flushed."""

    float32: float
    encoder: float
    memory: float
    python: float
    hash_byte: float
    disk_bytes_second: float


def probe_here(folder: Path | None = None) -> Probe:
    """Measured now. folder: where the disk is tried, with 16 MB; else the folder for temporary files."""
    import torch

    from graphbuild.machine.threads import torch_threads
    from graphbuild.nodes.encoder.model import fastest_precision

    flop = 2 * TOKENS * HIDDEN * WIDE
    seconds = {}
    with torch_threads(1):
        for name in {"float32", precision := fastest_precision("cpu")}:
            dtype = getattr(torch, name)
            a, b = torch.ones(TOKENS, HIDDEN, dtype=dtype), torch.ones(WIDE, HIDDEN, dtype=dtype)
            seconds[name] = _least(lambda a=a, b=b: torch.nn.functional.linear(a, b)) / flop  # type: ignore[misc]
    table = np.ones((TABLE_ROWS, HIDDEN), np.float16)
    rows = np.random.default_rng(0).integers(0, TABLE_ROWS, READ_ROWS)
    out = np.empty((READ_ROWS, HIDDEN), np.float16)
    records = [{"key": f"{number:09}", "caption": "a dog and two cats", "node": number} for number in range(5_000)]
    block = bytes(8 * BLOCK_BYTES)
    return Probe(
        seconds["float32"],
        seconds[precision],
        _least(lambda: np.take(table, rows, axis=0, out=out, mode="clip")) / READ_ROWS,
        _least(lambda: [json.loads(json.dumps(record)) for record in records]) / len(records),
        _least(lambda: hashlib.sha256(block)) / len(block),
        _disk(folder),
    )


def _least(call: Callable[[], object]) -> float:
    """CPU seconds of the quickest of some calls, after one that is not counted."""
    call()
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    return min(times)


def _disk(folder: Path | None) -> float:
    block = os.urandom(BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(DISK_BLOCKS):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BLOCKS * BLOCK_BYTES / (time.perf_counter() - begin)
