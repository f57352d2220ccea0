"""A URL list cut by several tasks: against the rows as they were made, and against what one task writes of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.job.steps import step_of
from graphbuild.job.verbs import run_step
from graphbuild.recipe import Download, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import records
from graphbuild.sources import pieces
from graphbuild.sources.download import COUNT, URLS
from graphbuild.sources.tables import TableSpec
from graphbuild.sources.tables.reader import can_be_cut, read_piece
from graphbuild.store.store import Store, Writer

ROWS, SHARD = 20_000, 1_700
BAD = {0, 5, 1_699, 1_700, 9_999, 15_000, ROWS - 1}  # rows without a URL


def row(number: int) -> tuple[str, str]:
    """A URL and a caption; with quotes, which are text, and of many lengths."""
    caption = f'"{number} ' + "dög and cat " * (number % 57)
    return ("" if number in BAD else f"http://x.invalid/{number}.jpg"), caption.strip()


def tsv(path: Path, numbers: range, *, header: bytes = b"") -> None:
    lines = ["\t".join(row(number)).encode() for number in numbers]
    path.write_bytes(header + b"\r\n".join(lines[:100]) + b"\r\n" + b"\n".join(lines[100:]))


def jsonl(path: Path, numbers: range) -> None:
    lines = [json.dumps(dict(zip(("url", "caption"), row(number), strict=True))) for number in numbers]
    lines[3_000] = "{broken"
    lines[12_000] = json.dumps({"url": "http://x.invalid/a", "caption": "b", "later": "a key the first rows lack"})
    path.write_text("\ufeff" + "\n".join(lines) + "\n")


def parquet(path: Path, numbers: range) -> None:
    urls, captions = zip(*map(row, numbers), strict=True)
    pq.write_table(pa.table({"url": urls, "caption": captions, "more": list(numbers)}), path, row_group_size=1_000)


def csv(path: Path, numbers: range) -> None:
    lines = [f'"http://x.invalid/{number}","{number}\nof two lines{" and more" * 40}"' for number in numbers]
    path.write_text("url,caption\n" + "\n".join(lines))


def cut(store: Path, urls: str, **options: Any) -> None:
    recipe = Recipe(download=Download(urls=urls, shard_size=SHARD, **options))
    with Runner(workers=0) as runner:
        for stage in (COUNT, URLS):
            run_step(step_of(stage), recipe, Store(str(store)), runner)


def written(store: Path, folder: str) -> list[dict[str, Any]]:
    return [found for path in sorted(store.glob(f"{folder}/*.parquet")) for found in pq.read_table(path).to_pylist()]


CASES: dict[str, tuple[Callable[..., None], dict[str, Any], int]] = {
    "preset.tsv": (tsv, {"preset": "cc12m"}, 3),
    "names.tsv": (lambda path, numbers: tsv(path, numbers, header=b"\xef\xbb\xbfurl\tcaption\n"), {}, 3),
    "list.jsonl": (jsonl, {}, 3),
    "list.parquet": (parquet, {}, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_give_the_shards_and_rejected_rows_of_one_task(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, options, least = CASES[name]
    write(tmp_path / name, range(ROWS))
    cut(tmp_path / "one", str(tmp_path / name), **options)
    size = (tmp_path / name).stat().st_size
    monkeypatch.setattr(pieces, "PIECE_BYTES", max(size // 5, 2 << 20) if name != "list.parquet" else size // 5)
    cut(tmp_path / "many", str(tmp_path / name), **options)
    assert list(records(Store(str(tmp_path / "one")), "urls")) == ["list"]
    assert len(records(Store(str(tmp_path / "many")), "urls")) >= least
    assert not list((tmp_path / "many/_state").glob("count/*"))
    for folder in ("_state/urls", "rejected/urls"):
        assert written(tmp_path / "many", folder) == written(tmp_path / "one", folder)
    files = [path.name for path in sorted(tmp_path.glob("one/_state/urls/*.parquet"))]
    assert files == [path.name for path in sorted(tmp_path.glob("many/_state/urls/*.parquet"))]
    for file in files:
        both = [pq.read_metadata(tmp_path / store / "_state/urls" / file).num_rows for store in ("one", "many")]
        assert both[0] == both[1]
    broken = {3_000, 12_000} if name == "list.jsonl" else set()
    kept = [number for number in range(ROWS) if number not in BAD | broken]
    urls = written(tmp_path / "many", "_state/urls")
    assert [(found["position"], found["url"], found["caption"]) for found in urls] == [(n, *row(n)) for n in kept]
    assert [found["position"] for found in written(tmp_path / "many", "rejected/urls")] == sorted(BAD | broken)


@pytest.mark.parametrize("parts", [2, 3, 7, 100])
@pytest.mark.parametrize("ends", [("\n", ""), ("\r\n", "\r\n"), ("\n\n", "\n")])
def test_each_line_is_in_the_part_in_which_it_begins(tmp_path: Path, parts: int, ends: tuple[str, str]) -> None:
    rows = [(f"http://{'x' * (number % 13)}", f"ü {number}") for number in range(60)]
    (tmp_path / "list.tsv").write_text(ends[0].join(map("\t".join, rows)) + ends[1], newline="")
    spec = TableSpec(path=str(tmp_path / "list.tsv"), columns={"url": "url", "caption": "caption"}, preset="cc12m")
    assert can_be_cut(spec)
    found = [list(read_piece(spec, part, parts, keep_others=True)) for part in range(parts)]
    told = [chunk.rows.select(["url", "caption"]).to_pylist() for chunks in found for chunk in chunks]
    assert [tuple(one.values()) for each in told for one in each] == rows
    assert sum(bool(chunks) for chunks in found) > min(parts, 20) / 2


def test_a_list_of_many_files_of_which_some_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    jsonl(lists / "a.jsonl", range(12_500))
    csv(lists / "b.csv", range(6_000))
    parquet(lists / "c.parquet", range(3_000))
    (lists / "d.jsonl").write_text("")
    cut(tmp_path / "one", f"{lists}/*")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 << 20)
    cut(tmp_path / "many", f"{lists}/*")
    of_files = Counter(file for file, _, _ in records(Store(str(tmp_path / "many")), "urls")["list"]["facts"]["pieces"])
    assert of_files[0] > 1
    assert (lists / "b.csv").stat().st_size > 2 << 20
    assert (of_files[1], of_files[2], of_files[3]) == (1, 1, 1)
    parquet(lists / "e.parquet", range(2_000))  # added: it gets the next shards, and no other changes
    before = {path.name: path.read_bytes() for path in tmp_path.glob("many/_state/urls/*.parquet")}
    cut(tmp_path / "many", f"{lists}/*")
    assert (
        before.items() <= {path.name: path.read_bytes() for path in tmp_path.glob("many/_state/urls/*.parquet")}.items()
    )
    cut(tmp_path / "one", f"{lists}/*")
    for folder in ("_state/urls", "rejected/urls"):
        assert written(tmp_path / "many", folder) == written(tmp_path / "one", folder)


def test_a_list_that_one_task_has_read_stays_so_and_a_stop_loses_finished_pieces_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tsv(tmp_path / "list.tsv", range(ROWS))
    options = {"urls": str(tmp_path / "list.tsv"), "preset": "cc12m"}
    cut(tmp_path / "one", **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*") if path.is_file()}
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 << 20)
    cut(tmp_path / "one", **options)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*") if path.is_file()}
    write, stops = Writer.table, 0

    def stopped(writer: Writer, name: str, table: pa.Table, **more: Any) -> None:
        if name == "_state/urls/00007.parquet" and not stops:
            raise KeyboardInterrupt
        write(writer, name, table, **more)

    monkeypatch.setattr(Writer, "table", stopped)
    with pytest.raises(KeyboardInterrupt):
        cut(tmp_path / "many", **options)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("many/_state/*/*") if path.is_file()}
    assert {path.parent.name for path in kept} == {"count", "urls"}
    stops = 1
    cut(tmp_path / "many", **options)
    assert {p: p.stat().st_mtime_ns for p in kept if p.parent.name == "urls"}.items() <= kept.items()
    assert written(tmp_path / "many", "_state/urls") == written(tmp_path / "one", "_state/urls")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*") if path.is_file()}
    cut(tmp_path / "many", **options)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "many").rglob("*") if path.is_file()}
