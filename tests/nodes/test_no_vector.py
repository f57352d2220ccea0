"""Captions of which an encoder makes zeros, NaN or infinities: rejected by name; their rows and the rest go on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from graphbuild.errors import QualityError, StageError
from graphbuild.job.relocate import relocate
from graphbuild.job.verbs import run_verb
from graphbuild.knn import inputs
from graphbuild.look.verify import verify_store
from graphbuild.nodes import fidelity
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store, Writer, json_text

EMOJI = "\U0001f600"  # the tokenizer has no token for it: zeros
NONE = {EMOJI, "q", "x y"}  # with the weights of `letters`: zeros, NaN, infinities
REASON = "the encoder gives no vector"
TARS = {
    "a": ["red", EMOJI, "blue", "q", "red", "old"],
    "b": [EMOJI, "x y", "q"],
    "c": ["x y", "green", "blue", "new", EMOJI, "green grass"],
}


def write_tars(folder: Path, names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for number, caption in enumerate(TARS[name]):
                info = tarfile.TarInfo(f"{name}{number}.txt")
                info.size = len(caption.encode())
                archive.addfile(info, io.BytesIO(caption.encode()))


def run(store: Path, verbs: str, embed: Embed, workers: int = 0) -> dict[str, object]:
    with Runner(workers=workers) as runner:
        for verb in verbs.split():
            manifest = run_verb(verb, Recipe(embed=embed, index=Index(k=2)), Store(str(store)), runner)
    return manifest


def column(store: Path, folder: str, name: str) -> list[object]:
    return [
        value for path in sorted(store.glob(f"{folder}/*.parquet")) for value in pq.read_table(path)[name].to_pylist()
    ]


def content(store: Path) -> dict[str, object]:
    """Of every file, without the seconds in records."""
    files = {str(path.relative_to(store)): path for path in store.rglob("*") if path.is_file()}
    return {
        name: {**json.loads(path.read_bytes()), "seconds": 0} if name.endswith("done.json") else path.read_bytes()
        for name, path in files.items()
        if name != "recipe.yaml"  # names the folder of the tars
    }


def expected_nodes(captions: list[str]) -> list[int | None]:
    first: dict[str, int] = {}
    return [None if caption in NONE else first.setdefault(caption, len(first)) for caption in captions]


def test_such_captions_of_tars_keep_their_rows_without_a_node_and_the_job_goes_on(tmp_path: Path, letters: str) -> None:
    write_tars(tmp_path / "tars", "abc")
    embed, store = Embed(shards=str(tmp_path / "tars/*.tar"), encoder=letters), tmp_path / "store"
    manifest = run(store, "embed index export", embed)
    captions = [caption for name in "abc" for caption in TARS[name]]
    nodes = expected_nodes(captions)
    assert column(store, "samples", "row") == list(range(len(captions)))
    assert column(store, "samples", "caption") == captions
    assert column(store, "samples", "node") == column(store, "shards", "node") == nodes
    texts = list(dict.fromkeys(caption for caption in captions if caption not in NONE))
    assert column(store, "nodes", "text") == texts
    assert column(store, "nodes", "node") == list(range(len(texts)))
    assert column(store, "nodes", "samples") == [captions.count(text) for text in texts]
    from sentence_transformers import SentenceTransformer

    own = SentenceTransformer(letters, device="cpu").encode(texts, normalize_embeddings=True)
    stored = np.concatenate([np.load(path) for path in sorted(store.glob("nodes/*.npy"))])
    np.testing.assert_allclose(stored.astype(np.float32), own, atol=1e-3)
    lost = [(f"{name}{at}", at, caption) for name in "abc" for at, caption in enumerate(TARS[name]) if caption in NONE]
    rejected = list(
        zip(*(column(store, "rejected/assign", name) for name in ("key", "position", "content")), strict=True)
    )
    assert rejected == lost
    assert set(column(store, "rejected/assign", "reason")) == {REASON}
    assert manifest["rejected"] == {REASON: len(lost)}
    assert manifest["recall"]["recall"] == 1  # type: ignore[index]
    assert verify_store(Store(str(store))).problems == []
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    run(store, "embed index export", embed)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before
    (tmp_path / "tars").rename(tmp_path / "moved")
    with Runner(workers=0) as runner:
        list(relocate(Store(str(store)), str(tmp_path / "moved/*.tar"), runner))
    assert Store(str(store)).manifest()["rejected"] == {REASON: len(lost)}


@pytest.mark.slow
def test_the_bytes_are_the_same_with_workers_and_when_tars_come_later(tmp_path: Path, letters: str) -> None:
    write_tars(tmp_path / "tars", "abc")
    embed = Embed(shards=str(tmp_path / "tars/*.tar"), encoder=letters)
    run(tmp_path / "one", "embed", embed)
    run(tmp_path / "two", "embed", embed, workers=2)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    write_tars(tmp_path / "grown", "ab")
    grown = Embed(shards=str(tmp_path / "grown/*.tar"), encoder=letters)
    run(tmp_path / "three", "embed index", grown)
    write_tars(tmp_path / "grown", "c")
    run(tmp_path / "three", "embed", grown)
    for folder in ("samples", "nodes", "rejected/assign"):
        for path in (tmp_path / "one" / folder).iterdir():
            assert (tmp_path / "three" / folder / path.name).read_bytes() == path.read_bytes()


def test_such_captions_of_a_list_keep_their_rows_without_a_node(tmp_path: Path, letters: str) -> None:
    captions = ["q", "red", EMOJI, "blue", "x y", "red", "old"]
    (tmp_path / "list.csv").write_text("\n".join(["caption", *captions]) + "\n")
    store = tmp_path / "store"
    embed = Embed(captions=str(tmp_path / "list.csv"), encoder=letters, shard_size=3)
    run(store, "embed index export", embed)
    assert column(store, "samples", "node") == column(store, "shards", "node") == expected_nodes(captions)
    assert column(store, "rejected/assign", "key") == ["0", "2", "4"]
    assert verify_store(Store(str(store))).problems == []


def test_an_encoder_without_any_vector_is_refused(tmp_path: Path, letters: str) -> None:
    (tmp_path / "list.csv").write_text(f"caption\nq\n{EMOJI}\n")
    with pytest.raises(StageError, match="no vector for any of 2 texts"):
        run(tmp_path / "store", "embed", Embed(captions=str(tmp_path / "list.csv"), encoder=letters))


def test_zeros_among_the_stored_vectors_fail_fidelity_and_index_and_the_way_out_works(
    tmp_path: Path, letters: str
) -> None:
    (tmp_path / "list.csv").write_text("caption\nred\nblue\nold\nnew\n")
    embed, store = Embed(captions=str(tmp_path / "list.csv"), encoder=letters), Store(str(tmp_path / "store"))
    run(tmp_path / "store", "embed", embed)
    path = tmp_path / "store/nodes/00000.npy"
    np.save(path, np.zeros_like(np.load(path)))
    (task,) = fidelity.plan(Recipe(embed=embed), store)
    with Writer(store) as writer, pytest.raises(QualityError, match="mean cosine of nan"):
        fidelity.run(type(task)(stage="fidelity", name="all", hints={**task.hints, "device": "cpu"}), store, writer)
    with pytest.raises(StageError, match=r"nodes/00000\.npy: row 0 is no vector.*4 such rows") as refused:
        run(tmp_path / "store", "index", embed)
    assert f"delete this file and run `graphbuild embed {store.url}`" in refused.value.fix
    path.unlink()
    inputs._opened.cache_clear()  # as of a command of its own
    run(tmp_path / "store", "embed index", embed)
    assert verify_store(store).problems == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_written_into_no_json(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"mean": [value]})
