"""The report's charts as plotly figures (plain dicts, `data` and `layout`), from report.json's numbers alone.

Colours: Okabe and Ito's, which the colour-blind tell apart; SCALE's, of ordered lines, have a contrast of 3 and more
with the pages of both themes. Text and grid colours are the page's, set by page.js.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphbuild.store.store import Json

BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"
TICKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
SCALE = ("#9b5fe0", "#5b7cf0", "#1788c9", "#12939a", "#2f9e44", "#c9850a", "#e0564a")
LOG = {"type": "log", "dtick": 1, "tickformat": ","}  # a tick each power of ten
LINEAR_BELOW = 100


def charts(numbers: Json) -> dict[str, Json]:
    """Figure by the id of its place in page.html; only those whose numbers are there."""
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


def _figure(data: list[Json], x: Json, y: Json, **layout: Any) -> Json:
    return {"data": data, "layout": {"xaxis": x, "yaxis": y, "showlegend": len(data) > 1, **layout}}


def _axis(title: str, **options: Any) -> Json:
    return {"title": {"text": title}, "automargin": True, **options}


def _lying_bars(names: list[str], values: list[float], color: str, title: str, **options: Any) -> Json:
    """One below the other, the first on top."""
    bar = {"type": "bar", "orientation": "h", "y": names, "x": values, "marker": {"color": color}, **options}
    return _figure([bar], _axis(title, rangemode="tozero"), _axis("", autorange="reversed"))


def _funnel(steps: list[Json]) -> Json:
    names, counts = [step["name"] for step in steps], [step["count"] for step in steps]
    shown = {"text": [f"{count:,}" for count in counts], "textposition": "auto"}
    return _lying_bars(names, counts, BLUE, "count", name="count", **shown)


def _stages(stages: list[Json]) -> Json:
    names, seconds = [row["stage"] for row in stages], [row["worker_seconds"] for row in stages]
    return _lying_bars(names, seconds, SKY, "seconds of all workers together", name="worker-seconds")


def _similarity(edges: Json) -> Json:
    bins = np.array(edges["bins"])
    middles, width = ((bins[1:] + bins[:-1]) / 2).round(4), bins[1] - bins[0]
    series = {
        "random pairs": ("random_similarity", ORANGE),
        "edges": ("edge_similarity", BLUE),
        "the k-th neighbour": ("last_similarity", GREEN),
    }
    counts = {name: np.array(edges[field]) for name, (field, _) in series.items()}
    seen = np.flatnonzero(sum(counts.values()))
    window = slice(max(int(seen[0]) - 1, 0), int(seen[-1]) + 2)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": middles[window].tolist(),
            "y": (counts[name] / max(counts[name].sum(), 1) / width)[window].tolist(),
            "line": {"color": color, "shape": "hvh", "width": 2},
            "fill": "tozeroy",
        }
        for name, (_, color) in series.items()
    ]
    return _figure(data, _axis("similarity (cosine)"), _axis("density", rangemode="tozero"))


def _bins(bins: list[Json], x: str, y: str) -> Json:
    names = [str(one["from"]) if one["from"] == one["to"] else f"{one['from']}-{one['to']}" for one in bins]
    counts = [one["nodes"] for one in bins]
    bar = {"type": "bar", "x": names, "y": counts, "marker": {"color": BLUE}, "name": y}
    most = max(counts)
    span = {}
    if most > LINEAR_BELOW:
        span = {**LOG, "range": [math.log10(0.7), math.log10(1.3 * most)]}  # a bar of 1 shows
    return _figure([bar], _axis(x, type="category"), _axis(y, **span))


def _line(name: str, x: list[float], y: list[float], **line: str) -> Json:
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": line}


def _tau_axis() -> Json:
    return _axis("tau_s", type="log", tickvals=TICKS, ticktext=[str(tick) for tick in TICKS])


def _spread(targets: list[Json]) -> Json:
    data = [
        _line(f"batch of {one['batch']:,}", one["tau_s"], one["spread"], color=SCALE[3 * at % len(SCALE)])
        for at, one in enumerate(targets)
    ]
    return _figure(data, _tau_axis(), _axis("exp(entropy)", **LOG))


def _mass(mass: Json) -> Json:
    data = []
    for at, rank in enumerate(mass["ranks"]):
        name, shares = f"+ nearest {rank}" if rank else "the sample itself", [share[at] for share in mass["share"]]
        dash = "dash" if at >= len(SCALE) else "solid"
        data.append(_line(name, mass["tau_s"], shares, color=SCALE[at % len(SCALE)], dash=dash))
    return _figure(data, _tau_axis(), _axis("share of mass", tickformat=".0%", rangemode="tozero"))


def _batches(batches: list[Json]) -> Json:
    names = [f"{one['batch']:,}" for one in batches]
    data = [
        {"type": "bar", "name": name, "x": names, "y": [one[field] for one in batches], "marker": {"color": color}}
        for name, field, color in (
            ("random batches", "random_edges_per_anchor", ORANGE),
            ("neighbour-aware batches", "edges_per_anchor", BLUE),
        )
    ]
    return _figure(data, _axis("batch size", type="category"), _axis("edges per anchor"), barmode="group")
