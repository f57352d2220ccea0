"""A release: one version, workflows that only call make, extras that go together, a wheel and images that work."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.test_install import python_of

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
IMAGES = {"cpu": ROOT / "docker" / "Dockerfile.cpu", "gpu": ROOT / "docker" / "Dockerfile.gpu"}


def test_the_version_stands_in_one_place_and_is_repeated_by_citation_and_changelog() -> None:
    assert version("graphbuild") == PROJECT["version"], "install it anew: make test"
    assert not [
        path for path in (ROOT / "graphbuild").rglob("*.py") if re.search(r"^__version__", path.read_text(), re.M)
    ]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert newest[1] == PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]


def test_the_citation_has_what_its_format_asks_for_and_the_license_of_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_only_calls_targets_of_make(path: Path) -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
    steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
    called = [step["run"].split() for step in steps if "run" in step]
    assert called
    for make, *words in called:
        assert make == "make"
        assert {word for word in words if "=" not in word} <= set(targets)
    assert all(step["uses"].startswith("actions/") for step in steps if "run" not in step)


def test_the_wheels_are_made_under_every_python_that_the_project_names() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert f"for python in {' '.join(PYTHONS)};" in (ROOT / "Makefile").read_text()
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_table_of_extras_has_those_of_the_project_and_what_they_bring() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", (ROOT / "docs" / "how-to" / "install.md").read_text(), re.M))
    assert rows.keys() == EXTRAS.keys()
    for extra in EXTRAS.keys() - {"dev"}:
        wanted = map(Requirement, EXTRAS[extra])
        assert rows[extra].split(", ") == [each.name for each in wanted if not each.marker]


def test_every_extra_that_documents_code_and_images_name_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", *IMAGES.values()]
    texts = [path.read_text() for path in (*pages, *(ROOT / "graphbuild").rglob("*.py"))]
    named = {
        name
        for text in texts
        for found in re.findall(r"(?:'\.\[|install_extra\([\"'])([a-z0-9,]+)[]\"']", text)
        for name in found.split(",")
    }
    assert {"cpu", "gpu", "download", "int8", "offline", "s3"} <= named <= EXTRAS.keys()
    assert not [text for text in texts if "install 'graphbuild" in text], "the index may have another's of this name"


def test_every_pinned_version_is_one_that_the_project_allows() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    for text in (*PROJECT["dependencies"], *(text for extra in EXTRAS for text in EXTRAS[extra] if extra != "gpu")):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), text


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_wheel_holds_the_package_and_nothing_else_and_starts_in_an_empty_environment(
    python: str, tmp_path: Path
) -> None:
    executable = python_of(python)
    if executable is None:
        pytest.skip(f"there is no Python {python} here")
    made = make("wheel", f"DIST={tmp_path}/dist", f"RELEASE={tmp_path}/release", f"PYTHON={executable}")
    assert f"graphbuild {PROJECT['version']}\n" in made
    assert made.count("PASSED") == 2, "twine check, of sdist and wheel"
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    listed = subprocess.run(["git", "ls-files", "graphbuild"], cwd=ROOT, capture_output=True, text=True, check=True)
    package = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith("tests")}


@pytest.mark.slow
def test_all_extras_resolve_together_newest_and_pinned(tmp_path: Path) -> None:
    assert make("resolve", f"RELEASE={tmp_path}/release", f"PYTHON={sys.executable}").count("all extras") == 6


@pytest.mark.slow
@pytest.mark.parametrize("image", IMAGES)
def test_the_steps_of_an_image_run_one_by_one_in_a_fresh_environment(image: str, tmp_path: Path) -> None:
    """The GPU's packages are only resolved: they weigh many GB, and do nothing here."""
    built = Image(tmp_path, ROOT)
    for word, rest in steps(IMAGES[image]):
        built.step(word, rest.replace("pip install", "pip install --dry-run") if image == "gpu" else rest)
    home = built.root / "opt" / "graphbuild"
    assert built.folder == built.root / "data"
    assert {"graphbuild", "pipelines", "training"} <= {path.name for path in home.iterdir()}
    if image == "gpu":
        assert f"graphbuild-{PROJECT['version']}" in built.said
        assert "faiss-gpu-" in built.said
        assert "faiss-cpu-" not in built.said
        return
    shutil.rmtree(home / "graphbuild")  # what runs is what was installed
    tars(built.folder / "tars")
    assert "Usage: graphbuild" in built.run_entry(built.command)
    built.run_entry(["embed", "out", "--shards", "tars"])
    built.run_entry(["index", "out", "--k", "4", "--engine", "faiss:Flat"])
    built.run_entry(["export", "out"])
    assert "no problems" in built.run_entry(["verify", "out"])


def steps(dockerfile: Path) -> Iterator[tuple[str, str]]:
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


class Image:
    """What a Dockerfile's steps do, with folders below `root` and a virtual environment in place of an image's own."""

    def __init__(self, path: Path, context: Path) -> None:
        self.root, self.said, self.command, self.entry = path / "root", "", [""], [""]
        self.folder = self.root
        self.variables = own_environment() | {"PATH": f"{path}/venv/bin:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-m", "venv", path / "venv"], check=True)
        left_out = (context / ".dockerignore").read_text().split()
        self.context = {p.name: p for p in context.iterdir() if not any(fnmatch.fnmatch(p.name, x) for x in left_out)}

    def step(self, word: str, rest: str) -> None:
        match word:
            case "FROM":
                assert rest == f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
            case "WORKDIR":
                self.folder = self.root / rest.lstrip("/")
                self.folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = rest.split()
                for name in sources:
                    if self.context[name].is_dir():
                        shutil.copytree(
                            self.context[name], self.folder / target, ignore=shutil.ignore_patterns("__pycache__")
                        )
                    else:
                        shutil.copy(self.context[name], self.folder / target)
            case "ARG" | "ENV":
                self.variables |= dict(part.split("=", 1) for part in shlex.split(rest))
            case "RUN":
                self.said += self.run(["sh", "-c", rest])
            case "ENTRYPOINT":
                self.entry = json.loads(rest)
            case "CMD":
                self.command = json.loads(rest)
            case _:
                raise AssertionError(f"no such step is known: {word}")

    def run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def run_entry(self, command: list[str]) -> str:
        return self.run([str(shutil.which(self.entry[0], path=self.variables["PATH"])), *self.entry[1:], *command])


def tars(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(40):
            colour, animal = (
                ("red", "green", "blue", "grey")[number % 4],
                ("dog", "cat", "horse", "bird", "hen")[number % 5],
            )
            for ending, content in (("jpg", b"\xff\xd8\xff\xd9"), ("txt", f"{number} {colour} {animal}s".encode())):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def own_environment() -> dict[str, str]:
    """Without what makes a Python find the packages of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def make(*words: str) -> str:
    done = subprocess.run(["make", *words], cwd=ROOT, env=own_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
