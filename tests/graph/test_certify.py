"""The certificate against float64 brute force: exact graphs pass, however alike their vectors; wrong ones never do."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphbuild.errors import GraphbuildError, QualityError
from graphbuild.graph import certify, tasks
from graphbuild.graph.certify import certify_afresh
from graphbuild.graph.recall.recall import sampled
from graphbuild.graph.tasks import ranges_of
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task, digest, records, sealed, state_path, write_manifest
from graphbuild.store.sharded import ShardedArray
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Store


def built(folder: Path, vectors: np.ndarray, shard_size: int = 10_000, **index: object) -> Store:
    if not (folder / "vectors.npy").exists():
        np.save(folder / "vectors.npy", vectors.astype(np.float32))
    embed = Embed(vectors=str(folder / "vectors.npy"), shard_size=shard_size)
    recipe = Recipe(embed=embed, index=Index(**index))  # type: ignore[arg-type]
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner)
    return store


def cone(nodes: int, width: int, noise: float) -> np.ndarray:
    """Vectors whose cosines are within about noise^2 of 1."""
    return 1 + noise * np.random.default_rng(0).standard_normal((nodes, width))


def cosines(store: Store) -> np.ndarray:
    """Of the stored vectors, float64 [N, N]; -inf with itself."""
    stored = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("nodes/*.npy"))]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    found = stored @ stored.T
    np.fill_diagonal(found, -np.inf)
    return found


def replace_lists(store: Store, lists: np.ndarray) -> None:
    """Put other neighbours [N, k] in place of a graph's."""
    begin = 0
    for path in sorted(Path(store.url).glob("graph/*.neighbors.npy")):
        rows = len(np.load(path))
        np.save(path, lists[begin : begin + rows].astype(np.uint32))
        begin += rows


@pytest.mark.parametrize(("nodes", "width", "noise"), [(60, 768, 1e-3), (400, 384, 1e-3), (400, 1024, 3e-3)])
def test_an_exact_graph_of_vectors_that_are_nearly_equal_is_certified(
    tmp_path: Path, nodes: int, width: int, noise: float
) -> None:
    store = built(tmp_path, cone(nodes, width, noise), k=5, engine="exact")
    certificate = store.manifest()["recall"]
    assert certificate["recall"] == certificate["worst_node_recall"] == 1
    listed = np.take_along_axis(cosines(store), np.load(tmp_path / "store/graph/00000.neighbors.npy").astype(int), 1)
    deficit = np.sort(cosines(store), axis=1)[:, -5:].mean() - listed.mean()
    assert certificate["mean_similarity_deficit"] == pytest.approx(deficit, abs=1e-9)


@pytest.mark.parametrize("noise", [1e-3, 3e-3, 0.1, 10.0])
def test_one_wrong_neighbour_costs_its_share_however_alike_the_vectors_are(tmp_path: Path, noise: float) -> None:
    store = built(tmp_path, cone(200, 96, noise), k=5, engine="exact")
    similar = cosines(store)
    order = np.argsort(-similar, axis=1)
    lists = order[:, :5].copy()
    spoiled = np.arange(0, 200, 3)
    lists[spoiled, 0] = order[spoiled, -2]  # the farthest but itself
    replace_lists(store, lists)
    certificate = certify_afresh(store, 200, seed=0)
    assert certificate["recall"] == pytest.approx(1 - len(spoiled) / 1_000, abs=1e-9)
    missed = (similar[spoiled, order[spoiled, 0]] - similar[spoiled, order[spoiled, -2]]).sum() / 1_000
    assert certificate["mean_similarity_deficit"] == pytest.approx(missed, abs=2e-9)


@pytest.mark.parametrize("noise", [1e-3, 10.0])
def test_lists_of_the_farthest_nodes_are_refused_by_the_command(tmp_path: Path, noise: float) -> None:
    vectors = cone(200, 96, noise)
    store = built(tmp_path, vectors, k=5, engine="exact", min_recall=0.5)
    replace_lists(store, np.argsort(cosines(store), axis=1)[:, 1:6])
    with pytest.raises(QualityError, match=r"recall@5 is 0\.000000"):
        built(tmp_path, vectors, k=5, engine="exact", min_recall=0.6)


def test_equal_vectors_are_ties_whichever_of_them_is_listed(tmp_path: Path) -> None:
    vectors = np.repeat(np.random.default_rng(3).standard_normal((20, 16)), 12, axis=0)
    store = built(tmp_path, vectors, k=5, engine="exact")
    others = np.arange(240)[:, None] // 12 * 12 + (np.arange(240)[:, None] + np.arange(7, 12)) % 12
    replace_lists(store, others)
    assert certify_afresh(store, 240, seed=0)["recall"] == 1


