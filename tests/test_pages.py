"""The commands and the code of README.md and docs/, run as they are printed, each page in a folder of its own.

A page's blocks are run in their order: those in bash each in a shell of its own, those in Python in one namespace, with
what given.py makes. No line is left out silently: it is run here, or `PAGES` names the test that runs it or the reason
why none does. `OTHERS` has the pages that other tests run.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests import given, spent, test_docs
from tests.conftest import MakeOnce
from tests.pages import ROOT, blocks, environment

SECONDS = 600  # that a block may take


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is there before, what is put in place of what is printed, and how lines begin that are not run, and why."""

    given: Callable[[], given.Names] = given.nothing
    swaps: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    then: str = ""  # uses what the page's code has made without using it
    alternatives: bool = False  # each line is run with `out` as it was before
    table: bool = False  # of what is printed, the first column of the table counts: the rest depends on the machine


INSTALLS = "installs packages: test_release.py::test_the_steps_of_an_image_run_one_by_one_in_a_fresh_environment"
MAKE_DEMO = "installs packages; what it runs then: test_demo.py, and train.md here"
CLOUD = "needs a cloud: test_clouds.py"
KUBERNETES = "needs a Kubernetes cluster: test_kubernetes.py"
SMALL_BATCHES = {"1024": "64", "num_workers=8": "num_workers=2"}

PAGES = {
    "README.md": Page(
        given=given.readme,
        swaps={"/data/cc3m": "cc3m", "range(100)": "range(2)", **SMALL_BATCHES},
        left={
            "make demo": MAKE_DEMO,
            "source .venv/bin/activate": INSTALLS,
            "python -m graphbuild.open_clip": "needs open_clip: test_launcher.py, and its tutorial",
        },
    ),
    "docs/how-to/batches.md": Page(given=given.loop, swaps={"1024": "64"}, then="next(iter(dataset))"),
    "docs/how-to/certify.md": Page(),
    "docs/how-to/embedding.md": Page(
        given=given.embedding, swaps={"--vectors emb\n": "--vectors emb_in_order\n"}, alternatives=True
    ),
    "docs/how-to/install.md": Page(
        left={
            "make demo": MAKE_DEMO,
            "pip ": INSTALLS,
            "python3.11 -m venv": INSTALLS,
            "export PIP_NO_INDEX=1": INSTALLS,
            "graphbuild demo demo": "a minute long: test_demo.py",
            "python training/train.py demo": "the same line of train.md is run here",
        },
    ),
    "docs/how-to/looking.md": Page(given=given.demo, table=True),
    "docs/how-to/matching.md": Page(given=given.questions),
    "docs/how-to/mining.md": Page(given=given.mining, then="assert len(triplets.collect())"),
    "docs/how-to/selections.md": Page(given=given.selections, swaps={"1_000_000": "100"}, then="next(iter(stream))"),
    "docs/how-to/sources.md": Page(
        given=given.sources,
        swaps={"/data/my-dataset": "my-dataset"},
        left={"graphbuild pack   out 'hf://": "needs a hub: test_packed.py reads the same files by path"},
    ),
    "docs/how-to/train.md": Page(
        given=given.trainer,
        swaps={
            "--nproc-per-node 8": "--nproc-per-node 2",
            "protocol.yaml": "protocol.yaml --epochs 1 --samples 64 --pixels 32 --batch-size 32 --workers 1",
            "pixels: 128\nbatch_size: 512\nepochs: 30": "pixels: 32\nbatch_size: 64\nepochs: 1",
            "workers: 8": "workers: 2",
        },
    ),
    "docs/reference/format.md": Page(given=given.format_),
    "docs/reference/loaders.md": Page(given=given.loaders, swaps=SMALL_BATCHES),
    "docs/reference/losses.md": Page(given=given.losses),
    "docs/explanation/architecture.md": Page(left={"python -m pytest tests/test_house.py": "is a test: test_house.py"}),
    "docs/explanation/experiments.md": Page(
        given=given.benchmarks,
        swaps={"summary --all": "summary benchmarks/experiments/d.yaml"},
        left={"python -m benchmarks.experiments run": "days long: test_experiments.py runs small experiments"},
    ),
    "docs/explanation/targets.md": Page(given=given.loop),
    "pipelines/README.md": Page(
        given=given.demo,
        left={
            "ray start": "leaves a cluster behind: test_ray_jobs.py",
            "export RAY_AUTH_MODE": "goes before what is not run",
            "ray job submit": "needs a cluster and a bucket: test_ray_jobs.py and test_kubernetes.py submit such jobs",
            "kubectl": KUBERNETES,
            "ray get-auth-token": CLOUD,
            "ray up": CLOUD,
            "ray dashboard": CLOUD,
            "ray down": CLOUD,
        },
    ),
}
OTHERS = {
    "docs/tutorials": "test_tutorials.py",
    "docs/how-to/elsewhere.md": "test_elsewhere.py",
    "docs/how-to/trainers.md": "test_examples.py; open_clip's line: test_launcher.py",
    "CONTRIBUTING.md": "make's targets, which run these tests, and code that is a part of a program",
}


