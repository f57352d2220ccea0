"""Forecasts against real jobs of three sizes: wall time within a factor of 2, a worker's memory within 30%."""

from __future__ import annotations

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

from graphbuild.plan import machine
from graphbuild.plan.calibration import Rates
from graphbuild.plan.job import job_of
from graphbuild.plan.show import cases
from graphbuild.recipe import read_recipe

BIN = Path(sys.executable).parent
WORDS = "amber boat cloud dune ember fern grove hill iris jetty kite lamp moss nest oak pier quay reed sail tide"


def list_of_captions(path: Path, rows: int) -> dict[str, object]:
    rng, words = random.Random(1), WORDS.split()
    lines = (f"{' '.join(rng.choices(words, k=rng.randint(5, 13)))} {number}" for number in range(rows))
    path.write_text("caption\n" + "\n".join(lines) + "\n")
    return {"captions": str(path), "shard_size": max(rows // 8, 250)}


def clustered_vectors(path: Path, rows: int) -> dict[str, object]:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((rows // 15, 384), np.float32)
    vectors = centres[rng.integers(len(centres), size=rows)]
    vectors += rng.standard_normal(vectors.shape, np.float32) * 0.6
    np.save(path, vectors.astype(np.float16))
    return {"vectors": str(path), "shard_size": max(rows // 10, 1_000)}


def proportional_bytes(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def run(recipe: Path, store: Path, workers: int) -> tuple[float, int]:
    """Wall seconds of `graphbuild run`, and the most that one of its workers took."""
    command = [str(BIN / "graphbuild"), "run", str(recipe), str(store), "--workers", str(workers)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    peak = 0
    begin = time.monotonic()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
        reader.start()
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    if child.name().startswith("ray::"):
                        peak = max(peak, proportional_bytes(child.pid))
                except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        reader.join()
    assert process.returncode == 0, "".join(said)
    return seconds, peak


@pytest.mark.parametrize(
    ("make", "rows", "k"),
    [
        pytest.param(list_of_captions, 2_000, 16, id="2,000 captions"),
        pytest.param(list_of_captions, 12_000, 64, id="12,000 captions", marks=pytest.mark.slow),
        pytest.param(clustered_vectors, 150_000, 32, id="150,000 vectors", marks=pytest.mark.slow),
    ],
)
def test_time_is_within_a_factor_of_2_and_memory_within_30_percent(
    rates: Rates, tmp_path: Path, make: object, rows: int, k: int
) -> None:
    path = tmp_path / ("list.tsv" if make is list_of_captions else "vectors.npy")
    source = make(path, rows)  # type: ignore[operator]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"embed": {**source, "device": "cpu"}, "index": {"k": k, "device": "cpu"}}))
    read = read_recipe(str(recipe))
    job = job_of("run", read)
    assert job.nodes == pytest.approx(rows, rel=0.001)
    ((_, found),) = cases(job, read, rates, [machine.here(rates, None, rates.cores)])
    seconds, peak = run(recipe, tmp_path / "out", rates.cores)
    forecast, ram = sum(cost.seconds for cost in found), max(cost.ram for cost in found)
    said = f"{rows:,} rows: {seconds:.1f} s, forecast {forecast:.1f}; {peak / 1e9:.2f} GB, forecast {ram / 1e9:.2f}"
    by_stage = {cost.name: round(cost.seconds, 2) for cost in found}
    assert 0.5 < forecast / seconds < 2, (said, by_stage)
    assert abs(ram / peak - 1) < 0.3, (said, {cost.name: round(cost.ram / 1e6) for cost in found})

    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    kept = [cost for cost in found if cost.name not in ("base", "prepare", "codes", "join", "merge")]
    assert 0.5 < sum(cost.written for cost in kept) / written < 2
