"""Selections: what each rule leaves, and that whatever takes one sees the join of its parquet file with the store.

References: the lists that the tests make, polars over the store's files, tarfile.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError, InputError
from graphbuild.export.sidecar import Sidecar
from graphbuild.graph.lists.duplicates import near_duplicates
from graphbuild.graph.select import rules as module
from graphbuild.graph.select.rules import select, select_store
from graphbuild.graph.select.selection import Selection
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import GraphDataset, NeighborBatchSampler, graph_webdataset
from graphbuild.torch.graph_loader import GraphLoader
from tests.conftest import MakeOnce

K = 4
WORDS = ["hen", "bird", "tree", "house", "car", "dog", "cat", "man", "sea", "sun", "bus", "cup"]
SHARDS, SAMPLES = 3, 40


def caption(row: int) -> str:
    return f"{WORDS[row % 12]} {WORDS[row // 12 % 12]} {WORDS[row * 7 % 11]}"


def jpeg(row: int) -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((96, 96)).filter(ImageFilter.GaussianBlur(row % 5))
    content = io.BytesIO()
    image.save(content, "JPEG")
    return content.getvalue()


def write_tars(folder: Path, *, plural: bool) -> None:
    folder.mkdir()
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for row in range(number * SAMPLES, (number + 1) * SAMPLES):
                texts = [caption(row)] + [f"{caption(row)} seen {WORDS[row % 5]}", f"the {caption(row)}"] * plural
                texts = [] if row % 40 == 39 else texts  # no usable caption
                facts = {"captions": texts, "uid": f"{row:032x}", "similarity": row / 100, "width": 100 + row}
                for extension, content in (("jpg", jpeg(row)), ("json", json.dumps(facts).encode())):
                    info = tarfile.TarInfo(f"{row:06}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module", params=["one caption", "three captions"])
def store(request: pytest.FixtureRequest, make_once: MakeOnce, letters: str) -> Path:
    plural = request.param == "three captions"

    def build(folder: Path) -> None:
        write_tars(folder / "tars", plural=plural)
        run(folder / "store", "embed", shards=f"{folder}/tars/*.tar", caption_member="json:captions", encoder=letters)
        run(folder / "store", "index", k=K)
        run(folder / "store", "export")

    return make_once(f"selected, {request.param}", build) / "store"


def run(store: Path, verb: str, *, force: bool = False, **changes: Any) -> None:
    changes = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
    opened = Store(str(store))
    with Runner(workers=0) as runner:
        run_verb(verb, resolve(opened, verb, changes), opened, runner, force=force)


def samples(store: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((store / "samples").glob("*"))], how="diagonal")


def graph_of(store: Path) -> SampleGraph:
    return SampleGraph.open(str(store))


def left(store: Path, **rules: Any) -> list[int]:
    table = select(graph_of(store), **rules).table().to_pydict()
    assert table["row"] == list(range(SHARDS * SAMPLES))
    assert all((why is None) == keep for why, keep in zip(table["why"], table["keep"], strict=True))
    return [row for row, keep in enumerate(table["keep"]) if keep]


WITH_NODE = [row for row in range(SHARDS * SAMPLES) if row % 40 != 39]


# Rules


def test_lists_are_of_keys_rows_or_uids(store: Path, tmp_path: Path) -> None:
    rows = [3, 5, 39, 77, 119]
    usable = [3, 5, 77]
    (tmp_path / "keys.txt").write_text("".join(f"{row:06}\n" for row in rows))
    (tmp_path / "uids.txt").write_text("".join(f"{row:032x}\n" for row in rows))
    np.save(tmp_path / "rows.npy", np.array(rows))
    np.save(tmp_path / "uids.npy", np.array([(0, row) for row in rows], "u8,u8"))
    pl.DataFrame({"key": [f"{row:06}" for row in rows]}).write_parquet(tmp_path / "keys.parquet")
    pl.DataFrame({"uid": [f"{row:032x}" for row in rows], "other": 1}).write_parquet(tmp_path / "uids.parquet")
    pl.DataFrame({"row": [*rows, 7], "keep": [True] * 5 + [False]}).write_parquet(tmp_path / "kept.parquet")
    for name in ("keys.txt", "uids.txt", "rows.npy", "uids.npy", "keys.parquet", "uids.parquet", "kept.parquet"):
        assert left(store, keep=[str(tmp_path / name)]) == usable, name
        dropped = [7] if name == "kept.parquet" else usable
        assert left(store, drop=[str(tmp_path / name)]) == [row for row in WITH_NODE if row not in dropped], name


def test_lists_as_windows_and_pandas_write_them_are_read_too(store: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("000003\n000005\n", "utf-8-sig")
    pl.DataFrame({"row": [3.0, 5.0]}).write_parquet(tmp_path / "floats.parquet")
    for number, dtype in enumerate((pl.Int64, pl.UInt8, pl.Float64)):
        table = pl.DataFrame({"row": [3, 5, 7], "keep": pl.Series([1, 1, 0], dtype=dtype)})
        table.write_parquet(tmp_path / f"{number}.parquet")
        assert left(store, drop=[f"{tmp_path}/{number}.parquet"]) == [row for row in WITH_NODE if row != 7]
    for name in ("keys.txt", "floats.parquet", "0.parquet", "1.parquet", "2.parquet"):
        assert left(store, keep=[str(tmp_path / name)]) == [3, 5], name


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"row": [1, 2], "keep": [0, 2]}, "its column keep is Int64, and not true or false, or 1 or 0"),
        ({"row": [1, 2], "keep": ["yes", "no"]}, "its column keep is String, and not true or false"),
        ({"row": ["1", "2"]}, "its column row is String, not numbers"),
        ({"row": [1.0, None]}, "row is null in line 2 of 2"),
        ({"row": [1, None, 2]}, "row is null in line 2 of 3"),
        ({"row": [1.0, 2.0, 2.5]}, "row is 2.5 in line 3 of 3"),
        ({"row": [float("nan"), 2.0]}, "row is nan in line 1 of 2"),
        ({"row": [1e300]}, "row is 1e+300 in line 1 of 1"),
    ],
)
def test_a_list_of_rows_that_are_none_is_refused(
    store: Path, tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "list.parquet")
    for rule in ("keep", "drop"):
        with pytest.raises(InputError, match=rf"list\.parquet: {re.escape(said)}"):
            select(graph_of(store), **{rule: [str(tmp_path / "list.parquet")]})


def test_several_lists_to_keep_are_joined_and_to_drop_too(store: Path, tmp_path: Path) -> None:
    paths = []
    for number, rows in enumerate(([1, 2, 3], [3, 4, 5], [2, 4])):
        paths.append(str(tmp_path / f"{number}.npy"))
        np.save(paths[-1], np.array(rows))
    assert left(store, keep=paths[:2]) == [1, 2, 3, 4, 5]
    assert left(store, keep=paths[:2], drop=paths[2:]) == [1, 3, 5]
    assert left(store, drop=paths[1:]) == [row for row in WITH_NODE if row not in (2, 3, 4, 5)]


def test_a_selection_of_the_store_is_a_list_by_its_name_and_one_that_is_replaced_is_told_of(store: Path) -> None:
    opened = Store(str(store))
    said = [select_store(opened, "early", {"where": "row < 20"}) for _ in range(2)]
    assert [one.endswith("early.parquet, in place of the list that was there") for one in said] == [False, True]
    assert left(store, keep=["early"]) == list(range(20))
    with pytest.raises(InputError, match="late"):
        left(store, keep=["late"])


def test_an_expression_is_over_samples_json_fields_and_the_graph(store: Path) -> None:
    graph = graph_of(store)
    degree = np.bincount(np.concatenate([ids for _, ids, _ in graph.edge_blocks()]).ravel(), minlength=len(graph))
    asked = {
        "row % 3 = 0": lambda row: row % 3 == 0,
        "similarity > 0.5 AND width < 200": lambda row: 50 < row < 100,
        "key = '000007' OR shard = '00002.tar'": lambda row: row == 7 or row >= 80,
        "uid LIKE '%f'": lambda row: row % 16 == 15,
    }
    for expression, is_true in asked.items():
        assert left(store, where=expression) == [row for row in WITH_NODE if is_true(row)], expression
    texts = samples(store).filter(pl.col("node").is_not_null())
    kept = {
        row
        for row, node, more in zip(texts["row"], texts["node"], others(texts), strict=True)
        if any(degree[one] >= 3 for one in [node, *(text["node"] for text in more)])
    }
    assert left(store, where="degree >= 3") == left(store, min_degree=3) == sorted(kept)
    assert 0 < len(kept) < len(WITH_NODE)


def build_bare(tars: str, store: Path, encoder: str, facts: dict[str, Any] | None = None) -> None:
    """A store of two tars, keys 00 to 04 and 10 to 14, with these facts as each sample's JSON member, or none."""
    fs, folder = fsspec.core.url_to_fs(tars)
    fs.makedirs(folder, exist_ok=True)
    for tar in range(2):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for row in range(5 * tar, 5 * tar + 5):
                members = {"jpg": jpeg(row), "txt": caption(row).encode()}
                members |= {"json": json.dumps(facts).encode()} if facts else {}
                for extension, member in members.items():
                    info = tarfile.TarInfo(f"{tar}{row % 5}.{extension}")
                    info.size = len(member)
                    archive.addfile(info, io.BytesIO(member))
        fs.pipe_file(f"{folder}/{tar:05}.tar", content.getvalue())
    run(store, "embed", shards=f"{tars}/*.tar", encoder=encoder)
    run(store, "index", k=K)


