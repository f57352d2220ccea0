"""Captions that deserve a look, by reason, worst first: from their letters and the graph's lists, without a model.

Cost: one pass over the texts, about 1.5 microseconds each. Memory: some 20 bytes a caption, for patterns that are still
to be counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from graphbuild.look.catalog import Catalog
from graphbuild.store.layout import TEXTS
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json

SHOWN = 10  # captions a reason
MANY = 10  # samples of one caption, or captions of one pattern, which is at least ONE_IN of all
ONE_IN = 10_000
SEPARATOR = r"(?:\s[-–—|·•/]\s|[|:;]\s*|[.!?]\s+)"
MARKUP = r"(?i)(\.(?:jpe?g|png|gif|webp|tiff?)\b|https?://|www\.|</?[a-z][^>]*>|&[a-z]+;|&#[0-9]+;)"
SCRIPTS = {
    name: rf"\p{{{name}}}"
    for name in ("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Thai", "Hangul")
} | {"Han and Kana": r"[\p{Han}\p{Hiragana}\p{Katakana}]"}
LOOKALIKE = r"\p{Latin}[\p{Cyrillic}\p{Greek}]|[\p{Cyrillic}\p{Greek}]\p{Latin}"


def suspicious(catalog: Catalog, limit: float) -> list[Json]:
    """By reason, the one of most samples first: found (how many captions, or patterns), samples (that have them), and
    of the worst `shown`: node, text, and `why`, the number by which they are ranked. Of ready vectors the graph alone
    tells.

    boilerplate: all but the numbers of a caption, or what stands before its first separator or behind its last, is
    that of many others. repeated: many samples have it. markup: it holds a file's name, an address or tags. scripts:
    its letters are of several (a mix of languages in one script is not seen); those with two in one word first. far:
    its nearest neighbour is no nearer than `limit`, mean and two deviations of random pairs.
    """
    store = catalog.store
    pieces, repeated, marked, mixed, far = [], [], [], [], []
    nearest = catalog.graph.nearest_similarities
    for name in shards_of(store, store.manifest()).with_nodes.names:
        table = pl.DataFrame(store.table(TEXTS.format(name), ["node", "samples", "text"]))
        table = table.filter(pl.col("samples") > 0)  # without nodes of tars that are gone
        far.append(table.with_columns(nearest=nearest[table["node"].to_numpy()]).filter(pl.col("nearest") <= limit))
        table = table.drop_nulls("text")
        pieces.append(_patterns(table))
        repeated.append(table.filter(pl.col("samples") >= MANY))
        marked.append(table.filter(pl.col("text").str.contains(MARKUP)))
        mixed.append(_mixed(table))
    patterns = _counted(pl.concat(pieces)).filter(pl.col("captions") >= max(MANY, len(catalog.graph) // ONE_IN))
    found = [
        _reason("boilerplate", patterns, pl.format("{} captions: {}", "captions", "pattern"), ["captions"]),
        _reason("repeated", pl.concat(repeated), pl.format("{} samples", "samples"), ["samples"]),
        _reason("markup", pl.concat(marked), pl.col("text").str.extract(MARKUP), ["samples"]),
        _reason("scripts", pl.concat(mixed), pl.col("why"), ["lookalike", "share"]),
        _reason("far", pl.concat(far), pl.format("nearest at {}", pl.col("nearest").round(3)), [-pl.col("nearest")]),
    ]
    found[1]["shown"] = []  # they are the report's most repeated captions
    found[-1]["limit"] = limit
    for one in found:
        texts = catalog.describe([row["node"] for row in one["shown"]], np.zeros(len(one["shown"])))
        one["shown"] = [{**row, "text": text.text} for row, text in zip(one["shown"], texts, strict=True)]
    return sorted((one for one in found if one["found"]), key=lambda one: -one["samples"])


def _patterns(table: pl.DataFrame) -> pl.DataFrame:
    """Patterns, with how many captions and samples have each, and the first of their nodes."""
    plain = pl.col("text").str.to_lowercase().str.replace_all("[0-9]+", "#")
    kinds = [
        pl.when(plain.str.contains("#", literal=True)).then(plain),
        "… " + plain.str.extract(f"^.*{SEPARATOR}(.{{3,40}})$"),
        plain.str.extract(f"^(.{{3,40}}?){SEPARATOR}.") + " …",
    ]
    each = [table.select("node", "samples", pattern=kind, captions=1) for kind in kinds]
    return _counted(pl.concat(each).drop_nulls("pattern"))


def _counted(pieces: pl.DataFrame) -> pl.DataFrame:
    return pieces.group_by("pattern").agg(pl.col("captions", "samples").sum(), pl.col("node").min())


def _mixed(table: pl.DataFrame) -> pl.DataFrame:
    """Captions with letters of several scripts: how many of each, and the share of those not of the most frequent."""
    text = pl.col("text")
    foreign = table.filter(text.str.len_bytes() > text.str.len_chars())  # in ASCII there is one script
    counts = foreign.with_columns(text.str.count_matches(letter).alias(name) for name, letter in SCRIPTS.items())
    letters, most = pl.sum_horizontal(*SCRIPTS), pl.max_horizontal(*SCRIPTS)
    named = [pl.when(pl.col(name) > 0).then(pl.format(name + " {}", name)) for name in SCRIPTS]
    return counts.filter(letters > most).select(
        "node",
        "samples",
        why=pl.concat_str(named, separator=", ", ignore_nulls=True),
        lookalike=text.str.contains(LOOKALIKE),
        share=1 - most / letters,
    )


def _reason(name: str, found: pl.DataFrame, why: pl.Expr, by: Sequence[str | pl.Expr]) -> Json:
    """The worst by these columns, of equal ones those of more samples, then of the smaller node."""
    worst = found.sort(*by, "samples", -pl.col("node"), descending=True).head(SHOWN)
    return {
        "reason": name,
        "found": len(found),
        "samples": int(found["samples"].sum()),
        "shown": worst.select("node", why=why).to_dicts(),
    }
