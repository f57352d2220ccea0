"""Vectors beside tars: each sample has the vector of its key, of its place, or of its own member, from embed to loader.

What is expected is computed with numpy from the values that the test wrote.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graphbuild.errors import ConfigError, GraphbuildError, InputError
from graphbuild.job.relocate import relocate
from graphbuild.job.summary import summary
from graphbuild.job.verbs import run_verb
from graphbuild.look.report.numbers import numbers
from graphbuild.look.verify import verify_store
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from graphbuild.torch import graph_webdataset
from tests.nodes.test_no_vector import column, content

D = 16
TARS = {"a": 5, "b": 7, "c": 4}
KEYS = {name: [f"{name}{number:03d}" for number in range(count)] for name, count in TARS.items()}
EVERY = [key for keys in KEYS.values() for key in keys]
OWN = dict(zip(EVERY, np.random.default_rng(0).normal(size=(len(EVERY), D)) * 3 + 1, strict=True))


def jpeg(number: int) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 9 % 256, 90, 40)).save(made, "JPEG")
    return made.getvalue()


def npy(value: Any) -> bytes:
    made = io.BytesIO()
    np.save(made, value)
    return made.getvalue()


def write_tar(path: Path, keys: list[str], **members: dict[str, bytes]) -> None:
    """A jpg and a txt of each key, and these members, by extension and key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for number, key in enumerate(keys):
            parts = {"jpg": jpeg(number), "txt": f"caption of {key}".encode()}
            parts |= {extension: values[key] for extension, values in members.items() if key in values}
            for extension, value in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))


@pytest.fixture
def tars(tmp_path: Path) -> str:
    for name, keys in KEYS.items():
        write_tar(tmp_path / f"tars/{name}.tar", keys)
    return str(tmp_path / "tars")


def write_vectors(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, embedding=values, others=np.arange(3))
    else:
        lists = pa.array(list(values), pa.list_(pa.from_numpy_dtype(values.dtype)))
        pq.write_table(pa.table({"embedding": lists}), path, row_group_size=2)


def write_keys(path: Path, keys: list[str | None], name: str = "key") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": np.arange(len(keys)), name: pa.array(keys, pa.string())}), path)


def run(store: Path, verbs: str, *, force: bool = False, **embed: Any) -> dict[str, Any]:
    recipe = Recipe(embed=Embed.model_validate(embed), index=Index(k=3, engine="exact"))
    manifest: dict[str, Any] = {}
    with Runner(workers=0) as runner:
        for verb in verbs.split():
            manifest = run_verb(verb, recipe, Store(str(store)), runner, force=force)
    return manifest