def write_table(tars: str, tar: int, widths: list[int | None], name: str = "0000{}.parquet") -> None:
    content = io.BytesIO()
    table = {"key": [f"{tar}{place}" for place in range(5)], "width": widths, "size": ["big"] * 5}
    pl.DataFrame(table).write_parquet(content)
    fs, folder = fsspec.core.url_to_fs(tars)
    fs.pipe_file(f"{folder}/{name.format(tar)}", content.getvalue())


def kept_of(store: Path, where: str) -> list[int]:
    table = select(graph_of(store), where=where).table()
    return table.filter(table["keep"])["row"].to_pylist()


@pytest.mark.parametrize("tars", ["{}/tars", "{}/store/tars", "memory://bare-{}/tars"])
def test_the_table_beside_a_tar_is_read_wherever_the_command_runs(
    tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch, tars: str
) -> None:
    tars, store = tars.format(tmp_path if tars[0] == "{" else tmp_path.name), tmp_path / "store"
    build_bare(tars, store, letters)
    for tar in range(2):
        write_table(tars, tar, [100, 200, 300, 400, None])
    (tmp_path / "elsewhere").mkdir()
    for tar in range(2):  # of another data set
        write_table(f"{tmp_path}/elsewhere", tar, [900, 0, 0, 0, 0])
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert kept_of(store, "width >= 300") == [2, 3, 7, 8]


