"""The report's charts, from report.json's numbers alone.

Colours: Okabe and Ito's, which the colour-blind tell apart; SCALE's, of ordered lines, have a contrast of 3 and more
with the pages of both themes. Text and grid colours are the page's.
"""

from __future__ import annotations

import numpy as np

from graphbuild.look.report.plot import Axis, Series, bars, lines, rows, steps
from graphbuild.store.store import Json

BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
SCALE = ("#9b5fe0", "#5b7cf0", "#1788c9", "#12939a", "#2f9e44", "#c9850a", "#e0564a")
LINEAR_BELOW = 100


def charts(numbers: Json) -> dict[str, Json]:
    """Chart by the id of its place in page.html; only those whose numbers are there."""
    found = {"chart-funnel": _funnel(numbers["funnel"]), "chart-stages": _stages(numbers["stages"])}
    if "edges" in numbers:
        found["chart-similarity"] = _similarity(numbers["edges"])
        found["chart-indegree"] = _bins(numbers["edges"]["indegree"], "in-degree", "nodes")
        found["chart-spread"] = _spread(numbers["targets"])
        found["chart-mass"] = _mass(numbers["mass"])
        found["chart-batches"] = _batches(numbers["batches"])
    repeats = numbers.get("duplicates", {}).get("samples_per_node", [])
    if len(repeats) > 1:
        found["chart-duplicates"] = _bins(repeats, "samples of a node", "nodes")
    return found


def comparison_charts(found: Json) -> dict[str, Json]:
    """The same for the page of two stores."""
    depths = np.arange(1.0, found["k"] + 1).tolist()
    shares = Axis("share in common", 0, 1.03, form=".0%", value_form=".1%")
    depth = Axis("depth", 0.95, 1.05 * max(found["k"], 2), log=True, form=",.0f")
    kl = [(name, [row[name] for row in found["kl"]]) for name in ("forward", "backward")]
    names = [f"{low}% to {low + 10}%" for low in range(0, 100, 10)]
    nodes = Axis("captions", 0, 1.05 * max(1, *found["histogram"]), value_form=",")
    nats = Axis("nats", 0, 1.05 * max(1e-9, *(max(values) for _, values in kl)), value_form=".4f")
    return {
        "chart-depths": lines(depths, [Series("overlap", found["overlap"], BLUE)], depth, shares),
        "chart-overlaps": bars(names, [Series("captions", found["histogram"], BLUE)], "overlap", nodes),
        "chart-kl": lines(
            [row["tau_s"] for row in found["kl"]],
            [Series(name, values, color) for (name, values), color in zip(kl, (BLUE, ORANGE), strict=True)],
            _tau_axis(),
            nats,
        ),
    }


def _funnel(funnel: list[Json]) -> Json:
    counts = [step["count"] for step in funnel]
    told = [f"{step['count']:,} {step['unit']}" for step in funnel]
    return rows([step["name"] for step in funnel], counts, told, BLUE)


def _stages(stages: list[Json]) -> Json:
    seconds = [row["worker_seconds"] for row in stages]
    return rows([row["stage"] for row in stages], seconds, [f"{value:,.2f} s" for value in seconds], SKY)


def _similarity(edges: Json) -> Json:
    bins = np.array(edges["bins"])
    series = {
        "random pairs": ("random_similarity", ORANGE),
        "edges": ("edge_similarity", BLUE),
        "the k-th neighbour": ("last_similarity", GREEN),
    }
    counts = {name: np.array(edges[field]) for name, (field, _) in series.items()}
    seen = np.flatnonzero(sum(counts.values()))
    begin, end = max(int(seen[0]) - 1, 0), min(int(seen[-1]) + 2, len(bins) - 1)
    densities = {
        name: (count / max(count.sum(), 1) / (bins[1] - bins[0]))[begin:end].tolist() for name, count in counts.items()
    }
    most = max(max(density) for density in densities.values())
    shown = bins[begin : end + 1].round(6).tolist()
    x, y = Axis("similarity (cosine)", shown[0], shown[-1]), Axis("density", 0, 1.05 * most, value_form=".2f")
    return steps(shown, [Series(name, densities[name], color) for name, (_, color) in series.items()], x, y)


def _bins(bins: list[Json], x: str, y: str) -> Json:
    names = [str(one["from"]) if one["from"] == one["to"] else f"{one['from']}-{one['to']}" for one in bins]
    counts = [one["nodes"] for one in bins]
    most = max(counts)
    whole = tuple(range(most + 1)) if most < 8 else ()
    axis = Axis(y, 0, 1.05 * most, ticks=whole, value_form=",")
    if most > LINEAR_BELOW:
        axis = Axis(y, 0.7, 1.3 * most, log=True, form=",.0f", value_form=",")  # a bar of 1 shows
    return bars(names, [Series(y, counts, BLUE)], x, axis)


def _tau_axis() -> Axis:
    return Axis("tau_s", 0.0095, 1.05, log=True, ticks=TICKS)


def _spread(targets: list[Json]) -> Json:
    series = [
        Series(f"batch of {one['batch']:,}", one["spread"], SCALE[3 * at % len(SCALE)])
        for at, one in enumerate(targets)
    ]
    most = max(max(one.y) for one in series)
    y = Axis("exp(entropy)", 0.9, 1.15 * most, log=True, value_form=",.2f")
    return lines(targets[0]["tau_s"], series, _tau_axis(), y)


def _mass(mass: Json) -> Json:
    names = [f"+ nearest {rank}" if rank else "the sample itself" for rank in mass["ranks"]]
    series = [
        Series(name, [share[at] for share in mass["share"]], SCALE[at % len(SCALE)], dash=at >= len(SCALE))
        for at, name in enumerate(names)
    ]
    return lines(mass["tau_s"], series, _tau_axis(), Axis("share of mass", 0, 1.03, form=".0%", value_form=".1%"))


def _batches(batches: list[Json]) -> Json:
    series = [
        Series(name, [one[field] for one in batches], color)
        for name, field, color in (
            ("random batches", "random_edges_per_anchor", ORANGE),
            ("neighbour-aware batches", "edges_per_anchor", BLUE),
        )
    ]
    most = max(0.1, *(max(one.y) for one in series))
    y = Axis("edges per anchor", 0, 1.05 * most, value_form=",.3f")
    return bars([f"{one['batch']:,}" for one in batches], series, "batch size", y)
