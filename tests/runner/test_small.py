"""Small jobs are done by the command itself; what is large, or asked for otherwise, goes to workers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from graphbuild.errors import ConfigError
from graphbuild.machine.gpus import cores_here
from graphbuild.nodes import encode
from graphbuild.recipe import DEFAULT_ENCODER, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.small import is_small
from graphbuild.runner.stage import Stage, Task
from graphbuild.sources import download, pack
from graphbuild.store.store import Json, Store, Writer

FILE = "a.tar, {} bytes, 1.0"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def task(name: str = "00000", **inputs: str) -> Task:
    return Task(stage="scan", name=name, inputs=inputs)


def stage(tasks: list[Task], name: str = "scan") -> Stage:
    def run(task: Task, store: Store, writer: Writer) -> Json:
        return {"process": os.getpid(), "threads": task.hints["threads"]}

    return Stage(name=name, title=name, plan=lambda recipe, store: tasks, run=run)


def finished(store: Store, **counts: Mapping[str, int]) -> None:
    """Write into the manifest that these stages are done."""
    manifest = store.manifest()
    manifest["stages"] = {name: {"fingerprint": "", "tasks": 1, "counts": each} for name, each in counts.items()}
    store.write_json("manifest.json", manifest)


def test_a_small_stage_runs_in_this_process_on_all_cores_and_says_so_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert not ray.is_initialized()
    caplog.set_level(logging.INFO, "graphbuild")
    with Runner() as runner:
        for name in ("scan", "search"):
            one = dataclasses.replace(task(tar=FILE.format(10)), stage=name)
            runner.run(stage([one], name), Recipe(), store)
            record = json.loads((Path(store.url) / f"_state/{name}/00000.done.json").read_text())
            assert record["facts"] == {"process": os.getpid(), "threads": cores_here()}
    assert caplog.text.count("so small a job runs in this process, unless --workers asks for others") == 1
    assert not ray.is_initialized()


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": "127.0.0.1:1"}])
def test_a_cluster_that_is_named_is_asked_however_small_the_job(
    store: Store, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    address = None if environment else "127.0.0.1:1"
    with Runner(address=address) as runner, pytest.raises(ConfigError, match=r"127\.0\.0\.1:1: nothing answers"):
        runner.run(stage([task(tar=FILE.format(10))]), Recipe(), store)


@pytest.mark.parametrize(
    ("inputs", "small"),
    [
        ([], True),
        ([FILE.format(200_000_000)], True),
        ([FILE.format(200_000_001)], False),
        ([FILE.format(150_000_000), FILE.format(150_000_001)], False),
        ([FILE.format(150_000_000), FILE.format(150_000_000)], True),  # one file, of which each reads a part
        ([FILE.format(None)], False),  # a server that does not tell
        (["photos, 2000 images, 5ec2e7"], True),
        (["photos, 2001 images, 5ec2e7"], False),
        (["a, b.tar, 7 bytes, Sat, 28 Nov 2026 23:20:42 GMT"], True),
    ],
)
def test_files_outside_the_store_count_once_by_their_bytes(store: Store, inputs: list[str], small: bool) -> None:
    tasks = [task(f"{number:05d}", images=identity) for number, identity in enumerate(inputs)] or [task()]
    assert is_small(stage(tasks), tasks, store) is small


@pytest.mark.parametrize("unit", ["urls", "rows", "samples", "nodes"])
def test_a_store_counts_by_what_its_finished_stages_counted(store: Store, unit: str) -> None:
    for count, small in ((10_000, True), (10_001, False)):
        finished(store, scan={unit: count, "captions": 5 * count}, number={"nodes": 7})
        assert is_small(stage([task()]), [task()], store) is small


def test_stages_say_what_no_size_tells(store: Store, tmp_path: Path) -> None:
    one = task()
    finished(store, scan={"samples": 1_001})
    assert is_small(download.DOWNLOAD, [one], store)
    assert not is_small(download.DOWNLOAD, [one, task("00001")], store)
    for size, small in ((None, True), (256, False)):
        packing = dataclasses.replace(one, settings={"image_size": size})
        assert is_small(pack.STAGE, [packing], store) is small
    (tmp_path / "static").mkdir()
    (tmp_path / "static/modules.json").write_text("[]")
    (tmp_path / "static/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")

    def encoding(encoder: object, precision: str) -> Task:
        hints = {"encoder": str(encoder), "trusted": False}
        return dataclasses.replace(one, settings={"precision": precision}, hints=hints)

    packed, int8, other = (
        encoding(name, precision)
        for name, precision in ((DEFAULT_ENCODER, "auto"), (DEFAULT_ENCODER, "int8"), (tmp_path / "static", "auto"))
    )
    assert is_small(encode.STAGE, [packed, packed], store)
    assert not is_small(encode.STAGE, [int8, int8], store)  # which takes one thread a process
    assert not is_small(encode.STAGE, [other, other], store)
    assert is_small(encode.STAGE, [other], store)
    finished(store, scan={"samples": 1_000})
    assert is_small(encode.STAGE, [other, other], store)
    assert not is_small(encode.STAGE, [dataclasses.replace(other, inputs={"tar": FILE.format(20_000_001)})] * 2, store)


WITHOUT_RAY = """
import sys
from graphbuild.cli import main

sys.argv = ["graphbuild", *sys.argv[1:]]
main()
assert "ray" not in sys.modules
"""


@pytest.mark.parametrize("source", ["vectors", pytest.param("captions", marks=pytest.mark.slow)])
def test_a_small_job_never_imports_ray(tmp_path: Path, source: str) -> None:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32))
    captions = pa.table({"caption": [f"{number} dogs in the grass" for number in range(300)]})
    pq.write_table(captions, tmp_path / "captions.parquet")
    ending = {"vectors": "npy", "captions": "parquet"}[source]
    (tmp_path / "recipe.yaml").write_text(f"embed:\n  {source}: {tmp_path}/{source}.{ending}\nindex:\n  k: 8\n")
    command = [sys.executable, "-c", WITHOUT_RAY, "run", str(tmp_path / "recipe.yaml"), str(tmp_path / "store")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "store/shards").glob("*.graph.parquet"))) == 1
    assert done.stderr.count("so small a job") == 1
