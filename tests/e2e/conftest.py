"""What the end-to-end tests share: the command line as a user runs it, real images, tars written by plain tarfile."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import forked
import pytest

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import encode_jpeg, make_scenes, render

Picture = tuple[bytes, str]  # a JPEG and its caption
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
NOT_INHERITED = ("RAY_ADDRESS", "AWS_", "FSSPEC_", "COLUMNS")
READ_WHEN_NEEDED = ("AWS_", "COLUMNS", "http_proxy", "no_proxy")  # and not when libraries are imported


@pytest.fixture(scope="session")
def program() -> Path:
    """The installed console script of this interpreter."""
    return Path(sys.executable).with_name("graphbuild")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment for a command: this one, without what would lead it to another cluster or cloud account."""
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}


@pytest.fixture(scope="session")
def cli(program: Path, environment: dict[str, str]) -> Cli:
    """Run `graphbuild ARGUMENTS`; fails unless it exits with `code` (None: any)."""

    def run(
        *arguments: object, code: int | None = 0, env: dict[str, str] | None = None, timeout: float = 500
    ) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        own = {**environment, **(env or {})}
        if all(name.startswith(READ_WHEN_NEEDED) for name in env or {}):
            done = forked.run(command, own, timeout)
        else:
            done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=timeout)
        if code is not None and done.returncode != code:
            pytest.fail(f"{' '.join(command)} exited {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def flickr(shared_data: Path) -> list[Picture]:
    """1,000 real photographs, each with the first of its captions, in the archive's order."""
    captions: dict[str, str] = {}
    with (shared_data / "images/flickr8k_captions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], row["caption"])
    with tarfile.open(shared_data / "images/flickr8k.tar") as archive:
        return [
            (archive.extractfile(member).read(), captions[Path(member.name).name])  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        ]


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    """120 drawn scenes, each with a caption of its own."""
    return [
        (encode_jpeg(render(scene, 32)), f"{caption(scene)}, picture {number}")
        for number, scene in enumerate(make_scenes(120))
    ]


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Iterable[tuple[str, bytes]]], None]:
    """Write a tar of (name, content) pairs, in that order."""

    def write(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    return write
