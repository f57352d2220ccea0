"""Every verb's --help is frozen: a change of the command line is seen as a diff of help/*.txt, and meant.

Width 80, as Typer of constraints.txt writes it. After a change that is meant: python tests/cli/test_help.py
"""

from __future__ import annotations

import difflib
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from graphbuild.cli import app

SNAPSHOTS = Path(__file__).parent / "help"
VERBS = ["graphbuild", *typer.main.get_command(app).commands]  # type: ignore[attr-defined]
PINNED = re.search(r"^typer==(\S+)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]


def help_of(verb: str) -> str:
    arguments = ["--help"] if verb == "graphbuild" else [verb, "--help"]
    outcome = CliRunner().invoke(app, arguments, prog_name="graphbuild", terminal_width=80)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_every_verb_and_no_other_has_a_snapshot() -> None:
    assert sorted(path.stem for path in SNAPSHOTS.glob("*.txt")) == sorted(VERBS)


@pytest.mark.skipif(version("typer") != PINNED, reason=f"the snapshots are of typer {PINNED}")
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_is_its_snapshot(verb: str) -> None:
    frozen = (SNAPSHOTS / f"{verb}.txt").read_text()
    now = help_of(verb)
    diff = "".join(difflib.unified_diff(frozen.splitlines(True), now.splitlines(True), "frozen", "now"))
    assert now == frozen, f"{verb} --help has changed:\n{diff}\nif it is meant: python tests/cli/test_help.py"


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for path in SNAPSHOTS.glob("*.txt"):
        path.unlink()
    for name in VERBS:
        (SNAPSHOTS / f"{name}.txt").write_text(help_of(name))
