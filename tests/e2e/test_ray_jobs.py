"""The recipes of pipelines/ as Ray jobs: submitted to a real Ray head on this machine, started with free ports."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import encode_jpeg, make_scenes, render
from graphbuild.demo.server import SceneServer, expected_images, image_url

pytestmark = pytest.mark.slow
PIPELINES = Path(__file__).parents[2] / "pipelines"
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A Ray head whose jobs run in a folder: that folder, and the address to submit to."""
    folder = tmp_path_factory.mktemp("jobs")
    # Ray finds a job's cluster through its temporary folder: one of its own, and short, as socket paths must be.
    temporary = tempfile.mkdtemp(prefix="gb", dir="/tmp")
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--object-store-memory=200000000",
        f"--temp-dir={temporary}",
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    for _ in range(60):
        if (
            subprocess.run(
                [BIN / "ray", "job", "list", "--address", address], env=ENVIRONMENT, capture_output=True
            ).returncode
            == 0
        ):
            break
        time.sleep(1)
    time.sleep(5)  # the job agent comes up after the dashboard
    yield folder, address
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(20)
    shutil.rmtree(temporary, ignore_errors=True)


def submit(head: tuple[Path, str], recipe: str) -> dict[str, object]:
    """Run one of the recipes, which may fetch from loopback here; its manifest."""
    folder, address = head
    content = yaml.safe_load((PIPELINES / recipe).read_text())
    if "download" in content:
        content["download"]["allow_private_hosts"] = True
    (folder / recipe).write_text(yaml.safe_dump(content))
    command = [
        BIN / "ray",
        "job",
        "submit",
        "--address",
        address,
        "--",
        "graphbuild",
        "run",
        folder / recipe,
        f"store-{recipe[:-5]}",
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    return dict(json.loads((folder / f"store-{recipe[:-5]}" / "manifest.json").read_text()))


@pytest.mark.parametrize(
    ("recipe", "name", "line"),
    [("cc3m.yaml", "Train_GCC-training.tsv", "{c}\t{u}\n"), ("cc12m.yaml", "cc12m.tsv", "{u}\t{c}\n")],
)
def test_a_url_list_becomes_a_graph(head: tuple[Path, str], recipe: str, name: str, line: str) -> None:
    scenes = make_scenes(240)
    with SceneServer(scenes) as server:
        rows = [line.format(c=caption(scene), u=image_url(server.url, index)) for index, scene in enumerate(scenes)]
        (head[0] / name).write_text("".join(rows))
        manifest = submit(head, recipe)
    sidecar = pq.read_table(head[0] / f"store-{recipe[:-5]}" / "shards" / "00000.graph.parquet")
    assert len(sidecar) == expected_images(server.faults)
    assert manifest["recall"]["recall"] == 1.0  # type: ignore[index]


def test_class_prompts_become_a_dense_graph(head: tuple[Path, str]) -> None:
    adjectives = ("red", "green", "blue", "old", "new", "tall", "small", "wet", "dry", "loud")
    materials = ("stone", "wooden", "paper", "iron", "silk", "clay", "glass", "brass", "wool", "straw")
    things = ("horse", "boat", "house", "lamp", "tree", "cup", "road", "bell", "hat", "drum")
    names = [" ".join(words) for words in itertools.product(adjectives, materials, things)]
    names[500] = names[7]  # ImageNet has two such pairs
    (head[0] / "imagenet_classes.txt").write_text("\n".join(names))
    (head[0] / "imagenet").mkdir()
    image = encode_jpeg(render(make_scenes(1)[0]))
    for shard in range(2):
        with tarfile.open(head[0] / "imagenet" / f"train-{shard:04d}.tar", "w") as tar:
            for label in range(1_000):
                for extension, content in (("cls", str(label).encode()), ("jpg", image)):
                    info = tarfile.TarInfo(f"{shard}_{label:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    manifest = submit(head, "imagenet.yaml")
    assert manifest["graph"]["k"] == 999  # type: ignore[index]
    assert manifest["stages"]["number"]["counts"] == {"nodes": 1_000, "samples": 2_000}  # type: ignore[index]
    sidecar = pq.read_table(head[0] / "store-imagenet" / "shards" / "train-0001.graph.parquet")
    assert sidecar["node"].to_pylist() == list(range(1_000))
    assert sidecar["caption"][7].as_py() == f"a photo of a {names[7]}"
