"""What this machine can do: each check really does the thing, within seconds, and says how to mend what fails.

A check gives one line; it warns where a job would work but badly, and fails where the demo could not run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graphbuild.errors import ConfigError, GraphbuildError, install_extra
from graphbuild.machine.cpu import cpu_features
from graphbuild.machine.gpus import cores_here
from graphbuild.machine.versions import version_of
from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model
from graphbuild.store.store import Store

State = Literal["ok", "warning", "FAIL"]
DISK_BYTES, MEMORY_BYTES = 5 << 30, 4 << 30  # that the demo's packages and jobs need at ease
DRIVER = Path("/proc/driver/nvidia/version")
VECTORS, QUERIES, WIDTH = 50_000, 200, 384


@dataclass(frozen=True)
class Finding:
    """One line of the table. fix: the next step; empty where nothing is to be done."""

    check: str
    state: State
    says: str
    fix: str = ""


def examine(url: str | None) -> Iterator[Finding]:
    """Findings, one after the other as they are made; url: the store to try, or a temporary folder."""
    for name, check in CHECKS.items():
        yield _finding(name, check)
    yield _finding("storage", lambda: _storage(url))


def _finding(name: str, check: Callable[[], tuple[State, str, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except GraphbuildError as error:
        return Finding(name, "FAIL", error.cause, error.fix)
    except Exception as error:  # noqa: BLE001 a check that breaks is what is looked for
        return Finding(name, "FAIL", f"{type(error).__name__}: {error}", "install the packages anew: make demo")


def _python() -> tuple[State, str, str]:
    says = f"{platform.python_version()}, {sys.platform} {platform.machine()}, {cores_here()} cores"
    return ("ok", says, "") if sys.version_info >= (3, 11) else ("FAIL", says, "use Python 3.11 or later")


def _torch() -> tuple[State, str, str]:
    import torch

    able = cpu_features()
    names = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "amx_bf16": "AMX"}
    has = [name for key, name in names.items() if able.get(key)]
    rate = _rate(torch, "cpu", torch.float32, 512)
    says = f"{torch.__version__}, CPU with {', '.join(has) or 'no vector units known'}: {rate / 1e9:,.0f} GFLOP/s"
    return "ok", says, ""


def _gpu() -> tuple[State, str, str]:
    import torch

    if not torch.cuda.is_available():
        if not DRIVER.exists():
            return "ok", "none: everything runs on the CPU", ""
        version = torch.version.cuda
        says = f"torch can use none, though there is a driver: {DRIVER.read_text().splitlines()[0]}"
        if version is None:
            return "warning", says, "install a torch with CUDA: this one is for CPUs"
        return (
            "warning",
            says,
            f"a driver for CUDA {version} or newer, or a torch with an older CUDA; in a container --gpus all",
        )
    found = []
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        rate = _rate(torch, f"cuda:{number}", torch.bfloat16, 8192)
        found.append(f"{torch.cuda.get_device_name(number)}, {memory:.0f} GiB, {rate / 1e12:,.0f} TFLOP/s")
    return "ok", "; ".join(found), ""


def _rate(torch: Any, device: str, dtype: Any, size: int) -> float:
    """FLOP a second of a matrix product whose result is checked."""
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    best = 1e9
    for _ in range(5):
        begin = time.perf_counter()
        product = a @ a
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    if not bool((product == size / 4).all()):
        raise ConfigError(f"a matrix product on {device} is wrong", "install torch anew, or say --device cpu")
    return 2 * float(size) ** 3 / best


def _faiss() -> tuple[State, str, str]:
    from graphbuild.knn.faiss_index import import_faiss

    try:
        faiss = import_faiss()
    except ConfigError as error:
        return "warning", "not installed: only --engine faiss needs it", error.fix
    vectors = np.random.default_rng(0).standard_normal((VECTORS, WIDTH)).astype(np.float32)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    seconds = _search_seconds(index, vectors)
    core = os.environ.get("OPENBLAS_CORETYPE", "its own choice")
    build = "GPU" if hasattr(faiss, "StandardGpuResources") else "CPU"
    says = f"{faiss.__version__} ({build} build), BLAS cores: {core}; {QUERIES / seconds:,.0f} queries/s of {VECTORS:,}"
    if build == "GPU" and faiss.get_num_gpus():
        on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        says += f"; GPU {QUERIES / _search_seconds(on_gpu, vectors):,.0f}"
    return "ok", says, ""


def _search_seconds(index: Any, vectors: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """Time of a search whose answers are compared with numpy's."""
    queries = vectors[:QUERIES]
    index.search(queries[:1], 1)
    begin = time.perf_counter()
    _, found = index.search(queries, 1)
    seconds = time.perf_counter() - begin
    if not (found[:, 0] == (queries @ vectors.T).argmax(axis=1)).all():
        raise ConfigError("faiss finds wrong neighbours here", "use --engine exact or partition, or install it anew")
    return seconds


