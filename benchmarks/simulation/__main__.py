"""A billion samples on clusters of 32 and 256 nodes, simulated: hours, bytes, requests, cost, and bottlenecks.

    python -m benchmarks.simulation run FOLDER [--nodes 32 --nodes 256] [--shards 100000]
    python -m benchmarks.simulation page FOLDER
    python -m benchmarks.simulation measure

in the project's root. `run` drives the job once for each cluster, kills the driver of the last one while it exports,
and starts it again twice: to finish, and with nothing to do. With 100,000 shards FOLDER gets 1.8 million small files
(6 GB), a driver takes some 6 minutes of a core (a quarter of it its own) and 3 GB. A folder in memory (/dev/shm) spares
a disk. Results lie in FOLDER; `page` writes benchmarks/results/simulation.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.simulation.files import tars
from benchmarks.simulation.measure import ray_calls, requests

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "simulation.md"
TAR_BYTES = 336_720_000
Folder = Annotated[Path, typer.Argument(show_default=False)]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@app.command()
def run(
    folder: Folder,
    nodes: Annotated[list[int], typer.Option(min=1, help="of a cluster; may be given several times")] = [32, 256],  # noqa: B006
    shards: Annotated[int, typer.Option(min=2)] = 100_000,
    rows: int = 1_000_000_000,
) -> None:
    """Drive the jobs, and write what came out to FOLDER/results.json."""
    results: list[dict[str, Any]] = []
    tars(folder / "tars", shards, TAR_BYTES)
    for count in nodes:
        shutil.rmtree(folder / "store", ignore_errors=True)
        options = {"nodes": count, "shards": shards, "rows": rows, "no_scratch": True}
        last = count == nodes[-1]
        starts = [{"fresh": True, "stop": ["export", shards // 2]}, {}, {}] if last else [{"fresh": True}]
        for start in starts:
            results.append(_process(folder, {**options, **start}))
            (folder / "results.json").write_text(json.dumps(results, indent=1))


def _process(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.simulation.driver", str(folder), json.dumps(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@app.command()
def page(folder: Folder) -> None:
    """Write the page of the results in FOLDER."""
    from benchmarks.simulation import page as pages

    text = pages.page(json.loads((folder / "results.json").read_text()))
    RESULTS.write_text(text)
    print(text)


@app.command()
def measure() -> None:
    """Measure requests and Ray's calls here, and keep them as the model's."""
    text = json.dumps({"ray": ray_calls(), "requests": requests()}, indent=1)
    (HERE / "measured.json").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    app()
