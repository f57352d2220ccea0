"""Pages as tests read and run them: the blocks of a page in their order, and what the page says that each prints."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', re.M | re.S)


@dataclass
class Block:
    """A block to run, and what it prints."""

    language: str
    title: str | None
    code: str
    prints: list[str] = field(default_factory=list)

    def check(self, output: str) -> None:
        """The lines that the page shows are in `output`, in their order, among others."""
        lines = iter(output.splitlines())
        for said in self.prints:
            assert any(matches(said, line) for line in lines), (
                f"{self.code}\ndoes not print, at its place:\n{said}\n\n{output}"
            )


def blocks(page: Path) -> list[Block]:
    """The page's blocks to run, each with the text that follows it; YAML is a file if its first line says so."""
    found: list[Block] = []
    for language, title, code in FENCE.findall(page.read_text()):
        name = re.match(r"# (\w+\.yaml)\b", code)
        if language in ("bash", "python"):
            found.append(Block(language, title or None, code))
        elif language == "yaml" and name:
            found.append(Block(language, name[1], code))
        elif language == "text" and found:
            found[-1].prints += code.splitlines()
        else:
            assert language in ("text", "yaml"), f"{page.name} has a block in {language or 'no language'}"
    return found


def matches(said: str, line: str) -> bool:
    """Whether a line is what a page says, in which `...` stands for anything."""
    return re.fullmatch(".*?".join(map(re.escape, said.split("..."))), line) is not None


def environment(folder: Path) -> dict[str, str]:
    """What a shell needs in which `python` and `graphbuild` are these; both lie in `folder`/bin."""
    tools = folder / "bin"
    tools.mkdir()
    for name, call in {"python": "", "graphbuild": " -c 'from graphbuild.cli import main; main()'"}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable}{call} "$@"\n')
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