def units(keys: list[str], dtype: Any = np.float64) -> np.ndarray[Any, Any]:
    values = np.array([OWN[key] for key in keys]).astype(dtype).astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def stored(store: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([np.load(path) for path in sorted(store.glob("nodes/*.npy"))])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
@pytest.mark.parametrize("ending", [".npy", ".npz", ".parquet"])
def test_vectors_in_files_of_any_kind_are_joined_by_key_whatever_their_order(
    tmp_path: Path, tars: str, ending: str, dtype: Any
) -> None:
    shuffled = np.random.default_rng(2).permutation(EVERY).tolist()
    for number, part in enumerate((shuffled[:11], shuffled[11:])):
        values = np.array([OWN[key] for key in part]).astype(dtype)
        write_vectors(tmp_path / f"emb/v_{number}{ending}", values)
        write_keys(tmp_path / f"meta/m_{number}.parquet", part)
    given = {"shards": tars, "vectors": f"{tmp_path}/emb", "vector_keys": f"{tmp_path}/meta/*.parquet"}
    manifest = run(tmp_path / "store", "embed index export", **given)
    store = tmp_path / "store"
    assert column(store, "samples", "key") == EVERY
    assert column(store, "samples", "row") == column(store, "samples", "node") == list(range(len(EVERY)))
    assert column(store, "samples", "caption") == [f"caption of {key}" for key in EVERY]
    np.testing.assert_allclose(stored(store).astype(np.float64), units(EVERY, dtype), atol=1e-3)
    assert manifest["embeddings"]["joined"] == "by key"
    assert manifest["rejected"] == {}
    assert not (store / "rejected").exists()
    assert verify_store(Store(str(store))).problems == []
    near = np.argsort(-(units(EVERY, dtype) @ units(EVERY, dtype).T), axis=1)[:, 1:2]
    first = np.array([row[0] for row in column(store, "shards", "neighbors")])  # type: ignore[index]
    assert (first == near[:, 0]).mean() > 0.9, "the nearest, but for ties of float16"


def test_the_loader_gives_each_image_its_own_vector(tmp_path: Path, tars: str) -> None:
    write_vectors(tmp_path / "v.npy", np.array([OWN[key] for key in reversed(EVERY)]))
    write_keys(tmp_path / "k.parquet", list(reversed(EVERY)))
    given = {"shards": tars, "vectors": str(tmp_path / "v.npy"), "vector_keys": str(tmp_path / "k.parquet")}
    run(tmp_path / "store", "embed index export", **given)
    batches = graph_webdataset(f"{tars}/*.tar", sidecars=tmp_path / "store/shards", batch_size=4, shuffle=0)
    seen = 0
    for batch in batches:
        rows = batch["row"].tolist()
        found = batch["embedding"].float().numpy()
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        assert (found * units([EVERY[row] for row in rows])).sum(axis=1) == pytest.approx(1, abs=1e-3)
        seen += len(rows)
    assert seen == len(EVERY)


def test_what_has_no_vector_or_no_sample_is_counted_and_kept_with_its_reason(tmp_path: Path, tars: str) -> None:
    values = dict(OWN) | {"a001": np.zeros(D), "b002": np.full(D, np.nan)}
    given: list[str | None] = [key for key in EVERY if key not in ("a000", "c003")]
    written = [values[str(key)] for key in given] + [np.ones(D)] * 3
    write_vectors(tmp_path / "v.npy", np.array(written))
    write_keys(tmp_path / "k.parquet", [*given, "stranger", None, None])
    embed = {"shards": tars, "vectors": str(tmp_path / "v.npy"), "vector_keys": str(tmp_path / "k.parquet")}
    store = tmp_path / "store"
    manifest = run(store, "embed index export", **embed)
    lost = {
        "a000": "no vector has its key",
        "a001": "its vector is a zero vector",
        "b002": "its vector holds NaN or infinity",
        "c003": "no vector has its key",
    }
    nodes = iter(range(len(EVERY)))
    assert column(store, "samples", "node") == [None if key in lost else next(nodes) for key in EVERY]
    assert column(store, "samples", "key") == EVERY
    rejected = dict(
        zip(column(store, "rejected/assign", "key"), column(store, "rejected/assign", "reason"), strict=True)
    )
    assert rejected == lost
    assert column(store, "rejected/assign", "position") == [0, 1, 2, 3]
    assert manifest["rejected"] == {
        "its vector holds NaN or infinity": 1,
        "its vector is a zero vector": 1,
        "no vector has its key": 2,
    }
    assert column(store, "rejected/number", "key") == ["stranger", None, None]
    assert column(store, "rejected/number", "position") == [14, 15, 16]
    assert column(store, "rejected/number", "reason") == ["no sample has its key", "no key", "no key"]
    assert set(column(store, "rejected/number", "content")) == {"v.npy"}
    np.testing.assert_allclose(stored(store), units([key for key in EVERY if key not in lost]), atol=1e-3)
    told = summary("run", manifest, Store(str(store)))
    assert "12 of 16 samples have a vector, joined by key, d = 16" in told
    assert "3 vectors without a sample, see rejected/number/" in told
    assert "2 samples without: no vector has its key" in told
    assert "4 samples without a vector: loaders leave them out" in told
    funnel = numbers(Store(str(store)))["funnel"]
    assert [step["count"] for step in funnel] == [16, 12, 12]
    assert funnel[-1]["lost"] == {"without a vector": 4}
    assert verify_store(Store(str(store))).problems == []


def test_without_keys_files_and_tars_are_joined_by_order_where_their_counts_match(tmp_path: Path, tars: str) -> None:
    for number, keys in enumerate(KEYS.values()):
        write_vectors(tmp_path / f"emb/{number + 8}.npy", np.array([OWN[key] for key in keys]))  # 8, 9, 10
    manifest = run(tmp_path / "store", "embed", shards=tars, vectors=f"{tmp_path}/emb/{{8..10}}.npy")
    np.testing.assert_allclose(stored(tmp_path / "store"), units(EVERY), atol=1e-3)
    assert "joined by order" in summary("embed", manifest, Store(str(tmp_path / "store")))
    write_vectors(tmp_path / "emb/9.npy", np.ones((6, D)))
    with pytest.raises(InputError, match=r"9\.npy has 6 vectors, and b\.tar 7 samples: no order joins them"):
        run(tmp_path / "other", "embed", shards=tars, vectors=f"{tmp_path}/emb")
    (tmp_path / "emb/10.npy").unlink()
    with pytest.raises(InputError, match="2 files of vectors, and 3 tars"):
        run(tmp_path / "third", "embed", shards=tars, vectors=f"{tmp_path}/emb")


@pytest.mark.parametrize("ending", ["tar", "tgz"])
def test_vectors_inside_tars_are_their_samples_own(tmp_path: Path, ending: str) -> None:
    members = {key: npy(OWN[key].astype(np.float32)[None] if key == "a002" else OWN[key]) for key in EVERY}
    members |= {"a001": b"no array", "b000": npy(np.zeros((2, D))), "b003": npy(np.zeros(D)), "c000": npy(["text"])}
    del members["a004"]
    for name, keys in KEYS.items():
        write_tar(tmp_path / f"tars/{name}.{ending}", keys, npy=members)
    store = tmp_path / "store"
    manifest = run(store, "embed index export", shards=f"{tmp_path}/tars", vector_member=".NPY")
    lost = {
        "a001": "its member .npy is no vector",
        "a004": "no member .npy",
        "b000": "its member .npy is no vector",
        "b003": "its vector is a zero vector",
        "c000": "its member .npy is no vector",
    }
    rejected = dict(
        zip(column(store, "rejected/assign", "key"), column(store, "rejected/assign", "reason"), strict=True)
    )
    assert rejected == lost
    np.testing.assert_allclose(stored(store), units([key for key in EVERY if key not in lost]), atol=1e-3)
    assert manifest["embeddings"]["joined"] == "as members"
    assert verify_store(Store(str(store))).problems == []


@pytest.mark.parametrize(
    ("folder", "pattern"), [("{}", "{}"), ("{}/*.tar", "{}/*.npy"), ("{}/{{9..0}}.tar", "{}/{{9..0}}.npy")]
)
def test_files_joined_by_order_lie_in_the_order_of_the_tars(tmp_path: Path, folder: str, pattern: str) -> None:
    """Of as many samples each, with numbers of one and two digits: only the order tells which belong together."""
    own = np.random.default_rng(0).standard_normal((12, 2, 5))
    for number in range(12):
        write_tar(tmp_path / f"tars/{number}.tar", [f"{number}a", f"{number}b"])
        write_vectors(tmp_path / f"emb/{number}.npy", own[number])
    given = {"shards": folder.format(tmp_path / "tars"), "vectors": pattern.format(tmp_path / "emb")}
    run(tmp_path / "store", "embed", **given)
    vectors = stored(tmp_path / "store").astype(np.float64)
    for key, vector in zip(column(tmp_path / "store", "samples", "key"), vectors, strict=True):
        expected = own[int(str(key)[:-1]), "ab".index(str(key)[-1])]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-3)


