"""Every tutorial, done as its page says: its blocks are run in their order, and print what the page says.

Of a page's blocks those in bash are typed into one shell, in a folder where `docs`, `training` and `pipelines` are the
project's. Those in Python with a title are files of that name; those without are given to `python`. A block of text is
what the block before it prints, among other lines: the same lines in the same order, `...` standing for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import spent
from tests.pages import ROOT, blocks, environment

TUTORIALS = sorted(path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.name != "index.md")
NEEDS = {"open-clip": "open_clip_train"}
SECONDS = 300  # of a core that a tutorial may take: less than five minutes on two cores, also where others use them too
WALL_SECONDS = 900  # a tutorial that waits for something does not use a core
MARK = "==== block {} ===="


def script(page: Path) -> str:
    lines = ["set -e", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for number, block in enumerate(blocks(page)):
        lines.append(f"echo '{MARK.format(number)}'")
        if block.language == "bash":
            lines.append(block.code)
        else:
            lines += [f"cat > {block.title} <<'END'" if block.title else "python - <<'END'", block.code + "END"]
    return "\n".join(lines)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_begins_with_what_it_gives_and_says_what_it_prints(page: Path) -> None:
    title, first = page.read_text().split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert first.startswith("You get ")
    assert sum(bool(block.prints) for block in blocks(page)) >= 2


def test_there_are_eight() -> None:
    assert len(TUTORIALS) == 8


def test_background_jobs_and_daemons_count_and_a_command_that_waits_for_ever_is_ended(tmp_path: Path) -> None:
    """What a shell has started and nobody waits for costs as much as the rest."""
    busy = f"{sys.executable} -c 'import time; end = time.process_time() + 1\nwhile time.process_time() < end: pass'"
    _, seconds = spent.run(["bash", "-c", f"setsid {busy} & {busy} & sleep 4"], {**os.environ}, 60, tmp_path)
    assert 1.2 < seconds < 4
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        spent.run(["bash", "-c", "echo begun; sleep 100 & wait"], {**os.environ}, 1, tmp_path)
    assert time.monotonic() - begin < 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says_in_less_than_five_minutes(page: Path, tmp_path: Path) -> None:
    if page.stem in NEEDS and find_spec(NEEDS[page.stem]) is None:
        pytest.skip(f"{NEEDS[page.stem]} is not installed: make test-open-clip")
    (tmp_path / "docs/tutorials").mkdir(parents=True)
    (tmp_path / "docs/tutorials/scenes.py").symlink_to(ROOT / "docs/tutorials/scenes.py")
    done, used = spent.run(["bash", "-c", script(page)], environment(tmp_path), WALL_SECONDS, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert used < SECONDS, f"it took {used:.0f} seconds of a core"
    printed = re.split("^" + re.escape(MARK).replace(r"\{\}", r"\d+") + "$\n", done.stdout, flags=re.M)[1:]
    for block, output in zip(blocks(page), printed, strict=True):
        block.check(output)
