"""The house: every folder of graphbuild/ stands above all that it imports, and no modules import in a circle.

All imports count, also those that wait inside a function or are for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import graphbuild

ROOT = Path(graphbuild.__file__).parent
FLOORS = (  # from the ground up, as the data flows; folders on one floor do not know each other
    ("errors",),
    ("machine",),
    ("store",),
    ("recipe",),
    ("runner",),
    ("sources", "knn"),
    ("nodes",),
    ("graph",),
    ("export", "mine"),
    ("torch",),
    ("open_clip",),
    ("job",),
    ("look",),
    ("demo",),
    ("cli",),
)


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("graphbuild", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """The modules of the package that a module names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (one for one in deeper if one in MODULES)
            if node.module in MODULES and not all(one in MODULES for one in deeper):
                yield node.module


def folder(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_folder_has_its_floor() -> None:
    folders = {folder(name) for name in MODULES} - {""}
    assert folders == {name for floor in FLOORS for name in floor}
    assert len([name for name in folders if (ROOT / name).is_dir()]) <= 14
    assert len(list(ROOT.glob("*.py"))) <= 4


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name)])
def test_no_import_runs_back_up(name: str) -> None:
    floor = {one: number for number, floor in enumerate(FLOORS) for one in floor}
    own = folder(name)
    for other in imported(name):
        there = folder(other)
        assert there, f"{name} imports the package's face"
        assert there == own or floor[there] < floor[own], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: set(imported(name)) - {name} for name in MODULES if folder(name)}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_module_opens_with_what_it_promises() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), name
