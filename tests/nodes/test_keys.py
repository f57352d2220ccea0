"""Vectors joined by key in groups and partitions, against a dictionary over all keys and against one task's bytes."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.errors import InputError
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.nodes import distinct, keys
from graphbuild.nodes.number import NUMBER
from graphbuild.nodes.samples import REJECTED
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.store.layout import SCANNED, shard_name
from graphbuild.store.store import Json, Store, Writer
from tests.nodes.test_beside import write_keys, write_tar, write_vectors
from tests.nodes.test_distinct import in_a_child
from tests.nodes.test_no_vector import column, content

D = 8
Lists = list[list[str]]
Given = Sequence[Sequence[str | None]]
STAGES = (distinct.SPLITTING, distinct.UNIQUES, distinct.MARKING, NUMBER)


# -- by a dictionary


def expected(tars: Given, files: Given) -> tuple[list[int], dict[int, list[tuple[int, str | None, str]]]] | str:
    """The place of each sample's vector, and of each file what no sample has; or what is said of a fault."""
    vectors = [(key, file, row) for file, own in enumerate(files) for row, key in enumerate(own)]
    samples = [(key, tar) for tar, own in enumerate(tars) for key in own]
    times = Counter(key for key, _, _ in vectors if key is not None)
    if twice := sorted(key for key, count in times.items() if count > 1):
        at = [f"{file}.parquet" for key, file, _ in vectors if key == twice[0]]
        return f"two vectors have the key {twice[0]!r}, in {at[0]} and {at[1]} ({len(twice):,} keys are there more"
    of_samples = Counter(key for key, _ in samples)
    if twice := sorted(str(key) for key, count in of_samples.items() if count > 1 and key in times):
        at = [f"{tar}.tar" for key, tar in samples if key == twice[0]]
        return f"two samples have the key {twice[0]!r}, in {at[0]} and {at[1]}"
    if not times.keys() & of_samples.keys():
        shown = [", ".join([repr(one[0]) for one in side if one[0] is not None][:3]) for side in (vectors, samples)]
        return f"Keys of vectors: {shown[0]}; of samples: {shown[1]}"
    place = {key: number for number, (key, _, _) in enumerate(vectors) if key is not None}
    left: dict[int, list[tuple[int, str | None, str]]] = defaultdict(list)
    for key, file, row in vectors:
        if key not in of_samples:
            left[file].append((row, key, "no key" if key is None else "no sample has its key"))
    return [place.get(key, -1) for key, _ in samples], dict(left)


def joined(folder: Path, tars: Given, files: Given) -> tuple[list[int], dict[int, list[tuple[int, str | None, str]]]]:
    """What the stages make of files of scan with these keys, beside files of vectors with those."""
    for number, own in enumerate(files):
        write_vectors(folder / f"{number}.npy", np.ones((len(own), 1), np.float16))
        write_keys(folder / f"{number}.parquet", list(own))

    def write(task: Task, store: Store, writer: Writer) -> Json:
        own = tars[int(task.name)]
        writer.table(SCANNED.format(task.name), pa.table({"key": pa.array(own, pa.string())}))
        tar = {"name": f"{int(task.name)}.tar"}
        return {"counts": {"samples": len(own)}, "shards": {task.name: {"samples": len(own), "tar": tar}}}

    given = {"shards": str(folder), "vectors": f"{folder}/*.npy", "vector_keys": f"{folder}/*.parquet"}
    tasks = [Task(stage="scan", name=shard_name(number)) for number in range(len(tars))]
    store, recipe = Store(str(folder / "store")), Recipe(embed=Embed.model_validate(given))
    with Runner(workers=0) as runner:
        for stage in (Stage(name="scan", title="", plan=lambda *_: tasks, run=write), *STAGES):
            runner.run(stage, recipe, store)
    (record,) = records(store, "number").values()
    assert record["task"] == "all"
    left = {}
    for path in sorted(folder.glob("store/rejected/number/*.parquet")):
        told = pq.read_table(path)
        assert set(told["content"].to_pylist()) == {f"{int(path.stem)}.npy"}
        rows = [told[name].to_pylist() for name in ("position", "key", "reason")]
        left[int(path.stem)] = list(zip(*rows, strict=True))
    places = np.load(folder / "store/_state/number/places.npy")
    has = places >= 0
    nodes = np.load(folder / "store/_state/number/nodes.npy")
    np.testing.assert_array_equal(nodes, np.where(has, np.cumsum(has) - 1, -1))
    np.testing.assert_array_equal(np.load(folder / "store/_state/number/counts.npy"), np.ones(has.sum()))
    assert record["facts"]["rows"] == [len(own) for own in files]
    assert record["facts"]["counts"] == {
        "samples": len(places),
        "nodes": has.sum(),
        "vectors": sum(map(len, files)),
        "vectors_without_sample": sum(map(len, left.values())),
    }
    return places.tolist(), left