def test_tars_without_captions_have_vectors_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tars/x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for key in KEYS["a"]:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = len(jpeg(1))
            archive.addfile(info, io.BytesIO(jpeg(1)))
    write_vectors(tmp_path / "v.npy", np.array([OWN[key] for key in KEYS["a"]]))
    manifest = run(tmp_path / "store", "embed index export", shards=str(path), vectors=str(tmp_path / "v.npy"))
    assert column(tmp_path / "store", "samples", "caption") == [None] * 5
    assert column(tmp_path / "store", "samples", "node") == [0, 1, 2, 3, 4]
    assert manifest["rejected"] == {}
    assert verify_store(Store(str(tmp_path / "store"))).problems == []


def test_the_layout_of_clip_retrieval_is_joined_as_it_is(tmp_path: Path, tars: str) -> None:
    """img_emb/img_emb_0.npy beside metadata/metadata_0.parquet, whose image_path is the sample's key."""
    parts = [EVERY[:6], EVERY[6:12], EVERY[12:]]
    for number, keys in enumerate(parts):
        write_vectors(tmp_path / f"out/img_emb/img_emb_{number}.npy", np.array([OWN[k] for k in keys], np.float16))
        columns = {"image_path": keys, "caption": [f"caption of {key}" for key in keys]}
        (tmp_path / "out/metadata").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / f"out/metadata/metadata_{number}.parquet")
    given = {"vectors": f"{tmp_path}/out/img_emb", "vector_keys": f"{tmp_path}/out/metadata"}
    run(tmp_path / "store", "embed", shards=tars, key_column="image_path", **given)
    np.testing.assert_allclose(stored(tmp_path / "store"), units(EVERY, np.float16), atol=1e-3)


