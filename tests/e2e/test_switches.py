"""A store whose source is switched, in every order and back: refused with what would go, or, with --force, the bytes of
a store made from nothing.

The sources have as many samples and vectors of one width where they can, so that neither a count nor a file's size
tells them apart. Every store begins with a finished download, which no switch may touch.
"""

from __future__ import annotations

import io
import itertools
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphbuild.errors import ConfigError
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.e2e.test_runs import digests
from tests.e2e.web import serving

SOURCES = ("tars", "list", "vectors", "matrix", "beside", "download")
SAMPLES, SHARD, WIDTH, K = 12, 4, 64, 3  # as wide as `words`
ANIMALS = ["dog", "cat", "horse", "owl"]
Picture = tuple[bytes, str]


def captions(place: str) -> list[str]:
    return [f"{count} {animal}s {place}" for animal in ANIMALS for count in (2, 3, 4)]


def write_tars(folder: Path, texts: list[str], extension: str) -> str:
    folder.mkdir()
    for number in range(SAMPLES // SHARD):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for row in range(number * SHARD, (number + 1) * SHARD):
                info = tarfile.TarInfo(f"{row:04d}.{extension}")
                info.size = len(texts[row])
                archive.addfile(info, io.BytesIO(texts[row].encode()))
    return str(folder)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, words: str) -> dict[str, dict[str, Any]]:
    """The settings of `embed`, by source."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "list.csv").write_text("caption\n" + "".join(f"{text}\n" for text in captions("by the sea")))
    draw = np.random.default_rng(0)
    np.save(folder / "vectors.npy", draw.standard_normal((SAMPLES, WIDTH)).astype(np.float32))
    (folder / "names.txt").write_text("".join(f"{animal}\n" for animal in ANIMALS))
    basis = np.linalg.qr(draw.standard_normal((4, 4)))[0] + 0.5
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    np.save(folder / "matrix.npy", basis @ basis.T)
    classes = write_tars(folder / "classes", [str(row % 4) for row in range(SAMPLES)], "cls")
    matrix = {"caption_member": "cls", "class_names": str(folder / "names.txt")}
    tars = write_tars(folder / "tars", captions("in the snow"), "txt")
    (folder / "keys.csv").write_text("key\n" + "".join(f"{row:04d}\n" for row in reversed(range(SAMPLES))))
    return {
        "tars": {"shards": tars, "encoder": words},
        "beside": {
            "shards": tars,
            "vectors": str(folder / "vectors.npy"),
            "vector_keys": str(folder / "keys.csv"),
        },
        "list": {"captions": str(folder / "list.csv"), "shard_size": SHARD, "encoder": words},
        "vectors": {"vectors": str(folder / "vectors.npy"), "shard_size": SHARD},
        "matrix": {"shards": classes, "encoder": f"matrix:{folder / 'matrix.npy'}", **matrix},
        "download": {"encoder": words},
    }


@pytest.fixture(scope="module")
def downloaded(pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store with nothing but a finished download, and the settings of its recipe."""

    folder = tmp_path_factory.mktemp("downloaded")
    texts = captions("on a hill")
    settings = {"urls": str(folder / "urls.csv"), "shard_size": SHARD, "allow_private_hosts": True, "resize_mode": "no"}
    with serving(lambda path: pictures[int(path.strip("/"))][0]) as base, Runner(workers=0) as runner:
        (folder / "urls.csv").write_text(
            "url,caption\n" + "".join(f"{base}/{number},{text}\n" for number, text in enumerate(texts))
        )
        run_verb("download", Recipe(download=settings), Store(str(folder / "store")), runner)
    return folder / "store", settings