def cut(things: Sequence[Any], draw: random.Random, most: int) -> list[list[Any]]:
    """In lists of 1 to so many."""
    lists, begin = [], 0
    while begin < len(things):
        size = draw.randint(1, most)
        lists.append(list(things[begin : begin + size]))
        begin += size
    return lists


@pytest.mark.parametrize("seed", range(12))
def test_keys_are_joined_as_by_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"{draw.choice(('', 'ä/', 'k'))}{number}" for number in draw.sample(range(1_000), 90)]
    samples, vectors = names[:70], [*names[20:], None, None, None]
    if seed % 3 == 1:  # a key of several vectors, near each other or far
        vectors += draw.choices(names[40:], k=draw.choice((1, 4)))
    if seed % 3 == 2:  # of several samples, with a vector or without
        samples += draw.choices(names[:30], k=draw.choice((1, 4)))
    if seed == 9:
        vectors = ["", *(f"x{name}" for name in names), None]
    draw.shuffle(samples)
    draw.shuffle(vectors)
    tars, files = cut(samples, draw, 12), cut(vectors, draw, 30)
    tars.insert(2, [])
    said = expected(tars, files)
    for group in (draw.randint(6, 20), draw.randint(20, 60), 1_000):
        monkeypatch.setattr(distinct, "GROUP", group)
        folder = tmp_path / str(group)
        if isinstance(said, str):
            with pytest.raises(InputError) as error:
                joined(folder, tars, files)
            assert said in str(error.value).replace(f"{folder}/", "")
        else:
            assert joined(folder, tars, files) == said


