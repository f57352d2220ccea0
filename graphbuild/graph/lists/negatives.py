"""Hard negatives: of each caption's nearest, those that are far enough from it; as pairs of ids, or as texts to train.

The candidates are the stored lists, or those that `match` found for queries of another corpus. Memory: a shard's
captions, and what graphbuild.graph.lists.candidates says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists.candidates import Array, Lists, Matches, Scorer
from graphbuild.graph.lists.derived import DerivedList, Part, check_similarity, reaches, slices
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.machine.gpus import gpu_here
from graphbuild.store.files import file_identity, read_array
from graphbuild.store.store import Json

CAPTIONS = "captions"
NEGATIVES = pa.schema(
    [
        ("row", pa.int64()),
        ("node", pa.int64()),
        ("neighbor", pa.int64()),
        ("rank", pa.int32()),
        ("similarity", pa.float32()),
    ]
)


def hard_negatives(
    graph: SampleGraph,
    *,
    count: int = 10,
    skip: int = 0,
    within: int | None = None,
    random: int | None = None,
    positive: float | Array | str | None = None,
    absolute_margin: float = 0.0,
    relative_margin: float = 0.05,
    min_similarity: float = -1.0,
    max_similarity: float = 1.0,
    matches: str | None = None,
    rescore: str | Scorer | None = None,
    format: Literal["pairs", "triplets"] = "pairs",
) -> DerivedList:
    """The nearest nodes of each sample, of each of its captions, that are far enough from it not to be positives.

    An anchor's first `skip` ranks are left out; of the others the nearest `count` are taken that keep the rules of
    NV-Retriever (Moreira et al., arXiv 2407.15831), where p is the score of the anchor's positive:
    similarity < p - absolute_margin (TopK-MarginPos), similarity < p - relative_margin |p| (TopK-PercPos; 0.05 is its
    95%), and min_similarity <= similarity <= max_similarity.

    within: only of an anchor's first so many ranks. random: a seed; `count` are drawn of those that pass, in place of
    the nearest.

    positive: p, one for all (1: the anchor's own caption), or float [N] by row, such as image-text similarities on the
    scale of the graph's; "captions": the least similarity to the sample's other captions, 1 where it has none.

    No caption of a sample is a negative of another one of it.

    matches: a list that `match` wrote for this graph (`--what neighbors`): the anchors are its queries, the candidates
    their nodes. rescore: a cross-encoder of sentence-transformers (name or folder), or a function from anchors and
    texts to scores [n]: these are compared in place of similarities, and the best are taken; p is, unless given as a
    number, the least score of the anchor with the sample's other captions, or with itself where it has none. It scores
    every candidate.

    Columns: row and node int64, the anchor (of matches: the query's number, and null); neighbor int64, a node; rank
    int32, 1 for the nearest of the whole list; similarity float32; score float32, of rescored ones. By row and rank.
    format "triplets": anchor, positive, and negative, or negative_1 to negative_<count>: texts, as
    sentence-transformers trains on. A line for each other caption of the anchor's sample as its positive; where there
    is none, its own text (SimCSE, Gao et al., arXiv 2104.08821). Anchors with fewer negatives are left out.
    Counts: anchors, negatives, anchors_with_fewer than `count`; of triplets too.

    Raises:
        ConfigError: an option out of range, or skip + count beyond k or `within`; no such cross-encoder; a store
            without texts where texts are needed.
        InputError: scores that are not [N], or one that is no cosine where the sample has a node; a list of `match`
            that is none, or of another graph.
    """
    source = Matches(graph, matches) if matches is not None else Lists(graph)
    last = source.k if within is None else min(within, source.k)
    if skip < 0 or count < 1 or skip + count > last:
        raise ConfigError(
            f"skip = {skip} and count = {count} do not lie within the "
            + (f"k = {source.k} neighbours of a node" if last == source.k else f"first {last} ranks"),
            f"choose skip >= 0, count >= 1 and skip + count <= {last}, or "
            + ("index with a larger --k" if matches is None and last == source.k else "take more ranks"),
        )
    if random is not None and random < 0:
        raise ConfigError(f"random = {random}", "give a seed, a whole number from 0 on")
    for name, margin in (("absolute_margin", absolute_margin), ("relative_margin", relative_margin)):
        if not 0 <= margin <= 2:
            raise ConfigError(f"{name} = {margin}", f"set {name} between 0 and 2")
    check_similarity("min_similarity", min_similarity)
    check_similarity("max_similarity", max_similarity)
    score = _cross_encoder(rescore) if isinstance(rescore, str) else rescore
    if positive is None:
        positive = CAPTIONS if score is not None else 1.0
    if matches is not None and (np.ndim(positive) or (isinstance(positive, str) and score is None)):
        raise ConfigError("--positive is of rows, but the anchors of --matches are queries", "give a number")
    scores = None if isinstance(positive, str) else _scores(graph, positive)
    options: Json = {"count": count, "skip": skip}
    options["positive"] = CAPTIONS if scores is None else "by row" if scores.ndim else float(scores)
    options |= {"absolute_margin": absolute_margin, "relative_margin": relative_margin}
    options |= {"min_similarity": min_similarity, "max_similarity": max_similarity}
    inputs = {} if matches is None else {"matches": file_identity(matches)}
    chosen: Json = {"within": within, "random": random, "format": None if format == "pairs" else format, **inputs}
    chosen["rescore"] = None if score is None else str(rescore)
    options |= {name: value for name, value in chosen.items() if value is not None}
    schema = NEGATIVES.append(pa.field("score", pa.float32())) if score is not None else NEGATIVES
    if format == "triplets":
        names = ["negative"] if count == 1 else [f"negative_{number}" for number in range(1, count + 1)]
        schema = pa.schema([(name, pa.string()) for name in ("anchor", "positive", *names)])
    if (score is not None or format == "triplets") and not source.has_texts:
        raise ConfigError("ready vectors have no texts", "leave --rescore and --format out")
    return DerivedList(
        "hard-negatives",
        graph,
        options,
        schema,
        lambda: _negatives(source, {**options, "last": last}, scores, score, schema),
        inputs=inputs,
    )


def _negatives(
    source: Lists, options: Json, positive: Array | None, score: Scorer | None, schema: pa.Schema
) -> Iterator[Part]:
    """positive: of all, or by row; None: of each anchor the least of its pairs."""
    as_texts = "anchor" in schema.names
    for number, anchors in enumerate(source.anchors(with_texts=as_texts or score is not None)):
        own = anchors.row * len(source.graph) + anchors.node  # a pair as one number
        one, other = anchors.pairs()
        least = source.least(anchors, one, other, score) if positive is None else None
        draws = None
        if "random" in options:
            draws = np.random.default_rng([options["random"], number]).random((len(own), source.k))
        for part in slices(len(own)):
            row, node = anchors.row[part], anchors.node[part]
            ids, listed = source.candidates(anchors, part)
            ranks = np.arange(1, ids.shape[1] + 1)
            allowed = (ranks > options["skip"]) & (ranks <= options["last"]) & (listed >= -1)
            if source.graph.is_plural and node[:1].min(initial=0) >= 0:  # another caption of it is no negative
                allowed &= ~np.isin(row[:, None] * len(source.graph) + ids, own)
            values = listed
            if score is not None:
                values = np.full(ids.shape, -np.inf, np.float32)
                at, place = np.nonzero(allowed)
                values[at, place] = score(anchors.text_of(part, at), source.texts(ids[at, place]).tolist())
            if least is not None:
                bound = least[part, None]
            else:
                assert positive is not None
                bound = positive[row, None] if positive.ndim else positive
            bound = bound - np.maximum(options["absolute_margin"], options["relative_margin"] * np.abs(bound))
            allowed &= reaches(values, options["min_similarity"]) & ~reaches(values, bound)
            allowed &= values <= options["max_similarity"]
            if draws is not None or score is not None:
                order = np.argsort(np.where(allowed, -values if draws is None else draws[part], np.inf), kind="stable")
                allowed &= np.argsort(order) < options["count"]
            allowed &= np.cumsum(allowed, axis=1) <= options["count"]
            full = allowed.sum(axis=1) == options["count"]
            at, place = np.nonzero(allowed)
            counts = {"anchors": len(row), "negatives": len(at), "anchors_with_fewer": int((~full).sum())}
            if as_texts:
                begin, end = np.searchsorted(one, [part.start, part.start + len(row)])
                kept = np.arange(begin, end)[full[one[begin:end] - part.start]]
                of_anchor = ids[full][allowed[full]].reshape(-1, options["count"])
                negatives = of_anchor[(np.cumsum(full) - 1)[one[kept] - part.start]]
                assert anchors.text is not None
                columns = [anchors.text[one[kept]], anchors.text[other[kept]], *map(source.texts, negatives.T)]
                yield (
                    pa.table([pa.array(column, pa.string()) for column in columns], schema),
                    counts | {"triplets": len(kept)},
                )
                continue
            columns = [row[at], pa.array(node[at], mask=node[at] < 0), ids[at, place], place + 1]
            columns += [listed[at, place]] + ([values[at, place]] if score is not None else [])
            yield pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema), counts


def _cross_encoder(name: str) -> Scorer:
    """Scores in [0, 1] of pairs of texts by a cross-encoder of one output; ConfigError where it cannot be had."""
    from sentence_transformers import CrossEncoder
    from torch.nn import Sigmoid

    try:
        model = CrossEncoder(name, device="cuda" if gpu_here() else "cpu", model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"--rescore {name} cannot be loaded ({str(error).splitlines()[0]})",
            "name a cross-encoder of sentence-transformers, published as safetensors",
        ) from None
    if model.num_labels != 1:
        raise ConfigError(
            f"--rescore {name} gives {model.num_labels} scores a pair", "name a cross-encoder with one score"
        )

    def score(some: list[str], others: list[str]) -> Array:
        if not some:
            return np.empty(0, np.float32)
        pairs = list(zip(some, others, strict=True))
        return np.asarray(model.predict(pairs, activation_fn=Sigmoid(), show_progress_bar=False), np.float32)

    return score


def _scores(graph: SampleGraph, positive: float | Array) -> Array:
    scores = np.asarray(positive, np.float32)
    if scores.ndim == 0:
        check_similarity("positive", float(scores))
        return scores
    nodes = graph.sample_nodes()
    if scores.shape != nodes.shape:
        raise InputError(f"positive has shape {list(scores.shape)}", f"give a score for each row: [{len(nodes)}]")
    bad = np.flatnonzero((nodes >= 0) & ~(np.abs(scores) <= 1))
    if len(bad):
        raise InputError(
            f"positive: row {bad[0]} has the score {scores[bad[0]]} ({len(bad)} such rows)",
            "give similarities between -1 and 1; only a sample without a node may have NaN",
        )
    return scores


def read_positive(text: str) -> float | str | Array:
    """--positive: a number, captions, or the .npy that text names."""
    if text == CAPTIONS:
        return text
    try:
        return float(text)
    except ValueError:
        fix = "give a number, or a float array by row: [N]"
        scores = read_array(text, fix)
    if scores.ndim != 1 or scores.dtype.kind != "f":
        raise InputError(f"--positive {text} holds {scores.dtype} {list(scores.shape)}", fix)
    return scores
