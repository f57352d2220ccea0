"""Queries against a graph's nodes: the nearest, what of a test set is in the training set, and what is new to it.

Each query is compared with every node (graphbuild.knn.queries), so what is found is exact; equal texts are found by
the texts themselves, and pictures by their hashes (pictures.py). Columns: docs/how-to/matching.md. Memory: some 40
bytes a pair, and the keys and captions of the queries and of the samples that they meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from graphbuild.errors import ConfigError
from graphbuild.graph.lists.derived import DerivedList, Part, captions, check_similarity, publish
from graphbuild.graph.match.pictures import Tars, close_pairs, image_tars, read_pictures, tars_of
from graphbuild.graph.match.queries import QUERY, Queries, caption_queries, store_queries, vector_queries
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.knn.queries import search
from graphbuild.machine.gpus import gpu_here
from graphbuild.recipe import flag
from graphbuild.sources.paths import part_inputs
from graphbuild.store.files import file_identities
from graphbuild.store.layout import TEXTS, VECTORS
from graphbuild.store.sharded import Living, ShardedArray, node_array
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store

What = Literal["neighbors", "leaks", "novel"]
SAMPLE = {"row": pa.int64(), "key": pa.string(), "node": pa.int64(), "caption": pa.string(), "similarity": pa.float32()}
MORE: dict[str, dict[str, pa.DataType]] = {
    "neighbors": {"rank": pa.int32()},
    "leaks": {"by": pa.string(), "bits": pa.int32()},
    "novel": {"novelty": pa.float32(), "mean": pa.float32(), "norm": pa.float32()},
}
SCHEMAS = {what: pa.schema([*QUERY, *pa.schema(SAMPLE), *pa.schema(more)]) for what, more in MORE.items()}
TAKES = {"neighbors": ("k", "threshold"), "leaks": ("threshold", "bits"), "novel": ("k",)}
READS = {
    "captions": ("caption_column", "key_column"),
    "vectors": ("vector_column", "key_column"),
    "store": (),
    "images": (),
}
NEAREST, BITS = 10, 4  # unless asked for others


def nearest_nodes(
    graph: SampleGraph, queries: Queries, *, k: int | None = None, threshold: float | None = None
) -> DerivedList:
    """Of each query the k nearest nodes (10, or all where only a threshold is given) that reach the threshold.

    Columns: QUERY; row, key and caption of the node's first sample; node; similarity float32; rank int32, from 1. By
    query and rank. Counts: queries, rejected, queries_without_any. Exact, at 2 Q N d operations.

    Raises:
        ConfigError: k below 1, or a threshold outside [-1, 1].
    """
    k = NEAREST if k is None and threshold is None else k
    _check(k, threshold)
    least = -1.0 if threshold is None else threshold

    def parts() -> Iterator[Part]:
        asked, pairs = _ask(graph, queries, k, least)
        places = pairs["at"].to_numpy()
        rank = np.arange(len(places)) - np.searchsorted(places, places) + 1
        found = pairs.with_columns(rank=pl.Series(rank)).join(_samples(graph, pairs, "node"), on="node")
        without = len(asked) - len(np.unique(places))
        counts = {**_counts(asked, queries), "queries_without_any": without}
        yield _table("neighbors", found.join(asked, on="at").sort("at", "rank")), counts

    return _mined("neighbors", graph, {"k": k, "threshold": threshold}, parts, queries)


def novel_queries(graph: SampleGraph, queries: Queries, *, k: int = NEAREST) -> DerivedList:
    """The queries, those first of which the store knows least.

    Columns: QUERY; row, key, node and caption of the nearest sample, with its similarity; novelty, 1 less that (of
    NormSim_inf, Wang et al., arXiv 2405.19547); mean and norm, the 2-norm (NormSim_2), of the similarities to the k
    nearest nodes. By descending novelty. Counts: queries, rejected.

    Raises:
        ConfigError: k below 1.
    """
    _check(k, None)

    def parts() -> Iterator[Part]:
        asked, pairs = _ask(graph, queries, k, -1.0)
        value = pl.col("similarity").cast(pl.Float64)
        scores = pairs.group_by("at", maintain_order=True).agg(
            pl.col("node").first(),
            pl.col("similarity").first(),
            novelty=1 - value.first(),
            mean=value.mean(),
            norm=(value**2).sum().sqrt(),
        )
        found = scores.join(_samples(graph, scores, "node"), on="node").join(asked, on="at")
        yield _table("novel", found.sort("novelty", "at", descending=[True, False])), _counts(asked, queries)

    return _mined("novel", graph, {"k": k}, parts, queries)


def leaks(
    graph: SampleGraph,
    queries: Queries | None,
    *,
    threshold: float | None = None,
    tars: Tars | None = None,
    bits: int = BITS,
) -> DerivedList:
    """The samples that are, or nearly are, of the queries: what to leave out before a test on these.

    By text, where a caption's normalised text equals the query's; by vector, where their similarity reaches the
    threshold; by picture, where the perceptual hashes of a query of `tars` (URLs, and the extension of their images)
    and of a sample differ in at most so many bits of 64.

    Columns: QUERY; row, key, node and caption of the sample, each sample of a node; similarity, null of pictures; by:
    text, vector or picture; bits, of pictures. By query and descending similarity. Counts: queries, rejected, by_text,
    by_vector, by_picture, leaked_queries, leaked_samples; of pictures those compared, and those left out.

    Raises:
        ConfigError: a threshold outside [-1, 1], bits outside 0..64, or pictures of a store without tars.
    """
    _check(None, threshold)
    if not 0 <= bits <= 64:
        raise ConfigError(f"bits = {bits}", "set bits between 0 and 64")
    own_tars = tars_of(Store(graph.url)) if tars is not None else None

    def parts() -> Iterator[Part]:
        asked, near = _ask(graph, queries, None, threshold)
        pairs = pl.concat([_equal(graph, asked), near.with_columns(by=pl.lit("vector"))])
        pairs = pairs.unique(["at", "node"], keep="first", maintain_order=True)
        found = pairs.join(_samples(graph, pairs, "node", every=True), on="node").join(asked, on="at")
        found = found.with_columns(bits=pl.lit(None, pl.Int32))
        counts = _counts(asked, queries)
        if tars is not None and own_tars is not None:
            theirs, own = read_pictures(tars), read_pictures(own_tars)
            at, place, apart = close_pairs(theirs.hashes, own.hashes, bits)
            rows = own.rows[place]
            seen = pl.DataFrame(
                {
                    "query": theirs.rows[at],
                    "query_key": [theirs.keys[i] for i in at.tolist()],
                    "row": rows,
                    "key": [own.keys[i] for i in place.tolist()],
                    "bits": apart,
                }
            ).with_columns(by=pl.lit("picture"), similarity=pl.lit(None, pl.Float32))
            seen = seen.join(_samples(graph, seen, "row").drop("key"), on="row", how="left")
            shown = asked.unique("query", keep="first").select("query", "query_caption")
            found = pl.concat([found, seen.join(shown, on="query", how="left")], how="diagonal_relaxed")
            counts |= {"pictures": len(own.hashes), "pictures_of_queries": len(theirs.hashes)}
            counts |= {"pictures_left_out": own.left_out + theirs.left_out}
        ways = dict(found["by"].value_counts().iter_rows())
        counts |= {f"by_{way}": int(ways.get(way, 0)) for way in ("text", "vector", "picture")}
        counts |= {"leaked_queries": found["query"].n_unique(), "leaked_samples": found["row"].n_unique()}
        yield _table("leaks", found.sort("query", "similarity", "row", descending=[False, True, False])), counts

    options: Json = {"threshold": threshold, "bits": bits if tars is not None else None}
    return _mined("leaks", graph, options, parts, queries)


def match_store(
    store: Store, what: What, options: Mapping[str, Any], out: str | None = None, *, dry_run: bool = False
) -> str:
    """Write one of the lists above to a parquet file, log its counts, and return a line that names the file.

    options: by name, None where not given: one source of READS with what is read of it, and what the list takes
    (TAKES). out: a path or URL; without it STORE/match/WHAT.parquet. dry_run: only tell what would be done.

    Raises:
        ConfigError: no source or several, an option that has no meaning, queries of another encoder.
        GraphbuildError: as the list's function.
    """
    given = {name: value for name, value in options.items() if value is not None}
    sources = [name for name in READS if name in given]
    if len(sources) != 1:
        raise ConfigError(
            f"{' and '.join(map(flag, sources)) or 'no queries'} given",
            f"give one of {', '.join(map(flag, READS))}",
        )
    source = sources[0]
    takes = {source, *READS[source], *TAKES[what]} - ({"threshold"} if source == "images" else set())
    takes -= {"bits"} if source in ("captions", "vectors") else set()
    for name in given:
        if name not in takes or (source == "images" and what != "leaks"):
            raise ConfigError(
                f"{flag(name)} has no meaning for {what} of {flag(source)}",
                f"--what {what} takes {', '.join(flag(name) for name in TAKES[what])}; pictures are of leaks alone",
            )
    rules = {name: given[name] for name in TAKES[what] if name in given}
    return publish(
        "match",
        lambda graph: _made(graph, what, source, given, rules),
        store,
        f"match/{what}.parquet",
        out,
        dry_run=dry_run,
    )


def _made(graph: SampleGraph, what: What, source: str, given: Json, rules: Json) -> DerivedList:
    of_vectors = what != "leaks" or "threshold" in rules
    read = {name: given[name] for name in READS[source] if name in given}
    queries, tars = None, None
    if source == "captions":
        queries = caption_queries(graph, given["captions"], vectors=of_vectors, **read)
    elif source == "vectors":
        queries = vector_queries(graph, given["vectors"], **read)
    elif source == "store":
        queries = store_queries(graph, given["store"], vectors=of_vectors)
        tars = tars_of(Store(given["store"])) if "bits" in rules else None
    else:
        tars = Tars(image_tars(given["images"]))
    if what == "neighbors":
        return nearest_nodes(graph, queries, **rules)  # type: ignore[arg-type]
    if what == "novel":
        return novel_queries(graph, queries, **rules)  # type: ignore[arg-type]
    if tars is None and "threshold" not in rules and not (queries and queries.has_texts):
        raise ConfigError("leaks of vectors need --threshold", "give a similarity between -1 and 1")
    made = leaks(graph, queries, tars=tars, **rules)
    if source == "images" and tars is not None:
        made.inputs = part_inputs("images", file_identities(tars.urls).values())
    return made


def _check(k: int | None, threshold: float | None) -> None:
    if k is not None and k < 1:
        raise ConfigError(f"k = {k}", "set k to 1 or more")
    if threshold is not None:
        check_similarity("threshold", threshold)


def _mined(what: What, graph: SampleGraph, options: Json, parts: Any, queries: Queries | None) -> DerivedList:
    options = {name: value for name, value in options.items() if value is not None} | {"search": "exact"}
    told: Json = {} if queries is None else {"inputs": queries.inputs, "rejected": queries.rejected}
    return DerivedList(what, graph, options, SCHEMAS[what], parts, **told)


def _ask(
    graph: SampleGraph, queries: Queries | None, k: int | None, least: float | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """All queries (`at`: their order; QUERY; text), and the pairs that are found: at, node and similarity, best first.
    Nothing is searched where neither k nor `least` is given."""
    store, device = Store(graph.url), "cuda" if gpu_here() else "cpu"
    every = node_array(store, shards_of(store, store.manifest()), VECTORS)
    vectors: ShardedArray | Living = Living(every, graph.gone) if graph.gone.any() else every
    asked: list[pa.Table] = [QUERY.append(pa.field("text", pa.string())).empty_table()]
    pairs = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    begin = 0
    if queries is not None:
        queries.rejected.clear()
        for about, texts, own in queries.blocks():
            asked.append(about.append_column("text", pa.array(texts, pa.string())))
            if own is not None and len(own) and not (k is None and least is None):
                at, node, similarity = search(vectors, own, k=k, least=-1.0 if least is None else least, device=device)
                pairs.append((at + begin, node, similarity))
            begin += len(about)
    joined = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return pl.DataFrame(pa.concat_tables(asked)).with_row_index("at").cast({"at": pl.Int64}), pl.DataFrame(
        dict(zip(("at", "node", "similarity"), joined, strict=True))
    )


def _equal(graph: SampleGraph, asked: pl.DataFrame) -> pl.DataFrame:
    """at, node, similarity 1 and by of the nodes whose text is a query's."""
    store, texts = Store(graph.url), asked.select("at", "text").drop_nulls()
    found = [pl.DataFrame(schema={"at": pl.Int64, "node": pl.Int64})]
    for name in shards_of(store, store.manifest()).with_nodes.names if len(texts) else []:
        nodes = pl.DataFrame(store.table(TEXTS.format(name), ["node", "text"])).drop_nulls()
        found.append(nodes.join(texts, on="text").select("at", "node"))
    return pl.concat(found).with_columns(similarity=pl.lit(1.0, pl.Float32), by=pl.lit("text"))


def _samples(graph: SampleGraph, wanted: pl.DataFrame, by: str, *, every: bool = False) -> pl.DataFrame:
    """row, key, node and caption of the samples of these nodes or rows, as `by` says: of each the first, or every."""
    found = [pl.DataFrame(schema={"row": pl.Int64, "key": pl.String, "node": pl.Int64, "caption": pl.String})]
    for table in captions(Store(graph.url), ["row", "key", "node", "caption"]):
        found.append(pl.DataFrame(table).join(wanted, on=by, how="semi"))
    joined = pl.concat(found)
    return joined if every else joined.unique(by, keep="first", maintain_order=True)


def _counts(asked: pl.DataFrame, queries: Queries | None) -> dict[str, int]:
    return {"queries": len(asked), "rejected": len(queries.rejected) if queries is not None else 0}


def _table(what: str, found: pl.DataFrame) -> pa.Table:
    schema = SCHEMAS[what]
    return found.select(schema.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
