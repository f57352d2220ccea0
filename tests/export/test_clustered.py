"""Tars in neighbour order: what is read, what is open meanwhile, and what is there after a stop in the midst.

The bytes are compared with those that tarfile writes of the members that the test made.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.errors import StageError
from graphbuild.export import cells, tarwriter
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.graph.select.rules import select_store
from graphbuild.job.plan.job import job_of
from graphbuild.job.plan.machine import here
from graphbuild.job.plan.rates import Rates
from graphbuild.job.plan.show import cases
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.sources.tars import member_header
from graphbuild.store.layout import VECTORS
from graphbuild.store.sharded import node_array
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Store, Writer
from tests.conftest import MakeOnce
from tests.e2e.test_bounds import limited
from tests.nodes.test_plural import jpeg

TARS, SAMPLES, CHUNK, SIZE = 36, 8, 4, 40
RUNS, OPEN_FILES = 9, 28  # fewer than there are tars
PIECE = 32_768
WORDS = ["hen", "bird", "tree", "house", "car", "dog", "cat", "man", "sea", "sun", "bus", "cup"]
Members = dict[str, bytes]


def odd_samples() -> list[Members]:
    """Members by extension: some without a picture, several captions in every other tar, long and foreign names."""
    rng = random.Random(0)
    found = []
    for row in range(TARS * SAMPLES):
        members = {"jpg": jpeg(row) + rng.randbytes(rng.randrange(4_000))} if row % 9 else {}
        members["txt"] = " ".join(rng.sample(WORDS, 3)).encode() if row % 50 != 7 else b" "
        if row // SAMPLES % 2:
            members["json"] = json.dumps({"captions": [" ".join(rng.sample(WORDS, 2))]}).encode()
        if row % 5 == 0:
            members["ünïcode.bin"] = rng.randbytes(rng.randrange(3_000))
        if row % 7 == 0:
            members["e" * 110] = b"long"
        found.append(members)
    return found


def captions_of(members: Members) -> list[str]:
    every = [members["txt"].decode(), *json.loads(members.get("json", b'{"captions": []}'))["captions"]]
    return [caption for caption in every if caption.strip()]


def tar_of(samples: dict[str, Members]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for key, members in samples.items():
            for extension, body in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return content.getvalue()


def run(store: str, verb: str, *, force: bool = False, **changes: Any) -> None:
    opened = Store(store)
    with Runner(workers=0) as runner:
        run_verb(verb, resolve(opened, verb, changes), opened, runner, force=force)


@pytest.fixture(scope="module")
def folder(make_once: MakeOnce, letters: str) -> Path:
    """tars/, and a store of them with its graph and a selection."""

    def build(folder: Path) -> None:
        (folder / "tars").mkdir()
        every = odd_samples()
        for number in range(TARS):
            some = every[number * SAMPLES : (number + 1) * SAMPLES]
            keys = [f"{number}-{place}" if (number, place) != (3, 1) else "k" * 120 for place in range(SAMPLES)]
            (folder / f"tars/{number:03}.tar").write_bytes(tar_of(dict(zip(keys, some, strict=True))))
        given = {"caption_member": "txt;json:captions", "encoder": letters, "precision": "float32"}
        run(f"{folder}/store", "embed", shards=f"{folder}/tars", **given)
        run(f"{folder}/store", "index", k=4)
        select_store(Store(f"{folder}/store"), "some", {"where": "row % 3 != 1"})

    return make_once("odd tars", build)


EXPORT = """
import collections, json, os, signal, sys

import graphbuild.graph.batches.order, graphbuild.graph.sample_graph
from graphbuild.export import cells, clustered, tarwriter
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

watched, dying, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
cells.RUNS, tarwriter.PIECE_BYTES = map(int, sys.argv[4:])
tarwriter.GAP_BYTES = 600
reads, opened, most, before, pread = collections.defaultdict(list), collections.Counter(), 0, 0, os.pread


def export(url):
    store = Store(url)
    with Runner(workers=0) as runner:
        run_verb("export", resolve(store, "export", changes), store, runner)


def files():
    found = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(path) and os.readlink(path).startswith("/") for path in found)


