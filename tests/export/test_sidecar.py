"""Sidecars: what is read equals what was written, and every contradiction is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphbuild.errors import ConfigError, InputError, ShardError
from graphbuild.export.quantized import quantize_int8, unit_rows
from graphbuild.export.sidecar import Sidecar, SidecarHeader, TarIdentity, read_columns, sidecar_schema
from graphbuild.runner.stage import sealed

D, K, ROWS, WITHOUT_NODE = 6, 3, 5, 2


def columns(embeddings: str = "int8") -> dict[str, list[Any]]:
    """Five rows; row 2 has no node."""
    rng = np.random.default_rng(0)
    vectors, scale = quantize_int8(rng.normal(size=(ROWS, D)))
    data: dict[str, list[Any]] = {
        "row": [10, 11, 12, 13, 14],
        "key": ["a", "b", "c", "d", "é"],
        "node": [7, 3, None, 7, 0],
        "caption": ["seven", "three", None, "Seven", "zero"],
        "embedding": list(vectors) if embeddings == "int8" else list(rng.normal(size=(ROWS, D)).astype(np.float16)),
        "embedding_scale": list(scale),
        "neighbors": [[1, 2, 2**32 - 1], [4, 5, 6], [0, 0, 0], [1, 2, 3], [9, 8, 7]],
        "similarities": [[np.float16(x) for x in (0.9, 0.5, -0.25)]] * ROWS,
        "background_mean": [0.1, 0.2, 0.0, 0.1, 0.3],
        "background_std": [0.01, 0.02, 0.0, 0.01, 0.03],
        "image_offset": [512, 2048, 4096, None, 9000],
        "image_size": [100, 200, 300, None, 400],
    }
    for name in (
        "embedding",
        "embedding_scale",
        "neighbors",
        "similarities",
        "background_mean",
        "background_std",
    ):
        data[name][WITHOUT_NODE] = None
    return data


def read_header(url: str) -> tuple[SidecarHeader, int]:
    """The header, and how many rows have a node."""
    found, table = read_columns(url, ["node"])
    return found, len(table) - table["node"].null_count


def header(**changes: Any) -> SidecarHeader:
    facts = {
        "encoder": "all-MiniLM-L6-v2",
        "d": D,
        "k": K,
        "embeddings": "int8",
        "graph": "abc123",
        "shard": "00000",
        "tar": TarIdentity(name="00000.tar", bytes=10240, sha256="00"),
        "rows": ROWS,
    }
    return SidecarHeader(**{**facts, **changes})


def write(
    path: Path, data: dict[str, list[Any]], head: SidecarHeader, metadata: dict[bytes, bytes] | None = None
) -> str:
    schema = sidecar_schema(D, K, head.embeddings)
    table = pa.table({name: data[name] for name in schema.names}, schema=schema)
    pq.write_table(table.replace_schema_metadata(metadata or head.metadata()), path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("embeddings", ["int8", "float16", "none"])
def test_reads_what_was_written(tmp_path: Path, embeddings: Any) -> None:
    data = columns(embeddings)
    sidecar = Sidecar.read(write(tmp_path / "s.parquet", data, header(embeddings=embeddings)))
    assert sidecar.header == header(embeddings=embeddings)
    assert sidecar.row.tolist() == data["row"]
    assert sidecar.key.tolist() == data["key"]
    assert sidecar.node.tolist() == [7, 3, -1, 7, 0]
    assert sidecar.caption.tolist() == data["caption"]
    named = [0, 1, 3, 4]
    assert sidecar.neighbors.dtype == np.uint32
    assert sidecar.neighbors[named].tolist() == [data["neighbors"][row] for row in named]
    assert sidecar.similarities.dtype == np.float16
    assert sidecar.similarities[0].tolist() == [*data["similarities"][0]]
    np.testing.assert_array_equal(
        sidecar.background[named], np.float32([[0.1, 0.01], [0.2, 0.02], [0.1, 0.01], [0.3, 0.03]])
    )
    assert sidecar.image_offset.tolist() == [512, 2048, 4096, -1, 9000]
    assert sidecar.image_size.tolist() == [100, 200, 300, -1, 400]
    for matrix in (sidecar.neighbors, sidecar.similarities, sidecar.background):
        assert not matrix[WITHOUT_NODE].any()


@pytest.mark.parametrize("embeddings", ["int8", "float16"])
def test_embeddings_are_unit_norm_and_zero_without_a_node(tmp_path: Path, embeddings: Any) -> None:
    data = columns(embeddings)
    sidecar = Sidecar.read(write(tmp_path / "s.parquet", data, header(embeddings=embeddings)))
    assert sidecar.embedding is not None
    unit = unit_rows(sidecar.embedding)
    assert unit.dtype == np.float32
    assert not unit[WITHOUT_NODE].any()
    for row in (0, 1, 3, 4):
        exact = np.asarray(data["embedding"][row], np.float64)
        np.testing.assert_allclose(unit[row], exact / np.linalg.norm(exact), atol=1e-6)


def test_a_store_without_embeddings_has_none(tmp_path: Path) -> None:
    sidecar = Sidecar.read(write(tmp_path / "s.parquet", columns(), header(embeddings="none")))
    assert sidecar.embedding is None


def test_other_tools_read_the_file_without_graphbuild(tmp_path: Path) -> None:
    import polars

    path = write(tmp_path / "s.parquet", columns(), header())
    frame = polars.read_parquet(path)
    assert frame["key"].to_list() == ["a", "b", "c", "d", "é"]
    assert frame["neighbors"][0].to_list() == [1, 2, 2**32 - 1]
    facts = json.loads(pq.read_schema(path).metadata[b"graphbuild"])
    assert facts["format_version"] == 1
    assert facts["tar"] == {"name": "00000.tar", "bytes": 10240, "sha256": "00"}


def test_reads_from_an_fsspec_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/stores/s.parquet", Path(write(tmp_path / "s.parquet", columns(), header())).read_bytes())
    assert Sidecar.read("memory://stores/s.parquet").row.tolist() == [10, 11, 12, 13, 14]
    assert read_header("memory://stores/s.parquet") == (header(), 4)
    memory.rm("/stores", recursive=True)


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "s.parquet", {name: [] for name in columns()}, header(rows=0))
    sidecar = Sidecar.read(path)
    assert sidecar.neighbors.shape == (0, K)
    assert sidecar.embedding is not None
    assert sidecar.embedding.shape == (0, D)
    assert read_header(path)[1] == 0


def test_a_shard_without_any_node_is_all_null(tmp_path: Path) -> None:
    data = {name: [value[WITHOUT_NODE]] * 2 for name, value in columns().items()} | {"key": ["a", "b"]}
    path = write(tmp_path / "s.parquet", data, header(rows=2))
    assert Sidecar.read(path).node.tolist() == [-1, -1]
    assert read_header(path)[1] == 0


@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.floats(-1e3, 1e3, width=32)).filter(
        lambda vectors: (np.abs(vectors).max(axis=1) > 1e-3).all()
    )
)
def test_int8_is_within_half_a_step_of_every_value(vectors: np.ndarray) -> None:
    values, scale = quantize_int8(vectors)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    assert (np.abs(values).max(axis=1) == 127).all()
    assert (np.abs(values * scale[:, None] - vectors) <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_vectors_without_a_direction_are_not_quantised(value: float) -> None:
    vectors = np.ones((3, 4), np.float32)
    vectors[1] = value
    with pytest.raises(InputError, match="vector 1"):
        quantize_int8(vectors)


def test_quantisation_of_no_vectors_and_of_half_precision() -> None:
    values, scale = quantize_int8(np.empty((0, 4), np.float16))
    assert (values.shape, scale.shape) == ((0, 4), (0,))
    tiny = np.full((1, 4), 6e-8, np.float16)
    assert quantize_int8(tiny)[0].tolist() == [[127] * 4]
    with pytest.raises(InputError):
        quantize_int8(np.ones(4, np.float32))


@pytest.mark.parametrize("arguments", [(0, 4, "int8"), (4, 0, "int8"), (4, 4, "int4")])
def test_schemas_out_of_range_are_refused(arguments: tuple[int, int, Any]) -> None:
    with pytest.raises(ConfigError):
        sidecar_schema(*arguments)


def test_a_missing_file_names_the_next_step(tmp_path: Path) -> None:
    for read in (Sidecar.read, read_header):
        with pytest.raises(ShardError, match=r"s\.parquet.*\n.*graphbuild export"):
            read(str(tmp_path / "s.parquet"))


def test_a_cut_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    write(path, columns(), header())
    path.write_bytes(path.read_bytes()[:-100])
    for read in (Sidecar.read, read_header):
        with pytest.raises(ShardError, match="not a readable Parquet file"):
            read(str(path))
    write(path, columns(), header(), metadata={b"other": b"{}"})
    with pytest.raises(ShardError, match="without graphbuild's metadata"):
        Sidecar.read(str(path))


def test_another_format_version_is_refused_before_anything_else(tmp_path: Path) -> None:
    path = write(tmp_path / "s.parquet", columns(), header(), metadata={b"graphbuild": b'{"format_version": 2}'})
    for read in (Sidecar.read, read_header):
        with pytest.raises(ShardError, match=r"version 2; this graphbuild reads 1\n.*install the version"):
            read(path)


def test_a_malformed_header_names_the_field(tmp_path: Path) -> None:
    facts = json.loads(header().metadata()[b"graphbuild"])
    facts["tar"]["bytes"] = "many"
    path = write(tmp_path / "s.parquet", columns(), header(), metadata={b"graphbuild": json.dumps(facts).encode()})
    with pytest.raises(ShardError, match=r"tar\.bytes"):
        Sidecar.read(path)


# What version 1 wrote before headers had an `image_member`.
EARLIER = (
    b'{"format_version": 1, "encoder": "sentence-transformers/all-MiniLM-L6-v2", "d": 384, "k": 2, "embedd'
    b'ings": "int8", "graph": "a2fe07a22dc749749d65a337052c7df512be70cb3190e794b46008cda3509eeb", "shard":'
    b' "00000", "tar": {"name": "a.tar", "bytes": 20480, "sha256": "624c352825c1199cd960ef5389c414fa2367ec'
    b'fe2d33831d998da819d46d14c6"}, "rows": 3, "chunk": null, "sketch_steps": null, "checksum": "8b4023979'
    b'cffd73045b2c14aae8d0ea67f62a28738916659a631623ae3b9bfc4"}'
)


def test_a_header_without_newer_settings_is_written_as_by_earlier_versions() -> None:
    assert SidecarHeader.model_validate_json(EARLIER).metadata() == {b"graphbuild": EARLIER}


def test_sidecars_of_earlier_and_later_versions_are_read(tmp_path: Path) -> None:
    schema = sidecar_schema(384, 2, "int8")
    numbers = {"row": [0, 1, 2], "key": ["a", "b", "c"], "node": [None] * 3}
    table = pa.table({name: numbers.get(name, [None] * 3) for name in schema.names}, schema=schema)
    later = sealed({**json.loads(EARLIER), "of a later version": [1.5]})
    for metadata in (EARLIER, json.dumps(later).encode()):
        pq.write_table(table.replace_schema_metadata({b"graphbuild": metadata}), tmp_path / "s.parquet")
        assert Sidecar.read(str(tmp_path / "s.parquet")).header.k == 2
    for changed in (EARLIER.replace(b'"k": 2', b'"k": 3'), EARLIER.replace(b'", "d"', b'",  "d"')):
        pq.write_table(table.replace_schema_metadata({b"graphbuild": changed}), tmp_path / "s.parquet")
        with pytest.raises(ShardError, match="its metadata has changed"):
            Sidecar.read(str(tmp_path / "s.parquet"))


def test_columns_must_have_the_header_s_types(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    table = pq.read_table(write(path, columns(), header()))
    pq.write_table(table.drop_columns("neighbors"), path)
    with pytest.raises(ShardError, match="neighbors is absent"):
        Sidecar.read(str(path))
    pq.write_table(table.set_column(0, "row", table["row"].cast(pa.int32())), path)
    with pytest.raises(ShardError, match="row is int32, expected int64"):
        Sidecar.read(str(path))
    pq.write_table(table.slice(1), path)
    with pytest.raises(ShardError, match="4 rows, its header says 5"):
        Sidecar.read(str(path))


@pytest.mark.parametrize("name", ["embedding", "embedding_scale", "neighbors", "similarities", "background_std"])
def test_a_value_missing_where_a_node_is_named_is_refused(tmp_path: Path, name: str) -> None:
    data = columns()
    data[name][3] = None
    with pytest.raises(ShardError, match=f"{name} is null at row 3"):
        Sidecar.read(write(tmp_path / "s.parquet", data, header()))


@pytest.mark.parametrize(("embeddings", "value"), [("int8", 0), ("float16", 0.0), ("float16", np.nan)])
def test_an_unusable_embedding_is_refused(tmp_path: Path, embeddings: Any, value: float) -> None:
    data = columns(embeddings)
    data["embedding"][1] = np.full(D, value, data["embedding"][0].dtype)
    with pytest.raises(ShardError, match="embedding of row 1 is zero or not finite"):
        Sidecar.read(write(tmp_path / "s.parquet", data, header(embeddings=embeddings)))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    data = columns()
    data["key"][4] = "b"
    with pytest.raises(ShardError, match="key 'b' stands at row 1 and again at row 4"):
        Sidecar.read(write(tmp_path / "s.parquet", data, header()))


def test_shard_errors_survive_pickling_and_being_rebuilt_from_their_text() -> None:
    error = ShardError("a.tar is cut", "fetch it again")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a.tar is cut\n  -> fetch it again"
    assert str(ShardError(str(error))) == str(error)
