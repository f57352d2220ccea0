"""Stage fidelity measures the stored vectors against the encoder in float32, and refuses vectors that are not its."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from graphbuild.errors import QualityError
from graphbuild.job.verbs import run_verb
from graphbuild.nodes import fidelity
from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store, Writer


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity")
    lines = [f"{number} grey herons by the {place}" for number in range(40) for place in ("lake", "sea", "Elbe")]
    (folder / "list.csv").write_text("caption\n" + "\n".join([*lines, "long " * 400]) + "\n")
    recipe = Recipe(embed=Embed(captions=str(folder / "list.csv"), shard_size=50))
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", recipe, store, runner)
    return folder / "store", recipe


def stored(folder) -> tuple[list[str], np.ndarray]:
    tables = sorted((folder / "nodes").glob("*.parquet"))
    texts = [text for table in tables for text in pq.read_table(table)["text"].to_pylist()]
    return texts, np.concatenate([np.load(table.with_suffix(".npy")) for table in tables]).astype(np.float64)


def test_the_certificate_is_the_cosine_to_sentence_transformers_in_float32(job):
    folder, _ = job
    texts, vectors = stored(folder)
    own = SentenceTransformer(str(find_encoder(DEFAULT_ENCODER).folder), device="cpu").encode(texts, batch_size=4)
    own = own.astype(np.float64)
    cosines = (own * vectors).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(vectors, axis=1)
    cosines = cosines[np.sort(np.random.default_rng(0).choice(len(texts), 31, replace=False))]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fidelity"] == {
        "texts": 31,
        "mean_cosine": pytest.approx(cosines.mean(), abs=1e-6),
        "min_cosine": pytest.approx(cosines.min(), abs=1e-6),
    }
    assert cosines.mean() > 0.9999
    assert manifest["embeddings"]["truncated"] == 1
    assert manifest["embeddings"]["max_tokens"] == 256
    assert not manifest["embeddings"]["static"]


@pytest.mark.slow
def test_vectors_do_not_depend_on_how_a_list_is_cut(job, tmp_path):
    folder, recipe = job
    other = Recipe(embed=recipe.embed.model_copy(update={"shard_size": 17}))
    with Runner(workers=0) as runner:
        run_verb("embed", other, Store(str(tmp_path)), runner)
    assert len(list((tmp_path / "nodes").glob("*.npy"))) == 8
    texts, vectors = stored(folder)
    again, recut = stored(tmp_path)
    assert again == texts
    np.testing.assert_array_equal(recut, vectors)


def test_vectors_of_other_texts_are_refused(job, tmp_path):
    folder, recipe = job
    store = Store(str(folder))
    (task,) = fidelity.plan(recipe, store)
    task = type(task)(stage=task.stage, name=task.name, hints={**task.hints, "device": "cpu"})
    path = folder / "nodes/00001.npy"
    kept = np.load(path)
    np.save(path, kept[::-1])
    try:
        with Writer(store) as writer, pytest.raises(QualityError, match=r"mean cosine of 0\.\d+ .* worst: "):
            fidelity.run(task, store, writer)
    finally:
        np.save(path, kept)