@pytest.mark.parametrize("bad", [False, True])
def test_memory_stays_whatever_the_graph(tmp_path: Path, bad: bool) -> None:
    store = built(tmp_path, np.random.default_rng(5).standard_normal((20_000, 8)), k=5, engine="exact")
    if bad:
        replace_lists(store, (np.arange(20_000)[:, None] + 7_000 + np.arange(5)) % 20_000)
    tracemalloc.start()
    try:
        certificate = certify_afresh(store, 300, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (certificate["recall"] < 0.01) == bad
    assert peak < 24e6


NODES, K = 1_500, 6


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few nodes at the first look, and ranges of few shards."""
    monkeypatch.setattr(tasks, "PART_NODES", 400)
    for name, value in (("FIRST_NODES", 100), ("FIRST_PAIRS", 0)):
        monkeypatch.setattr(certify, name, value)


def poor(folder: Path, share: float, **index: Any) -> Store:
    """A graph of which that share of the nodes list their farthest ones in half of their places; not certified."""
    store = built(folder, np.random.default_rng(8).standard_normal((NODES, 16)), 150, k=K, engine="exact", **index)
    order = np.argsort(-cosines(store), axis=1)
    lists, spoiled = order[:, :K].copy(), np.random.default_rng(1).random(NODES) < share
    lists[spoiled, ::2] = order[spoiled, -2 : -2 - K // 2 : -1]
    replace_lists(store, lists)
    return store


def certificate(folder: Path, **index: Any) -> dict[str, Any]:
    store = built(folder, np.empty(0), 150, k=K, engine="exact", **index)
    return {**store.manifest()["recall"], "tasks": store.manifest()["stages"]["certify"]["tasks"]}


@pytest.mark.usefixtures("small")
def test_the_certificate_is_brute_force_s_over_the_nodes_drawn_whatever_the_ranges_and_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = poor(tmp_path, 0.3, min_recall=0.0, recall_sample=1_000)
    found = certificate(tmp_path, min_recall=0.001, recall_sample=1_000, recall_width=0.0)
    similar = cosines(store)
    listed = np.concatenate([np.load(path) for path in sorted(Path(store.url).glob("graph/*.neighbors.npy"))])
    scores, true = np.take_along_axis(similar, listed.astype(int), 1), -np.sort(-similar, axis=1)[:, :K]
    recalls, deficits = (scores >= true[:, -1:]).mean(axis=1), (true - -np.sort(-scores, axis=1)).mean(axis=1)
    drawn = sampled(1_000, 0, NODES)
    assert (found["sampled_nodes"], found["tasks"]) == (1_000, 5 * (1 + 4)), "looks at 100, 200, 400, 800 and 1,000"
    assert found["recall"] == pytest.approx(recalls[drawn].mean(), abs=1e-9)
    assert found["worst_node_recall"] == recalls[drawn].min() < 1
    assert found["mean_similarity_deficit"] == pytest.approx(deficits[drawn].mean(), abs=2e-9)
    assert found["recall_95_low"] < recalls.mean() < found["recall_95_high"]
    monkeypatch.setattr(tasks, "PART_NODES", NODES)
    other = certificate(tmp_path, min_recall=0.002, recall_sample=1_000, recall_width=0.0)
    assert other == {**found, "tasks": 5 * 2}
    monkeypatch.setattr(certify, "FIRST_NODES", 1_000)
    assert certificate(tmp_path, min_recall=0.003, recall_sample=1_000, recall_width=0.0) == {**found, "tasks": 2}
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("certify/*")}
    monkeypatch.setattr(certify, "FIRST_NODES", 700)  # as a newer graphbuild may have it
    assert certificate(tmp_path, min_recall=0.003, recall_sample=1_000, recall_width=0.0) == {**found, "tasks": 2}
    assert done == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("certify/*")}


@pytest.mark.usefixtures("small")
def test_no_more_nodes_are_searched_once_recall_is_narrow_and_off_the_floor(tmp_path: Path) -> None:
    poor(tmp_path, 0.1, min_recall=0.0)  # 0.95
    loose = certificate(tmp_path, min_recall=0.5, recall_width=0.2)
    assert loose["sampled_nodes"] == 100
    narrow = certificate(tmp_path, min_recall=0.5, recall_width=0.05)
    assert 100 < narrow["sampled_nodes"] < NODES
    assert narrow["recall_95_high"] - narrow["recall_95_low"] <= 0.05
    near = certificate(tmp_path, min_recall=0.93, recall_width=0.2)
    assert near["sampled_nodes"] > 100, "the floor is in the interval of the first look"
    assert near["recall_95_low"] >= 0.93
    with pytest.raises(QualityError, match=r"under the floor of 0\.99"):
        certificate(tmp_path, min_recall=0.99, recall_width=0.2)
    last = records(Store(str(tmp_path / "store")), "certify").popitem()[1]["built"]["nodes"]
    assert last[1] == 100, "a bad graph is seen as soon"
    whole = certificate(tmp_path, min_recall=0.5, recall_width=0.0)
    assert whole["sampled_nodes"] == NODES
    assert whole["recall_95_low"] == pytest.approx(whole["recall_95_high"], abs=1e-6), "of all nodes it is known"


@pytest.mark.usefixtures("small")
def test_an_exact_graph_is_searched_no_longer_where_no_list_lacks_anything(tmp_path: Path) -> None:
    store = built(tmp_path, np.random.default_rng(8).standard_normal((NODES, 16)), 150, k=K, engine="exact")
    searched = {}
    for name, width in (("whole", 0.1), ("spoiled", 0.11)):
        built(tmp_path, np.empty(0), 150, k=K, engine="exact", recall_width=width, min_recall=0.9995)
        searched[name] = store.manifest()["recall"]["sampled_nodes"]
        order, node = np.argsort(-cosines(store), axis=1), sampled(10_000, 0, NODES)[3]
        lists = order[:, :K].copy()
        lists[node, 0] = order[node, -2]
        replace_lists(store, lists)
    assert searched == {"whole": 100, "spoiled": NODES}


@pytest.mark.usefixtures("small")
def test_a_certificate_that_was_stopped_goes_on_and_a_task_reads_the_vectors_of_its_own_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor(tmp_path, 0.3, min_recall=0.0, recall_sample=400)
    whole = certificate(tmp_path, min_recall=0.001, recall_sample=400, recall_width=0.0)
    store = Store(str(tmp_path / "store"))
    before = {name: record["checksum"] for name, record in records(store, "certify").items()}
    run, ran, read = certify.run, [], []
    blocks = ShardedArray.blocks

    def counting(self: ShardedArray, rows: int, shards: range | None = None) -> Any:
        for first, block in blocks(self, rows, shards):
            read.append((ran[-1], first // 150))
            yield first, block

    def stopping(task: Task, *rest: Any) -> Any:
        ran.append(task.name)
        if ran.count("00007") == 1 and task.name == "00007":
            raise RuntimeError("power")
        return run(task, *rest)

    monkeypatch.setattr(ShardedArray, "blocks", counting)
    object.__setattr__(certify.STAGE, "run", stopping)
    try:
        built(tmp_path, np.empty(0), 150, k=K, engine="exact", min_recall=0.0, recall_sample=400, recall_width=0.5)
        with pytest.raises(GraphbuildError, match="power"):
            certificate(tmp_path, min_recall=0.001, recall_sample=400, recall_width=0.0)
        begun = len(ran)
        assert certificate(tmp_path, min_recall=0.001, recall_sample=400, recall_width=0.0) == whole
    finally:
        object.__setattr__(certify.STAGE, "run", run)
    assert ran[begun] == "00007"
    assert not {"00000", "00004", "00006"} & set(ran[begun:])
    assert {name: record["checksum"] for name, record in records(store, "certify").items()} == before
    ranges = ranges_of(shards_of(store, store.manifest()))
    assert ranges == [[0, 3], [3, 5], [5, 8], [8, 10]]
    for name, shard in read:
        assert shard in range(*ranges[(int(name) - 1) % 5]), "the tasks of a look are a draw and one a range"


def test_a_graph_that_an_earlier_version_certified_stays_as_it_is(tmp_path: Path) -> None:
    store = built(tmp_path, np.random.default_rng(8).standard_normal((300, 16)), k=K, engine="exact")
    new = records(store, "certify")["00000"]["built"]
    built_of = {name: new[name] for name in ("graph", "embeddings", "min_recall")} | {"slice": [0, 1]}
    task = Task(stage="certify", name="00000", settings={"sample": 10_000, "seed": 0}, built=built_of)
    for path in Path(store.url).glob("_state/certify/*"):
        path.unlink()
    facts = {"nodes": 300, "recall": 300.0, "worst": 1.0, "deficit": 0.0}
    record = {"task": "00000", "fingerprint": task.fingerprint, "settings": dict(task.settings), "inputs": {}}
    store.write_json(
        state_path("certify", "00000"), sealed({**record, "built": built_of, "outputs": [], "facts": facts})
    )
    manifest = store.manifest()
    entry = {"fingerprint": digest([["00000", task.fingerprint]]), "tasks": 1, "counts": {}, "task": "00000"}
    manifest["stages"]["certify"] = entry
    write_manifest(store, manifest)
    before = {path: path.read_bytes() for path in Path(store.url).rglob("*.json")}
    built(tmp_path, np.empty(0), k=K, engine="exact")
    assert {path: path.read_bytes() for path in Path(store.url).rglob("*.json")} == before
    built(tmp_path, np.empty(0), k=K, engine="exact", min_recall=0.5)
    assert json.loads((Path(store.url) / "_state/certify/00000.done.json").read_text())["built"]["draw"] == "00000"
