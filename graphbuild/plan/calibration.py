"""What this machine takes for each kind of work: measured once by small jobs (small_jobs.py) and kept in the user's
cache folder, under a name made of the machine and the versions of what does the work."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from graphbuild.errors import StageError
from graphbuild.progress import Progress
from graphbuild.recipe import Embed, Recipe
from graphbuild.stage import digest
from graphbuild.versions import version_of

logger = logging.getLogger(__name__)
VERSION = 1  # of what is measured
PACKAGES = ("graphbuild", "torch", "numba", "numpy", "pyarrow", "ray", "sentence-transformers", "polars")
STEP = "calibrated a stage"
PATIENCE_SECONDS = 600
MOST_WORKERS = 8  # of the small jobs


class Sizes(BaseModel):
    """What the small jobs had: from which the formulas of costs.py scale."""

    model_config = ConfigDict(frozen=True)
    d: int = 384
    k: int = 64
    nodes: int = 30_000
    few_nodes: int = 6_000
    recall_sample: int = 2_500
    tars: int = 8
    tar_samples: int = 200
    tar_sample_bytes: int = 20_000
    list_rows: int = 20_000

    @property
    def samples(self) -> int:
        return self.tars * self.tar_samples

    @property
    def exact_length(self) -> int:
        return 2 * self.k + 16

    @property
    def leaf_length(self) -> int:
        return self.k + max(4, self.k // 8)

    @property
    def row_bytes(self) -> float:
        """Of a sidecar of ready vectors, int8."""
        return self.d + 4 + 6.0 * self.k + 40


CALIBRATED = Sizes()


class Rates(BaseModel):
    """Seconds of one core, with all cores busy, unless said otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    machine: str
    cores: int
    key: str
    import_torch: float  # of a worker, before its first task that needs it; so are load_encoder and load_index
    start: float  # of Ray and its workers
    load_encoder: float
    load_index: float
    task: float  # that the runner adds to each
    stage: float  # likewise
    list_row: float  # a row or sample of that stage, here and in the next five
    tar_sample: float
    number_row: float
    assign_row: float
    vector_row: float
    export_row: float
    text: float  # of the default encoder; others by FLOP
    token: float
    fidelity_text: float  # in float32
    code_node: float  # at 500 leaders or fewer
    pair: float  # of int8 products of CALIBRATED.d
    list_fill: float  # the filling of one candidate list
    leaf_row: float  # a node's place in a leaf
    prepare_flop: float  # float32
    merge_entry: float  # of a list
    candidate: float  # of a list
    refine_node: float  # the search of partition, a node
    far: float  # how many times slower than from a cache
    cache_bytes: float  # of that cache
    leader: float  # encoded
    hash_byte: float  # of sha256
    certify_mac: float  # a multiply-add
    image: float  # a web photograph
    disk_bytes_second: float  # written and flushed
    memory: dict[str, float]  # bytes of the largest worker by stage, "with_encoder." where it holds the encoder too
    image_memory: float  # what img2dataset adds


def rates_here(progress: Progress) -> Rates:
    """This machine's rates: from the cache, or measured now, which `progress` shows, and kept.

    Raises:
        StageError: the small jobs fail.
    """
    path = cache_file()
    try:
        return Rates.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        pass
    logger.info("%-9s small jobs to learn what this machine can do, only once", "calibrate")
    content = _measured(progress)
    rates = Rates.model_validate_json(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
    return rates


def _measured(progress: Progress) -> bytes:
    """The small jobs, in a process of their own, which prints STEP after each of their stages."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "rates.json", Path(folder) / "errors.txt"
        command = [sys.executable, "-m", "graphbuild.plan.small_jobs", str(out)]
        progress.begin("calibrate", total=_steps(), done=0)
        progress.running(1)
        with (
            contextlib.closing(progress),
            errors.open("w") as said,
            subprocess.Popen(command, env=inherited, stdout=subprocess.PIPE, stderr=said, text=True) as process,
        ):
            impatient = threading.Timer(PATIENCE_SECONDS, process.kill)
            impatient.daemon = True
            impatient.start()
            for line in process.stdout or ():
                if line.strip() == STEP:
                    progress.advance({}, {})
            impatient.cancel()
        if process.returncode:
            last = (errors.read_text().strip().splitlines() or ["no message"])[-1]
            raise StageError(f"the small jobs of the calibration failed ({last})", "see `graphbuild doctor`")
        progress.end()
        return out.read_bytes()


def _steps() -> int:
    """How often the small jobs print STEP: after each stage of a job from tars and three from vectors, and once."""
    from graphbuild.pipeline import steps_of

    from_tars, from_vectors = (
        len(steps_of("run", Recipe(embed=embed))) for embed in (Embed(shards="*.tar"), Embed(vectors="vectors.npy"))
    )
    return from_tars + 3 * from_vectors + 1


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "graphbuild" / f"calibration-{identity_here()['key']}.json"


def identity_here() -> dict[str, Any]:
    """machine: what is printed of it; cores; key: of the cache, changes with machine and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        model, flags = named.get("model name", model), named.get("flags", "")
    versions = {name: version_of(name) for name in PACKAGES}
    key = digest([VERSION, platform.node(), model, flags, cores_here(), platform.python_version(), versions])[:16]
    return {"machine": model, "cores": cores_here(), "key": key}


def cores_here() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
