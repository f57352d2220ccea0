"""What the report shows, as numbers (report.json): counts of the manifest, a pass over the graph's lists, and samples.

Cost: reads neighbours and similarities once, and the text of few nodes; targets are measured on ANCHORS nodes against
all, or OTHERS drawn ones. Memory: 4 bytes a node, and a block of OTHERS vectors.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl

from graphbuild.graph.lists import duplicates
from graphbuild.graph.lists.derived import MATCH, about
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.job.steps import STEPS
from graphbuild.look.catalog import Catalog
from graphbuild.look.report.advice import advice
from graphbuild.look.report.captions import suspicious
from graphbuild.look.report.targets import LOW, batch_targets, neighbor_mass, two_views
from graphbuild.runner.progress import UNITS
from graphbuild.runner.stage import records
from graphbuild.store.layout import REJECTED, TEXTS, by_number
from graphbuild.store.remote import reaching
from graphbuild.store.sharded import Array
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store

EDGE_NODES = 20_000  # nodes whose edges the similarity histogram counts
PAIRS = 200_000
DUPLICATE = 0.95  # similarity of a near-duplicate
SHOWN = 10  # rows of a table of examples
GROUPS, MEMBERS = 6, 6  # groups of near-duplicates that are shown, and nodes of each
BATCHES = (64, 256, 1024, 4096)
DELIVERED = {
    "export": "in sidecars",
    "inline": "in inline tars",
    "columns": "in columns",
    "cluster": "in clustered tars",
}
BINS = np.linspace(-1, 1, 201)
EDGES = [0, 1, 2, *(2**power + 1 for power in range(1, 33))]  # of in-degrees and samples: 0, 1, 2, 3-4, 5-8, ...


def numbers(store: Store) -> Json:
    """Everything that `graphbuild report` shows; parts whose stages are not finished are absent."""
    manifest = store.manifest()
    found: Json = {
        "store": store.url,
        "funnel": funnel(store, manifest),
        "stages": stage_times(store, manifest),
        "versions": manifest.get("versions", {}),
        "recipe": store.read_bytes("recipe.yaml").decode() if store.exists("recipe.yaml") else "",
    }
    for name in ("embeddings", "fidelity", "graph", "recall"):
        if manifest.get(name):
            found[name] = {key: value for key, value in manifest[name].items() if key != "files"}
    if manifest.get("shards"):
        found["duplicates"] = _repeated_texts(store, manifest)
    if "download" in manifest["stages"]:
        found["placeholders"] = manifest["download"]["placeholders"]
        found["hosts"] = manifest["download"]["hosts"]
        found["repeated_images"] = repeated_images(store)
    if "certify" in manifest["stages"]:
        catalog = Catalog(store)
        graph = catalog.graph
        found["edges"] = edge_numbers(graph, catalog)
        found["mass"] = neighbor_mass(graph)
        found["targets"] = [batch_targets(graph, size) for size in _batch_sizes(len(graph))]
        similar, sizes = found["edges"]["similar"], [size for size in _batch_sizes(len(graph)) if size > 1]
        found["two_views"] = [row for size in sizes for row in two_views(graph, size, similar)]
        found["batches"] = batch_edges(graph)
        found["groups"] = groups(graph, catalog)
        found["suspicious"] = suspicious(catalog, found["edges"]["random_limit"])
        found["advice"] = advice(found)
        found["matches"] = matches(store, graph)
    return found


def _batch_sizes(total: int) -> list[int]:
    return [size for size in BATCHES if size <= total] or [total]


# -- counts


def funnel(store: Store, manifest: Json) -> list[Json]:
    """The samples from source to sidecar: a step's name, count and unit, what it lost by reason, and a note."""
    counts = {name: entry["counts"] for name, entry in manifest["stages"].items()}
    steps: list[Json] = []

    def step(name: str, unit: str, count: int, lost: dict[str, int], note: str = "") -> None:
        counted = {"name": name, "unit": unit, "count": count, "note": note}
        steps.append({**counted, "lost": dict(Counter(lost).most_common())})

    if "urls" in counts:
        listed = counts["urls"]
        step("rows of the list", "rows", listed["urls"] + listed["rejected"], {})
        step("usable URLs", "URLs", listed["urls"], _rejected_urls(store))
    if "download" in counts:
        failures = manifest["download"]["failures"]
        step("images", "images", counts["download"]["images"], failures)
    if "pack" in counts:
        step("rows of the source", "rows", counts["pack"]["rows"], {})
        step("packed images", "images", counts["pack"]["samples"], manifest["pack"]["rejected"])
    lacking = "usable caption"
    if "assign" in counts and "joined" in manifest["embeddings"]:
        lacking = "vector"
        step("samples", "samples", counts["scan"]["samples"], {})
        step("nodes (samples with a vector)", "nodes", counts["assign"]["nodes"], manifest["rejected"])
    elif "assign" in counts:
        scanned = counts["scan"]
        without = scanned.get("without_image", 0)
        usable = scanned["captions"] - counts["assign"].get("rejected", 0)
        step("samples", "samples", scanned["samples"], {}, f"{without:,} have no image" if without else "")
        step("usable captions", "captions", usable, manifest["rejected"])
        same = usable - counts["assign"]["nodes"]
        note = f"{same:,} captions are equal to an earlier one"
        step("nodes (distinct texts)", "nodes", counts["assign"]["nodes"], {}, note)
    if "vectors" in counts:
        step("ready vectors", "vectors", counts["vectors"]["nodes"], {})
    for stage, what in DELIVERED.items():
        if stage in counts:
            lost = {f"without a {lacking}": counts[stage]["without_node"]} if counts[stage]["without_node"] else {}
            step(f"samples {what}", "samples", counts[stage]["samples"] - counts[stage]["without_node"], lost)
    return steps


