"""What the documents say exists: every setting, every command with its options, every file they link."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from graphbuild.cli import app
from graphbuild.recipe import Recipe, read_recipe
from tests.test_house import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "pipelines" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_setting_of_a_recipe_is_documented_with_its_default() -> None:
    page = (ROOT / "docs" / "reference" / "recipe.md").read_text()
    for section, values in Recipe().model_dump().items():
        part = page.split(f"\n## {section}")[1].split("\n## ")[0]
        for name, default in values.items():
            row = next((line for line in part.splitlines() if re.search(rf"^\|[^|]*\b{name}\b", line)), None)
            assert row is not None, f"{section}.{name} is missing"
            names = [cell.strip() for cell in row.split("|")[1].split(",")]
            defaults = [cell.strip() for cell in row.split("|")[2].split(",")]
            shown = "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
            assert defaults[names.index(name)] in (shown, shown.removesuffix(".0")), f"{section}.{name}: {row}"


def commands() -> list[str]:
    found = []
    for page in PAGES:
        prose, *blocks = re.split(r"^```.*$", page.read_text(), flags=re.M)
        for number, block in enumerate(blocks):
            if number % 2 == 0:
                found += re.findall(r"^(graphbuild [a-z].*)$", block, re.M)
            else:
                prose += block
        found += [" ".join(code.split()) for code in re.findall(r"`(graphbuild [a-z][^`]*)`", prose)]
    return sorted({part.strip() for line in found for part in line.split("&&")})


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documents_has_such_a_verb_and_options(line: str) -> None:
    words = shlex.split(line.split("  ")[0])[1:]
    group = typer.main.get_command(app)
    if words[0] == "VERB":
        return
    verb = group.commands[words[0]]  # type: ignore[attr-defined]
    options = {option for parameter in verb.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options | {"--help"}


def test_every_page_has_a_line_of_its_own_in_the_navigation_of_the_site() -> None:
    entries = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2])
    assert sorted(entries) == sorted(leaves(nav))
    assert {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} <= set(entries)


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation, which is a list of pages and of {title: a page or a list}."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(part)]


BEGINNINGS = "This page|These pages|These parts|You get"
WITHOUT = ("README.md", "CHANGELOG.md", "SECURITY.md", "docs/index.md")  # of the project, not of themselves


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_what_it_gives(page: Path) -> None:
    if page.relative_to(ROOT).as_posix() not in WITHOUT:
        assert re.match(rf"(?:<!--.*-->\n)?# .+\n\n(?:{BEGINNINGS}) ", page.read_text())


def test_the_readme_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_printed_code_imports_nothing_of_the_repository_but_the_package(page: Path) -> None:
    code = "".join(re.findall(r"^```python.*?\n(.*?)^```", page.read_text(), re.M | re.S))
    assert not re.findall(r"^ *(?:from|import) (?:training|benchmarks|tests|docs)\b.*", code, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_named_file_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_finds_it(page: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        target = page.parent / name if name else page
        headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", target.read_text(), flags=re.M | re.S), re.M)
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert anchor in anchors, f"{page.name} links {name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_document_names_exists(page: Path) -> None:
    tests = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    for name, test in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", page.read_text()):
        assert name in tests, f"{page.name} names {name}"
        assert not test or f"def {test}(" in tests[name].read_text(), f"{page.name} names {name}::{test}"
    names = [name for path in tests.values() for name in re.findall(r"def (test_\w+)", path.read_text())]
    for part in re.findall(r"`\.\.\._(\w+?)(?:_\.\.\.)?`", page.read_text()):
        assert any(part in name for name in names), f"{page.name} names ...{part}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_path_of_the_project_that_a_document_names_exists(page: Path) -> None:
    folders = "graphbuild|tests|benchmarks|training|pipelines|docs|docker"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_architecture_has_every_floor_from_the_ground_up() -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", page, re.M)
    assert rows == [name for floor in FLOORS for name in floor]


@pytest.mark.parametrize(("page", "count"), [("reference/recipe.md", 4), ("how-to/sources.md", 1)])
def test_every_recipe_that_a_page_prints_is_valid(page: str, count: int, tmp_path: Path) -> None:
    printed = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert len(printed) == count
    for number, text in enumerate(printed):
        (tmp_path / f"{number}.yaml").write_text(text)
        read_recipe(str(tmp_path / f"{number}.yaml"))


def test_the_recipe_in_the_help_of_run_is_valid(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"^  embed:\n(?:    .*\n)+", (ROOT / "tests/cli/help/run.txt").read_text(), re.M)
    (tmp_path / "job.yaml").write_text(textwrap.dedent(recipe))
    assert read_recipe(str(tmp_path / "job.yaml")).embed.shards == "/data/tars"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid(path: Path) -> None:
    read_recipe(str(path))


def test_every_page_that_the_code_names_exists() -> None:
    folders = ("graphbuild", "training", "pipelines", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".yaml")]
    named = {(name, path) for path in files for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())}
    assert len(named) > 20
    assert [f"{path}: {name}" for name, path in named if not (ROOT / name).exists()] == []
