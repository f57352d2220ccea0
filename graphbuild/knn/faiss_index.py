"""faiss engine: any index factory string, on CPU or GPU, searched shard by shard.

`IVF1024,Flat` or `HNSW32` or `Flat` as faiss's index_factory takes it, over unit vectors and inner product. What the
index has to set between speed and recall (nprobe, efSearch) is doubled until a sample reaches the recall asked for.
The CPU wheel's OpenBLAS does not know recent Intel CPUs and runs them slowly unless told, so it is (`import_faiss`).
Memory: the whole index, once a worker: N d 4 bytes for Flat, IVF...,Flat and HNSW.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from graphbuild.errors import ConfigError, install_extra
from graphbuild.knn import lists, sample
from graphbuild.knn.codes import Codes
from graphbuild.knn.inputs import Inputs
from graphbuild.knn.partition import list_length
from graphbuild.knn.products import unit
from graphbuild.machine.cpu import cpu_features
from graphbuild.runner.stage import records
from graphbuild.store.layout import SCRATCH
from graphbuild.store.sharded import Array, ShardedArray
from graphbuild.store.store import Json, Writer

INDEX = f"{SCRATCH}/index.faiss"
TASK_NODES = 65_536
TRAINING_ROWS = 262_144
BLOCK_ROWS = 8_192
LARGEST_EFFORT = 2_048


@dataclass(frozen=True)
class Faiss:
    """The engine; what its methods promise: `graphbuild.knn.engine.Engine`."""

    factory: str
    recall: float
    seed: int
    on_device: bool = True
    ordered: bool = False
    mapped_files: int = 1

    @property
    def name(self) -> str:
        return f"faiss:{self.factory}"

    def settings(self) -> Json:
        return {"recall": self.recall, "seed": self.seed}

    def prepare(self, inputs: Inputs, k: int, writer: Writer) -> Json:
        with writer.file(INDEX, durable=False) as path:
            facts = build(inputs.vectors, self.factory, k, self.recall, self.seed, path)
        return facts

    def describe(self, inputs: Inputs, codes: Codes, k: int) -> dict[str, Array]:
        return {}

    def joins(self, nodes: int, at_once: int, first_new: int = 0) -> list[tuple[int, int]]:
        """Ranges of nodes (first, count); each is searched among all."""
        rows = min(TASK_NODES, at_once)
        return [(first, min(rows, nodes - first)) for first in range(0, nodes, rows)]

    def spread(self, nodes: int, tasks: int) -> tuple[float, float]:
        return nodes / tasks, 1

    def beside(self, nodes: int) -> float:
        return 0.0

    def length(self, k: int, nodes: int) -> int:
        return list_length(k, nodes)

    def join(self, argument: Any, inputs: Inputs, length: int, device: str) -> tuple[Array, Array]:
        first, count = argument
        record = records(inputs.store, "prepare")["all"]
        facts, path = record["facts"], inputs.store.local_copy(INDEX)
        index = open_index(path, record["fingerprint"], facts["knob"], facts["effort"], device)
        ids = np.arange(first, first + count)
        keys = np.empty((count, length), np.int64)
        for start in range(0, count, BLOCK_ROWS):
            rows = ids[start : start + BLOCK_ROWS]
            scores, found = search(index, unit(inputs.vectors.take(rows)).numpy(), rows, length)
            keys[start : start + len(rows)] = np.where(found < 0, lists.EMPTY, lists.pack(scores, found))
        keys[:, ::-1].sort(axis=1)
        return ids, keys


def import_faiss() -> Any:
    """The module faiss, its BLAS set to what the CPU has; ConfigError says how to install it."""

    if "faiss" not in sys.modules:
        able = cpu_features()
        if able.get("avx512_f"):
            os.environ.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX")
        elif able.get("avx2"):
            os.environ.setdefault("OPENBLAS_CORETYPE", "HASWELL")
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "--engine faiss: the package faiss is not installed",
            f"{install_extra('cpu')}, or '.[gpu]' for GPUs, or use --engine auto",
        ) from None
    return faiss


def build(vectors: ShardedArray, factory: str, k: int, recall: float, seed: int, path: Path) -> dict[str, Any]:
    """Train, fill and calibrate an index of all nodes, and write it to `path`. Returns effort and sampled recall."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    try:
        index = faiss.index_factory(vectors.width, factory, faiss.METRIC_INNER_PRODUCT)
        random = np.random.default_rng(seed)
        if not index.is_trained:
            ids = np.sort(random.choice(len(vectors), min(TRAINING_ROWS, len(vectors)), replace=False))
            index.train(unit(vectors.take(ids)).numpy())
        for _, block in vectors.blocks(BLOCK_ROWS):
            index.add(unit(block).numpy())
    except RuntimeError as error:
        raise ConfigError(
            f"--engine faiss:{factory} cannot hold {len(vectors):,} vectors of {vectors.width} numbers "
            f"({_last_line(error)})",
            "use fewer lists, another factory, or --engine partition",
        ) from None
    ids = sample.draw(len(vectors), seed)
    queries = unit(vectors.take(ids)).numpy()
    true, _ = sample.true_neighbors(vectors, ids, k)
    knob = _knob(faiss, index)
    effort = 1 if knob == "nprobe" else k + 1
    while True:
        if knob:
            faiss.ParameterSpace().set_index_parameter(index, knob, effort)
        found = search(index, queries, ids, k)[1]
        exact = [unit(vectors.take(row[row >= 0])).numpy() @ query for row, query in zip(found, queries, strict=True)]
        reached = float(
            np.mean([(scores >= worst - 1e-6).sum() / k for scores, worst in zip(exact, true[:, -1], strict=True)])
        )
        if not knob or reached >= recall or effort * 2 > LARGEST_EFFORT:
            break
        effort *= 2
    faiss.write_index(index, str(path))
    return {"knob": knob, "effort": effort if knob else None, "sampled_recall": round(reached, 4)}


