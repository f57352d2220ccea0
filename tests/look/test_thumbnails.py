"""`graphbuild neighbors` on terminals that answer as those with kitty or sixel graphics, on a dumb one, in a pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import termios
from pathlib import Path

import pytest
from PIL import Image

from graphbuild.job.verbs import run_verb
from graphbuild.look.catalog import Catalog
from graphbuild.look.thumbnails import show_neighbors
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
GRAPHBUILD = Path(sys.executable).with_name("graphbuild")
QUERY = re.compile(rb"\x1b_G([^;]*a=q[^;]*);[^\x1b]*\x1b\\")
DRAWN = re.compile(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples, each of one colour, which its caption names; the last one's image is none."""
    folder = tmp_path_factory.mktemp("thumbnails")
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, colour in COLOURS.items():
            image = io.BytesIO()
            Image.new("RGB", (64, 32), colour).save(image, "JPEG", quality=95)
            content = image.getvalue() if name != "blue" else b"not an image"
            for member, data in ((f"{name}.jpg", content), (f"{name}.txt", f"a {name} wall".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    recipe = Recipe(embed=Embed(shards=str(folder / "0.tar")), index=Index(k=2))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, recipe, Store(str(folder / "store")), runner)
    return folder / "store"


def seen(store: Path, terminal: str, *options: str) -> bytes:
    """What a terminal receives that tells of graphics as `terminal` does."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 1000, 480))
    command = [str(GRAPHBUILD), "neighbors", str(store), "red", *options]
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    received, asked, answered = b"", 0, 0
    with contextlib.suppress(OSError):  # Linux says EIO when the other side has gone
        while block := os.read(master, 65_536):
            received += block
            if received.count(b"\x1b[c") > asked and terminal != "dumb":
                asked += 1
                os.write(master, b"\x1b[?62;4c" if terminal == "sixel" else b"\x1b[?62c")
            queries = QUERY.findall(received)
            if len(queries) > answered and terminal == "kitty":
                answered += 1
                number = re.search(rb"i=(\d+)", queries[-1])
                assert number
                os.write(master, b"\x1b_Gi=" + number[1] + b";OK\x1b\\")
    os.close(master)
    assert process.wait(60) == 0, received
    return received


def test_kitty_gets_the_images_of_the_samples(store: Path) -> None:
    received = seen(store, "kitty")
    payloads: list[bytes] = []
    for keys, payload in DRAWN.findall(received):
        if b"a=q" not in keys and payload:
            first = b"f=" in keys
            payloads = [*payloads, payload] if first else [*payloads[:-1], payloads[-1] + payload]
    images = [Image.open(io.BytesIO(base64.b64decode(payload))).convert("RGB") for payload in payloads]
    middles = [image.getpixel((image.width // 2, image.height // 2)) for image in images]
    assert [max(range(3), key=pixel.__getitem__) for pixel in middles] == [
        0,
        1,
    ]  # red, green; blue is none
    assert b"a red wall" in received
    assert b"a green wall" in received
    assert b"a blue wall" in received


def test_other_terminals_get_what_they_can_show(store: Path) -> None:
    assert re.search(rb"\x1bP[0-9;]*q", seen(store, "sixel"))
    blocks = seen(store, "dumb")
    assert "▀".encode() in blocks or "▄".encode() in blocks
    assert b"\x1bP" not in blocks


def test_text_is_all_that_is_asked_for_or_can_be_shown(store: Path) -> None:
    plain = seen(store, "kitty", "--no-images")
    assert b"\x1b" not in plain
    piped = subprocess.run([GRAPHBUILD, "neighbors", store, "red"], capture_output=True, text=True, check=True).stdout
    assert piped.splitlines() == plain.decode().replace("\r\n", "\n").splitlines()
    assert len(piped.splitlines()) == 3


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("odd", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"encoding": "latin-1"}, {}])
def test_a_terminal_without_colours_or_unicode_gets_text(
    odd: dict[str, str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(Store(str(store)))
    screen = Terminal()
    monkeypatch.setattr(screen, "encoding", odd.get("encoding", "utf-8"), raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    for name, value in ({"TERM": "xterm-256color"} | odd).items():
        monkeypatch.setenv(name, value)
    show_neighbors(catalog, *catalog.ask(2, key="red"), images=True)
    lines = screen.getvalue().splitlines()
    assert (len(lines) == 3 and "a red wall" in lines[0]) == bool(odd), lines
