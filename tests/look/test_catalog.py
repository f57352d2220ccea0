"""A finished store's texts, by the row group: those of other readers of the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from graphbuild.look import catalog as catalogs
from graphbuild.look.catalog import Catalog
from graphbuild.store.store import Store
from tests.store.test_shards import job

ROWS = 2


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "one group, as older stores have it"])
def test_texts_and_numbers_of_samples_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    store = Store(str(tmp_path / "store"))
    job(tmp_path, "tars")(store, 3)
    files = sorted((tmp_path / "store" / "nodes").glob("*.parquet"))
    tables = [pl.read_parquet(file) for file in files]
    if grouped:
        for file, table in zip(files, tables, strict=True):
            table.write_parquet(file, row_group_size=ROWS)
    monkeypatch.setattr(catalogs, "TEXTS_ROWS", ROWS)
    expected = pl.concat(tables).sort("node")
    nodes = np.random.default_rng(0).permutation(len(expected))
    found = Catalog(store).describe(nodes, np.zeros(len(nodes)))
    assert [(one.node, one.text, one.samples) for one in found] == expected[nodes.tolist()].rows()
