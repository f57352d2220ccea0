"""Stores whose vectors no encoder made, ready vectors without keys and a matrix with them: every look at them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Tab
from typer.testing import CliRunner

from graphbuild.cli import app
from graphbuild.errors import ConfigError
from graphbuild.job.verbs import run_verb
from graphbuild.look.report import write_report
from graphbuild.look.verify import verify_store
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

NODES, K = 40, 4


def finished(embed: Embed, folder: Path) -> Path:
    with Runner(workers=0) as runner:
        for verb in ("embed", "index", "export"):
            run_verb(verb, Recipe(embed=embed, index=Index(k=K)), Store(str(folder)), runner)
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("without")
    vectors = np.random.default_rng(5).standard_normal((NODES, 8))
    np.save(folder / "vectors.npy", vectors.astype(np.float32))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "matrix.npy", unit @ unit.T)
    names = "".join(f"class {number}\n" for number in range(NODES))
    (folder / "names.txt").write_text(names)
    (folder / "captions.csv").write_text(f"caption\n{names}")
    matrix = Embed(
        captions=str(folder / "captions.csv"),
        class_names=str(folder / "names.txt"),
        encoder=f"matrix:{folder / 'matrix.npy'}",
    )
    return {
        "ready vectors": finished(Embed(vectors=str(folder / "vectors.npy")), folder / "vectors"),
        "matrix": finished(matrix, folder / "matrix"),
    }


@pytest.mark.parametrize("kind", ["ready vectors", "matrix"])
def test_the_report_is_written_and_verify_finds_no_problem(stores: dict[str, Path], kind: str) -> None:
    page = Path(write_report(Store(str(stores[kind])))).read_text()
    assert re.search(rf"<dt>encoder</dt><dd><small>[^<]*{kind}[^<]*</small><small>d = \d+</small>", page)
    assert json.loads((stores[kind] / "report/report.json").read_text())["edges"]["nodes"] == NODES
    assert verify_store(Store(str(stores[kind]))).problems == []


def test_the_report_of_a_store_that_cannot_be_written_to_goes_elsewhere(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(stores["matrix"], tmp_path / "store")
    shutil.rmtree(tmp_path / "store/report", ignore_errors=True)
    (tmp_path / "store/report").touch()  # keeps out root too, whom no mode does
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    done = CliRunner().invoke(app, ["report", str(tmp_path / "store")])
    assert isinstance(done.exception, ConfigError)
    assert str(tmp_path / "store/report") in done.exception.cause
    assert "--out" in done.exception.fix
    done = CliRunner().invoke(app, ["report", str(tmp_path / "store"), "--out", str(tmp_path / "a/page")])
    assert done.output.splitlines()[-1] == f"report    {tmp_path}/a/page/index.html"
    assert json.loads((tmp_path / "a/page/report.json").read_text())["edges"]["nodes"] == NODES
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


@pytest.fixture
def address(stores: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[str]:
    program = str(Path(sys.executable).with_name("graphbuild"))
    command = [program, "explore", str(stores[request.param]), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[1]
        running.terminate()


@pytest.mark.parametrize(
    ("address", "ways", "first"),
    [("ready vectors", ["node"], "node 3"), ("matrix", ["key", "node"], "class 3")],
    indirect=["address"],
)
def test_the_explorer_offers_the_ways_that_the_store_has(tab: Tab, address: str, ways: list[str], first: str) -> None:
    tab.page.goto(f"{address}#node=3")
    tab.wait("document.querySelectorAll('.card').length > 0")
    assert tab.page.locator(".asked .text").text_content() == first
    assert tab.page.locator(".card").count() == K
    assert tab.page.locator("#how option:not([disabled])").all_text_contents() == ways
    tab.page.select_option("#how", ways[0])
    tab.page.fill("#what", "7")
    tab.page.press("#what", "Enter")
    tab.wait("document.querySelector('.asked dd')?.textContent === '7'")