def test_a_table_that_is_written_in_parts_has_the_bytes_of_one(tmp_path: Path) -> None:
    rows = 2 * keys.TABLE_ROWS + 12_345
    columns = [np.arange(rows), np.arange(rows).astype(str), ["no key", None, "é"] * (rows // 3 + 1), ["v.npy"] * rows]
    table = pa.table([column[:rows] for column in columns], schema=REJECTED)
    with Writer(Store(str(tmp_path))) as writer:
        writer.table("one.parquet", table)
        keys._write_left("parts.parquet", (table[begin : begin + 70_001] for begin in range(0, rows, 70_001)), writer)
        keys.move_left({"moved.parquet": ["parts.parquet"]}, writer.store, writer)
    one = (tmp_path / "one.parquet").read_bytes()
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "moved.parquet").read_bytes() == one


# -- whole stores


class Source:
    """Tars, and files of vectors with keys in another order, among them some of no sample, and none."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.vectors = folder, dict[str | None, np.ndarray[Any, Any]]()
        self.tars: Lists = []
        self.files: list[list[str | None]] = []
        sizes = (7, 1, 12, 5, 9, 3, 8)
        names = [f"k{number:03}" for number in range(sum(sizes) + 10)]
        random.Random(0).shuffle(names)
        for size in sizes:
            self.add_tar([names.pop() for _ in range(size)])
        given: list[str | None] = [key for own in self.tars for key in own][4:] + names + [None, None]
        random.Random(1).shuffle(given)
        for begin, end in ((0, 11), (11, 12), (12, 37), (37, len(given))):
            self.add_file(given[begin:end])

    def add_tar(self, own: list[str]) -> None:
        write_tar(self.folder / f"tars/{len(self.tars)}.tar", own)
        self.tars.append(own)

    def add_file(self, own: list[str | None]) -> None:
        self.files.append([])
        self.change_file(len(self.files) - 1, own)

    def change_file(self, number: int, own: list[str | None]) -> None:
        values = np.random.default_rng(number + len(own)).normal(size=(len(own), D))
        write_vectors(self.folder / f"emb/{number}.npy", values)
        write_keys(self.folder / f"meta/{number}.parquet", own)
        self.files[number] = own
        self.vectors |= dict(zip(own, values, strict=True))

    def embed(self, store: str, workers: int = 0, *, force: bool = False) -> Path:
        given = {"vectors": f"{self.folder}/emb", "vector_keys": f"{self.folder}/meta"}
        recipe = Recipe(embed=Embed.model_validate({"shards": f"{self.folder}/tars", **given}))
        with Runner(workers=workers) as runner:
            run_verb("embed", recipe, Store(str(self.folder / store)), runner, force=force)
        return self.folder / store

    def check(self, store: Path) -> None:
        """All that the dictionary says of it."""
        said = expected(self.tars, self.files)
        assert not isinstance(said, str)
        assert np.load(store / "_state/number/places.npy").tolist() == said[0]
        names = [key for own in self.tars for key in own]
        assert column(store, "samples", "key") == names
        nodes = iter(range(len(names)))
        assert column(store, "samples", "node") == [None if at < 0 else next(nodes) for at in said[0]]
        units = np.array([self.vectors[key] for key, at in zip(names, said[0], strict=True) if at >= 0])
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        found = np.concatenate([part for path in sorted(store.glob("nodes/*.npy")) if len(part := np.load(path))])
        np.testing.assert_allclose(found, units, atol=1e-3)
        assert column(store, "rejected/number", "key") == [key for own in said[1].values() for _, key, _ in own]
        assert not (store / "_work_number").exists()
        assert not verify_store(Store(str(store))).problems


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.mark.parametrize("group", [1, 10, 30])
def test_groups_give_the_bytes_of_one_task(source: Source, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    one = source.embed("one")
    source.check(one)
    tasks: Counter[str] = Counter()
    run = distinct.run_mark

    def counted(task: Task, store: Store, writer: Writer) -> Json:
        tasks["vectors" if task.hints["group"].pieces else "samples"] += 1
        assert task.hints["group"].rows <= max(group, 12)
        return run(task, store, writer)

    monkeypatch.setattr(distinct, "GROUP", group)
    monkeypatch.setattr("graphbuild.job.steps.STEPS", steps_with(counted))
    many = source.embed("many")
    assert tasks["vectors"] >= sum(map(len, source.files)) / group
    assert tasks["samples"] >= sum(map(len, source.tars)) / max(group, 12)
    assert content(many) == content(one)


def steps_with(run_mark: Callable[[Task, Store, Writer], Json]) -> tuple[Any, ...]:
    from graphbuild.job.steps import STEPS

    marking = replace(distinct.MARKING, run=run_mark)
    return tuple(replace(step, stage=marking) if step.name == "mark" else step for step in STEPS)


def test_what_is_added_changed_or_gone_is_as_one_task_has_it(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(store: str) -> None:
        for group in (1_000, 15):
            monkeypatch.setattr(distinct, "GROUP", group)
            source.embed(f"{store} {group}", force=store == "forced")
        of_one, of_many = (source.folder / f"{store} {group}" for group in (1_000, 15))
        assert content(of_many) == content(of_one)
        source.check(of_many)

    grow("store")
    source.add_tar(["new0", "new1", "new2"])
    grow("store")
    source.add_file(["new1", "stranger", None, source.tars[0][0]])  # of a sample of old without a vector too
    grow("store")
    fresh = source.embed("fresh")
    assert content(fresh) == content(source.folder / "store 15")
    (source.folder / "store 15").rename(source.folder / "forced 15")
    (source.folder / "store 1000").rename(source.folder / "forced 1000")
    source.change_file(2, [*reversed(source.files[2]), "another"])
    grow("forced")
    (source.folder / f"tars/{len(source.tars) - 1}.tar").unlink()
    source.tars.pop()
    grow("forced")
    assert content(source.embed("anew")) == content(source.folder / "forced 15")


def test_a_store_that_one_task_joined_stays_as_it_is_and_grows_in_groups(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = source.embed("store")

    def state() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in store.rglob("*") if path.is_file()}

    before = state()
    monkeypatch.setattr(distinct, "GROUP", 5)
    source.embed("store")
    assert state() == before
    source.add_tar(["late"])
    source.add_file(["late"])
    source.embed("store")  # without --force
    source.check(store)
    assert content(store) == content(source.embed("fresh"))


def test_a_stop_anywhere_in_it_loses_finished_tasks_alone(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    one = source.embed("one")
    monkeypatch.setattr(distinct, "GROUP", 25)
    write = Writer.file
    files: list[str] = []

    def killed(writer: Writer, name: str, *, durable: bool = True) -> Any:
        if name.startswith(("_work_number", "_state/number", "rejected/number")):
            files.append(name)
            if len(files) == 4:  # so each attempt ends one task or two
                os.kill(os.getpid(), signal.SIGKILL)
        return write(writer, name, durable=durable)

    kills, seen = 0, set()
    monkeypatch.setattr(Writer, "file", killed)
    while kills < 30 and (status := in_a_child(lambda: source.embed("many"))):
        assert status == signal.SIGKILL
        kills += 1
        done = {path.parent.name for path in (source.folder / "many/_state").glob("*/*.done.json")}
        seen |= done
        if len(records(Store(str(source.folder / "many")), "mark")) == 5:
            break  # number alone writes as many files
    assert kills > 5
    assert {"split", "unique", "mark"} <= seen
    monkeypatch.setattr(Writer, "file", write)
    assert content(source.embed("many")) == content(one)


@pytest.mark.slow
def test_workers_give_the_same_bytes(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    one = source.embed("one")
    monkeypatch.setattr(distinct, "GROUP", 10)
    assert content(source.embed("many", workers=2)) == content(one)


def test_tars_and_files_in_order_are_joined_a_shard_after_the_other(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, own in enumerate(source.tars):
        write_vectors(source.folder / f"ordered/{number}.npy", np.array([[len(key) + number, 1.0] for key in own]))
    monkeypatch.setattr(distinct, "GROUP", 1)
    recipe = Recipe(embed=Embed(shards=f"{source.folder}/tars", vectors=f"{source.folder}/ordered"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, Store(str(source.folder / "store")), runner)
    places = np.load(source.folder / "store/_state/number/places.npy")
    np.testing.assert_array_equal(places, np.arange(sum(map(len, source.tars))))
    assert not (source.folder / "store/_state/split").exists()


# -- what it takes


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "group"), [(2_000_000, 1_000_000), (1_000_000, 2_000_000)])
def test_a_task_holds_no_more_than_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, group: int
) -> None:
    monkeypatch.setattr(distinct, "GROUP", group)
    held: dict[str, list[int]] = defaultdict(list)

    def measured(run: Callable[[Task, Store, Writer], Json]) -> Callable[[Task, Store, Writer], Json]:
        def measure(task: Task, store: Store, writer: Writer) -> Json:
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            facts = run(task, store, writer)
            held[task.stage].append(memory("VmHWM") - before)
            return facts

        return measure

    def memory(what: str) -> int:
        """Bytes, of files that are mapped too."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    monkeypatch.setattr(f"{__name__}.STAGES", tuple(replace(stage, run=measured(stage.run)) for stage in STAGES))
    names = np.char.zfill(np.arange(rows + rows // 3).astype(str), 9)
    given = names[np.random.default_rng(0).permutation(len(names))[:rows]]
    tars = [names[begin : begin + 10_000].tolist() for begin in range(0, rows, 10_000)]
    files = [given[begin : begin + 250_000].tolist() for begin in range(0, rows, 250_000)]
    places, left = joined(tmp_path, tars, files)
    of = {name: at for at, name in enumerate(given.tolist())}
    assert places == [of.get(name, -1) for name in names[:rows].tolist()]
    assert sum(map(len, left.values())) == places.count(-1)
    own = 120e6  # what libraries keep, whatever the size
    most = {stage: (max(peaks) - own) / group for stage, peaks in held.items()}
    assert len(held) == (4 if group < rows else 1)
    assert max(most.values()) < distinct.TASK_BYTES, most