def named_tests(reason: str) -> dict[str, str]:
    """The source of each test file that a reason names; a test that it names is in its file."""
    named = re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", reason)
    found = {file: next((ROOT / "tests").rglob(file)).read_text() for file, _ in named}
    assert all(f"def {test}" in found[file] for file, test in named)
    return found


def test_every_page_with_commands_or_code_is_run_by_a_test() -> None:
    with_blocks = {page.relative_to(ROOT).as_posix() for page in test_docs.PAGES if blocks(page)}
    assert {name for name in with_blocks if not name.startswith(tuple(OTHERS))} == PAGES.keys()
    for name, reason in OTHERS.items():
        assert (ROOT / name).exists()
        sources = named_tests(reason).values()
        assert not sources or any(Path(name).name in source for source in sources)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_replaced_or_left_out_is_on_the_page_and_named_tests_exist(name: str) -> None:
    code = "".join(block.code for block in blocks(ROOT / name))
    assert not re.search(r"^ +```", (ROOT / name).read_text(), re.M), "such a block is not found"
    assert [text for text in PAGES[name].swaps if text not in code] == []
    for beginning, reason in PAGES[name].left.items():
        assert re.search(f"^{re.escape(beginning)}", code, re.M), beginning
        named_tests(reason)


@pytest.fixture
def folder(make_once: MakeOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the stores and the project's programs and recipes."""
    shutil.copytree(make_once("pages", given.make_stores), tmp_path, dirs_exist_ok=True)
    for name in ("training", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.syspath_prepend(ROOT / "training" / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_s_commands_and_code_run_as_they_are_printed(name: str, folder: Path) -> None:
    page = PAGES[name]
    names, variables = page.given(), environment(folder)
    found = [replace(block, code=to_run(block.code, page)) for block in blocks(ROOT / name)]
    for block in found:
        if block.language == "yaml":
            (folder / str(block.title)).write_text(block.code)
    for block in found:
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(compile(block.code, f"{name}: {block.code[:60]}", "exec"), names)
            block.check(said.getvalue())
        elif block.language == "bash" and block.code.strip():
            for part in block.code.splitlines() if page.alternatives else [block.code]:
                command = "set -e\n" + "rm -rf out\n" * page.alternatives + part
                done, _ = spent.run(["bash", "-c", command], variables, SECONDS, folder)
                assert done.returncode == 0, f"{part}\n{done.stdout[-4000:]}"
                if page.table and block.prints:
                    assert first_column(block.prints) == first_column(done.stdout.splitlines())
                else:
                    block.check(done.stdout)
    exec(page.then, names)


def to_run(code: str, page: Page) -> str:
    """Of a block what is run here, with what stands in place of what is printed."""
    lines = code.replace("\\\n", "").splitlines(keepends=True)
    kept = "".join(line for line in lines if not line.startswith(tuple(page.left)))
    for printed, instead in page.swaps.items():
        kept = kept.replace(printed, instead)
    return kept


def first_column(lines: list[str]) -> list[str]:
    """Of the table that begins with `stage`."""
    begin = next(number for number, line in enumerate(lines) if line.startswith("stage "))
    return [re.split(" {2,}", line)[0] for line in lines[begin : lines.index("", begin)]]