def test_keys_may_stand_in_the_vectors_own_parquet(tmp_path: Path, tars: str) -> None:
    lists = pa.array([OWN[key] for key in reversed(EVERY)], pa.list_(pa.float64()))
    pq.write_table(pa.table({"id": list(reversed(EVERY)), "embedding": lists}), tmp_path / "v.parquet")
    run(tmp_path / "store", "embed", shards=tars, vectors=str(tmp_path / "v.parquet"), key_column="id")
    np.testing.assert_allclose(stored(tmp_path / "store"), units(EVERY), atol=1e-3)


@pytest.mark.parametrize("joined", ["key", "order"])
def test_tars_and_vectors_that_come_later_keep_rows_nodes_and_files_of_the_first(tmp_path: Path, joined: str) -> None:
    def given(names: str) -> dict[str, Any]:
        for name in names:
            if not (tmp_path / f"tars/{name}.tar").exists():
                write_tar(tmp_path / f"tars/{name}.tar", KEYS[name])
                write_vectors(tmp_path / f"emb/{name}.npy", np.array([OWN[key] for key in KEYS[name]]))
                write_keys(tmp_path / f"meta/{name}.parquet", list(KEYS[name]))
        keys = {"vector_keys": f"{tmp_path}/meta"} if joined == "key" else {}
        return {"shards": f"{tmp_path}/tars", "vectors": f"{tmp_path}/emb", **keys}

    store = tmp_path / "store"
    run(store, "embed index export", **given("ac"))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.parent.name in ("samples", "nodes")}
    manifest = run(store, "embed index export", **given("abc"))  # b lies between the two by name
    assert {path: path.stat().st_mtime_ns for path in before} == before
    order = [key for name in "acb" for key in KEYS[name]]
    assert column(store, "samples", "key") == order
    np.testing.assert_allclose(stored(store), units(order), atol=1e-3)
    assert manifest["graph"]["kept_nodes"] == 9
    assert verify_store(Store(str(store))).problems == []
    assert run(store, "embed", **given("abc")) == manifest


@pytest.mark.parametrize("lacking", ["null", "no key"])
def test_a_tar_none_of_whose_samples_has_a_vector_is_no_fault(tmp_path: Path, tars: str, lacking: str) -> None:
    first, others = list(KEYS["a"]), [key for key in EVERY if key not in KEYS["a"]]
    values = [OWN[key].tolist() for key in others]
    keys = others if lacking == "no key" else [*first, *others]
    lists = pa.array([None] * (len(keys) - len(others)) + values, pa.list_(pa.float32()))
    pq.write_table(pa.table({"key": keys, "embedding": lists}), tmp_path / "v.parquet")
    store = tmp_path / "store"
    manifest = run(store, "embed index export", shards=tars, vectors=f"{tmp_path}/v.parquet", key_column="key")
    assert manifest["rejected"] == {"its vector is null" if lacking == "null" else "no vector has its key": len(first)}
    nodes = column(store, "samples", "node")
    assert [key for key, node in zip(EVERY, nodes, strict=True) if node is not None] == others
    kept = np.concatenate([part for path in sorted(store.glob("nodes/*.npy")) if len(part := np.load(path))])
    np.testing.assert_allclose(kept, units(others), atol=1e-3)
    assert verify_store(Store(str(store))).problems == []


