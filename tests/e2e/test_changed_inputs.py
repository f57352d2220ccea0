"""A list, a tar, vectors or an encoder that changed under a store: named, refused, and with --force built anew."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder
from tests.e2e.test_bad_input import column, graphbuild, refused, snapshot, succeeded

CAPTIONS = [
    f"{count} {animal}s at {place}" for count in (2, 3) for animal in ("dog", "cat") for place in ("sea", "home")
]
Change = Callable[[Path, list[str]], list[object]]


def caption_list(folder: Path, captions: list[str]) -> list[object]:
    (folder / "list.tsv").write_text("caption\n" + "".join(f"{caption}\n" for caption in captions))
    return ["--captions", folder / "list.tsv"]


def tar(folder: Path, captions: list[str]) -> list[object]:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, caption in enumerate(captions):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = len(caption)
            archive.addfile(info, io.BytesIO(caption.encode()))
    return ["--shards", folder / "a.tar"]


@pytest.mark.parametrize(("make", "name"), [(caption_list, "list.tsv"), (tar, "a.tar")])
def test_a_changed_source_is_refused_by_name_until_it_is_forced(tmp_path: Path, make: Change, name: str) -> None:
    store = tmp_path / "store"
    options = make(tmp_path, CAPTIONS)
    succeeded(graphbuild("embed", store, *options, "--workers", 0))
    before = snapshot(store)
    make(tmp_path, [*CAPTIONS[:-1], "4 birds on a roof"])
    refused(graphbuild("embed", store, "--workers", 0), name, "->", "--force")
    assert snapshot(store) == before
    succeeded(graphbuild("embed", store, "--workers", 0, "--force"))
    assert column(store, "samples", "caption") == [*CAPTIONS[:-1], "4 birds on a roof"]
    succeeded(graphbuild("embed", tmp_path / "fresh", *options, "--workers", 0))
    for folder in ("samples", "nodes"):
        assert snapshot(store / folder) == snapshot(tmp_path / "fresh" / folder)


def test_changed_vectors_are_refused_until_they_are_forced(tmp_path: Path) -> None:
    store, vectors = tmp_path / "store", np.eye(6, 8, dtype=np.float32)
    np.save(tmp_path / "v.npy", vectors)
    succeeded(graphbuild("embed", store, "--vectors", tmp_path / "v.npy", "--workers", 0))
    before = snapshot(store)
    np.save(tmp_path / "v.npy", vectors[::-1].copy())
    refused(graphbuild("embed", store, "--workers", 0), "v.npy", "--force")
    assert snapshot(store) == before
    succeeded(graphbuild("embed", store, "--workers", 0, "--force"))
    np.testing.assert_array_equal(np.load(next((store / "nodes").glob("*.npy"))), vectors[::-1])


def test_another_encoder_is_refused_until_it_is_forced(tmp_path: Path) -> None:
    """Of other weights, by one bit, and in another folder."""
    store = tmp_path / "store"
    same = shutil.copytree(find_encoder(DEFAULT_ENCODER).folder, tmp_path / "same")
    succeeded(graphbuild("embed", store, *caption_list(tmp_path, CAPTIONS), "--encoder", same, "--workers", 0))
    before = snapshot(store)
    other = shutil.copytree(same, tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4_000] ^= 0x40
    weights.write_bytes(content)
    refused(graphbuild("embed", store, "--encoder", other, "--workers", 0), "encoder: ", "--force")
    assert snapshot(store) == before
    succeeded(graphbuild("embed", store, "--encoder", other, "--workers", 0, "--force"))
    assert column(store, "samples", "caption") == CAPTIONS
    changed = {name for name, content in snapshot(store).items() if before.get(name) != content}
    assert "_state/encode/00000.done.json" in changed
    assert not any(name.startswith("samples/") for name in changed)


def test_a_lost_tar_is_named_with_what_to_do_and_that_works(tmp_path: Path) -> None:
    store = tmp_path / "store"
    tars = [tmp_path / "tars" / name for name in ("a.tar", "b.tar")]
    for number, path in enumerate(tars):
        path.parent.mkdir(exist_ok=True)
        _, made = tar(tmp_path, [f"{caption} {number}" for caption in CAPTIONS])
        Path(str(made)).rename(path)
    succeeded(graphbuild("embed", store, "--shards", tars[0].parent, "--workers", 0))
    content = tars[1].read_bytes()
    status = tars[1].stat()
    tars[1].unlink()
    found = graphbuild("verify", store)
    assert found.code == 1
    assert f"BAD  {tars[1]}: missing (shard 00001)" in found.out
    assert found.err.endswith(
        f"  -> restore the tar; if it was moved, `graphbuild relocate {store} SHARDS`; or `graphbuild embed {store} "
        "--force` without it, then index and export\n"
    )
    tars[1].write_bytes(content)
    os.utime(tars[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "no problems" in succeeded(graphbuild("verify", store))
    tars[1].unlink()
    succeeded(graphbuild("embed", store, "--workers", 0, "--force"))
    assert "no problems" in succeeded(graphbuild("verify", store))
    kept = [
        *range(len(CAPTIONS)),
        *[None] * len(CAPTIONS),
    ]  # rows keep their numbers, and those of the lost tar no node
    assert column(store, "samples", "node") == kept
    for verb in (["index", "--k", 3], ["export"], ["verify"]):
        succeeded(graphbuild(verb[0], store, *verb[1:], *(["--workers", 0] if verb[0] != "verify" else [])))
