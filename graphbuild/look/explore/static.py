"""`graphbuild explore --static`: the explorer as a folder of files that any web server can serve, of at most BYTES.

It has all nodes if their texts and neighbours fit, else nodes spread evenly over all, and of each one's neighbours
those that it has too. Cost: that of the map, if it is not made yet, and some passes over the samples; memory: some kB
a node of the folder, 1 GB at most.
"""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl

from graphbuild.errors import ConfigError, GraphbuildError
from graphbuild.graph.lists.derived import captions
from graphbuild.look.catalog import Catalog
from graphbuild.look.explore.duplicates import duplicates
from graphbuild.look.explore.map import NodeMap, codes_by, columns_of, node_map
from graphbuild.look.explore.server import SCRIPTS
from graphbuild.look.pages import base_css, own_text
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json, Store

BYTES = 50_000_000
IMAGES, IMAGE_PIXELS = 1_000, 160  # at most, evenly spread, and their longer side
NEIGHBORS = 12
CHUNK = 1_024  # nodes of a file
TRIED = 2_000  # nodes from whose size that of all is told
LONGEST = 500  # characters of a text
KEYS = 500  # of a node's samples, at most
OWN = re.compile(r"data/(colour-\d+\.bin|nodes-\d+\.json)|image/\d+\.jpg")  # what a run before may leave behind


def write_static(store: Store, out: str, most_bytes: int = BYTES) -> str:
    """Write the folder `out`; returns a line that says what is in it.

    Raises:
        ConfigError: the store has no graph, or `out` cannot be written, or holds what no run of this wrote.
    """
    folder = Store(out)
    folder.check_writable()
    catalog = Catalog(store)
    _begin(folder)
    made, total = node_map(catalog), len(catalog.graph)
    images = _images(catalog, folder)
    found = json.dumps(duplicates(catalog)).encode()
    colours = [name for name in columns_of(catalog) if name not in ("row", "key", "node", "caption")]
    left = 0.93 * (most_bytes - sum(images.values()) - len(found) - 200_000)
    each = np.mean([len(one) for one in _entries(catalog, _spread(total, TRIED), np.arange(total))])
    while True:
        nodes = np.union1d(_spread(total, int(left / (8 + len(colours) + each))), np.array([*images], np.int64))
        nodes = nodes[~catalog.graph.gone[nodes]]
        entries = _entries(catalog, nodes, nodes)
        taken = sum(map(len, entries)) + len(nodes) * (8 + len(colours))
        if taken <= left or len(nodes) <= len(images) + 1:
            break
        each *= 1.05 * taken / left
    order = np.argsort(_along_curve(made.places[nodes]), kind="stable")  # so that neighbours lie in the same files
    drawn = nodes[order]
    mapped = NodeMap(made.about, made.places, made.codes, drawn)
    for name in list(colours):
        try:
            legend, codes = codes_by(catalog, mapped, name)
        except GraphbuildError:  # of too many values
            colours.remove(name)
            continue
        folder.write_bytes(f"data/colour-{colours.index(name)}.bin", json.dumps(legend).encode() + b"\n" + codes)
    about = made.about | {"points": len(drawn), "columns": colours, "chunk": CHUNK, "images": sorted(images)}
    known: Json = {"store": store.url.rstrip("/").rpartition("/")[2], "nodes": total, "k": catalog.graph.k}
    known |= {"encoder": catalog.graph.encoder, "recall": catalog.graph.certificate["recall"], "mapped": True}
    known |= {"searchable": catalog.has_texts, "keys": catalog.has_samples, "images": False}
    known["samples"] = int((catalog.graph.sample_nodes() >= 0).sum())
    for name, content in (
        ("map.json", json.dumps(about).encode()),
        ("stores.json", json.dumps([known]).encode()),
        ("duplicates.json", found),
        ("places.bin", made.places[drawn].astype("<u2").tobytes()),
        ("ids.bin", drawn.astype("<u4").tobytes()),
    ):
        folder.write_bytes(f"data/{name}", content)
    for begin in range(0, len(drawn), CHUNK):
        some = b",".join(entries[at] for at in order[begin : begin + CHUNK].tolist())
        folder.write_bytes(f"data/nodes-{begin // CHUNK}.json", b"[" + some + b"]")
    size = sum(sum(folder.sizes(name).values()) for name in (".", "data", "image"))
    return f"explore   {len(drawn):,} of {total:,} nodes, {size / 1e6:.1f} MB, in {folder.display('index.html')}"