def _rejected_urls(store: Store) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name in sorted(store.sizes(REJECTED.format("urls"))):
        for one in store.table(name, ["reason"])["reason"].value_counts().to_pylist():
            counts[one["values"]] += one["counts"]
    return counts


def stage_times(store: Store, manifest: Json) -> list[Json]:
    """By finished stage: tasks, worker-seconds (sum over tasks), what they worked on, and that a worker-second."""
    rows = []
    for stage in (step.name for step in STEPS if step.name in manifest["stages"]):
        entry = manifest["stages"][stage]
        seconds = sum(record["seconds"] for record in records(store, stage).values())
        unit = next((name for name in UNITS if entry["counts"].get(name)), "")
        count = entry["counts"].get(unit, 0)
        rows.append(
            {
                "stage": stage,
                "tasks": entry["tasks"],
                "worker_seconds": round(seconds, 3),
                "unit": unit,
                "count": count,
                "per_second": count / seconds if seconds and count else None,
            }
        )
    return rows


def matches(store: Store, graph: SampleGraph) -> list[Json]:
    """What each list of match/ says of itself; current: it is of this graph."""
    paths = [output["path"] for record in records(store, MATCH.name).values() for output in record["outputs"]]
    found = []
    for path in paths:
        if path.startswith("match/") and store.exists(path):
            with reaching(store.display(path)), store.fs.open(store.path(path), "rb") as file:
                told = about(file)
            found.append({"path": path, **told, "current": told["graph"] == graph.fingerprint})
    return found


# -- duplicates


def _repeated_texts(store: Store, manifest: Json) -> Json:
    """Samples a node: how many nodes have 1, 2, 3-4, 5-8, ... samples, and the texts that most samples have."""
    counts = np.zeros(len(EDGES) - 1, np.int64)
    best = pl.DataFrame()
    for name in shards_of(store, manifest).with_nodes.names:
        table = pl.DataFrame(store.table(TEXTS.format(name), ["samples", "node", "text"]))
        counts += np.histogram(table["samples"].to_numpy(), EDGES)[0]
        several = table.select("samples", "node", "text").filter(pl.col("samples") > 1)
        best = pl.concat([best, several], how="diagonal")
        best = best.sort("samples", descending=True, maintain_order=True).head(SHOWN)
    texts = [one for one in best.to_dicts() if one["text"] is not None]
    return {"samples_per_node": _bins(counts)[1:], "texts": texts}


def groups(graph: SampleGraph, catalog: Catalog) -> Json:
    """Groups of near-duplicate nodes, as `mine --what duplicates` makes them: their number, the nodes in them, and of
    the largest GROUPS the first MEMBERS nodes, each with its similarity to the first."""
    label, _, truncated = duplicates.components(graph, DUPLICATE)
    sizes = np.bincount(label[~graph.gone], minlength=len(label))
    several = sizes[sizes > 1]
    largest = []
    for group in np.argsort(-sizes, kind="stable")[: min(GROUPS, len(several))]:
        nodes = np.flatnonzero((label == group) & ~graph.gone)[:MEMBERS]
        members = catalog.describe(nodes, duplicates.similarities(graph, nodes, np.full(len(nodes), nodes[0])))
        largest.append({"nodes": int(sizes[group]), "members": [vars(one) for one in members]})
    counts = {"groups": len(several), "nodes": int(several.sum()), "truncated": truncated}
    return {"threshold": DUPLICATE, **counts, "largest": largest}