@pytest.mark.parametrize("there", [0, 1])
def test_samples_of_a_tar_without_a_table_have_null_in_its_columns(tmp_path: Path, letters: str, there: int) -> None:
    tars, store = f"{tmp_path}/tars", tmp_path / "store"
    build_bare(tars, store, letters)
    write_table(tars, there, [100, 200, 300, 400, None])
    first, other = 5 * there, 5 * (1 - there)
    assert kept_of(store, "width >= 300") == [first + 2, first + 3]
    assert kept_of(store, "size LIKE 'b%'") == list(range(first, first + 5))
    assert kept_of(store, "width IS NULL") == sorted([first + 4, *range(other, other + 5)])
    with pytest.raises(ConfigError, match="has a column 'widht'"):
        kept_of(store, "widht > 3")
    budget = select(graph_of(store), where="width > 0", budget=2, method="d2", scores="width").table()
    assert sum(budget["keep"].to_pylist()) == 2


def test_json_members_stand_in_for_a_table_that_is_missing(tmp_path: Path, letters: str) -> None:
    tars, store = f"{tmp_path}/tars", tmp_path / "store"
    build_bare(tars, store, letters, {"width": 350})
    write_table(tars, 0, [100, 200, 300, 400, None])
    assert kept_of(store, "width >= 300") == [2, 3, 5, 6, 7, 8, 9]
    assert kept_of(store, "width >= 300 AND size = 'big'") == [2, 3]


