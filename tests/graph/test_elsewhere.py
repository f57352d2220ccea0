"""`to_knn`, and the code that docs/how-to/elsewhere.md prints, run as it is printed against the packages themselves."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from graphbuild import SampleGraph
from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import make_scenes
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "elsewhere.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
K = 12


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> SampleGraph:
    """Captions of 400 scenes, some of which share one, in shards of 90; k = 12."""
    folder = tmp_path_factory.mktemp("elsewhere")
    texts = [f"{caption(scene)}, seen {n % 3} times" for n, scene in enumerate(make_scenes(400))]
    pl.DataFrame({"caption": texts}).write_parquet(folder / "captions.parquet")
    recipe = Recipe(embed=Embed(captions=str(folder / "captions.parquet"), shard_size=90), index=Index(k=K))
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
        run_verb("index", recipe, store, runner)
    return SampleGraph.open(store.url)


@pytest.fixture
def run(graph: SampleGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A section's code, run in a folder where the store is at out/; returns its names."""
    (tmp_path / "out").symlink_to(graph.url)
    monkeypatch.chdir(tmp_path)

    def run_section(name: str) -> dict[str, Any]:
        code = re.search(r"```python\n(.*?)```", SECTIONS[name], re.S)
        assert code is not None
        assert len([line for line in code[1].splitlines() if line]) <= 10
        names: dict[str, Any] = {}
        exec(compile(code[1], f"{PAGE} {name}", "exec"), names)
        return names

    return run_section


def stored(graph: SampleGraph, pattern: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(Path(graph.url).glob(pattern))])


def expected(graph: SampleGraph) -> tuple[np.ndarray, np.ndarray]:
    """The lists with each node before its own, as numpy reads them."""
    neighbors, similarities = stored(graph, "graph/*.neighbors.npy"), stored(graph, "graph/*.similarities.npy")
    itself = np.arange(len(neighbors))[:, None]
    return np.hstack([itself, neighbors]), np.hstack([0 * itself, (1 - similarities.astype(float)).clip(0)])


def test_to_knn_has_each_node_and_then_its_list_by_distance(graph: SampleGraph) -> None:
    indices, distances = graph.to_knn()
    assert (indices.dtype, distances.dtype) == (np.int64, np.float32)
    assert (len(stored(graph, "graph/*.neighbors.npy")) > 90) == (len(graph) > 90)
    np.testing.assert_array_equal(indices, expected(graph)[0])
    np.testing.assert_allclose(distances, expected(graph)[1], atol=1e-7)
    assert (np.diff(distances) >= 0).all()
    vectors = graph.embeddings(indices[::40]).astype(float)
    np.testing.assert_allclose(distances[::40], 1 - np.einsum("nkd,nd->nk", vectors, vectors[:, 0]), atol=2e-3)


def test_scikit_learn_clusters_by_the_lists(graph: SampleGraph, run: Any) -> None:
    from sklearn.cluster import DBSCAN

    indices, distances = expected(graph)
    dense = np.full((len(graph), len(graph)), 2.0)
    np.put_along_axis(dense, indices, distances, axis=1)
    reference = DBSCAN(eps=0.05, min_samples=2, metric="precomputed").fit_predict(dense)
    assert len(set(reference)) > 10
    assert run("scikit-learn")["labels"].tolist() == reference.tolist()


def test_umap_takes_the_lists_for_its_own(graph: SampleGraph, run: Any) -> None:
    umap = pytest.importorskip("umap", reason="umap-learn is not installed")
    names = run("umap-learn")
    indices, distances = expected(graph)
    np.testing.assert_array_equal(names["mapper"]._knn_indices, indices)
    fuzzy, *_ = umap.umap_.fuzzy_simplicial_set(
        np.zeros((len(graph), 1)), K + 1, 0, "cosine", knn_indices=indices, knn_dists=distances.astype(np.float32)
    )
    np.testing.assert_allclose(names["mapper"].graph_.toarray(), fuzzy.toarray(), atol=5e-3)  # umap drops the weakest
    assert names["places"].shape == (len(graph), 2)
    assert np.isfinite(names["places"]).all()


def test_cleanlab_finds_near_duplicates_by_the_lists(graph: SampleGraph, run: Any) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    pytest.importorskip("datasets", reason="datasets, which Datalab needs, is not installed")
    nearest = expected(graph)[1][:, 1]
    found = run("cleanlab")["lab"].get_issues("near_duplicate")
    assert found["distance_to_nearest_neighbor"].to_numpy() == pytest.approx(nearest, abs=1e-6)
    assert found["is_near_duplicate_issue"].any()
    assert len(run("cleanlab")["lab"].get_issues("outlier")) == len(graph)


def test_embedding_atlas_starts_with_the_file(graph: SampleGraph, run: Any, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    pytest.importorskip("embedding_atlas", reason="embedding-atlas is not installed")
    import pandas as pd

    run("Embedding Atlas")
    table = pl.read_parquet("atlas.parquet")
    assert table["text"].to_list() == [
        text for path in sorted(Path("out").glob("nodes/*.parquet")) for text in pl.read_parquet(path)["text"]
    ]
    assert [each["ids"] for each in table["neighbors"]] == expected(graph)[0].tolist()
    command = re.search(r"```bash\n(embedding-atlas .*)\n```", SECTIONS["Embedding Atlas"])
    assert command is not None
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = shutil.which("embedding-atlas")
    assert program is not None
    words = [program, *command[1].split()[1:], "--port", str(port), "--no-auto-port"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            page = wait_for(f"http://localhost:{port}/", process)
            assert "<title>" in page.decode()
            metadata = wait_for(f"http://localhost:{port}/data/metadata.json", process).decode()
            assert '"neighbors"' in metadata
            data = wait_for(f"http://localhost:{port}/data/dataset.parquet", process)
        finally:
            process.terminate()
    (tmp_path / "served.parquet").write_bytes(data)
    served = pd.read_parquet(tmp_path / "served.parquet")
    assert served["neighbors"][5]["ids"].tolist() == expected(graph)[0][5].tolist()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> bytes:
    """What a server that is starting answers."""
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(address) as answer:
                return bytes(answer.read())
        except OSError:
            assert process.poll() is None, "it ended"
            assert time.monotonic() < end, "no answer"
            time.sleep(0.5)
