"""What commands say a user can do next: it can be done, for that store and with what is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from graphbuild.demo.run import _activate

CAPTIONS = ["a dog", "a cat", "a  dog", "a red car"]
NUMBERS = "all are numbers"


# -- the demo's environment


def test_an_environment_that_the_shell_does_not_know_is_to_be_activated_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / ".venv" / "bin" / "activate"
    script.parent.mkdir(parents=True)
    script.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert _activate() == f"first     source {script}\n"
    monkeypatch.chdir(tmp_path)
    assert _activate() == "first     source .venv/bin/activate\n"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert _activate() == ""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script.unlink()
    assert _activate() == ""