@lru_cache(maxsize=1)
def open_index(path: Path, version: str, knob: str | None, effort: int | None, device: str) -> Any:
    """The index of `build`, on its device: a GPU's after a real search there has found what it must, or ConfigError.

    Kept from task to task; `version` changes when the file may.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(path))
    if device == "cuda":
        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            raise ConfigError(
                "--engine faiss on a GPU: this faiss has no GPU support, or sees no GPU",
                f"pip uninstall faiss-cpu, then {install_extra('gpu')}, or say --device cpu",
            )
        probe = np.eye(64, dtype=np.float32)
        flat = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatIP(64))
        flat.add(probe)
        if not (flat.search(probe, 1)[1][:, 0] == np.arange(64)).all():
            raise ConfigError("faiss finds the wrong neighbours on this GPU", "use --engine exact, or --device cpu")
        try:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        except RuntimeError as error:
            raise ConfigError(
                f"--engine faiss: this index cannot be on a GPU ({_last_line(error)})",
                "say --device cpu, or take Flat, IVF...,Flat or --engine exact",
            ) from None
        if knob:
            faiss.GpuParameterSpace().set_index_parameter(index, knob, effort)
    elif knob:
        faiss.ParameterSpace().set_index_parameter(index, knob, effort)
    return index


def search(index: Any, queries: Array, ids: Array, length: int) -> tuple[Array, Array]:
    """Similarities float32 and ids int64 [n, length] of the neighbours of nodes `ids`, not themselves; -1: none."""
    try:
        scores, found = index.search(queries, length + 1)
    except RuntimeError as error:  # on a GPU a list is of 2,048 at most
        raise ConfigError(
            f"--engine faiss finds no {length + 1} neighbours ({_last_line(error)})",
            "use a smaller --k, --device cpu or --engine exact",
        ) from None
    own = found == ids[:, None]
    own[~own.any(axis=1), -1] = True  # one too many where it did not find itself
    return scores[~own].reshape(len(ids), length), found[~own].reshape(len(ids), length)


def _knob(faiss: Any, index: Any) -> str | None:
    for name in ("nprobe", "efSearch"):
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, 1)
        except RuntimeError:
            continue
        return name
    return None


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1][:200]
