"""What commands print: nothing that a list, a tar or a server says can steer the terminal; logs hold no secrets."""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

from graphbuild.errors import public

ProgressMode = Literal["auto", "live", "plain", "json"]


def harmless(text: str) -> str:
    r"""Text whose control and formatting characters, but the line end, stand as escapes, such as \x1b."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 tar, 1,200 tars."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def echo(text: str, *, err: bool = False) -> None:
    print(harmless(text), file=sys.stderr if err else sys.stdout, flush=True)


class HarmlessFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(public(super().format(record)))


class JsonFormatter(logging.Formatter):
    """A log line as a JSON object, among those of `--progress json`."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"event": "log", "level": record.levelname.lower(), "message": public(record.getMessage())})


class StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the time: above a live view, while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def log_as_json() -> None:
    """From now on, log lines are JSON objects."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrHandler):
            handler.setFormatter(JsonFormatter())


def say_error(text: str) -> None:
    """The last words of a command, on stderr; as JSON among JSON."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger(__name__).error(text)
    else:
        echo(text, err=True)
