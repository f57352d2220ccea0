"""`verify` on sources of its own: a compressed tar that another one has replaced."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from graphbuild.job.steps import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import Embed, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.conftest import MakeOnce
from tests.nodes.test_no_vector import fill


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_another_of_the_same_keys_has_replaced_is_named(
    tmp_path: Path, make_once: MakeOnce, mode: str
) -> None:
    path = tmp_path / ("a.tar.gz" if mode == "w:gz" else "a.tar")

    def write(captions: list[bytes]) -> None:
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            for number, caption in enumerate(captions):
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = len(caption)
                archive.addfile(info, io.BytesIO(caption))

    write([b"red", b"old", b"new"])
    store = Store(str(tmp_path / "store"))
    embed = Embed(shards=str(path), encoder=str(make_once("letters", fill)))
    with Runner(workers=0) as runner:
        run_verb("embed", Recipe(embed=embed), store, runner)
    assert verify_store(store).problems == []
    write([b"old", b"red", b"new"])
    (problem,) = verify_store(store).problems
    assert problem == f"{path.name}: its content has changed (sha256 differs)"
