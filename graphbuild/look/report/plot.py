"""A chart's marks and ticks as percent of its plot, from its left and its top, for page.html to draw as SVG and text.

Percent, not pixels: a chart fits a phone, a wide screen and paper, and its text keeps its size. What each place of the
x axis holds is text too, so a chart can be read by hovering, by keys and by a screen reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from graphbuild.store.sharded import Array
from graphbuild.store.store import Json

BAR = 0.8  # of its place is a bar, or a group of bars
PHONE, WIDE = 40, 130  # characters of labels that stand side by side


@dataclass(frozen=True)
class Series:
    """A line, or a colour of bars: y[i] at the i-th place of the x axis."""

    name: str
    y: list[float]
    color: str
    dash: bool = False


@dataclass(frozen=True)
class Axis:
    """From low to high; ticks: those to show, without them round numbers. form, value_form: of ticks and of values."""

    title: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()
    form: str = ",g"
    value_form: str = ",g"

    def percent(self, values: Array | list[float]) -> Array:
        """Where values lie between low (0) and high (100)."""
        scaled = np.asarray([self.low, self.high, *values], np.float64)
        if self.log:
            scaled = np.log(np.maximum(scaled, self.low))
        low, high = scaled[:2]
        return np.asarray((scaled[2:] - low) / (high - low) * 100).round(3)

    def marks(self) -> list[Json]:
        ticks = np.array(self.ticks or (_powers(self.low, self.high) if self.log else _round(self.low, self.high)))
        ticks = ticks[(ticks >= self.low) & (ticks <= self.high)]
        texts = [format(tick, self.form) for tick in ticks.tolist()]
        return [{"at": at, "text": text} for at, text in zip(self.percent(ticks).tolist(), texts, strict=True)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten; of a short span 2 and 5 times them too."""
    digits = (1, 2, 5) if high / low < 100 else (1,)
    return [digit * 10.0**power for power in range(-12, 13) for digit in digits]


def _round(low: float, high: float) -> list[float]:
    """Four to ten multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10((high - low) / 4))
    step = max(digit * power for digit in (1, 2, 5) if digit * power <= (high - low) / 4 * 1.000001)
    ticks = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    return list(ticks.round(12) + 0.0)  # not -0


def lines(x: list[float], series: list[Series], x_axis: Axis, y_axis: Axis) -> Json:
    """A line through each series, with a dot at each of the places x."""
    at = x_axis.percent(x)
    marks = []
    for one in series:
        places = [f"{left},{top}" for left, top in zip(at, 100 - y_axis.percent(one.y), strict=True)]
        marks.append(_mark(one, line="M" + "L".join(places), dots="".join(f"M{place}h0" for place in places)))
    points = _points(at, x, [format(value, x_axis.value_form) for value in x], series, y_axis)
    return _plot(x_axis.title, x_axis.marks(), y_axis, marks, points)


def steps(edges: list[float], series: list[Series], x_axis: Axis, y_axis: Axis) -> Json:
    """Levels between each two neighbouring edges, the area below filled."""
    left = x_axis.percent(edges)
    marks = []
    for one in series:
        tops = 100 - y_axis.percent(one.y)
        line = f"M{left[0]},{tops[0]}" + "".join(f"V{top}H{right}" for top, right in zip(tops, left[1:], strict=True))
        marks.append(_mark(one, line=line, area=f"{line}V100H{left[0]}Z"))
    middles = ((np.array(edges[1:]) + np.array(edges[:-1])) / 2).round(6).tolist()
    labels = [f"{low:.2f} to {high:.2f}" for low, high in pairwise(edges)]
    points = _points(x_axis.percent(middles), middles, labels, series, y_axis)
    return _plot(x_axis.title, x_axis.marks(), y_axis, marks, points)


def bars(names: list[str], series: list[Series], title: str, y_axis: Axis) -> Json:
    """Upright bars, one of each series side by side at each name."""
    place = 100 / len(names)
    width = place * BAR / len(series)
    marks = []
    for number, one in enumerate(series):
        left = (np.arange(len(names)) * place + place * (1 - BAR) / 2 + number * width).round(3)
        heights = y_axis.percent(one.y)
        area = "".join(f"M{x},100v-{y}h{width:.3f}v{y}z" for x, y in zip(left, heights, strict=True) if y > 0)
        marks.append(_mark(one, area=area))
    at = ((np.arange(len(names)) + 0.5) * place).round(3)
    ticks = [{"at": x, "text": name} for x, name in zip(at.tolist(), names, strict=True)]
    letters = sum(len(name) + 2 for name in names)
    upright = "always" if letters > WIDE else "phone" if letters > PHONE else ""
    return {**_plot(title, ticks, y_axis, marks, _points(at, names, names, series, y_axis)), "upright": upright}


def rows(names: list[str], values: list[float], texts: list[str], color: str) -> Json:
    """Lying bars, one below the other, each under its name and value."""
    most = max([*values, 1e-12])
    found = [
        {"name": name, "value": value, "text": text, "width": round(100 * value / most, 3)}
        for name, value, text in zip(names, values, texts, strict=True)
    ]
    return {"rows": found, "color": color}


def _mark(one: Series, line: str = "", area: str = "", dots: str = "") -> Json:
    return {"name": one.name, "color": one.color, "dash": one.dash, "line": line, "area": area, "dots": dots}


def _points(at: Array, x: Sequence[float | str], labels: list[str], series: list[Series], y_axis: Axis) -> list[Json]:
    """What each place of the x axis holds; its width is that of what is nearer to it than to others."""
    ends = np.array([0, *(at[1:] + at[:-1]) / 2, 100])
    return [
        {
            "x": x[i],
            "label": label,
            "at": float(at[i]),
            "width": round(float(ends[i + 1] - ends[i]), 3),
            "values": [{"of": one, "y": one.y[i], "text": format(one.y[i], y_axis.value_form)} for one in series],
        }
        for i, label in enumerate(labels)
    ]


def _plot(title: str, ticks: list[Json], y_axis: Axis, marks: list[Json], points: list[Json]) -> Json:
    axes = {
        name: {"title": text, "ticks": found, "letters": max(len(tick["text"]) for tick in found)}
        for name, text, found in (("x", title, ticks), ("y", y_axis.title, y_axis.marks()))
    }
    return {**axes, "marks": marks, "points": points, "upright": ""}
