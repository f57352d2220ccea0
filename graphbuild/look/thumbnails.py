"""Neighbours on a terminal: with their images where it shows sixel or kitty graphics, or coloured half blocks; lines of
text where it is none.

The terminal is asked what it can do when this module's first image is made (within 0.1 s; textual-image).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from graphbuild.errors import GraphbuildError
from graphbuild.look.catalog import Catalog, Neighbor, Sample, printable
from graphbuild.machine.terminal import counted, echo

PIXELS = 160
ROWS = 5  # terminal rows of an image


def show_neighbors(catalog: Catalog, asked: Sample | None, found: Sequence[Neighbor], *, images: bool) -> None:
    """Print the asked sample, if it is one, and neighbours, best first."""
    heads = [f"{printable(asked.key)}  node {asked.node}  {printable(asked.captions)}"] if asked else []
    firsts = [catalog.sample_of(neighbor.node) for neighbor in found]
    nodes = _aligned([f"node {neighbor.node}" for neighbor in found])
    samples = _aligned([_samples(neighbor, first) for neighbor, first in zip(found, firsts, strict=True)])
    lines = [
        "  ".join(part for part in (f"{neighbor.similarity:.3f}", node, keys, printable(neighbor.text)) if part)
        for neighbor, node, keys in zip(found, nodes, samples, strict=True)
    ]
    if not (images and _shows_colours()):
        for line in heads + [f"  {line}" for line in lines]:
            echo(line)
        return
    shown = ([asked] if asked else []) + firsts
    _show([(_image(catalog, sample), line) for sample, line in zip(shown, heads + lines, strict=True)])


def _shows_colours() -> bool:
    """Whether stdout is a terminal that pictures can be drawn on: neither dumb, nor without colours or Unicode."""
    from rich.console import Console

    console = Console()
    return bool(sys.stdout.isatty() and console.color_system and not console.no_color and console.encoding == "utf-8")


def _samples(neighbor: Neighbor, first: Sample | None) -> str:
    """How many samples a node has, and the key of the first; nothing of ready vectors."""
    if first is None:
        return ""
    return f"{counted(neighbor.samples, 'sample')}: {printable(first.key, 40)}{', ...' * (neighbor.samples > 1)}"


def _aligned(texts: Sequence[str]) -> list[str]:
    width = max(map(len, texts), default=0)
    return [text.ljust(width) for text in texts]


def _image(catalog: Catalog, sample: Sample | None) -> bytes | str:
    """The thumbnail, or what to say in its place."""
    try:
        content = catalog.image(sample, PIXELS)
    except GraphbuildError as error:
        return printable(error.cause, 40)
    return "" if content is None else content


def _show(rows: Sequence[tuple[bytes | str, str]]) -> None:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from textual_image.renderable import Image as TerminalImage

    table = Table.grid(padding=(0, 2, 1, 0))
    for content, line in rows:
        shown = Text(content) if isinstance(content, str) else Image.open(io.BytesIO(content))
        table.add_row(shown if isinstance(shown, Text) else TerminalImage(shown, width="auto", height=ROWS), Text(line))
    Console().print(table)
