"""Progress as it is seen: on a real terminal (a pseudo-terminal of some width, resized), in a log, and as JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest

from graphbuild.runner import progress
from graphbuild.runner.progress import State, described, duration, lines
from tests.e2e import forked

SCRIPT = """
import logging, sys, time
from graphbuild.cli import main
from graphbuild.runner.progress import Progress
sys.argv = ["graphbuild", "neighbors", "--help"]
try:
    main()
except SystemExit:
    pass
progress = Progress({mode!r})
logging.getLogger("graphbuild").warning("a warning \\x1b[31m in front of it")
progress.begin("download", total=10, done=2)
for number in range(8):
    progress.running(3)
    time.sleep({pause})
    counts = {{"urls": 1000, "images": 700, "failed": 300}}
    progress.advance(counts, {{"download: HTTP Error 404: Not Found": 200, "resize: not an image \\x1b[2J": 100}})
    if number == 3:
        logging.getLogger("graphbuild").warning("a worker died, as it happens")
progress.end({{"urls": 10000, "images": 7000}})
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def watched(widths: list[int], pause: float = 0.3) -> list[tuple[int, str]]:
    """What a terminal received, each piece with the width it had then, which changes every second from the first on."""
    master, slave = os.openpty()
    resize(slave, widths[0])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(pause=pause, mode="auto")],
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env={**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    pieces: list[tuple[int, str]] = []
    width, begun = widths[0], threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says EIO when the other side has gone
            while block := os.read(master, 65_536):
                pieces.append((width, block.decode()))
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(60)
    for width in widths:
        resize(master, width)
        os.kill(process.pid, signal.SIGWINCH)
        if width != widths[-1]:
            time.sleep(1)
    assert process.wait(60) == 0
    reader.join(10)
    os.close(master)
    return pieces


def drawn(text: str) -> list[str]:
    """The lines that were drawn, without the sequences that move and colour."""
    return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", text)) if line.strip()]


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_every_drawn_line_fits_its_width_and_one_line_stays(columns: int) -> None:
    text = "".join(piece for _, piece in watched([columns]))
    found = drawn(text)
    assert max(map(len, found)) <= columns
    assert any("of 10 tasks" in line and "left" in line for line in found)
    assert any("700 images" in line or "70.0% usable" in line for line in found)
    assert any("1,600 download: HTTP Error 404" in line for line in found)
    assert found[-1].startswith("download  8 tasks in")
    assert "2 done before: 10,000 urls, 7,000 images" in found[-1]
    assert "\x1b[2J" not in text
    assert "\x1b[31m in front" not in text
    assert sum("a worker died, as it happens" in line for line in found) == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_a_resized_terminal_gets_lines_of_its_new_width() -> None:
    pieces = watched([200, 60, 120], pause=0.4)
    late = {width: [line for w, piece in pieces if w == width for line in drawn(piece)][6:] for width in (60, 120)}
    assert late[60]
    assert max(map(len, late[60])) <= 60
    assert max(map(len, late[120])) > 60
    drawn_wide = [line for w, piece in pieces if w == 200 for line in drawn(piece)]
    assert max(map(len, drawn_wide)) <= 80  # so that a terminal made as narrow as that has none to break in two


def piped(mode: str) -> list[str]:
    script = SCRIPT.format(pause=0.3, mode=mode)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env={**os.environ}
    )
    return done.stderr.splitlines()


def test_in_a_log_lines_are_plain() -> None:
    found = piped("auto")
    assert not any("\x1b" in line or "\r" in line for line in found)
    assert found[-1].startswith("download  8 tasks in")
    assert len(found) == 3  # two warnings and the end: nothing every 10 s in so short a run


