"""What commands print: nothing that a list, a tar or a server says can steer the terminal."""

from __future__ import annotations

import logging

import typer


def harmless(text: str) -> str:
    r"""Text whose control and formatting characters, but the line end, stand as escapes, such as \x1b."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def echo(text: str, *, err: bool = False) -> None:
    typer.echo(harmless(text), err=err)


class HarmlessFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))
