"""Sidecars of class graphs: small, though every row has the lists of its class; and plain Parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from graphbuild.export.sidecar import SidecarHeader, sidecar_schema
from graphbuild.export.sidecars import packed

CLASSES, D, ROWS = 1000, 384, 10_000


def lists(values: NDArray[np.generic]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def class_sidecar() -> pa.Table:
    """Of a shard as ImageNet's: 1,000 classes in a random order, every other class a neighbour."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(CLASSES, D)) + 0.8 * rng.normal(size=D)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -9)
    neighbors = np.argsort(-cosines, 1)[:, : CLASSES - 1]
    node = rng.integers(0, CLASSES, ROWS)
    sizes = rng.integers(50_000, 200_000, ROWS)
    columns = {
        "row": pa.array(np.arange(ROWS)),
        "key": pa.array([f"n0144_{i:05d}" for i in range(ROWS)]),
        "node": pa.array(node),
        "caption": pa.array([f"a photo of a class {i}" for i in node]),
        "embedding": lists(np.rint(127 * vectors / np.abs(vectors).max(1, keepdims=True)).astype(np.int8)[node]),
        "embedding_scale": pa.array((np.abs(vectors).max(1) / 127).astype(np.float32)[node]),
        "neighbors": lists(neighbors.astype(np.uint32)[node]),
        "similarities": lists(np.take_along_axis(cosines, neighbors, 1).astype(np.float16)[node]),
        "background_mean": pa.array(cosines.mean(1).astype(np.float32)[node]),
        "background_std": pa.array(cosines.std(1).astype(np.float32)[node]),
        "image_offset": pa.array(np.cumsum(sizes)),
        "image_size": pa.array(sizes),
    }
    header = SidecarHeader(
        encoder="e", d=D, k=CLASSES - 1, embeddings="int8", graph="g", shard="00000", tar=None, rows=ROWS
    )
    schema = sidecar_schema(D, CLASSES - 1, "int8")
    return pa.table(columns, schema=schema.with_metadata(header.metadata()))


@pytest.mark.slow
def test_a_row_of_imagenet_s_sidecars_takes_at_most_0_4_kb_and_any_reader_reads_it(tmp_path: Path) -> None:
    table, path = class_sidecar(), tmp_path / "00000.graph.parquet"
    pq.write_table(table, path, compression="zstd", write_page_checksum=True, **packed(table))
    assert path.stat().st_size / ROWS < 400
    assert pq.read_table(path).equals(table)
    assert pl.read_parquet(path).equals(pl.from_arrow(table))  # type: ignore[arg-type]
