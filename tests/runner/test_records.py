"""Records of many tasks: read once by a driver while they stay the same, and anew as soon as they change."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest

from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner import stage as stages
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import records, write_together
from graphbuild.store import sharded
from graphbuild.store.sharded import ShardedArray
from graphbuild.store.store import Json, Store, Writer

CONTENTS = [b'{"a": 1}', b'{"a": [1', b"2]}", b'{"b": 2}, {"c": 3}', b"", b"[1]", b"null", b'{"a": "\xff"}', b"{} {}"]


class Counting(Store):
    """Counts how often each record is read."""

    def read_jsons(self, sizes: Mapping[str, int]) -> list[Json | None]:
        self.__dict__.setdefault("read", Counter()).update(list(sizes))
        return super().read_jsons(sizes)

    def reads(self) -> Counter[str]:
        found: Counter[str] = self.__dict__.pop("read", Counter())
        return found


def settle(folder: Path) -> None:
    """The files there have been as they are for a while."""
    for path in folder.rglob("*.json"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))


def test_what_changed_is_read_again_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Counting(str(tmp_path))
    for name in "abcd":
        store.write_json(f"_state/s/{name}.done.json", {"task": name, "settings": {"k": 1}})
    settle(tmp_path)
    first = records(store, "s")
    assert first == {name: {"task": name, "settings": {"k": 1}} for name in "abcd"}
    assert store.reads().total() == 4
    assert records(store, "s") == first
    assert store.reads().total() == 0
    store.write_json("_state/s/b.done.json", {"task": "B", "settings": {"k": 1}})  # of the same size
    store.remove("_state/s/c.done.json")
    (tmp_path / "_state/s/d.done.json").write_bytes(b'{"task"')
    found = records(store, "s")
    assert set(store.reads()) == {"_state/s/b.done.json", "_state/s/d.done.json"}
    assert {name: record["task"] for name, record in found.items()} == {"a": "a", "b": "B"}
    assert "d.done.json is damaged" in caplog.text


def test_a_record_that_may_have_changed_within_a_tick_of_the_clock_is_not_kept(tmp_path: Path) -> None:
    store = Counting(str(tmp_path))
    path = tmp_path / "_state/s/a.done.json"
    store.write_json("_state/s/a.done.json", {"task": 1})
    before = path.stat()
    assert records(store, "s")["a"] == {"task": 1}
    with path.open("r+b") as file:  # neither size, nor inode, nor date tell
        file.write(path.read_bytes().replace(b"1", b"2"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert records(store, "s")["a"] == {"task": 2}


def test_no_more_records_are_kept_than_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "KEPT", 5)
    monkeypatch.setattr(stages, "_kept", {})
    store = Counting(str(tmp_path))
    for stage in "xyz":
        for number in range(3):
            store.write_json(f"_state/{stage}/{number}.done.json", {"task": number})
    settle(tmp_path)
    for stage in "xyz":
        assert len(records(store, stage)) == 3
        assert sum(map(len, stages._kept.values())) <= 5


@pytest.mark.parametrize("order", [CONTENTS, CONTENTS[::-1], CONTENTS[:1] * 2_500, CONTENTS[1:4], []])
def test_objects_that_are_read_together_are_those_that_each_file_holds(order: list[bytes], tmp_path: Path) -> None:
    store, expected = Store(str(tmp_path)), []
    for number, content in enumerate(order):
        (tmp_path / f"{number}.json").write_bytes(content)
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        expected.append(value if isinstance(value, dict) else None)
    assert store.read_jsons({f"{number}.json": len(content) for number, content in enumerate(order)}) == expected


def test_a_command_with_nothing_to_do_reads_each_record_once(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_kept", {})
    (tmp_path / "list.csv").write_text("caption\nred\nblue\nold\nnew\ngreen\ngrass\n")
    source = {"captions": str(tmp_path / "list.csv"), "shard_size": 2, "encoder": letters}
    recipe, store = Recipe(embed=Embed.model_validate(source), index=Index(k=2)), Counting(str(tmp_path / "store"))
    with Runner(workers=0) as runner:
        run_verb("run", recipe, store, runner)
    store.reads()
    settle(tmp_path / "store")
    stages._kept.clear()
    with Runner(workers=0) as runner:
        run_verb("run", recipe, store, runner)
    found = store.reads()
    assert {path.split("/")[1] for path in found} >= {"scan", "number", "texts", "encode", "assign", "search", "export"}
    again = {path: count for path, count in found.items() if count > 1}
    assert again in ({}, {"_state/scan/list.done.json": 2}), "one record of the source tells what it was made from"
    assert runner.ran == set()


def test_of_many_files_of_an_object_store_a_listing_is_asked_for_in_place_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharded, "LISTED_FROM", 3)
    store = Store("memory://many/files")
    for number in range(6):
        Writer(store).array(f"codes/{number}.npy", np.full((4, 2), number))
    asked: list[str] = []
    info = type(store.fs).info
    monkeypatch.setattr(type(store.fs), "info", lambda fs, path, **more: asked.append(path) or info(fs, path, **more))

    def opened() -> ShardedArray:
        return ShardedArray(store, [str(number) for number in range(6)], [4] * 6, "codes/{}.npy")

    opened().table()  # fetches the copies
    asked.clear()
    found = opened()
    found.table()
    assert len(set(asked)) == 1, "the first tells how wide all are"
    np.testing.assert_array_equal(found.take(np.arange(24))[:, 0], np.repeat(np.arange(6), 4))
    monkeypatch.setattr(sharded, "LISTED_FROM", 6)
    opened().table()
    assert len(set(asked)) == 6
    monkeypatch.setattr(sharded, "LISTED_FROM", 3)
    with fsspec.open("memory://many/files/codes/3.npy", "wb") as file:  # other content has another listing
        np.save(file, np.full((4, 2), 7))
    again = opened()
    again.table()
    np.testing.assert_array_equal(again.take(np.array([13])), [[7, 7]])


@pytest.mark.parametrize("place", ["{}", "memory://together/{}"])
def test_records_of_a_finished_stage_come_from_one_file_as_long_as_they_are_what_it_holds(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "MANY", 3)
    monkeypatch.setattr(stages, "_kept", {})
    store, path = Counting(place.format(tmp_path)), "_state/s/{}.done.json"
    for name in "abcde":
        store.write_json(path.format(name), {"task": name, "settings": {"k": 1}, "facts": {"é": [1, None]}})
    settle(tmp_path)
    first = records(store, "s")
    write_together(store, "s", first)

    def read() -> set[str]:
        stages._kept.clear()  # as another process
        store.reads()
        found = records(store, "s")
        assert found == {name: store.read_json(path.format(name)) for name in found}
        return {name.split("/")[-1][0] for name in store.reads()}

    assert read() == set()
    store.write_json(path.format("b"), {"task": "B", "settings": {"k": 1}, "facts": {"é": [1, None]}})
    store.remove(path.format("c"))
    store.write_json(path.format("f"), {"task": "f"})
    assert read() == {"b", "f"}
    assert list(records(store, "s")) == list("abdef")
    whole = store.read_bytes("_state/s/all.records")
    for damaged in (whole.replace(b"null", b"true"), whole[:-9], b""):
        store.write_bytes("_state/s/all.records", damaged)
        assert read() == set("abdef"), "each from its own file"
    store.remove("_state/s/all.records")
    assert read() == set("abdef")


def test_a_stage_of_many_tasks_leaves_that_file_and_few_leave_none(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "MANY", 3)
    monkeypatch.setattr(stages, "_kept", {})
    (tmp_path / "list.csv").write_text("caption\nred\nblue\nold\nnew\ngreen\ngrass\n")
    source = {"captions": str(tmp_path / "list.csv"), "shard_size": 2, "encoder": letters}
    recipe, store = Recipe(embed=Embed.model_validate(source), index=Index(k=2)), Counting("memory://many/records")
    with Runner(workers=0) as runner:
        run_verb("run", recipe, store, runner)
    together = {path.split("/")[-2] for path in store.fs.find(store.path("_state")) if path.endswith("all.records")}
    assert together == {"texts", "encode", "assign", "search", "export"}
    store.reads()
    stages._kept.clear()
    with Runner(workers=0) as runner:
        run_verb("run", recipe, store, runner)
    assert not together & {path.split("/")[1] for path in store.reads()}
    assert runner.ran == set()
