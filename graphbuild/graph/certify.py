"""Stage certify: measures the finished graph's recall against brute force, checks its structure, refuses a bad graph.

Nodes are drawn at random and searched again, a first few and then some more, until the interval of recall is narrow
and does not hold the floor (`next_look`); it is one that may be looked at so often (recall/interval.py).
Each time one task draws: it copies the nodes' vectors and lists, and scores the lists. Then a task for each range of
shards looks there for nodes that are nearer, so all read the vectors once, and none much; at the first time it checks
every list of its range too. How recall is measured, its time and memory: recall/recall.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from graphbuild.errors import QualityError, StageError
from graphbuild.graph.recall.certificate import FAULTS, list_faults
from graphbuild.graph.recall.interval import interval
from graphbuild.graph.recall.recall import BLOCK_ROWS, COSINE, certificate_of, judged, sampled, unlisted
from graphbuild.graph.tasks import gone_nodes, living_nodes, nodes_entry, ranges_of
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, finished_tasks, records
from graphbuild.runner.state import require
from graphbuild.store.layout import NEIGHBORS, SIMILARITIES, VECTORS, shard_name
from graphbuild.store.sharded import Array, living_blocks, node_array
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

FIRST_NODES, FIRST_PAIRS = 640, 2e7  # searched before the first look; more, where that many pairs allow it
LEAST_FACTOR = 1.25  # by which the nodes searched grow from look to look
AFRESH_NODES = 1_250
EXACT_FLOOR = 0.999
SLACK = 0.01  # between the recall that an approximate engine is set for and the floor
DRAWN, DRAWN_PARTS = "_state/certify/{}.{}.npy", ("nodes", "vectors", "lists", "scores")  # of `_draw`


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest, index = nodes_entry(store), recipe.index
    done, finished = records(store, "certify"), finished_tasks(store, "certify")
    settings = {"sample": index.recall_sample, "seed": index.seed}
    built = {
        "graph": manifest["graph"]["fingerprint"],
        "embeddings": manifest["embeddings"]["fingerprint"],
        "min_recall": floor_of(recipe, manifest["graph"]["engine"]),
    }

    def task(**more: object) -> Task:
        return Task(stage="certify", name=shard_name(len(tasks)), settings=settings, built={**built, **more})

    tasks: list[Task] = []
    if "certify" in manifest["stages"] and "slice" in next(iter(done.values()), {"built": ()})["built"]:
        for number in range(len(done)):  # by a graphbuild that always searched the whole sample
            tasks.append(task(slice=[number, len(done)]))
        if all(map(finished, tasks)):
            return tasks
        tasks = []
    ranges = ranges_of(shards_of(store, manifest).with_nodes)
    begin, end = 0, first_look(min(index.recall_sample, node_count(manifest)), node_count(manifest))
    before = done.get(shard_name(0), {"built": {}})["built"]
    if built.items() <= before.items() and "nodes" in before:  # as it was begun, if with other FIRST_NODES
        end = before["nodes"][1]
    while end > begin:
        first, look = len(tasks), {"width": index.recall_width, "nodes": [begin, end], "draw": shard_name(len(tasks))}
        tasks.append(task(**look, shards=None))
        if not finished(tasks[-1]):
            break
        for shards in ranges:
            tasks.append(task(**look, shards=shards))
        if not all(map(finished, tasks[first:])):
            break
        begin, end = end, next_look(store, manifest, [done[task.name] for task in tasks])
    return tasks


def first_look(sample: int, nodes: int) -> int:
    """How many nodes are searched before recall is looked at."""
    return min(max(FIRST_NODES, int(FIRST_PAIRS / nodes)), sample)


def next_look(store: Store, manifest: Json, done: Sequence[Json]) -> int:
    """How many nodes must have been searched when recall is looked at again; those that are, when that is enough: when
    its interval is as narrow as was asked for and does not hold the floor, or nothing is left of the sample.

    The interval of an exact graph, whose lists are proved, may hold the floor where no list lacks anything: it tells of
    files that changed, and of machines that compute wrongly.
    """
    recalls, built = measured(store, done)[0], done[-1]["built"]
    low, high = interval(recalls, living_nodes(manifest))
    proved = manifest["graph"]["engine"] == "exact" and recalls.min() == 1
    wide, n = high - low > built["width"], int(built["nodes"][1])
    if not wide and (proved or low >= built["min_recall"] or high < built["min_recall"]):
        return n
    factor = min(1.1 * ((high - low) / built["width"]) ** 2, 2.0) if wide and built["width"] else 2.0
    return min(math.ceil(n * max(factor, LEAST_FACTOR)), int(done[0]["settings"]["sample"]), node_count(manifest))


def floor_of(recipe: Recipe, engine: str) -> float:
    if recipe.index.min_recall is not None:
        return recipe.index.min_recall
    return EXACT_FLOOR if engine == "exact" else round(recipe.index.recall - SLACK, 6)


def run(task: Task, store: Store, writer: Writer) -> Json:
    manifest = store.manifest()
    nodes, (begin, end) = node_count(manifest), task.built["nodes"]
    if task.built["shards"] is None:
        drawn = _draw(store, manifest, sampled(task.settings["sample"], task.settings["seed"], nodes)[begin:end])
        for what, values in zip(DRAWN_PARTS, drawn, strict=True):
            writer.array(DRAWN.format(task.name, what), values)
        return {}
    some = range(*task.built["shards"])
    for shard in map(shards_of(store, manifest).with_nodes.__getitem__, some if begin == 0 else ()):
        own = np.arange(shard.first_node, shard.first_node + shard.nodes)
        check_lists(own, np.array(store.array(NEIGHBORS.format(shard.name))).astype(np.int64), nodes)
        check_similarities(own, np.array(store.array(SIMILARITIES.format(shard.name))))
    drawn = [store.array(DRAWN.format(task.built["draw"], what)) for what in DRAWN_PARTS]
    return {"nearer": [row[np.isfinite(row)].tolist() for row in _nearer(store, manifest, some, *drawn)]}


def _draw(store: Store, manifest: Json, ids: Array) -> list[Array]:
    """Of drawn nodes [n] those that a sample has; their vectors float16 [n, d], lists uint32 [n, k], and the scores
    float64 [n, k] of these lists."""
    shards = shards_of(store, manifest).with_nodes
    if manifest.get("gone"):
        begins = shards.column("first_node")
        numbers, place = np.unique(np.searchsorted(begins, ids, side="right") - 1, return_inverse=True)
        gone = [gone_nodes(store, [shards.names[number]]) for number in numbers.tolist()]
        ids = ids[[not gone[at][node - begins[numbers[at]]] for node, at in zip(ids, place, strict=True)]]
    vectors, lists = (node_array(store, shards, pattern, few=True) for pattern in (VECTORS, NEIGHBORS))
    raw, listed = vectors.take(ids), lists.take(ids)
    check_lists(ids, listed.astype(np.int64), node_count(manifest))
    return [ids, raw, listed, COSINE.pairs(vectors, COSINE.prepare(raw), listed.astype(np.int64))]


def _nearer(store: Store, manifest: Json, some: range, ids: Array, raw: Array, listed: Array, scores: Array) -> Array:
    """As `unlisted`, of the nodes of some shards that a sample has, for nodes that were drawn."""
    shards = shards_of(store, manifest).with_nodes
    vectors = node_array(store, shards, VECTORS)
    blocks = vectors.blocks(BLOCK_ROWS, some)
    if manifest.get("gone"):
        gone = gone_nodes(store, shards.names[some.start : some.stop])
        blocks = living_blocks(blocks, gone, int(vectors.starts[some.start]))
    return unlisted(blocks, COSINE.prepare(raw), ids, listed.astype(np.int64), scores.min(axis=1, keepdims=True))


def measured(store: Store, done: Sequence[Json]) -> tuple[Array, Array]:
    """Recall and mean deficit [n] of the nodes that these tasks have drawn and searched, in the order of their draw."""
    found: list[tuple[Array, Array]] = []
    for draw in (record["task"] for record in done if record["built"]["shards"] is None):
        searched = (record for record in done if record["built"]["draw"] == draw != record["task"])
        nearer = [list(chain(*row)) for row in zip(*(each["facts"]["nearer"] for each in searched), strict=True)]
        others = np.full((len(nearer), max(map(len, nearer))), -np.inf)
        for row, scores in zip(others, nearer, strict=True):
            row[: len(scores)] = scores
        found.append(judged(np.array(store.array(DRAWN.format(draw, "scores"))), [others]))
    recalls, deficits = (np.concatenate(each) for each in zip(*found, strict=True))
    return recalls, deficits


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    manifest = store.manifest()
    floor = floor_of(recipe, manifest["graph"]["engine"])
    certificate = certificate_of(manifest["graph"]["k"], living_nodes(manifest), *measured(store, done))
    if certificate["recall"] < floor:
        raise under_floor(certificate, floor, store)
    return {"recall": certificate}


def under_floor(certificate: Json, floor: float, store: Store) -> QualityError:
    low, high, worst = (certificate[name] for name in ("recall_95_low", "recall_95_high", "worst_node_recall"))
    if store.manifest()["graph"]["engine"] == "exact":  # then files changed, or the machine computes wrongly
        better = f"see what is damaged by `graphbuild verify {store.url}`, and build it anew by `index --force`"
    else:
        better = f"build a better one with `graphbuild index {store.url} --engine exact --force`, or a higher --recall"
    return QualityError(
        f"{store.url}: recall@{certificate['k']} is {certificate['recall']:.6f} (95%: {low:.4f} to {high:.4f}; worst "
        f"node {worst:.4f}), under the floor of {floor}",
        f"the graph is kept in graph/ for inspection; {better}; or lower --min-recall, only if that recall is good "
        "enough for you",
    )


def require_graph(store: Store) -> None:
    """ConfigError when the index is not finished; QualityError when only its recall is under the floor."""
    manifest = store.manifest()
    if "certify" not in manifest["stages"]:
        refuse_under_floor(store, manifest)
    require(store, "certify", "index")


def refuse_under_floor(store: Store, manifest: Json) -> None:
    """QualityError when a graph without a certificate was measured whole, and its recall is under the floor."""
    done = list(records(store, "certify").values())
    if "search" not in manifest["stages"] or not done or "draw" not in done[0]["built"]:
        return
    same = all(record["built"]["graph"] == manifest["graph"]["fingerprint"] for record in done)
    tasks = 1 + len(ranges_of(shards_of(store, manifest).with_nodes))
    if not same or len(done) % tasks:
        return
    certificate = certificate_of(manifest["graph"]["k"], living_nodes(manifest), *measured(store, done))
    floor = done[0]["built"]["min_recall"]
    if certificate["recall"] < floor and next_look(store, manifest, done) == done[-1]["built"]["nodes"][1]:
        raise under_floor(certificate, floor, store)


STAGE = Stage(name="certify", title="recall", plan=plan, run=run, finish=finish, entries=("recall",), grows=True)


def certify_afresh(store: Store, sample: int, seed: int) -> Json:
    """The certificate of another draw of at most AFRESH_NODES nodes."""
    manifest = store.manifest()
    drawn = _draw(store, manifest, sampled(min(sample, AFRESH_NODES), seed, node_count(manifest)))
    nearer = _nearer(store, manifest, range(len(shards_of(store, manifest).with_nodes)), *drawn)
    return certificate_of(manifest["graph"]["k"], living_nodes(manifest), *judged(drawn[-1], [nearer]))


def check_lists(ids: Array, listed: Array, nodes: int) -> None:
    """StageError when a neighbour list [n, k] of nodes `ids` names the node itself, one twice, or one out of range."""
    for fault, rows in list_faults(ids, listed, nodes).items():
        if rows.any():
            raise StageError(
                f"the neighbour list of node {ids[np.argmax(rows)]} {FAULTS[fault]} ({rows.sum()} lists do)",
                "rebuild with `graphbuild index --force`",
            )


def check_similarities(ids: Array, similarities: Array) -> None:
    """StageError when a list's similarities [n, k] are not finite, descending cosines."""
    values = similarities.astype(np.float32)
    ordered = (values[:, 1:] <= values[:, :-1]).all(axis=1) & (np.abs(values) <= 1.001).all(axis=1)
    if not ordered.all():
        raise StageError(
            f"the similarities of node {ids[np.argmin(ordered)]} are not descending cosines ({(~ordered).sum()} lists)",
            "rebuild with `graphbuild index --force`",
        )