@pytest.mark.slow
def test_workers_make_the_same_bytes(tmp_path: Path, tars: str) -> None:
    write_vectors(tmp_path / "v.parquet", np.array([OWN[key] for key in EVERY]))
    write_keys(tmp_path / "k.parquet", [*EVERY[:-1], "stranger"])
    embed = Embed(shards=tars, vectors=str(tmp_path / "v.parquet"), vector_keys=str(tmp_path / "k.parquet"))
    for name, workers in (("none", 0), ("two", 2)):
        with Runner(workers=workers) as runner:
            run_verb("embed", Recipe(embed=embed), Store(str(tmp_path / name)), runner)
    assert content(tmp_path / "none") == content(tmp_path / "two")


def test_a_changed_file_of_vectors_or_keys_is_told_and_rebuilt_with_force(tmp_path: Path, tars: str) -> None:
    write_vectors(tmp_path / "v.npy", np.array([OWN[key] for key in EVERY]))
    write_keys(tmp_path / "k.parquet", list(EVERY))
    embed = {"shards": tars, "vectors": str(tmp_path / "v.npy"), "vector_keys": str(tmp_path / "k.parquet")}
    run(tmp_path / "store", "embed", **embed)
    write_vectors(tmp_path / "v.npy", np.array([OWN[key] for key in reversed(EVERY)], np.float32))
    with pytest.raises(ConfigError, match=r"vectors: v\.npy, .* -> v\.npy, .*"):
        run(tmp_path / "store", "embed", **embed)
    run(tmp_path / "store", "embed", **embed, force=True)
    np.testing.assert_allclose(stored(tmp_path / "store"), units(list(reversed(EVERY))), atol=1e-3)
    run(tmp_path / "fresh", "embed", **embed)
    assert content(tmp_path / "store") == content(tmp_path / "fresh")


def test_moved_tars_keep_their_vectors(tmp_path: Path, tars: str) -> None:
    write_vectors(tmp_path / "v.npy", np.array([OWN[key] for key in EVERY]))
    write_keys(tmp_path / "k.parquet", list(EVERY))
    embed = {"shards": tars, "vectors": str(tmp_path / "v.npy"), "vector_keys": str(tmp_path / "k.parquet")}
    run(tmp_path / "store", "embed index", **embed)
    before = stored(tmp_path / "store")
    Path(tars).rename(tmp_path / "moved")
    with Runner(workers=0) as runner:
        list(relocate(Store(str(tmp_path / "store")), str(tmp_path / "moved"), runner))
    assert np.array_equal(stored(tmp_path / "store"), before)
    assert verify_store(Store(str(tmp_path / "store"))).problems == []


def test_tars_joined_by_order_keep_their_vectors_under_other_names_and_where_one_is_gone(tmp_path: Path) -> None:
    groups = {name: EVERY[4 * number : 4 * number + 4] for number, name in enumerate("012")}
    for name in "01":
        write_tar(tmp_path / f"old/{name}.tar", groups[name])
    for name, keys in groups.items():
        write_vectors(tmp_path / f"all/{name}.npy", np.array([OWN[key] for key in keys]))
    vectors, store, new = tmp_path / "emb", tmp_path / "store", tmp_path / "new"
    vectors.mkdir()
    new.mkdir()
    for name in "01":
        shutil.copy2(tmp_path / f"all/{name}.npy", vectors)
    run(store, "embed index", shards=f"{tmp_path}/old", vectors=str(vectors))
    (tmp_path / "old/0.tar").rename(new / "z.tar")
    (tmp_path / "old/1.tar").rename(new / "b.tar")
    with Runner(workers=0) as runner:
        list(relocate(Store(str(store)), str(new), runner))
    write_tar(new / "a.tar", groups["2"])
    shutil.copy2(tmp_path / "all/2.npy", vectors)
    given = {"shards": str(new), "vectors": str(vectors)}
    run(store, "embed", **given)
    assert column(store, "samples", "key") == EVERY[:12]
    np.testing.assert_allclose(stored(store), units(EVERY[:12]), atol=1e-3)
    (new / "z.tar").unlink()
    (vectors / "0.npy").unlink()
    run(store, "embed", **given, force=True)
    nodes = column(store, "samples", "node")
    keys = [key for key, node in zip(column(store, "samples", "key"), nodes, strict=True) if node is not None]
    assert keys == EVERY[4:12]
    np.testing.assert_allclose(stored(store)[-8:], units(EVERY[4:12]), atol=1e-3)


