"""`graphbuild mine` as a user runs it: the same lists as the library makes, one line of counts, and refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from graphbuild import SampleGraph
from graphbuild.graph.lists.mine import LISTS
from tests.e2e.test_bad_input import graphbuild, refused, snapshot, succeeded

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
LINES = {
    "duplicates": r"groups, \d+ truncated nodes, \d+ samples, \d+ samples to drop, \d+ chained samples",
    "hard-negatives": r"anchors, \d+ negatives, \d+ anchors with fewer",
    "false-negatives": r"edges, \d+ nodes without any, \d+ truncated nodes",
    "positives": r"edges, \d+ nodes without any, \d+ truncated nodes",
}

MARGINS = ["--absolute-margin", 0.1, "--relative-margin", 0.2, "--min-similarity", -0.5, "--max-similarity", 0.8]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 nodes around 20 centres, k = 8."""
    folder = tmp_path_factory.mktemp("mine")
    draw = np.random.default_rng(4)
    centres = np.repeat(draw.standard_normal((20, 16)), 3, axis=0)
    np.save(folder / "vectors.npy", centres + 0.2 * draw.standard_normal((60, 16)))
    succeeded(graphbuild("embed", folder / "store", "--vectors", folder / "vectors.npy", "--workers", 0))
    succeeded(graphbuild("index", folder / "store", "--k", 8, "--workers", 0))
    return folder / "store"


@pytest.mark.parametrize(
    ("what", "arguments", "options"),
    [
        ("duplicates", ["--threshold", 0.9], {"threshold": 0.9}),
        (
            "hard-negatives",
            ["--count", 4, "--skip", 1, "--positive", "{scores}", *MARGINS],
            {"count": 4, "skip": 1, "positive": np.linspace(0.5, 1, 60), "absolute_margin": 0.1}
            | {"relative_margin": 0.2, "min_similarity": -0.5, "max_similarity": 0.8},
        ),
        ("false-negatives", ["--threshold", "0.5"], {"threshold": 0.5}),
        ("positives", ["--threshold", 0.2, "--count", 3, "--mutual"], {"threshold": 0.2, "count": 3, "mutual": True}),
    ],
)
def test_the_file_is_the_list_that_the_library_makes(
    what: str, arguments: list[Any], options: dict[str, Any], store: Path, cli: Cli, tmp_path: Path
) -> None:
    np.save(tmp_path / "scores.npy", np.linspace(0.5, 1, 60))
    arguments = [tmp_path / "scores.npy" if word == "{scores}" else word for word in arguments]
    done = cli("mine", store, "--what", what, *arguments, "--out", tmp_path / "lists" / "list.parquet")
    expected = LISTS[what](SampleGraph.open(str(store)), **options).table()
    assert len(expected)
    assert pq.read_table(tmp_path / "lists" / "list.parquet").equals(expected)
    assert done.stdout == f"mine      {len(expected):,} rows, in {tmp_path}/lists/list.parquet\n"
    assert re.fullmatch(rf"mine      {what} in [\d.]+ s: \d+ {LINES[what]}\n", done.stderr), done.stderr


def test_without_out_lists_lie_in_the_store_which_stays_whole(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    for what in LISTS:
        options = ["--count", 3, "--positive", 0.7] if what == "hard-negatives" else ["--threshold", 0.5]
        assert f"in {copy}/mined/{what}.parquet" in succeeded(graphbuild("mine", copy, "--what", what, *options))
    first = snapshot(copy)
    assert {name for name in first if name not in snapshot(store)} == {
        path for what in LISTS for path in (f"mined/{what}.parquet", f"_state/mine/{what}.done.json")
    }
    expected = LISTS["hard-negatives"](SampleGraph.open(str(store)), count=3, positive=0.7).table()
    assert pq.read_table(copy / "mined/hard-negatives.parquet").equals(expected)
    succeeded(graphbuild("mine", copy, "--what", "positives", "--threshold", 0.5))
    again = snapshot(copy)
    record = "_state/mine/positives.done.json"  # tells its seconds
    assert {**again, record: b""} == {**first, record: b""}  # the same bytes
    assert "no problems" in succeeded(graphbuild("verify", copy))


def test_an_out_without_a_folder_lies_in_the_working_folder(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--what", "duplicates", "--threshold", 1, "--out", "list.parquet"]
    assert "0 rows" in succeeded(graphbuild("mine", store, *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["list.parquet"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["duplicates"], ["duplicates needs --threshold"]),
        (["duplicates", "--threshold", 1.2], ["threshold = 1.2"]),
        (["positives", "--threshold", "nan"], ["threshold = nan"]),
        (["duplicates", "--threshold", 0.9, "--skip", 1], ["--skip has no meaning for duplicates", "--threshold"]),
        (["false-negatives", "--threshold", 0.9, "--mutual"], ["--mutual has no meaning for false-negatives"]),
        (["hard-negatives", "--threshold", 0.9], ["--threshold has no meaning for hard-negatives", "--max-similarity"]),
        (["hard-negatives", "--count", 5, "--skip", 4], ["skip = 4 and count = 5", "k = 8"]),
        (["hard-negatives", "--count", 1, "--positive", "none.npy"], ["none.npy does not exist"]),
        (["hard-negatives", "--count", 1, "--positive", "{text}"], ["not a whole .npy"]),
        (["hard-negatives", "--count", 1, "--positive", "{whole}"], ["int64 [60]"]),
        (["hard-negatives", "--count", 1, "--positive", "{short}"], ["[59]", "[60]"]),
        (["positives", "--threshold", 0.5, "--out", "{text}"], ["--out", "names no parquet file"]),
        (["positives", "--threshold", 0.5, "--out", "{text}/list.parquet"], ["list.parquet", "cannot write"]),
        (["positives", "--threshold", 0.5, "--out", "{folder}"], ["is a folder"]),
        (["positives", "--threshold", 0.5, "--out", "nosuch://x/list.parquet"], ["nosuch://x/list.parquet"]),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(
    arguments: list[Any], named: list[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "text").write_text("not numbers")
    np.save(tmp_path / "whole.npy", np.ones(60, np.int64))
    np.save(tmp_path / "short.npy", np.ones(59))
    paths = {"text": "text", "folder": "folder.parquet", "whole": "whole.npy", "short": "short.npy"}
    before = snapshot(store), snapshot(tmp_path)
    words = [str(word).format(**paths) for word in arguments]
    refused(graphbuild("mine", store, "--what", *words), *named)
    assert (snapshot(store), snapshot(tmp_path)) == before


def test_a_store_without_a_graph_names_the_next_step(tmp_path: Path) -> None:
    outcome = graphbuild("mine", tmp_path, "--what", "duplicates", "--threshold", 0.9)
    refused(outcome, "has no finished graph", "graphbuild index")
    assert not (tmp_path / "mined").exists()


def test_an_unknown_list_is_a_usage_error(store: Path) -> None:
    outcome = graphbuild("mine", store, "--what", "negatives")
    assert outcome.code == 2
    assert "'duplicates', 'hard-negatives', 'false-negatives', 'positives'" in outcome.err.replace("\n", " ")


def test_help_comes_in_half_a_second(cli: Cli) -> None:
    """Of a core: other tests run beside it."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert "--relative-margin" in cli("mine", "--help").stdout
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5