def read(file, length, begin):
    content = pread(file, length, begin)
    reads[os.readlink(f"/proc/self/fd/{file}")].append((begin, len(content)))
    return content


def look(event, arguments):
    global most
    if event == "open" and before:
        opened[str(arguments[0])] += 1
        most = max(most, files() + 1)


child = os.fork()
if not child:
    clustered.copy_samples = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    export(dying)
_, status = os.waitpid(child, 0)
sys.addaudithook(look)
os.pread, before = read, files()
export(watched)
told = {"reads": reads, "opened": opened, "most": most - before, "signal": os.WTERMSIG(status)}
before = 0
json.dump(told, sys.stdout)
"""
SETTINGS = {"layout": "clustered", "chunk": CHUNK, "shard_size": SIZE}


@dataclass
class Exported:
    """store: with new tars, whose maker might open OPEN_FILES, and opened `most` at once. reads: of each old tar,
    places and bytes in turn; opened: how often each path was. died: another store, whose maker was killed when all old
    tars were read and the first new one was begun."""

    store: Path
    died: Path
    reads: dict[str, list[tuple[int, int]]]
    opened: dict[str, int]
    most: int


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    stores = [tmp_path_factory.mktemp(name) / "store" for name in ("exported", "died")]
    for store in stores:
        shutil.copytree(folder / "store", store)
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *map(str, stores), json.dumps(SETTINGS), str(RUNS), str(PIECE)],
        capture_output=True,
        text=True,
        preexec_fn=limited(resource.RLIMIT_NOFILE, OPEN_FILES),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("signal") == signal.SIGKILL
    return Exported(*stores, **told)


def expected(rows: list[int]) -> bytes:
    every = odd_samples()
    return tar_of({f"{row:012d}": every[row] for row in rows})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are read of each old tar from now on, in runs of as many tars as in `exported`."""
    found: dict[str, int] = Counter()
    pread = os.pread

    def read(file: int, length: int, begin: int) -> bytes:
        content = pread(file, length, begin)
        found[str(Path(f"/proc/self/fd/{file}").readlink())] += len(content)
        return content

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(cells, "RUNS", RUNS)
    monkeypatch.setattr(tarwriter, "GAP_BYTES", 600)
    monkeypatch.setattr(tarwriter, "PIECE_BYTES", 3_000)  # less than some samples
    return found


def test_the_new_tars_are_byte_for_byte_what_tarfile_writes(exported: Exported) -> None:
    every, seen = odd_samples(), []
    for path in sorted((exported.store / "clustered").glob("*.tar")):
        sidecar = pq.read_table(path.with_suffix(".graph.parquet"))
        rows, content = sidecar["row"].to_pylist(), path.read_bytes()
        assert content == expected(rows)
        for row, begin, size in zip(
            *(sidecar[n].to_pylist() for n in ("row", "image_offset", "image_size")), strict=True
        ):
            image = None if begin is None else content[begin : begin + size]
            assert image == every[row].get("jpg")
        more = sidecar["more_captions"].to_pylist()
        assert [len(one) for one in more] == [max(len(captions_of(every[row])) - 1, 0) for row in rows]
        seen += rows
    assert len(seen) == TARS * SAMPLES
    assert set(seen) == set(range(TARS * SAMPLES))
    assert verify_store(Store(str(exported.store))).problems == []


def test_each_old_tar_is_read_once_from_its_begin_to_its_end(folder: Path, exported: Exported) -> None:
    tars = sorted(map(str, (folder / "tars").glob("*.tar")))
    assert sorted(exported.reads) == tars
    for tar in tars:
        assert exported.opened[tar] == 1
        end = 0
        for begin, size in exported.reads[tar]:
            assert begin >= end, "no byte twice, and none before those that were read"
            end = begin + size
        most = 2 * Path(tar).stat().st_size // PIECE + 1  # two pieces behind each other are more than PIECE
        assert len(exported.reads[tar]) <= most < SAMPLES, "many samples at once"


