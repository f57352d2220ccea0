"""Forecasts against real jobs of three sizes: wall time within a factor of 2, a worker's memory within 30%."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from graphbuild.job.plan import machine
from graphbuild.job.plan.job import job_of
from graphbuild.job.plan.rates import Rates
from graphbuild.job.plan.show import cases
from graphbuild.machine.gpus import cores_here
from graphbuild.recipe import read_recipe

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SCRATCH = ("base", "prepare", "codes", "order", "join", "merge", "refine")
WORDS = "amber boat cloud dune ember fern grove hill iris jetty kite lamp moss nest oak pier quay reed sail tide"


def list_of_captions(path: Path, rows: int) -> dict[str, object]:
    rng, words = random.Random(1), WORDS.split()
    lines = (f"{' '.join(rng.choices(words, k=rng.randint(5, 13)))} {number}" for number in range(rows))
    path.write_text("caption\n" + "\n".join(lines) + "\n")
    return {"captions": str(path), "shard_size": max(rows // 8, 250)}


def clustered_vectors(path: Path, rows: int) -> dict[str, object]:
    """Of 8 dimensions in each of 40 clusters, and a little noise in all 384."""
    rng = np.random.default_rng(1)
    basis = rng.standard_normal((40, 8, 384), np.float32) / 20
    centres = rng.standard_normal((40, 384), np.float32) / 10
    vectors = np.empty((rows, 384), np.float16)
    for cluster, part in enumerate(np.array_split(vectors, 40)):
        noise = 0.01 * rng.standard_normal(part.shape, np.float32)
        part[:] = centres[cluster] + rng.standard_normal((len(part), 8), np.float32) @ basis[cluster] + noise
    np.save(path, rng.permutation(vectors))
    return {"vectors": str(path), "shard_size": max(rows // 10, 1_000)}


def proportional_bytes(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def busy_seconds() -> float:
    """Of all cores of this machine, since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run(recipe: Path, store: Path, workers: int) -> tuple[tuple[float, float], int]:
    """Seconds of `graphbuild run`, and the most that one of its workers took.

    Two numbers, equal on a machine to oneself: others take cores from it meanwhile, which lengthens what runs on all
    cores by more than what runs on one. Least and most that it would have taken without them.
    """
    command = [str(BIN / "graphbuild"), "run", str(recipe), str(store), "--workers", str(workers)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    peak = 0
    own: dict[int, float] = {}
    busy, begin = busy_seconds(), time.monotonic()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
        reader.start()
        while process.poll() is None:
            for child in family(process.pid):
                try:
                    own[child.pid] = sum(child.cpu_times()[:2])
                    if child.name().startswith("ray::"):
                        peak = max(peak, proportional_bytes(child.pid))
                except (psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.2)
        seconds = time.monotonic() - begin
        reader.join()
    assert process.returncode == 0, "".join(said)
    others = max(busy_seconds() - busy - sum(own.values()), 0)
    cores = (psutil.cpu_count() or 1) - others / seconds  # that were to be had
    return (seconds * min(cores / workers, 1), seconds * min(cores, 1)), peak


@pytest.mark.parametrize(
    ("make", "rows", "k"),
    [
        pytest.param(list_of_captions, 2_000, 16, id="2,000 captions"),
        pytest.param(list_of_captions, 12_000, 64, id="12,000 captions"),
        pytest.param(clustered_vectors, 150_000, 32, id="150,000 vectors"),
    ],
)
def test_time_is_within_a_factor_of_2_and_memory_within_30_percent(
    rates: Rates, tmp_path: Path, make: object, rows: int, k: int
) -> None:
    path = tmp_path / ("list.tsv" if make is list_of_captions else "vectors.npy")
    source = make(path, rows)  # type: ignore[operator]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"embed": source, "index": {"k": k, "device": "cpu"}}))
    read = read_recipe(str(recipe))
    job = job_of("run", read)
    assert job.nodes == pytest.approx(rows, rel=0.001)
    ((_, found),) = cases(job, read, rates, [machine.here()])
    (least, most), peak = run(recipe, tmp_path / "out", cores_here())
    forecast, ram = sum(cost.seconds for cost in found), max(cost.resident for cost in found)
    said = f"{rows:,} rows: {least:.1f} to {most:.1f} s, forecast {forecast:.1f}"
    said += f"; {peak / 1e9:.2f} GB, forecast {ram / 1e9:.2f}"
    logging.getLogger(__name__).warning(said)
    by_stage = {cost.name: round(cost.seconds, 2) for cost in found}
    assert least / 2 < forecast < 2 * most, (said, by_stage)
    assert abs(ram / peak - 1) < 0.3, (said, {cost.name: round(cost.resident / 1e6) for cost in found})

    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    kept = [cost for cost in found if cost.name not in SCRATCH]
    assert 0.5 < sum(cost.written for cost in kept) / written < 2