def refusals(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What is refused, by name: the options, and the message."""
    every = np.array([OWN[key] for key in EVERY])
    for name, values in (("0", every[:8]), ("1", every[8:])):
        write_vectors(folder / f"two/{name}.npy", values)
        write_vectors(folder / f"mixed/{name}.npy", values[:, : D - int(name)])
    write_vectors(folder / "all.npy", every)
    write_vectors(folder / "wrong.npy", np.zeros((16, D), np.int64))
    np.savez(folder / "several.npz", left=every, right=every)
    write_keys(folder / "keys.parquet", list(EVERY))
    write_keys(folder / "short.parquet", list(EVERY[:-2]))
    write_keys(folder / "foreign.parquet", [f"x{number}" for number in range(16)])
    write_keys(folder / "twice.parquet", [*EVERY[:-1], EVERY[0]])
    write_tar(folder / "same/0.tar", KEYS["a"])
    write_tar(folder / "same/1.tar", KEYS["a"])
    every_key = {"vectors": f"{folder}/all.npy", "vector_keys": f"{folder}/keys.parquet"}
    return {
        "mixed widths": ({"vectors": f"{folder}/mixed"}, r"mixed length: 16 in .*mixed/0\.npy, 15 in .*mixed/1\.npy"),
        "no match": (
            every_key | {"vector_keys": f"{folder}/foreign.parquet"},
            r"Keys of vectors: 'x0', 'x1', 'x2'; of samples: 'a000', 'a001', 'a002'(?s:.*)--key-column",
        ),
        "key of two vectors": (
            every_key | {"vector_keys": f"{folder}/twice.parquet"},
            r"two vectors have the key 'a000', in .*twice\.parquet",
        ),
        "key of two samples": (every_key | {"shards": f"{folder}/same"}, r"key 'a000', in 0\.tar and 1\.tar"),
        "fewer keys": (
            every_key | {"vector_keys": f"{folder}/short.parquet"},
            r"all\.npy has 16 vectors, and .*short\.parquet 14 keys",
        ),
        "fewer lists": (every_key | {"vectors": f"{folder}/two"}, r"2 files of vectors .*, and 1 with their keys"),
        "no such column": (every_key | {"key_column": "id"}, r"keys\.parquet has no column 'id'"),
        "whole numbers": ({"vectors": f"{folder}/wrong.npy"}, r"wrong\.npy holds int64"),
        "several arrays": ({"vectors": f"{folder}/several.npz"}, r"no array 'embedding'; it has 'left', 'right'"),
        "nothing there": ({"vectors": f"{folder}/none/*.npy"}, r"no file matches .*none/\*\.npy"),
        "no member": (
            {"vector_member": "emb"},
            r"none of its 5 samples has a vector \(first: no member \.emb",
        ),
    }


REFUSALS = (
    "mixed widths",
    "no match",
    "key of two vectors",
    "key of two samples",
    "fewer keys",
    "fewer lists",
    "no such column",
    "whole numbers",
    "several arrays",
    "nothing there",
    "no member",
)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, tars: str, name: str) -> None:
    options, said = refusals(tmp_path)[name]
    with pytest.raises(GraphbuildError, match=said):
        run(tmp_path / "store", "embed", **{"shards": tars, **options})