def test_few_files_are_open_at_once_and_few_are_opened_for_a_new_tar(exported: Exported) -> None:
    assert exported.most <= 5, "what is read; what is written, and again, to lock it; and where progress is told"
    of_runs = [times for name, times in exported.opened.items() if name.endswith((".rows", ".moved"))]
    new = -(-TARS * SAMPLES // SIZE)
    pieces = 2 * sum(size for reads in exported.reads.values() for _, size in reads) // PIECE
    assert RUNS * new < sum(of_runs) <= 3 * RUNS * new + pieces, "three a run, and one more for each full piece"


def test_a_selection_passes_over_what_it_leaves_out(folder: Path, tmp_path: Path, reads: dict[str, int]) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    run(f"{tmp_path}/store", "export", **SETTINGS, selection="some", embeddings="none")
    seen = []
    for path in sorted((tmp_path / "store/clustered").glob("*.tar")):
        rows = pq.read_table(path.with_suffix(".graph.parquet"))["row"].to_pylist()
        assert path.read_bytes() == expected(rows)
        seen += rows
    assert sorted(seen) == [row for row, one in enumerate(odd_samples()) if row % 3 != 1 and captions_of(one)]
    assert sum(reads.values()) < 0.8 * sum(path.stat().st_size for path in (folder / "tars").glob("*.tar"))


def test_orders_made_in_cells_keep_neighbours_together_whatever_the_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = SampleGraph.open(str(folder / "store"))
    nodes, together, made = graph.sample_nodes(), {}, {}
    for name, cell, runs in (("one cell", 1_000, RUNS), ("cells", 60, RUNS), ("and other runs", 60, 2)):
        monkeypatch.setattr(cells, "CELL", cell)
        monkeypatch.setattr(cells, "RUNS", runs)
        shutil.copytree(folder / "store", tmp_path / name)
        run(f"{tmp_path}/{name}", "export", **SETTINGS)
        made[name] = content_of(tmp_path / name)
        rows = [
            row
            for path in sorted((tmp_path / name / "clustered").glob("*.graph.parquet"))
            for row in pq.read_table(path, columns=["row"])["row"].to_pylist()
        ]
        assert sorted(rows) == list(range(TARS * SAMPLES))
        assert (nodes[rows] < 0).nonzero()[0].min() == (nodes >= 0).sum(), "those without a node come last"
        chunks = [nodes[rows[begin : begin + CHUNK]] for begin in range(0, (nodes >= 0).sum() - CHUNK, CHUNK)]
        listed = [graph.neighbors(chunk)[0] for chunk in chunks]
        together[name] = sum(np.isin(lists, chunk).sum() for lists, chunk in zip(listed, chunks, strict=True))
    assert made["cells"] == made["and other runs"] != made["one cell"]
    assert 0.6 * together["one cell"] < together["cells"] < together["one cell"]


def test_a_cell_has_the_samples_nearest_to_its_leaders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By float64, of a store that stage cells has gone through."""
    monkeypatch.setattr(cells, "CELL", 60)
    store = Store(str(folder / "store"))
    shards = shards_of(store, store.manifest()).with_nodes
    leaders = cells._leaders(store, shards, 5, 0)
    vectors = node_array(store, shards, VECTORS).take(np.arange(node_count(store.manifest())))
    assert leaders.shape == (5 * cells.LEADERS, vectors.shape[1])
    steps = np.linalg.norm(np.diff(leaders, axis=0), axis=1).mean()
    assert steps < np.linalg.norm(leaders[:, None] - leaders[None], axis=2).mean(), "near ones are behind each other"
    recipe = resolve(store, "export", SETTINGS)
    tasks, writer = cells.plan_cells(recipe, store), Writer(store)
    sizes = [cells.run_cells(task, store, writer)["sizes"] for task in tasks]
    nodes = SampleGraph.open(store.url).sample_nodes()
    seen = []
    for task, counts in zip(tasks, sizes, strict=True):
        members = store.array(cells.MEMBERS.format(task.name))
        of = np.repeat(np.arange(len(counts)), counts)
        assert (nodes[members[:, 0]] == members[:, 1]).all()
        assert (of[members[:, 1] < 0] == len(counts) - 1).all()
        own = members[:, 1] >= 0
        scores = vectors[members[own, 1]].astype(np.float64) @ leaders.astype(np.float64).T
        assert (scores[np.arange(len(scores)), of[own]] >= scores.max(axis=1) - 1e-5).all()
        seen += members[:, 0].tolist()
    assert sorted(seen) == list(range(TARS * SAMPLES))
    shutil.rmtree(folder / "store" / "_work_clustered")


def test_samples_of_a_tar_that_is_gone_have_no_place_and_no_other_one_is_lost(
    folder: Path, tmp_path: Path, letters: str
) -> None:
    (tmp_path / "tars").mkdir()
    numbers, store = (0, 2, 5, 32), f"{tmp_path}/store"  # the first and the last have a sample without a caption
    for number in numbers:
        shutil.copy(folder / f"tars/{number:03}.tar", tmp_path / "tars")
    given = {"caption_member": "txt;json:captions", "encoder": letters, "precision": "float32"}
    run(store, "embed", shards=f"{tmp_path}/tars", **given)
    (tmp_path / "tars/002.tar").unlink()
    run(store, "embed", force=True)
    run(store, "index", k=4)
    run(store, "export", layout="clustered", chunk=CHUNK, shard_size=8)
    every, seen = odd_samples(), []
    for path in sorted((tmp_path / "store/clustered").glob("*.tar")):
        rows = pq.read_table(path.with_suffix(".graph.parquet"))["row"].to_pylist()
        members = {f"{row:012d}": every[numbers[row // SAMPLES] * SAMPLES + row % SAMPLES] for row in rows}
        assert path.read_bytes() == tar_of(members)
        seen += rows
    assert seen[-2:] == [7, 3 * SAMPLES + 1], "those without a caption come last"
    assert sorted(seen) == [row for row in range(4 * SAMPLES) if row // SAMPLES != 1]


def content_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "clustered").iterdir()}


def test_who_was_killed_between_the_passes_reads_no_old_tar_again_and_leaves_no_scratch(
    exported: Exported, tmp_path: Path, reads: dict[str, int]
) -> None:
    shutil.copytree(exported.died, tmp_path / "store")
    scratch = sum(path.stat().st_size for path in (tmp_path / "store/_work_clustered").iterdir())
    store = Store(f"{tmp_path}/store")
    recipe = resolve(store, "export", SETTINGS)
    ((_, costs),) = cases(job_of("export", recipe, store), recipe, Rates(), [here(store)])
    assert next(cost.written for cost in costs if cost.name == "scatter") == pytest.approx(scratch, rel=0.25)
    run(store.url, "export", **SETTINGS)
    assert reads == {}
    assert content_of(tmp_path / "store") == content_of(exported.store)
    assert not list((tmp_path / "store").glob("_work*"))


def test_damaged_scratch_is_named_and_what_is_said_mends_it(
    exported: Exported, tmp_path: Path, reads: dict[str, int]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(exported.died, store)
    damaged = store / "_work_clustered/00007.moved"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(StageError, match=r"00007\.moved was damaged after it was written") as raised:
        run(str(store), "export", **SETTINGS)
    assert f"delete the folder {store}/_work_clustered and run the same command again" in str(raised.value)
    assert reads == {}
    shutil.rmtree(store / "_work_clustered")
    run(str(store), "export", **SETTINGS)
    assert content_of(store) == content_of(exported.store)


def test_a_header_is_as_long_as_it_is_reckoned_for_any_name_and_size() -> None:
    members = [
        ("jpg", 5),
        ("x" * 85, 0),
        ("x" * 88, 512),
        ("ünï", 513),
        ("x" * 200, 8**11 - 1),
        ("jpg", 8**11),
        ("jpg", 9**12),
    ]
    rows = [{"members": [{"extension": e, "offset": 0, "size": s} for e, s in some]} for some in (members, members[:1])]
    found = tarwriter.copied_bytes(pa.Table.from_pylist(rows), "0" * 12)
    sizes = []
    for extension, size in members:
        info = tarfile.TarInfo(f"{7:012d}.{extension}")
        info.size = size
        header = info.tobuf(tarfile.PAX_FORMAT)
        assert member_header(info.name, size) == header
        sizes.append(len(header) + -(-size // 512) * 512)
    assert found.tolist() == [sum(sizes), sizes[0]]
