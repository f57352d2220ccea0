"""The command line: parses, builds a recipe, calls one function. Heavy imports wait until a verb runs."""

from __future__ import annotations

import gc
import io
import logging
import sys

from graphbuild.cli import build, look
from graphbuild.cli.app import app
from graphbuild.errors import GraphbuildError
from graphbuild.machine.terminal import HarmlessFormatter, StderrHandler, say_error

__all__ = ["app", "build", "look", "main"]


def main() -> None:
    """Entry point: users' mistakes become two lines on stderr and exit code 2, failed work exit code 1."""
    gc.set_threshold(50_000, 20, 100)  # importing libraries makes millions of objects that stay: an eighth of its time
    handler = StderrHandler()
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("graphbuild").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every caption's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except GraphbuildError as error:
        say_error(f"graphbuild: {error}")
        sys.exit(error.exit_code)
