"""Class similarities in place of an encoder: cosines are the matrix's entries; what is no such matrix is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graphbuild.cli import main

NAMES = ["cat", "dog", "lorry", "car", "oak"]
SIMILAR = np.array(
    [
        [1.0, 0.8, 0.1, 0.1, 0.2],
        [0.8, 1.0, 0.1, 0.2, 0.2],
        [0.1, 0.1, 1.0, 0.9, 0.0],
        [0.1, 0.2, 0.9, 1.0, 0.0],
        [0.2, 0.2, 0.0, 0.0, 1.0],
    ]
)


def embed(tmp_path: Path, monkeypatch, capsys, matrix: np.ndarray, names: list[str] = NAMES) -> tuple[Path, str]:
    np.save(tmp_path / "similar.npy", matrix)
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names))
    captions = ("car", "cat", "oak", "dog", "lorry", "cat", "car")
    (tmp_path / "list.csv").write_text("caption\n" + "".join(f"{caption}\n" for caption in captions))
    store = tmp_path / "store"
    arguments = ["embed", store, "--captions", tmp_path / "list.csv", "--encoder", f"matrix:{tmp_path / 'similar.npy'}"]
    arguments += ["--class-names", tmp_path / "names.txt", "--template", "a {}", "--workers", 0]
    monkeypatch.setattr("sys.argv", ["graphbuild", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        if end.code:
            return store, capsys.readouterr().err
    return store, ""


def test_cosines_of_class_nodes_are_the_entries_of_the_matrix(tmp_path, monkeypatch, capsys):
    store, error = embed(tmp_path, monkeypatch, capsys, SIMILAR)
    assert not error
    texts = pq.read_table(store / "nodes/00000.parquet")["text"].to_pylist()
    assert texts == ["a car", "a cat", "a oak", "a dog", "a lorry"]
    vectors = np.load(store / "nodes/00000.npy").astype(np.float64)
    rows = [NAMES.index(text.removeprefix("a ")) for text in texts]
    np.testing.assert_allclose(vectors @ vectors.T, SIMILAR[np.ix_(rows, rows)], atol=2e-3)
    recorded = json.loads((store / "manifest.json").read_text())["embeddings"]
    assert recorded["max_deviation"] == pytest.approx(
        np.abs(vectors @ vectors.T - SIMILAR[np.ix_(rows, rows)]).max(), abs=2e-6
    )


CONTRADICTORY = np.array([[1, 0.99, -0.99], [0.99, 1, 0.99], [-0.99, 0.99, 1]])


@pytest.mark.parametrize(
    ("matrix", "names", "says"),
    [
        (SIMILAR[:4], NAMES, "shape (4, 5) is not [5, 5]"),
        (np.where(np.eye(5), 0.5, SIMILAR), NAMES, "row 0 has not 1 on the diagonal"),
        (SIMILAR + np.triu(np.full((5, 5), 0.01), 1), NAMES, "not symmetric at row 0, column 1"),
        (np.where(SIMILAR == 0.9, np.nan, SIMILAR), NAMES, "no finite number"),
        (np.where(SIMILAR == 0.9, 1.5, SIMILAR), NAMES, "entries beyond 1"),
        (np.kron(np.eye(2), CONTRADICTORY)[:5, :5], NAMES, "no Gram matrix"),
        (SIMILAR, ["cat", "dog", "lorry", "cat", "oak"], "names 1 classes twice"),
        (SIMILAR[:4, :4], NAMES[:4], "'a oak' is no class name"),
    ],
)
def test_what_is_no_similarity_matrix_of_the_classes_is_refused(tmp_path, monkeypatch, capsys, matrix, names, says):
    _, error = embed(tmp_path, monkeypatch, capsys, matrix, names)
    assert says in error