def _encoder() -> tuple[State, str, str]:
    encoder = find_encoder(DEFAULT_ENCODER)
    model = open_model(encoder, "cpu")
    near, far = (model.encode(["a small dog", other]).vectors.astype(np.float32) for other in ("a puppy", "tax law"))
    if not near[0] @ near[1] > far[0] @ far[1]:
        return "FAIL", "its vectors make no sense", "try --precision float32, and report this machine"
    texts = ["a caption of about ten words, as there are many"] * 100
    begin = time.perf_counter()
    model.encode(texts)
    rate = len(texts) / (time.perf_counter() - begin)
    return "ok", f"{encoder.identity}, {model.precision}: {rate:,.0f} captions/s a core", ""


def _ray() -> tuple[State, str, str]:
    from graphbuild.runner.runner import Runner

    begin = time.perf_counter()
    with Runner(workers=1) as runner:
        ray = runner.start_ray()
        process, mode = ray.get(ray.remote(_process).remote(), timeout=60)
    if process == os.getpid():
        return "FAIL", "a task did not run in a process of its own", "install ray anew"
    return "ok", f"{version_of('ray')}, started with a task in {time.perf_counter() - begin:.1f} s, auth: {mode}", ""


def _download() -> tuple[State, str, str]:
    missing = [name for name in ("img2dataset", "webdataset") if version_of(name) is None]
    if missing:
        fix = f"{install_extra('download')}; with tars or captions of your own it is not needed"
        return "FAIL", f"{missing[0]} is not installed", fix
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
        port = server.getsockname()[1]
    return "ok", f"img2dataset {version_of('img2dataset')}; loopback answers (port {port})", ""


def _memory() -> tuple[State, str, str]:
    import psutil

    memory = psutil.virtual_memory()
    says = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available < MEMORY_BYTES:
        return "warning", says, "close other programs, or use fewer --workers and a smaller index --memory"
    return "ok", says, ""


def _storage(url: str | None) -> tuple[State, str, str]:
    with tempfile.TemporaryDirectory() if url is None else contextlib.nullcontext(url) as place:
        store = Store(place)
        root = Path(store.root)
        fresh = [path for path in (root, *root.parents) if not path.exists()] if store.is_local else []
        try:
            begin = time.perf_counter()
            store.check_writable()
            seconds = time.perf_counter() - begin
            kind = "write, sync and rename" if store.is_local else "put"
            says = f"{'a temporary folder' if url is None else store.url}: {kind} in {1000 * seconds:.0f} ms"
            if not store.is_local:
                return "ok", says, ""
            free = shutil.disk_usage(store.root).free
        finally:
            for path in fresh:
                with contextlib.suppress(OSError):  # never made, or others have put something there
                    path.rmdir()
    says += f", {free / 2**30:,.0f} GiB free"
    if free < DISK_BYTES:
        return "warning", says, "make room: a job needs what `graphbuild index` prints, and the tars"
    return "ok", says, ""


CHECKS: dict[str, Callable[[], tuple[State, str, str]]] = {
    "python": _python,
    "torch": _torch,
    "gpu": _gpu,
    "faiss": _faiss,
    "encoder": _encoder,
    "ray": _ray,
    "download": _download,
    "memory": _memory,
}


def _process() -> tuple[int, str]:
    return os.getpid(), os.environ.get("RAY_AUTH_MODE", "none")
