"""What a core takes for each kind of work: a table of measured rates, scaled to this machine by a short probe.

What the processor's matrix instructions decide has a row for each kind of CPU (`KINDS`); all else was measured on one
machine, that of AVX2. A rate is multiplied by what the probe takes here over what it took there. What finished tasks of
a store took outranks these for their stages (costs.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from graphbuild.machine.cpu import cpu_features
from graphbuild.machine.threads import torch_threads
from graphbuild.nodes.encoder.model import fastest_precision
from graphbuild.store.store import Store

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


PROBED = Probe(1.2e-11, 1.2e-11, 1.15e-7, 4.9e-6, 6.3e-10, 6e8)
"""What the probe took on two cores of an AMD EPYC (Zen 3), where `Rates` was measured."""


def _by(probed: str, seconds: float) -> float:
    """What was measured, and the number of the probe with which it goes."""
    measured: float = field(default=seconds, metadata={"by": probed})
    return measured


@dataclass(frozen=True)
class Rates:
    """Seconds of one core, with all cores busy, unless said otherwise; of vectors of 384 numbers (`case.WIDTH`).

    As measured: CPU seconds of the tasks of real jobs in one process, from 1,600 captions of tars and from 10,000 and
    60,000 vectors with k = 64 and 32; the runner's own and what workers load, of a job on Ray.
    """

    kind: str = "AVX2"  # of CPU, of KINDS
    token: float = _by("encoder", 3.8e-4)  # computed by the default encoder; others by FLOP
    pair: float = _by("encoder", 1.1e-8)  # of int8 products
    flop: float = _by("float32", 1.2e-11)
    fidelity_text: float = _by("float32", 4.5e-3)
    code_node: float = _by("float32", 2.0e-5)
    search_node: float = _by("float32", 1.0e-5)  # its background and sketch
    list_entry: float = _by("memory", 3.0e-7)  # of a candidate list that exact fills
    leaf_entry: float = _by("memory", 8.0e-8)  # of the list of a node's place in a leaf
    merge_entry: float = _by("memory", 4.0e-8)
    candidate: float = _by("memory", 1.1e-7)  # scored again by its vector
    sort_node: float = _by("memory", 1.0e-6)  # copied behind those of the same leader
    order_node: float = _by("memory", 2.5e-6)  # copied to its place, and coded
    refine_entry: float = _by("memory", 2.0e-7)  # of a list that partition refines
    far: float = 7.0  # times that a candidate takes in tables of much more than NEAR_BYTES: so the searches of 50,000,
    # 250,000 and 3,000,000 nodes in benchmarks/results/knn.jsonl and knn_epyc.jsonl
    start: float = _by("python", 6.0)  # of Ray and its workers
    load_torch: float = _by("python", 2.0)  # by a worker, before its first task that needs it; so are the next two
    load_transformers: float = _by("python", 5.5)
    load_numba: float = _by("python", 1.6)
    task: float = _by("python", 0.015)  # that the runner adds to each
    stage: float = _by("python", 0.022)  # likewise
    list_row: float = _by("python", 5.5e-6)  # a row or sample of that stage, here and in the next four
    tar_sample: float = _by("python", 1.3e-4)
    number_row: float = _by("python", 4.4e-7)
    assign_row: float = _by("python", 5.0e-6)
    vector_row: float = _by("python", 1.2e-5)
    export_byte: float = _by("python", 2.7e-8)
    certified_edge: float = _by("memory", 4.0e-6)  # of a sampled node, looked up and scored
    checked_entry: float = _by("memory", 3.0e-8)  # of a list whose structure is checked
    text: float = _by("python", 3.1e-5)  # tokenised
    image: float = _by("python", 0.019)  # a web photograph checked, decoded, scaled and written again
    hash_byte: float = _by("hash_byte", 6.3e-10)
    disk_bytes_second: float = _by("disk_bytes_second", 6e8)  # written and flushed


@dataclass(frozen=True)
class Kind:
    """`encoder`: seconds of a FLOP of the encoder's products alone, where the other two were measured."""

    encoder: float
    token: float
    pair: float


KINDS = {
    "AMX": Kind(1 / 698e9, 7.7e-5, 8.0e-10),
    "AVX-512 with VNNI": Kind(1 / 210e9, 1.37e-4, 2.2e-9),
    "AVX2": Kind(PROBED.encoder, Rates.token, Rates.pair),
}
"""Two cores each. AMX: an Intel Xeon; encoder and token of benchmarks/results/embed_xeon.md (847 captions of 14.6
tokens a CPU second), pair from the joins of exact at 50,000 and 251,610 nodes in knn.jsonl. AVX-512 with VNNI: an AMD
EPYC, by the same in embed_epyc.md (475 captions; 70% of the products alone) and knn_epyc.jsonl."""
NEAR_BYTES = 100e6  # of a table, up to which random reads take what they did where rates were measured
WORKER_BYTES = {"python": 130e6, "torch": 220e6, "transformers": 70e6, "numba": 40e6, "img2dataset": 240e6}
"""Of a worker, by what it has imported: its proportional set size in jobs of two workers on that machine."""


def rates_here(store: Store | None = None) -> Rates:
    """This machine's rates, by a probe made now, of the disk where the store is or will be."""
    folder = nearest_folder(store)
    return scaled(kind_here(), probe_here(folder if folder and os.access(folder, os.W_OK) else None))


def scaled(kind: str, probe: Probe) -> Rates:
    """The table's rates for a machine of that kind with that probe."""
    row = KINDS[kind]
    there = replace(PROBED, encoder=row.encoder)
    rates = Rates(kind, row.token, row.pair)
    by = {one.name: one.metadata["by"] for one in fields(Rates) if one.metadata}
    ratios = {name: getattr(probe, of) / getattr(there, of) for name, of in by.items()}
    return replace(rates, **{name: getattr(rates, name) * ratio for name, ratio in ratios.items()})


def kind_here() -> str:
    """The best of KINDS that this CPU is; AVX2 also for any other, of whose products the probe tells the speed."""
    able = cpu_features()
    if able.get("amx_int8") and able.get("amx_bf16"):
        return "AMX"
    return "AVX-512 with VNNI" if able.get("avx512_vnni") and able.get("avx512_bf16") else "AVX2"


def nearest_folder(store: Store | None) -> Path | None:
    """The folder on this machine that is nearest to where a store is or will be; None where it is elsewhere."""
    if store is not None and not store.is_local:
        return None
    place = Path(store.root if store else ".")
    return next(folder for folder in (place, *place.absolute().parents) if folder.exists())


def probe_here(folder: Path | None = None) -> Probe:
    """Measured now. folder: where the disk is tried, with 16 MB; else the folder for temporary files.

    Under a second beside the import of torch, and 150 MB of memory. All but the disk is CPU time of one thread, so that
    other programs on the machine lengthen it little.
    """
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
