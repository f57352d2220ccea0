"""Which files a path, folder or pattern names: what exists is taken as it is written, whatever characters it has.

Only what does not exist is a pattern: first its braces ({000..331}, {a,b}), then *, ? and [ ]. A part of a pattern that
exists, as the folder of `only [v1]/*.tar`, is taken as it is written too. A request for each part with such characters,
and one a listing.
"""

from __future__ import annotations

import glob
import os

from braceexpand import braceexpand

from graphbuild.store.remote import file_system

MARKS = frozenset("*?[{")


def expand(pattern: str) -> list[str]:
    """The paths that it names; matches of * in order of name. Paths without a match for * may not exist. A query of an
    HTTP URL is as it is written, for each of them.

    Raises:
        ValueError: unbalanced braces, or a URL that fsspec does not know. FileNotFoundError: nothing matches; it is
            named.
    """
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - may be a URL
    pattern, mark, query = pattern.partition("?") if pattern.startswith(("http://", "https://")) else (pattern, "", "")
    literal, rest = _split(pattern)
    return [path + mark + query for part in braceexpand(rest) for path in _matches(literal + part)]


def folder_of(pattern: str) -> str:
    """The folder, with its slash, in which all lies that a pattern names: what is taken of it as it is written."""
    literal, rest = _split(pattern)
    fs, path = file_system(literal or ".")
    return f"{literal.rstrip('/')}/" if not rest and fs.isdir(path) else literal[: literal.rfind("/") + 1]


def _matches(pattern: str) -> list[str]:
    literal, rest = _split(pattern)
    if not rest or not glob.has_magic(rest):
        return [pattern]
    fs, folder = file_system(literal or ".")
    found = sorted(fs.glob(f"{glob.escape(folder.rstrip('/'))}/{rest}"))
    if not found:
        raise FileNotFoundError(pattern)
    return [fs.unstrip_protocol(path) if "://" in pattern else path for path in found]


def _split(pattern: str) -> tuple[str, str]:
    """The beginning that is taken as it is written, up to a slash or all, and the rest."""
    begin = 0
    for part in pattern.split("/"):
        end = begin + len(part)
        if MARKS & set(part):
            fs, path = file_system(pattern[:end])
            if not fs.exists(path):
                return pattern[:begin], pattern[begin:]
        begin = end + 1
    return pattern, ""