def _begin(folder: Store) -> None:
    """Write the page into an empty folder, or into that of a run before, without what that one left."""
    if folder.exists("static.js"):
        ours = folder.read_bytes("static.js").startswith(b'"use strict";\n// The explorer without a server')
    else:
        ours = not folder.fs.ls(folder.root) if folder.fs.exists(folder.root) else True
    if not ours:
        raise ConfigError(f"{folder.url} holds other files", "name a new or an empty folder by --static")
    for name in filter(OWN.fullmatch, [*folder.sizes("data"), *folder.sizes("image")]):
        folder.remove(name)
    for name in ("static.js", *SCRIPTS):
        folder.write_bytes(name, own_text(__package__, name).encode())
    page = own_text(__package__, "page.html").replace("</head>", '<link rel="icon" href="data:,">\n</head>')
    page = page.replace("<script", '<script src="static.js"></script>\n<script', 1)
    folder.write_bytes("index.html", page.encode())
    folder.write_bytes("page.css", (base_css() + own_text(__package__, "page.css")).encode())


def _spread(total: int, count: int) -> Array:
    """At most `count` of the numbers below `total`, ascending."""
    return np.unique(np.linspace(0, total - 1, max(min(total, count), 1)).astype(np.int64))


def _along_curve(places: Array) -> Array:
    """The number of each place on a curve that visits squares within squares (Morton's)."""
    found = np.zeros(len(places), np.uint64)
    for bit in range(16):
        for side in (0, 1):
            found |= ((places[:, side].astype(np.uint64) >> bit) & 1) << (2 * bit + side)
    return found


def _images(catalog: Catalog, folder: Store) -> dict[int, int]:
    """Thumbnails of some nodes; returns the bytes of each."""
    sizes: dict[int, int] = {}
    for node in _spread(len(catalog.graph), IMAGES if catalog.has_images else 0).tolist():
        try:
            content = catalog.image(catalog.sample_of(node), IMAGE_PIXELS)
        except GraphbuildError:  # gone, or broken: shown without one, as the explorer does
            content = None
        if content:
            folder.write_bytes(f"image/{node}.jpg", content)
            sizes[node] = len(content)
    return sizes


def _entries(catalog: Catalog, some: Array, nodes: Array) -> list[bytes]:
    """What the page tells of some nodes, ascending, as JSON; nodes: those of the folder, ascending."""
    entries, keys = [], _keys(catalog, some)
    for begin in range(0, len(some), CHUNK):
        part = some[begin : begin + CHUNK]
        lists, values = catalog.graph.neighbors(part)
        known = nodes[np.minimum(np.searchsorted(nodes, lists), len(nodes) - 1)] == lists
        background = catalog.graph.background(part).round(3).astype(float).round(3).tolist()
        for at, itself in enumerate(catalog.describe(part, np.ones(len(part)))):
            entry: Json = {"text": itself.text and itself.text[:LONGEST], "samples": itself.samples}
            entry |= {"neighbors": lists[at][known[at]][:NEIGHBORS].tolist(), "background": background[at]}
            entry["similarities"] = [round(float(one), 3) for one in values[at][known[at]][:NEIGHBORS]]
            if sample := catalog.sample_of(itself.node):
                own = keys[itself.node]
                entry |= {"row": sample.row, "keys": own[:KEYS], "left_out": len(own[KEYS:])}
                if sample.more:
                    entry["captions"] = [(one or "")[:LONGEST] for one in (sample.caption, *sample.more)]
            entries.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode())
    return entries


def _keys(catalog: Catalog, nodes: Array) -> dict[int, list[str]]:
    """The keys of each node's samples, each once."""
    wanted = np.zeros(len(catalog.graph), bool)
    wanted[nodes] = True
    tables = captions(catalog.store, ("row", "node", "key")) if catalog.has_samples else ()
    parts = [pl.DataFrame(table.filter(wanted[table["node"].to_numpy()])) for table in tables]
    if not parts:
        return {}
    keys = pl.concat(parts).group_by("node").agg(pl.col("key").unique(maintain_order=True))
    return dict(zip(keys["node"].to_list(), keys["key"].to_list(), strict=True))
