"""`verify` on sources of its own: a compressed tar that another one has replaced."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_another_of_the_same_keys_has_replaced_is_named(tmp_path: Path, letters: str, mode: str) -> None:
    path = tmp_path / ("a.tar.gz" if mode == "w:gz" else "a.tar")

    def write(captions: list[bytes]) -> None:
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            for number, caption in enumerate(captions):
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = len(caption)
                archive.addfile(info, io.BytesIO(caption))

    write([b"red", b"old", b"new"])
    store = Store(str(tmp_path / "store"))
    embed = Embed(shards=str(path), encoder=letters)
    with Runner(workers=0) as runner:
        run_verb("embed", Recipe(embed=embed), store, runner)
    assert verify_store(store).problems == []
    write([b"old", b"red", b"new"])
    (problem,) = verify_store(store).problems
    assert problem == f"{path.name}: its content has changed (sha256 differs)"


def test_an_older_record_of_a_shards_texts_is_named(tmp_path: Path, letters: str) -> None:
    stores = []
    for captions in ("red\nold\nnew\nblue\n", "red\nold\nnew\ngrass\n"):
        (tmp_path / "list.csv").write_text(f"caption\n{captions}")
        stores.append(Store(str(tmp_path / str(len(stores)))))
        embed = Embed(captions=str(tmp_path / "list.csv"), encoder=letters, shard_size=2)
        with Runner(workers=0) as runner:
            run_verb("embed", Recipe(embed=embed), stores[-1], runner)
    name = "_state/texts/00001.done.json"
    assert verify_store(stores[1]).problems == []
    stores[1].write_bytes(name, stores[0].read_bytes(name))
    assert any(name in problem for problem in verify_store(stores[1]).problems)
