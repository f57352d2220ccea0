"""Numbering in groups and partitions, against a dictionary over the texts in row order and one task's bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from graphbuild.errors import InputError
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.nodes import distinct
from graphbuild.nodes.number import NUMBER
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.store.layout import SCANNED, shard_name
from graphbuild.store.store import Json, Store, Writer
from tests.nodes.test_no_vector import column, content
from tests.nodes.test_plural import sample, write_tar

WORDS = ["red", "blue", "green", "old", "new", "small", "grey", "tall", "q", "hen", "tree", "car", "house", "man"]
SIZES = [7, 1, 0, 12, 5, 9, 3, 8, 20, 6]  # samples a tar


def captions_of(tar: int, size: int) -> list[str | None]:
    """Of a tar's samples; texts come again in the same and in other tars, some samples have none, one has no vector."""
    draw = random.Random(tar)
    return [
        None if draw.random() < 0.1 else " ".join(draw.choices(WORDS, k=draw.choice((1, 1, 2)))) for _ in range(size)
    ]


def write_tars(folder: Path, count: int) -> list[list[str | None]]:
    captions = [captions_of(tar, size) for tar, size in enumerate(SIZES[:count])]
    for tar, own in enumerate(captions):
        if not (folder / f"{tar:02}.tar").exists():
            write_tar(folder / f"{tar:02}.tar", [sample(caption) for caption in own])
    return captions


def embed(store: Path, tars: Path, letters: str, workers: int = 0, force: bool = False, **options: str) -> None:
    recipe = Recipe(embed=Embed(shards=f"{tars}/*.tar", encoder=letters, **options), index=Index(k=2))
    with Runner(workers=workers) as runner:
        run_verb("embed", recipe, Store(str(store)), runner, force=force)


def numbered(store: Path) -> dict[str, object]:
    """Shard -> what stage number tells of it."""
    done = records(Store(str(store)), "number").values()
    return {name: shard for record in done for name, shard in record["facts"]["shards"].items()}


def told(store: Path) -> dict[str, object]:
    """All that a store holds but the files and records of stage number and the manifest, which names their tasks."""
    parts = ("_state/number/", "manifest.json")
    found = {name: value for name, value in content(store).items() if not name.startswith(parts)}
    return {name: value for name, value in found.items() if not name.endswith(".gone.json")}  # whose seconds differ


def expected(captions: list[list[str | None]]) -> list[int | None]:
    first: dict[str, int] = {}
    every = [caption for own in captions for caption in own]
    return [None if text is None or "q" in text.split() else first.setdefault(text, len(first)) for text in every]


@pytest.mark.parametrize("captions_a_group", [1, 10, 25])
def test_groups_give_the_numbers_of_a_dictionary_and_the_bytes_of_one_task(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch, captions_a_group: int
) -> None:
    captions = write_tars(tmp_path / "tars", len(SIZES))
    embed(tmp_path / "one", tmp_path / "tars", letters)
    monkeypatch.setattr(distinct, "GROUP", captions_a_group)
    embed(tmp_path / "many", tmp_path / "tars", letters)
    assert len(records(Store(str(tmp_path / "one")), "number")) == 1
    held = records(Store(str(tmp_path / "many")), "number")
    sizes = [sum(shard["samples"] for shard in record["facts"]["shards"].values()) for record in held.values()]
    assert sum(sizes) == sum(SIZES)
    assert len(sizes) >= sum(SIZES) / captions_a_group > 1 or captions_a_group == 1
    assert all(size <= captions_a_group or size in SIZES for size in sizes)
    assert column(tmp_path / "many", "samples", "node") == expected(captions)
    assert told(tmp_path / "many") == told(tmp_path / "one")
    assert numbered(tmp_path / "many") == numbered(tmp_path / "one")
    nodes = [np.load(path) for path in sorted(tmp_path.glob("many/_state/number/*.nodes.npy"))]
    np.testing.assert_array_equal(np.concatenate(nodes), np.load(tmp_path / "one/_state/number/nodes.npy"))
    counts = [np.load(path) for path in sorted(tmp_path.glob("many/_state/number/*.counts.npy"))]
    np.testing.assert_array_equal(np.concatenate(counts), np.load(tmp_path / "one/_state/number/counts.npy"))
    assert not (tmp_path / "many/_work_number").exists()
    assert not verify_store(Store(str(tmp_path / "many"))).problems


