"""What bounds each stage of an index by engine partition: the work that a node needs, at this machine's own rates.

    python benchmarks/bounds.py CACHE ladder.jsonl

The lines are those of benchmarks/ladder.py, made on the same machine. Of each stage the script counts, a node, the
multiplications of codes or vectors, the bytes that are read or written in order, and the rows that are read at random
places. It measures how fast `--workers` processes at once do each of the three, in tiles and rows of the engine's
sizes, with CACHE's largest vectors. The work at these rates is what the stage needs if it does nothing else, one after
the other; beside it stands the CPU time that it took. ABOUT says what the rest is spent on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ABOUT = {
    "prepare": "True neighbours of 400 sampled nodes, by float32 products with all vectors; then the leaders, a node "
    "in 64, are ordered by halving. Bound by the products; the rest is conversion from float16, and the order.",
    "codes": "Each node is compared with the leaders of the 12 nearest groups. Bound by the products, in small tiles: "
    "a shard's nodes that look at one group, some 60 to 330, times its 90 to 128 leaders. The rest is gathering these "
    "rows, converting them where the machine has no int8 products, and offering what passes.",
    "order": "Vectors and codes are copied to where near nodes are neighbours. Bound by the reads at random.",
    "join": "All pairs of each leaf, counted here as the whole square, of which half is computed where codes are "
    "multiplied two at a time. Bound by the products; most of the rest is offering pairs to both lists, as the nodes "
    "of a leaf are near and many pairs enter.",
    "merge": "Lists of several leaves become one. Bound by the offers.",
    "refine": "Of each node the lists of its 12 nearest are read, and what is new is compared by its code. Bound by "
    "these reads at random, which depend on the data and are not counted here.",
    "search": "A list's candidates are scored by their float16 vectors in float64. Bound by the reads, which are less "
    "at random than counted here, as nodes lie by leader.",
    "certify": "The sampled nodes against all, by 32 of the 384 numbers of a vector, and by more where these cannot "
    "rule a pair out. Bound by the products; the rest is shortening, masks, and pairs that are computed again.",
}
SECONDS = 2.0  # that each rate is measured
ROWS = 10_000  # read at random at a time


class Work(NamedTuple):
    """Of one node."""

    products: float = 0.0  # multiplications with additions
    ordered: float = 0.0  # bytes
    rows: float = 0.0  # at random places


class Rates(NamedTuple):
    """Of one of several processes at once, a second."""

    products: float
    ordered: float
    rows: float


def work(line: dict[str, Any]) -> dict[str, Work]:
    """Of each stage; line: of the ladder."""
    from graphbuild.graph.recall.narrowing import PARTS
    from graphbuild.knn import leaders as L
    from graphbuild.knn import partition as P
    from graphbuild.knn.sample import SAMPLE

    n, k, d, fan = line["nodes"], line["k"], 384, line["graph"]["fan"]
    listed = line["graph"].get("listed") or P.list_length(k, n)
    all_leaders = L.leader_count(n)
    groups = 2 ** max(0, math.ceil(math.log2(all_leaders / L.GROUP_LEADERS)))
    if groups <= L.FLAT_GROUPS:
        compared = float(all_leaders)
    else:
        compared = L.PROBED_GROUPS * all_leaders / groups + min(
            groups, L.PROBED_GROUPS * L.GROUP_GROUPS + groups / L.GROUP_GROUPS
        )
    shortened = d // PARTS[0]
    return {
        "prepare": Work(SAMPLE * d, 2 * d),
        "codes": Work(compared * d, 3 * d + 8 + 4 * (fan + 1)),
        "order": Work(0, 5 * d + 12, 1),
        "join": Work(fan**2 * L.NODES_PER_LEADER * d, 8 * fan * (listed + 1), fan),
        "merge": Work(0, 8 * (fan + 1) * listed),
        "refine": Work(0, 16 * listed, P.EXPAND),
        "search": Work(2 * listed * d, 8 * listed + 6 * k, listed),
        "certify": Work((line["recall"]["sampled_nodes"] + d) * shortened, 2 * d + 6 * k),
    }


def rates(path: str) -> Rates:
    """Of this process. path: vectors float16 [n, d]."""
    import torch

    from graphbuild.knn.products import TILE_ROWS, products, tile_memory

    torch.set_num_threads(1)
    vectors = np.load(path, mmap_mode="r")
    d = vectors.shape[1]
    code = torch.randint(-127, 128, (TILE_ROWS, d), dtype=torch.int8)
    memory = tile_memory()
    block = np.empty((65_536, d), np.float16)
    places = np.random.default_rng(0).integers(0, len(vectors), (50, ROWS))
    turn = iter(range(10**9))

    def copy() -> None:
        first = next(turn) * len(block) % (len(vectors) - len(block))
        block[:] = vectors[first : first + len(block)]

    def gather() -> None:
        np.take(vectors, places[next(turn) % len(places)], axis=0, out=block[:ROWS], mode="clip")

    return Rates(
        TILE_ROWS**2 * d * often(lambda: products(code, code, memory)),
        2 * block.nbytes * often(copy),
        ROWS * often(gather),
    )


def often(do: Callable[[], object]) -> float:
    """How often a second it is done."""
    do()
    begin, times = time.process_time(), 0
    while time.process_time() < begin + SECONDS:
        do()
        times += 1
    return times / (time.process_time() - begin)


def table(lines: list[dict[str, Any]], rate: Rates) -> str:
    counted = ("products", "bytes in order", "rows at random")
    rows = [["nodes", "stage", *counted, *(f"µs of {name}" for name in counted), "µs needed", "µs taken", "share"]]
    for line in lines:
        for name, needed in work(line).items():
            taken = line["stages"][name]["cpu"] / line["nodes"] * 1e6
            times = [1e6 * amount / a_second for amount, a_second in zip(needed, rate, strict=True)]
            whole = sum(times)
            rows.append([f"{line['nodes']:,}", name, *(f"{amount:,.0f}" for amount in needed)])
            rows[-1] += [*(f"{one:.1f}" for one in [*times, whole, taken]), f"{whole / taken:.0%}"]
    cells = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([cells[0], "|" + "---|" * len(rows[0]), *cells[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("ladder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    largest = max(asked.cache.glob("mixed_*.npy"), key=lambda path: path.stat().st_size)
    with multiprocessing.get_context("spawn").Pool(asked.workers) as pool:
        found = pool.map(rates, [str(largest)] * asked.workers, chunksize=1)
    rate = Rates(*np.mean(found, axis=0).tolist())
    lines = [json.loads(line) for line in asked.ladder.read_text().splitlines()]
    print(f"# What bounds each stage of an index: {lines[0]['machine']}\n")
    print(
        f"`python benchmarks/bounds.py`: {asked.workers} processes at once, each of which does "
        f"{rate.products / 1e9:.1f} billion products a second, moves {rate.ordered / 1e9:.1f} GB in order, and reads "
        f"{rate.rows / 1e6:.2f} million rows of {largest.name} at random. All numbers are of a node; µs are of CPU.\n"
    )
    print("\n".join([table(lines, rate), "", *(f"- **{name}**: {said}" for name, said in ABOUT.items())]))


if __name__ == "__main__":
    main()
