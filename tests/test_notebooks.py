"""The notebooks: small, kept with the outputs of a real run, and still doing what they show."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install '.[dev]'")
nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install '.[dev]'")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
KILOBYTES = 300


def read(path: Path) -> Any:
    return nbformat.read(path, 4)


def shown(cell: Any) -> list[str]:
    """What a cell shows: printed text without numbers, and of anything else its kind."""
    found = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            text = re.sub(r"\S+/store\b", "store", output.text)
            found.append(" ".join(re.sub(r"\d+([.,]\d+)*", "#", text).split()))
        else:
            found.append(", ".join(sorted(output.get("data", {output.output_type: ""}))))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_prose_pictures_and_all_outputs_of_one_run(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < KILOBYTES * 1000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from the top, whole"
    kinds = [kind for cell in code for kind in shown(cell)]
    assert sum("image/jpeg" in kind for kind in kinds) >= 3
    assert not [kind for kind in kinds if "error" in kind or "Traceback" in kind]
    assert len(notebook.cells) - len(code) >= 0.7 * len(code), "prose beside code"
    assert all(len(cell.source.splitlines()) <= 40 for cell in code), "one idea a cell"
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = read(path)
    fresh = read(path)
    nbclient.NotebookClient(fresh, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    for before, now in zip(kept.cells, fresh.cells, strict=True):
        assert shown(now) == shown(before), before.source
