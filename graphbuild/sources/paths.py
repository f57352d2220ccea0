"""Which files a path, folder or pattern names: what exists is taken as it is written, whatever characters it has.

Only what does not exist is a pattern: first its braces ({000..331}, {a,b}), then *, ? and [ ]. A part of a pattern that
exists, as the folder of `only [v1]/*.tar`, is taken as it is written too. A request for each part with such characters,
and one a listing.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from braceexpand import braceexpand

from graphbuild.errors import InputError, public
from graphbuild.machine.terminal import counted
from graphbuild.recipe import absolute
from graphbuild.runner.stage import named_file
from graphbuild.store.remote import file_system, reaching

logger = logging.getLogger(__name__)
MARKS = frozenset("*?[{")


def named_files(pattern: str, ending: re.Pattern[str], option: str) -> list[str]:
    """The files that a path, folder or pattern names, in order of name, numbers in names as numbers: part-2 before
    part-10. Of a folder those with such an ending.

    Raises:
        InputError: there are none, or a part of the pattern names none.
    """
    try:
        with reaching(pattern):
            found = [path for named in expand(pattern) for path in in_folder(named, ending, "file")]
    except FileNotFoundError as error:
        raise InputError(
            f"no file matches {error}", f"check {option}; quote a pattern with * so that the shell leaves it alone"
        ) from None
    except (ValueError, ImportError) as error:
        raise InputError(f"{option} {pattern}: {error}", "write it as in 'part-{0000..0331}.parquet'") from None
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise InputError(f"{option}: {twice} is named twice", "name each file once")
    return sorted(found, key=by_numbers)


def by_numbers(url: str) -> tuple[list[str | int], str]:
    """The key by which names sort with their numbers as numbers."""
    parts = re.split(r"([0-9]+)", public(url))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], url


def known_first(identities: Mapping[str, str], known: Sequence[str]) -> dict[str, str]:
    """URL -> identity: first those that a store knows, in its order, by their identity or else name; then new ones."""
    places = {identity: place for place, identity in enumerate(known)}
    by_name = {named_file(identity): place for identity, place in places.items()}

    def place(url: str) -> int:
        return places.get(identities[url], by_name.get(named_file(identities[url]), len(known)))

    return {url: identities[url] for url in sorted(identities, key=place)}


def part_inputs(what: str, identities: Iterable[str]) -> dict[str, str]:
    """The inputs of a task that reads several files: "captions", "captions 2", ... in their order."""
    return {f"{what} {number}" if number > 1 else what: one for number, one in enumerate(identities, 1)}


def parts_of(inputs: Mapping[str, str], what: str) -> list[str]:
    """The identities that `part_inputs` named, in their order: a record has names sorted as text, "captions 10" before
    "captions 2"."""
    numbers = {name: name.removeprefix(what) or "1" for name in inputs if name.rstrip("0123456789 ") == what}
    return [inputs[name] for name in sorted(numbers, key=lambda name: int(numbers[name]))]


def in_folder(url: str, ending: re.Pattern[str], what: str, used: Iterable[str] = ()) -> list[str]:
    """The files in a folder with such an ending, in order of name; any other path as it is. what: their name, "file".
    What is left out is told once a process, but for `used`: files that other options name.

    Raises:
        FileNotFoundError: a folder without one; it is named.
    """
    fs, path = file_system(url)
    is_file = url.startswith(("http://", "https://")) and ending.search(public(url))  # isdir would fetch it
    if is_file or not fs.isdir(path):
        return [url]
    names = sorted(name.rstrip("/") for name in fs.ls(path, detail=False) if not is_hidden(name.rpartition("/")[2]))
    found = [name for name in names if ending.search(name)]
    if not found:
        first = re.findall("[a-z]+", ending.pattern)[0]
        raise FileNotFoundError(f"{url.rstrip('/')}/*.{first}")
    told = {*found, *(file_system(other)[1] for other in used)}
    if left := [name.rpartition("/")[2] for name in names if name not in told]:
        kinds = left if len(left) == 1 else sorted({f".{name.partition('.')[2]}" for name in left})
        are = "other is" if len(left) == 1 else "others are"
        _tell(f"{url}: {counted(len(found), what)}; {len(left):,} {are} left out ({', '.join(kinds)})")
    return [fs.unstrip_protocol(name) if "://" in url else name for name in found]


@cache
def _tell(line: str) -> None:
    """Log it, once a process: a source is looked at several times."""
    logger.info("%-9s %s", "source", line)


def is_hidden(path: str) -> bool:
    """Whether it is no one's data: a file whose name begins with a dot, and what macOS puts beside (__MACOSX/)."""
    folders, _, name = path.rpartition("/")
    return name.startswith(".") or "__MACOSX" in folders.split("/")


def expand(pattern: str) -> list[str]:
    """The paths that it names; matches of * in order of name. Paths without a match for * may not exist. A query of an
    HTTP URL is as it is written, for each of them.

    Raises:
        ValueError: unbalanced braces, or a URL that fsspec does not know. FileNotFoundError: nothing matches; it is
            named.
    """
    if pattern.startswith("{") and _split(pattern)[1]:
        return [path for part in braceexpand(pattern) for path in expand(part)]
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - may be a URL
    pattern, mark, query = pattern.partition("?") if pattern.startswith(("http://", "https://")) else (pattern, "", "")
    literal, rest = _split(pattern)
    return [path + mark + query for part in braceexpand(rest) for path in _matches(literal + part)]


def several(patterns: Sequence[str]) -> str:
    """One pattern for what several name: {a,b}, of absolute paths, then URLs, where `public` ends a query."""
    ordered = sorted(patterns, key=lambda pattern: "://" in pattern)
    parts = [("", pattern) if "://" in pattern else _split(absolute(pattern)) for pattern in ordered]
    whole = [re.sub(r"([\\{},])", r"\\\1", literal) for literal, _ in parts]
    others = [rest if "{" in rest else rest.replace(",", r"\,") for _, rest in parts]
    return f"{{{','.join(map(str.__add__, whole, others))}}}"


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
