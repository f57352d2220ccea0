"""How fast parquet with image bytes becomes tars, beside a plain copy of the same files, and in how much memory.

The files are as Hugging Face writes them: a struct of bytes and path, 100 rows a row group; the images are random
bytes behind a JPEG's beginning. `shutil.copyfile` with a flush to disk, and `graphbuild pack`, which flushes and hashes
what it writes, take turns; before each the files leave the page cache. Both need the machine for themselves: a copy
waits for the disk, and pack computes. Memory: the peak of a process that packs one file, at two numbers of rows; in one
row group, too, as `pyarrow.parquet.write_table` writes by default.

    python benchmarks/pack.py FOLDER --files 8 --rows 1000 --bytes 100000 --rounds 3 --workers 2
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graphbuild.job.verbs import run_verb
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BATCH = 100


def write(path: Path, rows: int, size: int, group: int = BATCH) -> None:
    """A file of so many images of so many bytes."""
    draw = np.random.default_rng(rows)
    with pq.ParquetWriter(path, pa.schema([("image", IMAGE), ("caption", pa.string())]), compression="none") as file:
        for first in range(0, rows, group):
            names = [f"{row:08d}.jpg" for row in range(first, min(first + group, rows))]
            images = [{"bytes": b"\xff\xd8\xff" + draw.bytes(size - 3), "path": name} for name in names]
            captions = [f"picture {name}" for name in names]
            table = pa.table({"image": pa.array(images, IMAGE), "caption": captions})
            file.write_table(table, row_group_size=group)


def forget(paths: list[Path]) -> None:
    """Take files out of the page cache."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(paths: list[Path], target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    forget(paths)
    begin = time.perf_counter()
    for path in paths:
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - begin


def pack(source: Path, target: Path, runner: Runner) -> float:
    shutil.rmtree(target, ignore_errors=True)
    forget(sorted(source.rglob("*.parquet")))
    begin = time.perf_counter()
    store = Store(str(target))
    run_verb("pack", resolve(store, "pack", {"source": str(source)}), store, runner)
    return time.perf_counter() - begin


def peak(source: Path, target: Path) -> float:
    """MB of a process that packs."""
    command = [sys.executable, __file__, str(target), "--one", str(source)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1_000, help="a file")
    parser.add_argument("--bytes", type=int, default=100_000, help="an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with Runner(workers=0) as runner:
            pack(options.one, options.folder, runner)
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    source = options.folder / "source"
    source.mkdir(parents=True)
    for number in range(options.files):
        write(source / f"train-{number:05d}.parquet", options.rows, options.bytes)
    paths = sorted(source.iterdir())
    total = sum(path.stat().st_size for path in paths)
    with Runner(workers=options.workers) as runner:
        pack(source, options.folder / "store", runner)  # imports, starts workers
        seconds: dict[str, list[float]] = {"copy": [], "pack": []}
        for _ in range(options.rounds):
            seconds["copy"].append(copy(paths, options.folder / "copy"))
            seconds["pack"].append(pack(source, options.folder / "store", runner))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"{options.files * options.rows:,} images of {options.bytes:,} bytes, {options.workers} workers")
    for name, found in medians.items():
        each = ", ".join(f"{total / one / 1e6:.0f}" for one in seconds[name])
        print(f"{name}  {found:6.1f} s  {total / found / 1e6:6.0f} MB/s  ({each})")
    print(f"ratio {medians['copy'] / medians['pack']:.2f}, medians of {options.rounds}")
    for name, group in (("row groups of 100", BATCH), ("one row group", 1 << 20)):
        for rows in (options.rows, 4 * options.rows):
            (options.folder / "memory").mkdir(exist_ok=True)
            write(options.folder / "memory/one.parquet", rows, options.bytes, group)
            found = peak(options.folder / "memory", options.folder / "store")
            print(f"peak  {rows:,} rows in {name}: {found:.0f} MB")


if __name__ == "__main__":
    main()
