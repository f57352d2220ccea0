"""open_clip's own training beside the same with the graph: samples a second, same flags, in turn.

Each run is a process of its own, of one epoch; its rate is the median of what open_clip logs, without the first steps.
In the environment of `make test-open-clip`:

    python benchmarks/open_clip.py STORE --model ViT-S-32-alt --batch-size 64 --samples 960 --rounds 3
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile

from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store

WARM_UP = 2  # of the logged steps


def rate(command: list[str]) -> float:
    """Samples a second."""
    done = subprocess.run(command, capture_output=True, text=True)
    found = [float(rate) for rate in re.findall(r"Train Epoch: .*? ([0-9.]+)/s, ", done.stdout + done.stderr)]
    if done.returncode or len(found) <= WARM_UP:
        raise SystemExit(f"{' '.join(command)} exited {done.returncode}\n{done.stderr[-2000:]}")
    return statistics.median(found[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--model", default="ViT-S-32-alt")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    store = Store(options.store)
    urls = [store.resolve(url) for url in shards_of(store, store.manifest()).table["tar_url"].to_pylist()]
    rates: dict[str, list[float]] = {"open_clip": [], "with --graph": []}
    for number in range(options.rounds):
        for name, found in rates.items():
            with tempfile.TemporaryDirectory() as logs:
                flags = [*("--model", options.model, "--batch-size", str(options.batch_size), "--epochs", "1")]
                flags += ["--workers", str(options.workers), "--precision", "fp32", "--log-every-n-steps", "1"]
                flags += ["--train-data", "{" + ",".join(urls) + "}", "--logs", logs, "--seed", str(number)]
                flags += ["--train-num-samples", str(options.samples), "--dataset-type", "webdataset"]
                module = "open_clip_train.main" if name == "open_clip" else "graphbuild.open_clip"
                own = [] if name == "open_clip" else ["--graph", options.store]
                found.append(rate([sys.executable, "-m", module, *flags, *own]))
    for name, found in rates.items():
        each = ", ".join(f"{one:.1f}" for one in found)
        print(f"{name:<13} {statistics.median(found):7.1f} samples/s  ({each})")
    pairs = [graph / plain for plain, graph in zip(*rates.values(), strict=True)]
    print(f"ratio {statistics.median(pairs):.3f}, median of pairs ({', '.join(f'{one:.3f}' for one in pairs)})")


if __name__ == "__main__":
    main()