def test_as_json_every_line_is_an_object_with_the_state() -> None:
    found = [json.loads(line) for line in piped("json") if line.startswith("{")]
    assert found[0]["event"] == "begin"
    end = found[-1]
    assert end["event"] == "end"
    assert end["tasks"] == {"total": 10, "done": 10, "skipped": 2, "failed": 0, "running": 0, "again": 0}
    assert end["all_counts"] == {"urls": 10_000, "images": 7_000}
    assert end["success"] == pytest.approx(0.7)
    assert end["reasons"]["download: HTTP Error 404: Not Found"] == 1_600
    middle = [one for one in found if one["event"] == "progress"]
    assert middle
    assert all(one["memory_bytes"] > 1e6 and one["seconds"] > 0 for one in middle)


def test_a_job_told_as_json_writes_nothing_else_to_stderr(tmp_path: Path) -> None:
    captions = tmp_path / "captions.tsv"
    captions.write_text("caption\n\n" + "".join(f"a picture of {number} things\n" for number in range(50)))
    command = [str(Path(sys.executable).with_name("graphbuild")), "embed", str(tmp_path / "out"), "--workers", "0"]
    done = forked.run([*command, "--captions", str(captions), "--progress", "json"], os.environ, 200)
    assert done.returncode == 0
    found = [json.loads(line) for line in done.stderr.splitlines()]
    ends = {one["stage"]: one for one in found if one["event"] == "end"}
    assert list(ends) == ["captions", "numbering", "texts", "encoding", "nodes", "fidelity"]
    assert ends["captions"]["all_counts"]["rejected"] == 1
    assert ends["encoding"]["all_counts"]["embeddings"] == 50


def test_counts_are_told_in_words_without_those_of_empty_rows() -> None:
    counts = {"embeddings": 10, "truncated": 0, "tokens": 1071, "computed_tokens": 4096}
    assert described(counts) == "10 embeddings, 1,071 tokens"


def test_time_left_and_rate_follow_from_this_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1_000.0)
    state = State("encoding", total=100, done=60, skipped=50, begin=980.0)
    state.counts = {"embeddings": 4_000}
    assert state.rate() == 200
    assert state.seconds_left() == 20 / 10 * 40
    assert "60 of 100 tasks, 0:20, 1:20 left" in lines(state)[0]
    state.parts = lambda: 2.5  # shares of running tasks
    assert state.seconds_left() == 20 / 12.5 * 37.5
    assert "62.5 of 100 tasks, 0:20, 1:00 left" in lines(state)[0]
    state.done, state.parts = 50, lambda: 0.1  # no task has ended: most of the time may be the workers' start
    assert state.seconds_left() is None
    assert "left" not in lines(state)[0]
    assert duration(3_661) == "1:01:01"


def test_an_interrupted_job_gives_the_cursor_back_and_says_that_it_can_go_on() -> None:
    script = """
import sys, time
from graphbuild.cli import main
from graphbuild.runner.runner import Runner
sys.argv = ["graphbuild", "neighbors", "--help"]
try:
    main()
except SystemExit:
    pass
with Runner(workers=0) as runner:
    runner.progress.begin("download", total=10, done=2)
    time.sleep(0.5)
    raise KeyboardInterrupt
"""
    master, slave = os.openpty()
    resize(slave, 80)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    received = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal ends
        while piece := os.read(master, 65536):
            received += piece
    os.close(master)
    process.wait()
    text = received.decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "hidden, and shown again"
    after = ESCAPE.sub("", text[text.index("\x1b[?25h") :])
    assert "stopped   the same command goes on from here" in after


def test_memory_counts_what_children_hold_and_is_read_no_oftener_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    children = psutil.Process.children
    monkeypatch.setattr(psutil.Process, "children", lambda self, **how: looks.append(self) or children(self, **how))
    monkeypatch.setattr(progress, "_memory", (-math.inf, 0))
    before = progress.memory_bytes()
    program = "import sys; held = bytearray(200_000_000); print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert {progress.memory_bytes() for _ in range(100)} == {before}
        assert len(looks) == 1, "a live view asks four times a second, on machines with thousands of processes"
        monkeypatch.setattr(progress, "MEMORY_SECONDS", 0)
        assert progress.memory_bytes() > before + 190_000_000
        child.communicate()
