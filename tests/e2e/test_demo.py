"""`graphbuild demo` as a newcomer runs it: what it prints, what it leaves, and what a second run does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import forked
import polars as pl
import pytest

from graphbuild.demo.scenes import make_scenes
from graphbuild.demo.server import FAULTS, assign_faults, expected_images, image_url, write_url_list
from tests import spent

SCENES = 200  # the fewest that the command takes
GRAPHBUILD = Path(sys.executable).parent / "graphbuild"


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(GRAPHBUILD), "demo", "demo", "--scenes", str(SCENES)]
    folders = [path for path in os.environ["PATH"].split(os.pathsep) if Path(path).absolute() != GRAPHBUILD.parent]
    environment = {**os.environ, "PATH": os.pathsep.join(folders)}  # as of a shell that has not activated its own
    return forked.run(command, environment, 300, folder)


def on_a_terminal(folder: Path) -> tuple[str, str]:
    """What the demo shows on a terminal, and what it says on stderr."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 1200, 1000))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [str(GRAPHBUILD), "demo", "demo", "--scenes", str(SCENES)]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=subprocess.PIPE, start_new_session=True
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says EIO when the other side has gone
        while block := os.read(master, 65_536):
            shown += block
    os.close(master)
    assert process.stderr
    said = process.stderr.read().decode()
    assert process.wait(60) == 0, said
    return shown.decode(), said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder)


def test_demo_succeeds_and_says_what_to_look_at(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = run
    assert done.returncode == 0, done.stderr
    images = expected_images(assign_faults(SCENES))
    assert f"{SCENES:,} rows -> {SCENES:,} URLs -> {images:,} images" in done.stdout
    assert "recall@32 1.000000" in done.stdout
    assert "404: Not Found" in done.stdout
    assert f"{folder}/demo/shards/" in done.stdout
    (page,) = re.findall(r"^look +(.*)$", done.stdout, re.M)
    assert page == f"{folder}/demo/report/index.html"
    assert "<html" in Path(page).read_text()
    if Path(sys.prefix, "bin/activate").exists():  # the commands under `try` need it
        activate = re.search(r"^first +source (.*)\ntry +graphbuild explore demo$", done.stdout, re.M)
        assert activate
        assert Path(activate[1]).samefile(Path(sys.prefix, "bin/activate"))
    assert done.stdout.count("nearest neighbours") == 1
    assert len(set(re.findall(r"^(\d{8})  node \d+  ", done.stdout, re.M))) == 3, "different samples"
    assert "train.py" not in done.stdout, "no such file is here"
    assert "Traceback" not in done.stderr


def test_every_url_ends_as_its_fault_foretells(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    files = [path for path in (run[0] / "demo" / "shards").glob("0*.parquet") if ".graph." not in path.name]
    status = dict(pl.concat([pl.read_parquet(path, columns=["url", "status"]) for path in files]).iter_rows())
    base = next(iter(status)).rsplit("/images/", 1)[0]
    for index, fault in enumerate(assign_faults(len(make_scenes(SCENES)))):
        kept = status[image_url(base, index)] == "success"
        assert kept == (fault is None or fault.kept), (index, fault)
    assert {fault.kind for fault in assign_faults(SCENES) if fault} == set(FAULTS)


def test_a_second_demo_does_nothing_and_is_quick(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run[0] / "demo").rglob("*") if path.is_file()}
    (run[0] / "training").mkdir()
    (run[0] / "training/train.py").touch()
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    shown, said = on_a_terminal(run[0])
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin
    assert said.count("up to date") == 12
    assert "python training/train.py demo --config" in shown
    assert shown.count("\N{UPPER HALF BLOCK}") > 100, "of three scenes, drawn with coloured blocks"
    assert {path: path.stat().st_mtime_ns for path in (run[0] / "demo").rglob("*") if path.is_file()} == before
    assert seconds < 10, "of a CPU"


@pytest.mark.slow
def test_the_demo_costs_no_more_than_the_page_says(tmp_path: Path) -> None:
    """docs/how-to/install.md says 60 seconds of a CPU, README.md 100 with the training."""
    done, seconds = spent.run([str(GRAPHBUILD), "demo", "demo"], os.environ, 900, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert seconds < 90


def test_a_port_that_another_program_has_taken_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        write_url_list(tmp_path / "demo/scenes.parquet", make_scenes(SCENES), f"http://127.0.0.1:{port}")
        done = demo(tmp_path)
    assert done.returncode == 2
    assert (
        f"cannot have port {port}, which {tmp_path}/demo/scenes.parquet names (Address already in use)" in done.stderr
    )
    assert "Traceback" not in done.stderr
