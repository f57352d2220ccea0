"""Classes as nodes where names repeat, and k of their graph, which is known before anything is embedded."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from graphbuild import SampleGraph
from graphbuild.errors import ConfigError
from graphbuild.export.sidecar import Sidecar
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

NAMES = ["crane", "tench", "crane ", "maillot", "crane"]
LABELS = [4, 0, 1, 2, 3, 0, 4, 2]


def tar_of_classes(path: Path, labels: list[int]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            info = tarfile.TarInfo(f"{number}.cls")
            content = f"{label}\n".encode()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def build(folder: Path, *verbs: str, names: list[str] = NAMES, labels: list[int] = LABELS, **index: Any) -> Path:
    tar = folder / "a.tar"
    if not tar.exists():
        tar_of_classes(tar, labels)
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
    embed = Embed(shards=str(tar), caption_member="cls", class_names=str(folder / "names.txt"), template="a {} here")
    with Runner(workers=0) as runner:
        for verb in verbs:
            run_verb(verb, Recipe(embed=embed, index=Index(**index)), Store(str(folder / "store")), runner)
    return folder / "store"


def test_classes_of_one_name_are_nodes_of_their_own_with_the_same_text_and_vector(tmp_path: Path) -> None:
    store = build(tmp_path, "embed", "index", "export", k=0)
    nodes = SampleGraph.open(str(store)).sample_nodes()
    first: dict[int, int] = {}
    assert nodes.tolist() == [first.setdefault(label, len(first)) for label in LABELS]  # by class, not by name
    texts = pq.read_table(store / "nodes/00000.parquet")["text"].to_pylist()
    assert texts == [f"a {NAMES[label].strip()} here" for label in first]
    captions = pq.read_table(store / "samples/00000.parquet")["caption"].to_pylist()
    assert captions == [f"a {NAMES[label].strip()} here" for label in LABELS]
    vectors = np.load(store / "nodes/00000.npy")
    same = [node for node, text in enumerate(texts) if text == "a crane here"]
    assert len(same) == 3
    assert np.array_equal(vectors[same], vectors[same[:1]].repeat(3, axis=0))


def test_k_0_is_all_the_other_nodes(tmp_path: Path) -> None:
    store = build(tmp_path, "run", k=0)
    neighbors, similarities = SampleGraph.open(str(store)).neighbors(np.arange(5))
    assert [sorted([node, *row]) for node, row in enumerate(neighbors.tolist())] == [[0, 1, 2, 3, 4]] * 5
    vectors = np.load(store / "nodes/00000.npy").astype(np.float64)
    exact = np.take_along_axis(vectors @ vectors.T, neighbors.astype(np.int64), 1)
    assert np.abs(similarities - exact).max() < 2e-3
    assert json.loads((store / "manifest.json").read_text())["graph"]["k"] == 4
    build(tmp_path, "run", k=0)  # done: nothing to refuse


def test_k_0_is_2048_of_more_nodes() -> None:
    assert [Index(k=0).neighbors(nodes) for nodes in (2, 2049, 2050, 10**6)] == [1, 2048, 2048, 2048]
    assert Index(k=7).neighbors(100) == 7


def test_k_that_is_not_given_is_64_or_all_the_others_of_fewer_nodes(tmp_path: Path) -> None:
    assert [Index().neighbors(nodes) for nodes in (2, 64, 65, 66, 10**6)] == [1, 63, 64, 64, 64]
    store = build(tmp_path, "embed", "index")
    assert SampleGraph.open(str(store)).k == 4
    assert json.loads((store / "manifest.json").read_text())["graph"]["k"] == 4
    assert yaml.safe_load((store / "recipe.yaml").read_text())["index"]["k"] is None
    with pytest.raises(ConfigError, match="--k 64"):
        build(tmp_path, "index", k=64)


def test_a_k_that_the_classes_are_too_few_for_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--k 5: .*names.txt names 5 classes.*4 possible.*--k 0"):
        build(tmp_path, "run", k=5)
    assert not (tmp_path / "store").exists()


def test_names_that_do_not_repeat_are_in_the_record_as_they_are(tmp_path: Path) -> None:
    """So a store that was embedded before goes on; one whose names repeat is refused with what differs."""
    store = build(tmp_path, "embed", names=["a", "b", "c", "d", "e"])
    (record,) = (store / "_state/scan").glob("*.json")
    assert json.loads(record.read_text())["settings"]["class_names"] == ["a", "b", "c", "d", "e"]


def test_sidecars_of_classes_are_packed_and_those_of_captions_written_as_ever(tmp_path: Path) -> None:
    store = build(tmp_path, "run", k=0)
    (packed,) = (store / "shards").glob("*.graph.parquet")
    found = Sidecar.read(str(packed))
    nodes = SampleGraph.open(str(store)).sample_nodes()
    neighbors, _ = SampleGraph.open(str(store)).neighbors(nodes)
    assert np.array_equal(found.node, nodes)
    assert np.array_equal(found.neighbors, neighbors)
    assert "BYTE_STREAM_SPLIT" in encodings(packed)["neighbors.list.element"]
    with Runner(workers=0) as runner:
        embed = Embed(shards=str(tmp_path / "a.tar"), caption_member="cls")
        for verb in ("embed", "index", "export"):
            run_verb(verb, Recipe(embed=embed, index=Index(k=2)), Store(str(tmp_path / "plain")), runner)
    (plain,) = (tmp_path / "plain/shards").glob("*.graph.parquet")
    pq.write_table(pq.read_table(plain), tmp_path / "as_ever", compression="zstd", write_page_checksum=True)
    assert encodings(tmp_path / "as_ever") == encodings(plain)


def encodings(path: Path) -> dict[str, tuple[str, ...]]:
    columns = pq.ParquetFile(path).metadata.row_group(0)
    return {columns.column(i).path_in_schema: columns.column(i).encodings for i in range(columns.num_columns)}
