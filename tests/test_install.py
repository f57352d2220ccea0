"""A new user's first hour: what stops an installation is named before anything is fetched, or after pip has failed."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALL = (ROOT / "docs" / "how-to" / "install.md").read_text()
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def preflight(monkeypatch: pytest.MonkeyPatch) -> object:
    """The script as a module, on a machine where nothing is amiss."""
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "preflight.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 100 << 30))
    assert list(module.findings()) == []
    return module


@pytest.mark.parametrize(("version", "fine"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_a_python_that_is_too_old_or_too_new_is_named(
    version: tuple[int, int], fine: bool, preflight: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    found = list(preflight.findings())  # type: ignore[attr-defined]
    assert bool(found) != fine
    for stops, cause, fix in found:
        assert stops
        assert "{}.{}".format(*version) in cause
        assert "make demo PYTHON=python3.11" in fix


def test_a_missing_venv_module_and_a_full_disk_are_named(preflight: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    for gib, stops in ((3, True), (5, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, gib=gib: Usage(0, 0, gib << 30))
        venv, disk = preflight.findings()  # type: ignore[attr-defined]
        assert venv[0]
        assert "-venv" in venv[2]
        assert disk[0] == stops
        assert f"{gib}.0 GiB are free" in disk[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 100 << 30 if place == "." else 1 << 30))
    *_, temporary = preflight.findings()  # type: ignore[attr-defined]
    assert not temporary[0]
    assert "TMPDIR" in temporary[2]


def python_of(version: str) -> str | None:
    """A Python of that version that runs; the name alone may be a version manager's shim."""
    managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), *map(str, managed)):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def test_an_old_python_reads_the_script() -> None:
    """What is run to refuse an old Python must not be what breaks there."""
    text = (ROOT / "preflight.py").read_text()
    for path in filter(None, map(python_of, ("3.6", "3.7", "3.8", "3.9", "3.10"))):
        done = subprocess.run([path, "-c", text], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "graphbuild runs with 3.11, 3.12 and 3.13" in done.stderr
    ast.parse(text, feature_version=(3, 6))  # where there is no old one
    assert not re.search(r"^from __future__", text, re.M)  # which came with 3.7, and is not refused by that


def test_the_commands_without_make_are_those_of_make() -> None:
    said = subprocess.run(["make", "-Bn", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    made = re.findall(r"(pip install .*?)(?: *\|\||$)", said.replace("\\\n", ""), re.M)
    without = INSTALL.split("### Without make")[1].split("```")[1]
    plain = [re.sub(r" --(quiet|disable-pip-version-check)", "", line).strip() for line in made]
    assert plain == re.findall(r"pip install .*$", without, re.M)
    for command in (
        "graphbuild demo demo",
        "python training/train.py demo --config training/demo.yaml --labels kind,colour,count,background",
    ):
        assert command in without
        assert command in said


def test_every_fault_has_its_row_on_the_page(preflight: object) -> None:
    rows = INSTALL.split("## When something stops you")[1].split("\n## ")[0]
    for word in ("make: command not found", "3.10", "venv", "No space left", "proxy", "without a network", "3.14"):
        assert word in rows, word
    assert '"When something stops you"' in preflight.AFTER  # type: ignore[attr-defined]


ENVIRONMENTS = {"demo": ".venv", "docs": ".venv-docs", "wheel": ".venv-release"}


@pytest.mark.parametrize("target", ENVIRONMENTS)
def test_make_says_that_there_is_no_python(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name in ("constraints.txt", "constraints-docs.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(["make", target, "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no Python 3 here: install one" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ENVIRONMENTS)
def test_make_names_what_pip_could_not_fetch_and_mends_a_half_made_environment(target: str, tmp_path: Path) -> None:
    environment = tmp_path / ENVIRONMENTS[target]
    for name in ("Makefile", "preflight.py", "pyproject.toml", "constraints.txt", "constraints-docs.txt"):
        shutil.copy(ROOT / name, tmp_path)
    # What a Python without ensurepip leaves.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "VIRTUAL"))
    }
    done = subprocess.run(
        ["make", target, f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env=variables | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "pip could not install the packages" in done.stderr
    assert "PIP_FIND_LINKS=FOLDER" in done.stderr
    assert (environment / "bin" / "pip").exists(), "made anew"
    assert not (environment / ".installed").exists()
