"""What `benchmarks/knn.py` measured, as Markdown tables and plots of recall against time, beside the results file.

python benchmarks/knn_report.py benchmarks/results/knn.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

OWN = ("exact", "partition")


def report(results: Path) -> None:
    """For each set of vectors a Markdown table of medians, and a plot of recall against time, a curve an engine."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    for vectors, k in sorted({(row["vectors"], row["k"]) for row in rows}):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if (row["vectors"], row["k"]) == (vectors, k) and "seconds" in row:
                groups.setdefault((row["name"], json.dumps(row["settings"])), []).append(row)
        points = [
            (
                name,
                settings,
                *(float(np.median([row[key] for row in runs])) for key in ("seconds", "recall", "peak_bytes")),
                len(runs),
            )
            for (name, settings), runs in groups.items()
        ]
        machines = sorted({row["machine"] for row in rows if (row["vectors"], row["k"]) == (vectors, k)})
        on = ", ".join(sorted({machine.split(",")[0] for machine in machines}))
        text = [f"# {k} neighbours of {vectors} on {on}", "", f"{'; '.join(machines)}; medians of the runs.", ""]
        text += ["| engine | settings | seconds | recall | peak GB | runs |", "|---|---|---|---|---|---|"]
        for name, settings, seconds, found, peak, runs in sorted(points, key=lambda point: (point[0], point[2])):
            text.append(
                f"| {name} | {settings.strip('{}')} | {seconds:.1f} | {found:.4f} | {peak / 1e9:.1f} | {runs} |"
            )
        text += ["", *ratios(points)]
        base = results.with_name(f"{results.stem}_{Path(vectors).stem}_k{k}")
        base.with_suffix(".md").write_text("\n".join(text) + "\n")
        print("\n".join(text))
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for name in sorted({point[0] for point in points}):
            mine = sorted((point[3], point[2]) for point in points if point[0] == name)
            own = name in OWN
            axes.plot(
                *zip(*mine, strict=True),
                marker="o",
                linewidth=2.5 if own else 1,
                label=f"graphbuild {name}" if own else name,
            )
        axes.set(xlabel=f"recall@{k}", ylabel="seconds (log)", yscale="log", title=vectors)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(base.with_suffix(".png"), dpi=120)


def ratios(points: list[tuple[str, str, float, float, float, int]]) -> list[str]:
    """graphbuild's quickest setting at a recall against the quickest peer's."""
    lines = []
    for wanted in (0.8, 0.95, 0.99, 0.9999):
        best = {}
        for name, _, seconds, found, _, _ in points:
            side = "own" if name in OWN else "peer"
            if found >= wanted and seconds < best.get(side, ("", np.inf))[1]:
                best[side] = (name, seconds)
        if len(best) == 2:
            (own, mine), (peer, theirs) = best["own"], best["peer"]
            lines.append(
                f"recall >= {wanted}: {own} {mine:.1f} s, best peer {peer} {theirs:.1f} s: {theirs / mine:.1f} x"
            )
    return lines


if __name__ == "__main__":
    report(Path(sys.argv[1]))