def repeated_images(store: Store) -> list[Json]:
    """The files that most URLs gave, byte for byte: URLs, sha256, and the first one's key and caption.

    Memory: 8 bytes of each image's sha256, and what sorts them.
    """
    names = [name for name in store.sizes("shards") if name.endswith(".parquet")]
    names = sorted((name for name in names if not name.endswith(".graph.parquet")), key=by_number)

    def images(name: str, *columns: str) -> pl.DataFrame:
        rows = pl.DataFrame(store.table(name, [*columns, "status", "sha256"]))
        return rows.filter((pl.col("status") == "success") & pl.col("sha256").is_not_null())

    digits = pl.col("sha256").str.head(16).str.to_integer(base=16, dtype=pl.UInt64)
    hashes = [images(name).select(digits).to_series().to_numpy() for name in names]
    if not hashes:
        return []
    _, firsts, urls = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
    ends = np.cumsum([len(each) for each in hashes])
    shown = [at for at in np.lexsort((firsts, -urls))[:SHOWN].tolist() if urls[at] > 1]
    found = []
    for at in shown:
        number = int(np.searchsorted(ends, firsts[at], side="right"))
        row = int(firsts[at] - ends[number] + len(hashes[number]))
        first = images(names[number], "key", "caption").row(row, named=True)
        found.append({"urls": int(urls[at]), **{name: first[name] for name in ("sha256", "key", "caption")}})
    return found


# -- the graph


def edge_numbers(graph: SampleGraph, catalog: Catalog) -> Json:
    """Histograms: similarity of edges and of random pairs, of the k-th neighbour, in-degree; and what follows.

    random_limit: mean and two deviations of random pairs. similar: a similarity from which captions have something in
    common, which is that limit, or LOW where that is greater.
    """
    living, k = np.flatnonzero(~graph.gone), graph.k
    total = len(living)
    rng = np.random.default_rng(0)
    indegree = graph.in_degrees[living]
    last = np.zeros(len(BINS) - 1, np.int64)
    for first, _, values in graph.edge_blocks():
        values = values[~graph.gone[first : first + len(values)]]
        last += np.histogram(values[:, -1].astype(np.float32), BINS)[0]
    nodes = living[np.sort(rng.choice(total, min(EDGE_NODES, total), replace=False))]
    _, similarities = graph.neighbors(nodes)
    pairs = living[rng.integers(0, total, (PAIRS, 2))]
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    products = []
    for part in np.array_split(pairs, max(len(pairs) // 10_000, 1)):
        drawn, at = np.unique(part, return_inverse=True)  # a small store has each of them many times
        vectors, at = graph.embeddings(drawn), at.reshape(part.shape)
        products.append((vectors[at[:, 0]] * vectors[at[:, 1]]).sum(axis=1))
    random = np.clip(np.concatenate(products), -1, 1)
    hubs = np.lexsort((living, -indegree))[:SHOWN]
    deviation, limit = float(indegree.std()), float(random.mean() + 2 * random.std())
    return {
        "nodes": total,
        "k": k,
        "bins": BINS.round(4).tolist(),
        "edge_similarity": np.histogram(similarities, BINS)[0].tolist(),
        "edge_nodes": len(nodes),
        "random_similarity": np.histogram(random, BINS)[0].tolist(),
        "random_pairs": len(random),
        "random_mean": float(random.mean()),
        "random_deviation": float(random.std()),
        "random_limit": limit,
        "similar": max(LOW, limit),
        "last_similarity": last.tolist(),
        "near_duplicate_nodes": int((graph.nearest_similarities[living] >= DUPLICATE).sum()),
        "near_duplicate": DUPLICATE,
        "indegree": _bins(np.histogram(indegree, EDGES)[0]),
        "indegree_skewness": float(((indegree - k) ** 3).mean()) / deviation**3 if deviation else 0.0,
        "no_indegree": int((indegree == 0).sum()),
        "hubs": [
            {"node": hub.node, "indegree": int(indegree[at]), "text": hub.text}
            for at, hub in zip(hubs, catalog.describe(living[hubs], np.zeros(len(hubs))), strict=True)
        ],
    }


def _bins(counts: Array) -> list[Json]:
    """The bins of EDGES by the nodes in each, up to the last that has any."""
    full = counts[: int(np.flatnonzero(counts).max(initial=-1)) + 1]
    return [{"from": EDGES[i], "to": EDGES[i + 1] - 1, "nodes": int(count)} for i, count in enumerate(full)]


def batch_edges(graph: SampleGraph) -> list[Json]:
    """By batch size: edges an anchor in random batches and in those of NeighborBatchSampler, its groups by default."""
    from graphbuild.graph.batches.order import NeighborOrder

    rows = []
    for size in _batch_sizes(len(graph)):
        measured = NeighborOrder(graph, size, nodes=np.arange(len(graph)), group=min(8, size)).report(0, 200)
        names = ("random_edges_per_anchor", "edges_per_anchor", "random_anchors_with_edge", "anchors_with_edge")
        rows.append({"batch": size, **{name: measured[name] for name in names}})
    return rows