def others(table: pl.DataFrame) -> list[list[dict[str, Any]]]:
    """The further captions of each sample."""
    more = table["more_captions"].to_list() if "more_captions" in table.columns else [None] * len(table)
    return [texts or [] for texts in more]


def test_an_expression_over_captions_judges_each_by_itself(store: Path) -> None:
    table = select(graph_of(store), where="caption LIKE '%dog%seen%' OR caption LIKE 'the %cat%'").table()
    chosen = table["captions"].to_pylist() if "captions" in table.column_names else [None] * len(table)
    everything = samples(store).sort("row")
    for row, first, more, keep, places in zip(
        everything["row"], everything["caption"], others(everything), table["keep"].to_pylist(), chosen, strict=True
    ):
        texts = [first or "", *(text["caption"] for text in more)]
        wanted = [place for place, text in enumerate(texts) if re.search("dog.*seen|^the .*cat", text)]
        assert keep == bool(wanted), row
        if keep and len(wanted) < len(texts):
            assert places == wanted
        else:
            assert places is None


def test_which_of_a_group_of_duplicates_stays(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "duplicates.parquet"
    near_duplicates(graph_of(store), 0.985).write(path)
    table = pl.read_parquet(path)
    assert table["group"].n_unique() > 3
    dropped = table.filter(~pl.col("keep"))["row"].to_list()
    assert left(store, drop=[str(path)]) == [row for row in WITH_NODE if row not in dropped]
    for prefer, score in (
        ("first", lambda row, _: -row),
        ("longest", lambda row, text: (len(text), -row)),
        ("sharpest", lambda row, _: (-(row % 5), 0)),
    ):
        kept = left(store, drop=[str(path)], prefer=prefer)
        for _, group in table.group_by("group"):
            stays = [row for row in group["row"] if row in kept]
            assert len(stays) == 1
            scores = {row: score(row, text) for row, text in zip(group["row"], group["caption"], strict=True)}
            assert scores[stays[0]] == max(scores.values()), prefer  # less blurred, of pictures equally noisy


def test_a_list_without_groups_has_none_to_choose_from(store: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(3))
    with pytest.raises(InputError, match=r"rows\.npy without groups"):
        select(graph_of(store), drop=[str(tmp_path / "rows.npy")], prefer="longest")


def test_beside_groups_a_list_without_any_is_dropped_as_it_is(store: Path, tmp_path: Path) -> None:
    groups, rows = tmp_path / "duplicates.parquet", tmp_path / "rows.npy"
    near_duplicates(graph_of(store), 0.985).write(groups)
    by_groups = left(store, drop=[str(groups)], prefer="longest")
    np.save(rows, np.array(by_groups[:5]))
    for drop in ([groups, rows], [rows, groups]):
        assert left(store, drop=list(map(str, drop)), prefer="longest") == by_groups[5:]


def test_a_budget_is_of_what_is_left(store: Path) -> None:
    every = left(store, where="row < 60", budget=0.5)
    assert len(every) == round(0.5 * sum(row < 60 for row in WITH_NODE))
    assert max(every) < 60
    assert every == left(store, where="row < 60", budget=len(every))
    assert every != left(store, where="row < 60", budget=len(every), seed=1)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({}, "no rule"),
        ({"where": "widht > 3"}, "has a column 'widht'"),
        ({"where": "width >"}, "cannot be read"),
        ({"where": "width"}, "is Int64, not true or false"),
        ({"where": "width > avg(width)"}, "looks at more than one sample"),
        ({"where": "count(*) > 30"}, "looks at more than one sample"),
        ({"where": "caption > 3"}, "fails"),
        ({"budget": 1000.0}, "of the 117 rows left"),
        ({"budget": float("nan")}, "budget = nan"),
        ({"budget": float("inf")}, "budget = inf"),
        ({"budget": -1.0}, "budget = -1.0"),
        ({"budget": 0.5, "seed": -1}, "seed = -1"),
        ({"where": "row < 0", "budget": 0.5}, "the rules before it keep no sample"),
        ({"budget": 0.5, "method": "best"}, "no method 'best'"),
        ({"where": "row > 3", "prefer": "first"}, "without a list to drop"),
        ({"keep": ["nowhere.txt"]}, "nowhere.txt"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(store: Path, rules: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, InputError)) as caught:
        select(graph_of(store), **rules)
    assert said in str(caught.value)
    if "widht" in said:
        assert all(name in caught.value.fix for name in ("width", "similarity", "caption", "degree"))


def test_a_constant_condition_holds_for_every_sample_or_none(store: Path) -> None:
    assert left(store, where="1=1") == left(store, where="true") == WITH_NODE
    assert left(store, where="1=0") == []


def test_a_selection_that_keeps_nothing_is_written_with_a_warning(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "none.parquet"
    for rule, warned in (("row = 3", False), ("row < 0", True)):
        select_store(Store(str(store)), "none", {"where": rule}, str(path))
        assert ("the selection keeps no sample" in caplog.text) == warned
    assert Selection(path).kept == 0
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    with pytest.raises(ConfigError, match=r"none\.parquet keeps no sample.*\n.*looser rules"):
        run(copy, "export", layout="clustered", selection=path)


def test_lists_of_nobody_of_another_graph_or_of_another_kind_are_refused(store: Path, tmp_path: Path) -> None:
    for name, content in (
        ("nobody.txt", b"not there\n"),
        ("a.csv", b"1\n"),
        ("cut.npy", b"\x93NUMPY"),
        ("x.parquet", b"PAR1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            select(graph_of(store), keep=[str(tmp_path / name)])
    path = tmp_path / "list.parquet"
    near_duplicates(graph_of(store), 0.9).write(path)
    table = pl.read_parquet(path)
    rewritten = table.to_arrow().replace_schema_metadata({"graphbuild": json.dumps({"graph": "another"})})
    pq.write_table(rewritten, path)
    with pytest.raises(InputError, match="another graph"):
        select(graph_of(store), drop=[str(path)])


# What takes a selection


@pytest.fixture
def chosen(store: Path, tmp_path: Path) -> tuple[Path, dict[int, list[int]]]:
    """A selection, and of each row that it keeps the captions' places, from its parquet file by polars alone."""
    path = tmp_path / "chosen.parquet"
    rule = "row % 2 = 0 AND (caption LIKE '%seen%' OR caption LIKE 'the %' OR row % 4 = 0)"
    select_store(Store(str(store)), "x", {"where": rule}, str(path))
    table = pl.read_parquet(path)
    counts = {row: 1 + len(more) for row, more in zip(samples(store)["row"], others(samples(store)), strict=True)}
    captions = table["captions"].to_list() if "captions" in table.columns else [None] * len(table)
    kept = {
        row: list(range(counts[row])) if places is None else places
        for row, keep, places in zip(table["row"], table["keep"], captions, strict=True)
        if keep
    }
    assert 20 < len(kept) <= 60
    return path, kept


def texts_of(store: Path) -> dict[int, list[tuple[str, int]]]:
    """Caption and node of every caption of each row."""
    table = samples(store)
    return {
        row: [(first, node), *((text["caption"], text["node"]) for text in more)]
        for row, first, node, more in zip(table["row"], table["caption"], table["node"], others(table), strict=True)
    }


def check(batches: Any, store: Path, kept: dict[int, list[int]]) -> None:
    texts, graph, rows = texts_of(store), graph_of(store), []
    for batch in batches:
        for row, key, text, node, vector, near in zip(
            batch["row"].tolist(),
            batch["key"],
            batch["caption"],
            batch["node"].tolist(),
            batch["embedding"],
            batch["neighbors"].tolist(),
            strict=True,
        ):
            rows.append(row)
            assert key == f"{row:06}"
            assert (text, node) == texts[row][kept[row][0]]
            assert near == graph.neighbors([node])[0][0].tolist()
            torch.testing.assert_close(vector, torch.from_numpy(graph.embeddings([node])[0]), atol=5e-3, rtol=0)
    assert sorted(rows) == sorted(kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_the_join_with_the_selection(store: Path, chosen: Any, workers: int) -> None:
    path, kept = chosen
    options: dict[str, Any] = {"sidecars": f"{store}/shards", "batch_size": 4, "selection": path}
    stream = graph_webdataset(f"{store.parent}/tars/*.tar", **options)
    assert stream.count_samples() == len(kept)
    batches = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert len(batches) == stream.batches_per_epoch(workers)
    check(batches, store, kept)


def test_a_stream_of_a_selection_goes_on_where_it_stood_and_not_with_another(store: Path, chosen: Any) -> None:
    path, _ = chosen
    tars, options = f"{store.parent}/tars/*.tar", {"sidecars": f"{store}/shards", "batch_size": 4}

    def loader(selection: Any) -> GraphLoader:
        return GraphLoader(graph_webdataset(tars, selection=selection, **options))

    whole = [batch["row"].tolist() for batch in loader(path)]
    first = loader(path)
    batches = iter(first)
    assert [next(batches)["row"].tolist() for _ in range(2)] == whole[:2]
    second = loader(Selection(path))
    second.load_state_dict(first.state_dict())
    assert [batch["row"].tolist() for batch in second] == whole[2:]
    other = loader(None)
    with pytest.raises(ConfigError, match="selection = "):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("captions", ["first", "draw", "all"])
def test_captions_that_were_left_out_are_never_seen(store: Path, chosen: Any, captions: Any) -> None:
    path, kept = chosen
    texts, tars = texts_of(store), f"{store.parent}/tars/*.tar"
    options: dict[str, Any] = {"sidecars": f"{store}/shards", "captions": captions, "selection": path}
    dataset = GraphDataset(tars, **options)
    sampler = NeighborBatchSampler(graph_of(store), 4, nodes=dataset.nodes, group=2)
    batches = [
        *DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate),
        *graph_webdataset(tars, batch_size=4, **options),
    ]
    rows = []
    for batch in batches:
        own = batch["row"].tolist()
        rows += own
        counts = np.diff(batch["offsets"].numpy()) if captions == "all" else np.ones(len(own), int)
        seen = iter(zip(batch["caption"], batch["node"].tolist(), strict=True))
        for row, count in zip(own, counts.tolist(), strict=True):
            given = [next(seen) for _ in range(count)]
            allowed = [texts[row][place] for place in kept[row]]
            assert given == allowed if captions == "all" else given[0] in allowed
            if captions == "all":
                start = batch["offsets"][own.index(row)]
                torch.testing.assert_close(batch["weight"][start : start + count].sum(), torch.tensor(1.0))
    assert sorted(rows) == sorted([*kept, *kept])


@pytest.mark.parametrize("with_graph", [False, True])
def test_a_data_set_is_the_join_with_the_selection(store: Path, chosen: Any, with_graph: bool) -> None:
    path, kept = chosen
    graph = graph_of(store) if with_graph else None
    dataset = GraphDataset(f"{store.parent}/tars/*.tar", sidecars=f"{store}/shards", selection=path, graph=graph)
    assert len(dataset) == len(kept)
    check(DataLoader(dataset, batch_size=5, collate_fn=dataset.collate), store, kept)


def test_a_sampler_over_rows_yields_the_selection_s(store: Path, chosen: Any) -> None:
    path, kept = chosen
    graph = graph_of(store)
    sampler = NeighborBatchSampler(graph, 4, nodes=graph.sample_nodes(), group=2, selection=path)
    assert sorted(row for batch in sampler for row in batch) == sorted(kept)
    with pytest.raises(ConfigError, match="is of 120 rows; nodes are given of 7"):
        NeighborBatchSampler(graph, 4, nodes=np.arange(7), selection=path)


def test_a_selection_of_another_graph_is_refused(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(other, "embed", captions=_list(tmp_path), encoder=resolve(Store(str(store)), "embed", {}).embed.encoder)
    run(other, "index", k=2)
    foreign, graph = tmp_path / "foreign.parquet", graph_of(store)
    select_store(Store(str(other)), "x", {"where": "row > 1"}, str(foreign))
    tars: dict[str, Any] = {"urls": f"{store.parent}/tars/*.tar", "sidecars": f"{store}/shards"}
    for use in (
        lambda: graph_webdataset(**tars, batch_size=2, selection=foreign),
        lambda: GraphDataset(**tars, selection=foreign),
        lambda: NeighborBatchSampler(graph, 4, nodes=graph.sample_nodes(), group=2, selection=foreign),
        lambda: run(store, "export", layout="inline", selection=foreign),
    ):
        with pytest.raises(ConfigError, match="another graph"):
            use()


def _list(folder: Path) -> Path:
    path = folder / "captions.tsv"
    path.write_text("caption\n" + "".join(f"{caption(row)}\n" for row in range(9)))
    return path


def test_files_that_are_no_selection_are_refused(store: Path, tmp_path: Path) -> None:
    near_duplicates(graph_of(store), 0.9).write(tmp_path / "duplicates.parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name, said in (("duplicates", "no selection"), ("empty", "cannot be read"), ("absent", "absent")):
        with pytest.raises(InputError, match=said):
            Selection(tmp_path / f"{name}.parquet")


def test_every_layout_has_the_selected_samples_alone(store: Path, chosen: Any, tmp_path: Path) -> None:
    path, kept = chosen
    copy, texts = tmp_path / "copy", texts_of(store)
    shutil.copytree(store, copy)
    for layout in ("sidecars", "inline", "clustered"):
        run(copy, "export", layout=layout, selection=path, force=True)
        tars = f"{store.parent}/tars" if layout == "sidecars" else f"{copy}/{layout}"
        if layout != "inline":
            beside, seen = copy / "shards" if layout == "sidecars" else None, {}
            for batch in graph_webdataset(f"{tars}/*.tar", sidecars=beside, batch_size=4):
                seen |= dict(zip(batch["row"].tolist(), batch["caption"], strict=True))
            assert seen == {row: texts[row][places[0]][0] for row, places in kept.items()}, layout
        if layout != "sidecars":
            names = set()
            for tar in Path(tars).glob("*.tar"):
                with tarfile.open(tar) as archive:
                    names |= {int(name.partition(".")[0]) for name in archive.getnames()}
            assert names == kept.keys(), layout
            assert sum(json.loads((Path(tars) / "sizes.json").read_text()).values()) == len(kept)
    sidecars = [Sidecar.read(str(path)) for path in sorted((copy / "shards").glob("*.parquet"))]
    assert sum(len(one.row) for one in sidecars) == SHARDS * SAMPLES, "rows stay beside their tars' samples"
    assert verify_store(Store(str(copy))).problems == []
    run(copy, "export", layout="sidecars", selection=None, force=True)
    for one in sorted((store / "shards").glob("*.parquet")):
        assert (copy / "shards" / one.name).read_bytes() == one.read_bytes(), "without it, as it was before"


def test_verify_finds_a_selection_that_changed(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    for _ in range(2):
        select_store(Store(str(copy)), "half", {"where": "row % 2 = 0"})
        assert verify_store(Store(str(copy))).problems == []
    path = copy / "selections/half.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    assert "selections/half.parquet: its content has changed" in verify_store(Store(str(copy))).problems[0]


def test_a_random_half_takes_less_than_a_byte_a_row(tmp_path: Path) -> None:
    choice = module._Choice.__new__(module._Choice)
    choice.reasons = ["", "where: half"]
    choice.why = np.random.default_rng(0).integers(0, 2, 1_000_000).astype(np.int8)

    class Graph:
        fingerprint = "graph"

    schema = pa.schema(module.SCHEMA)
    made = module.DerivedList("selection", Graph(), {}, schema, lambda: choice.parts(schema), packed=("row",))  # type: ignore[arg-type]
    made.write(tmp_path / "half.parquet")
    assert (tmp_path / "half.parquet").stat().st_size < 1_000_000
    assert np.array_equal(Selection(tmp_path / "half.parquet").keeps(np.arange(1_000_000)), choice.why == 0)