class Builder:
    """Runs the verbs behind the download on a store, in this process."""

    def __init__(self, download: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> None:
        self._recipes = {
            name: Recipe.model_validate({"download": download, "embed": embed, "index": {"k": K}})
            for name, embed in recipes.items()
        }

    def embed(self, store: Path, source: str, *, force: bool = False) -> None:
        with Runner(workers=0) as runner:
            run_verb("embed", self._recipe(source), Store(str(store)), runner, force=force)

    def go_on(self, store: Path, source: str) -> None:
        with Runner(workers=0) as runner:
            for verb in ("index", "export"):
                run_verb(verb, self._recipe(source), Store(str(store)), runner)

    def _recipe(self, source: str) -> Recipe:
        recipe = self._recipes[source]
        few = {"k": 2} if source == "matrix" else {}  # its four classes are four nodes
        return recipe.model_copy(update={"index": recipe.index.model_copy(update=few)})


@pytest.fixture(scope="module")
def builder(downloaded: tuple[Path, dict[str, Any]], recipes: dict[str, dict[str, Any]]) -> Builder:
    return Builder(downloaded[1], recipes)


@pytest.fixture(scope="module")
def fresh(builder: Builder, downloaded: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished store of each source, made from the download alone."""
    folder = tmp_path_factory.mktemp("fresh")
    for source in SOURCES:
        shutil.copytree(downloaded[0], folder / source)
        builder.embed(folder / source, source)
        builder.go_on(folder / source, source)
        assert verify_store(Store(str(folder / source))).problems == []
    return {source: folder / source for source in SOURCES}


@pytest.mark.parametrize(("first", "second"), itertools.combinations(SOURCES, 2))  # there and back: each order once
def test_a_switch_of_source_is_refused_or_gives_the_bytes_of_a_store_made_from_nothing(
    first: str, second: str, builder: Builder, fresh: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(fresh[first], store)
    for source, before in ((second, first), (first, second)):
        with pytest.raises(ConfigError, match="--force"):
            builder.embed(store, source)
        assert digests(store) == digests(fresh[before])
        builder.embed(store, source, force=True)
        builder.go_on(store, source)
        assert digests(store) == digests(fresh[source])
    assert verify_store(Store(str(store))).problems == []


def test_what_a_switch_would_replace_is_named(builder: Builder, fresh: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(fresh["list"], store)
    with pytest.raises(ConfigError) as refusal:
        builder.embed(store, "vectors")
    for name in ("samples/", "nodes/", "graph/", "shards/", "captions", "vectors", str(store)):
        assert name in refusal.value.cause


def test_a_list_over_a_finished_download_replaces_nothing_unasked(
    builder: Builder, downloaded: tuple[Path, Any], fresh: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(downloaded[0], store)
    builder.embed(store, "download")
    before = digests(store)
    with pytest.raises(ConfigError, match="--force"):
        builder.embed(store, "list")
    assert digests(store) == before
    builder.embed(store, "list", force=True)
    assert digests(store / "shards").items() >= digests(downloaded[0] / "shards").items()


def test_a_store_that_was_switched_has_no_problems_before_it_is_indexed_again(
    builder: Builder, fresh: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(fresh["list"], store)
    builder.embed(store, "vectors", force=True)
    assert verify_store(Store(str(store))).problems == []


def test_a_store_in_which_two_sources_were_mixed_is_refused_and_healed(
    builder: Builder, fresh: dict[str, Path], tmp_path: Path
) -> None:
    """As an earlier version left it: records of both, and the files of the second in the place of the first's."""
    for source in ("list", "vectors"):
        store = tmp_path / source
        shutil.copytree(fresh["list"], store)
        for folder in ("samples", "nodes", "_state/vectors"):
            shutil.copytree(fresh["vectors"] / folder, store / folder, dirs_exist_ok=True)
        with pytest.raises(ConfigError, match="--force"):
            builder.embed(store, source)
        builder.embed(store, source, force=True)
        builder.go_on(store, source)
        assert digests(store) == digests(fresh[source])


@pytest.mark.parametrize("source", ["list", "tars"])
def test_a_damaged_record_is_made_again_and_is_no_switch(
    source: str, builder: Builder, fresh: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(fresh[source], store)
    for record in (store / "_state/scan").glob("*.done.json"):
        record.write_bytes(record.read_bytes()[:-9])
    builder.embed(store, source)
    builder.go_on(store, source)
    assert digests(store) == digests(fresh[source])