def test_samples_of_several_captions_are_numbered_alike(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    for tar in range(6):
        own = [sample(None, texts=draw.choices(WORDS, k=draw.choice((1, 2, 3)))) for _ in range(tar + 2)]
        write_tar(tmp_path / f"tars/{tar:02}.tar", own)
    embed(tmp_path / "one", tmp_path / "tars", letters, caption_member="json:texts")
    monkeypatch.setattr(distinct, "GROUP", 12)
    embed(tmp_path / "many", tmp_path / "tars", letters, caption_member="json:texts")
    held = records(Store(str(tmp_path / "many")), "number").values()
    assert len(held) > 3
    assert all(
        sum(shard["texts"] for shard in record["facts"]["shards"].values() if "texts" in shard) < 20 for record in held
    )
    assert told(tmp_path / "many") == told(tmp_path / "one")
    assert numbered(tmp_path / "many") == numbered(tmp_path / "one")


def test_a_stop_anywhere_in_it_loses_finished_tasks_alone(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tars(tmp_path / "tars", len(SIZES))
    embed(tmp_path / "one", tmp_path / "tars", letters)
    monkeypatch.setattr(distinct, "GROUP", 25)
    write = Writer.array
    files: list[str] = []

    def killed(writer: Writer, name: str, values: np.ndarray[Any, Any], *, durable: bool = True) -> None:
        if name.startswith(("_work_number", "_state/number")):
            files.append(name)
            if len(files) == 4:  # so each attempt ends one task or two
                os.kill(os.getpid(), signal.SIGKILL)
        write(writer, name, values, durable=durable)

    monkeypatch.setattr(Writer, "array", killed)
    kills, seen = 0, set()
    while status := in_a_child(lambda: embed(tmp_path / "many", tmp_path / "tars", letters)):
        assert status == signal.SIGKILL
        kills += 1
        seen |= {path.parent.name for path in (tmp_path / "many/_state").glob("*/*.done.json")}
    assert kills > 5
    assert {"split", "unique", "mark"} <= seen
    assert told(tmp_path / "many") == told(tmp_path / "one")


def in_a_child(do: Callable[[], object]) -> int:
    """The wait status of a fork of this process that does it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        do()
        status = 0
    except Exception:  # noqa: BLE001 whatever it is must not run the rest of the tests twice
        traceback.print_exc()
    finally:
        os._exit(status)


def test_tars_added_keep_old_numbers_whether_one_task_made_them_or_many(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_tars(tmp_path / "tars", 4)
    embed(tmp_path / "store", tmp_path / "tars", letters)
    old = expected(captions)
    for count, captions_a_group in ((6, 15), (9, 15), (10, 1_000)):
        captions = write_tars(tmp_path / "tars", count)
        monkeypatch.setattr(distinct, "GROUP", captions_a_group)
        embed(tmp_path / "store", tmp_path / "tars", letters)
        nodes = column(tmp_path / "store", "samples", "node")
        assert nodes == expected(captions)
        assert nodes[: len(old)] == old
        embed(tmp_path / f"anew{count}", tmp_path / "tars", letters)
        assert content(tmp_path / "store") == content(tmp_path / f"anew{count}")
        old = expected(captions)


def test_captions_of_tars_that_are_gone_count_for_no_node(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_tars(tmp_path / "tars", len(SIZES))
    for captions_a_group in (1_000, 10):
        monkeypatch.setattr(distinct, "GROUP", captions_a_group)
        embed(tmp_path / f"of {captions_a_group}", tmp_path / "tars", letters)
    for tar in (0, 4, 8):
        (tmp_path / f"tars/{tar:02}.tar").unlink()
    for captions_a_group in (1_000, 10):
        monkeypatch.setattr(distinct, "GROUP", captions_a_group)
        embed(tmp_path / f"of {captions_a_group}", tmp_path / "tars", letters, force=True)
    there = [text for tar, own in enumerate(captions) for text in own if tar not in (0, 4, 8) and text]
    texts, counts = (column(tmp_path / "of 10", "nodes", name) for name in ("text", "samples"))
    assert counts == [there.count(text) for text in texts]
    assert 0 in counts
    assert len(records(Store(str(tmp_path / "of 10")), "number")) > 5
    assert told(tmp_path / "of 10") == told(tmp_path / "of 1000")
    assert numbered(tmp_path / "of 10") == numbered(tmp_path / "of 1000")


def test_a_store_that_one_task_numbered_stays_as_it_is(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tars(tmp_path / "tars", 4)
    embed(tmp_path / "store", tmp_path / "tars", letters)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(distinct, "GROUP", 5)
    embed(tmp_path / "store", tmp_path / "tars", letters)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_task_holds_no_more_than_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, shards, group = 100_000, 40, 2_000_000
    monkeypatch.setattr(distinct, "GROUP", group)
    ids = np.random.default_rng(0).integers(0, 3_000_000, (shards, size))
    hashes = np.random.default_rng(1).integers(1, 2**63, (3_000_000, 2), dtype=np.uint64)

    def write(task: Task, store: Store, writer: Writer) -> Json:
        mine = hashes[ids[int(task.name)]]
        writer.table(SCANNED.format(task.name), pa.table({"hash_high": mine[:, 0], "hash_low": mine[:, 1]}))
        counts = {"samples": size, "captions": size}
        return {"counts": counts, "shards": {task.name: {"samples": size, "tar": None}}}

    def measured(task: Task, store: Store, writer: Writer) -> Json:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        facts = next(stage for stage in stages if stage.name == task.stage).run(task, store, writer)
        held[task.stage].append(memory("VmHWM") - before)
        return facts

    def memory(what: str) -> int:
        """Bytes, of files that are mapped too."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    tasks = [Task(stage="scan", name=shard_name(number)) for number in range(shards)]
    stages = (distinct.SPLITTING, distinct.UNIQUES, distinct.MARKING, NUMBER)
    held: dict[str, list[int]] = {stage.name: [] for stage in stages}
    store, recipe = Store(str(tmp_path)), Recipe(embed=Embed(captions="list.tsv", preset="cc3m"))
    with Runner(workers=0) as runner:
        runner.run(Stage(name="scan", title="", plan=lambda *_: tasks, run=write), recipe, store)
        for stage in stages:
            runner.run(replace(stage, run=measured), recipe, store)
    own = 120e6  # what libraries keep, whatever the size
    most = {stage: (max(peaks) - own) / group for stage, peaks in held.items()}
    assert all(len(peaks) == 2 for peaks in held.values())
    assert max(most.values()) < distinct.TASK_BYTES, most
    nodes = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("_state/number/*.nodes.npy"))])
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(nodes, first.argsort().argsort()[inverse].ravel())


def test_where_no_sample_of_any_group_has_a_caption_it_is_said(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distinct, "GROUP", 2)
    lines = "".join(json.dumps({"caption": text}) + "\n" for text in ("", " ", ""))
    (tmp_path / "list.jsonl").write_text(lines)
    with pytest.raises(InputError, match="no row has a caption"), Runner(workers=0) as runner:
        run_verb(
            "embed", Recipe(embed=Embed(captions=str(tmp_path / "list.jsonl"))), Store(str(tmp_path / "s")), runner
        )


@pytest.mark.slow
def test_workers_give_the_same_bytes(tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "tars", len(SIZES))
    embed(tmp_path / "one", tmp_path / "tars", letters)
    monkeypatch.setattr(distinct, "GROUP", 10)
    embed(tmp_path / "many", tmp_path / "tars", letters, workers=2)
    assert told(tmp_path / "many") == told(tmp_path / "one")
    assert numbered(tmp_path / "many") == numbered(tmp_path / "one")
