"""The library without the CLI framework, and a command line that starts at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "graphbuild"
FRAMEWORK = {"typer", "click"}
MODULES = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"]


def imported(tree: ast.AST, *, at_start: bool) -> Iterator[str]:
    """Packages that a module imports; at_start: not those that wait in a function or are for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        waits = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if not (at_start and waits):
            yield from imported(node, at_start=at_start)


def test_no_module_of_the_library_imports_the_cli_framework_and_none_imports_rich_before_it_shows_something() -> None:
    assert len(MODULES) > 50
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert not FRAMEWORK & set(imported(tree, at_start=False)), path
        assert "rich" not in set(imported(tree, at_start=True)), path


@pytest.mark.slow
def test_the_whole_library_is_imported_without_the_cli_framework() -> None:
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)"
    code += "\nassert 'typer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_command_line_starts_without_what_only_work_needs() -> None:
    heavy = {"numpy", "torch", "ray", "polars", "pyarrow", "fsspec", "yaml", "rich"}
    code = f"import sys, graphbuild.cli\nfound = {heavy!r} & sys.modules.keys()\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
