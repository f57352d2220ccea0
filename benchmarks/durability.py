"""What checksums and flushing to disk cost: the same job with them, and without.

Tars of captioned scenes through embed, index and export in this process, into a new store each time; the runs with and
without take turns. Without: `os.fsync` does nothing and no sha256 is computed of what is written.

    python benchmarks/durability.py FOLDER --samples 6000 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

from loader import make_store

from graphbuild.job.verbs import run_verb
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store import store as stores
from graphbuild.store.store import Store

FSYNC, SHA256 = os.fsync, stores.file_sha256


def job(folder: Path, tars: Path) -> float:
    """Seconds of a whole job."""
    shutil.rmtree(folder, ignore_errors=True)
    store = Store(str(folder))
    begin = time.perf_counter()
    with Runner(workers=0) as runner:
        run_verb("embed", resolve(store, "embed", {"shards": str(tars / "*.tar")}), store, runner)
        run_verb("index", resolve(store, "index", {"k": 32}), store, runner)
        run_verb("export", resolve(store, "export", {}), store, runner)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=6_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    make_store(options.folder, options.samples)
    tars = options.folder / f"tars_{options.samples}"
    job(options.folder / "run", tars)  # imports, compiles
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(options.rounds):
        for name, found in seconds.items():
            os.fsync = FSYNC if name == "with" else lambda descriptor: None
            stores.file_sha256 = SHA256 if name == "with" else lambda path: ""
            found.append(job(options.folder / "run", tars))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{options.samples:,} samples: with {medians['with']:.1f} s, without {medians['without']:.1f} s")
    print(f"overhead {medians['with'] / medians['without'] - 1:.1%}, medians of {options.rounds}")


if __name__ == "__main__":
    main()
