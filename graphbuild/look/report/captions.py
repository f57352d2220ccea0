"""Captions that deserve a look, by reason, worst first: from their letters and the graph's lists, without a model.

Cost: one pass over the texts, about 1.5 microseconds each, and some ten of those with letters that are not ASCII's.
Memory: some 20 bytes a caption, for patterns that are still to be counted.
"""

from __future__ import annotations

import unicodedata
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
KNOWN = (
    "Latin Cyrillic Greek Armenian Georgian Arabic Hebrew Ethiopic Devanagari Bengali Gujarati Gurmukhi Kannada "
    "Malayalam Sinhala Tamil Telugu Thai Lao Khmer Myanmar Hangul"
)
SCRIPTS = {name: rf"\p{{{name}}}" for name in KNOWN.split()} | {"Han and Kana": r"[\p{Han}\p{Hiragana}\p{Katakana}]"}
ALIKE = r"[\p{Cyrillic}\p{Greek}]"  # some look like Latin ones
TWO_SCRIPTS = rf"(\w*(?:\p{{Latin}}{ALIKE}|{ALIKE}\p{{Latin}})\w*)"  # a word


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
    pieces, repeated, marked, mixed, alike, mains, far = [], [], [], [], [], [], []
    nearest = catalog.graph.nearest_similarities
    for name in shards_of(store, store.manifest()).with_nodes.names:
        table = pl.DataFrame(store.table(TEXTS.format(name), ["node", "samples", "text"]))
        table = table.filter(pl.col("samples") > 0)  # without nodes of tars that are gone
        far.append(table.with_columns(nearest=nearest[table["node"].to_numpy()]).filter(pl.col("nearest") <= limit))
        table = table.drop_nulls("text")
        pieces.append(_patterns(table))
        repeated.append(table.filter(pl.col("samples") >= MANY))
        marked.append(table.filter(pl.col("text").str.contains(MARKUP)))
        lettered = _lettered(table)
        mains.append(_mains(table, lettered))
        two = pl.col("text").str.contains(TWO_SCRIPTS)
        alike.append(_alike(lettered.filter(two)))
        mixed.append(_mixed(lettered.filter(~two)))
    patterns = _counted(pl.concat(pieces)).filter(pl.col("captions") >= max(MANY, len(catalog.graph) // ONE_IN))
    found = [
        _reason("boilerplate", patterns, pl.format("{} captions: {}", "captions", "pattern"), ["captions"]),
        _reason("repeated", pl.concat(repeated), pl.format("{} samples", "samples"), ["samples"]),
        _reason("markup", pl.concat(marked), pl.col("text").str.extract(MARKUP), ["samples"]),
        _minorities(pl.concat(mains)),
        _reason("lookalikes", pl.concat(alike), pl.col("word"), [-pl.col("odd")]),
        _reason("scripts", pl.concat(mixed), pl.col("why"), ["share"]),
        _reason("far", pl.concat(far), pl.format("nearest at {}", pl.col("nearest").round(3)), [-pl.col("nearest")]),
    ]
    found[1]["shown"] = []  # they are the report's most repeated captions
    for row in found[4]["shown"]:
        row["why"] = _odd_letters(row["why"])
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


def _lettered(table: pl.DataFrame) -> pl.DataFrame:
    """Captions with letters that are not ASCII's: how many there are of each script, the most frequent one as `main`,
    and the share of the others. (In ASCII there is one script, and nothing to count.)"""
    text, most = pl.col("text"), pl.max_horizontal(*SCRIPTS)
    foreign = table.filter(text.str.len_bytes() > text.str.len_chars())
    counts = foreign.with_columns(text.str.count_matches(letter).alias(name) for name, letter in SCRIPTS.items())
    main = pl.coalesce(pl.when(pl.col(name) == most).then(pl.lit(name)) for name in SCRIPTS)
    return counts.filter(most > 0).with_columns(main=main, share=1 - most / pl.sum_horizontal(*SCRIPTS))


def _mains(table: pl.DataFrame, lettered: pl.DataFrame) -> pl.DataFrame:
    """By main script: captions, their samples, and the first of their nodes."""
    text = pl.col("text")
    plain = table.filter(text.str.len_bytes() == text.str.len_chars(), text.str.contains("[A-Za-z]"))
    each = pl.concat(
        [one.select("node", "samples", "main") for one in (plain.with_columns(main=pl.lit("Latin")), lettered)]
    )
    return each.group_by("main").agg(
        pl.len().alias("captions"), pl.col("samples").sum(), pl.col("node").sort().head(SHOWN)
    )


def _minorities(pieces: pl.DataFrame) -> Json:
    """Captions of all main scripts but the most frequent: of each script the first, then of each the second, ..."""
    whole = pieces.group_by("main").agg(
        pl.col("captions", "samples").sum(), pl.col("node").explode().sort().head(SHOWN)
    )
    few = whole.sort("captions", "main", descending=[True, False])[1:]
    rows = few.explode("node").with_columns(place=pl.int_range(pl.len()).over("main")).sort("place", "captions", "main")
    why = pl.format("{}: {} of {} captions", "main", "captions", pl.lit(whole["captions"].sum()))
    return {
        "reason": "minority",
        "found": int(few["captions"].sum()),
        "samples": int(few["samples"].sum()),
        "shown": rows.head(SHOWN).select("node", why=why).to_dicts(),
    }


def _alike(lettered: pl.DataFrame) -> pl.DataFrame:
    """The first word of each that mixes scripts, and the share of its letters that are not of its most frequent one."""
    word = pl.col("text").str.extract(TWO_SCRIPTS)
    latin, other = word.str.count_matches(SCRIPTS["Latin"]), word.str.count_matches(ALIKE)
    return lettered.select("node", "samples", word=word, odd=pl.min_horizontal(latin, other) / (latin + other))


def _odd_letters(word: str) -> str:
    """A word, and the names of its letters of the rarer script."""
    names = [unicodedata.name(letter, "") for letter in word if letter.isalpha()]
    latin = [name.startswith("LATIN") for name in names]
    odd = [name.capitalize() for name, one in zip(names, latin, strict=True) if one == (sum(latin) < len(latin) / 2)]
    return f"{word}: {', '.join(dict.fromkeys(odd))}"


def _mixed(lettered: pl.DataFrame) -> pl.DataFrame:
    """Captions with letters of several scripts: the first word of each script but the most frequent."""
    named = [
        pl.when(pl.col(name) > 0, pl.col("main") != name).then(
            pl.format("{}: {}", pl.lit(name), pl.col("text").str.extract(f"((?:{letter})+)"))
        )
        for name, letter in SCRIPTS.items()
    ]
    why = pl.concat_str(named, separator=", ", ignore_nulls=True)
    return lettered.filter(pl.col("share") > 0).select("node", "samples", "share", why=why)


def _reason(name: str, found: pl.DataFrame, why: pl.Expr, by: Sequence[str | pl.Expr]) -> Json:
    """The worst by these columns, of equal ones those of more samples, then of the smaller node."""
    worst = found.sort(*by, "samples", -pl.col("node"), descending=True).head(SHOWN)
    return {
        "reason": name,
        "found": len(found),
        "samples": int(found["samples"].sum()),
        "shown": worst.select("node", why=why).to_dicts(),
    }
