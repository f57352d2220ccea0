"""What every format shares: the list asked for, the chunks it comes in, its columns, its rejected rows.

Columns are found by their exact names; an error names the nearest one and the flag to change. A rejected row
keeps its position, a reason and its content up to 10,000 characters.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from graphbuild.errors import ConfigError, InputError

PRESETS: Mapping[str, tuple[str, ...]] = {"cc3m": ("caption", "url"), "cc12m": ("url", "caption")}
"""The columns, in order, of the headerless and unquoted TSVs as published."""

MAX_CONTENT_CHARACTERS = 10_000
CHUNK_BYTES = 64 << 20
FIELD_ROLE = "field "  # of a column that the caption's template names
CAPTION_ROLES = ("caption", *(f"caption {number}" for number in range(2, 101)))  # of columns with a caption each
WEIGHTS_ROLE = "weights"  # of a column with a list of numbers, one for each caption
BLANK, NO_URL, NOT_UTF8 = "blank line", "no url", "invalid UTF-8"
_REJECTED = pa.schema([("position", pa.int64()), ("reason", pa.string()), ("content", pa.large_string())])


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """Where a list lies, and which of its columns (value) plays which role (key: "url", "key", one of CAPTION_ROLES,
    WEIGHTS_ROLE, or FIELD_ROLE and a name).

    `preset` names a published headerless TSV, whose columns are called "caption" and "url". plural: a value of
    CAPTION_ROLES may be a list of texts.
    """

    path: str
    columns: Mapping[str, str]
    preset: str | None = None
    plural: bool = False

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"there is no preset {self.preset!r}", f"--preset takes {' or '.join(PRESETS)}")

    def takes_lists(self, role: str) -> bool:
        """Whether a value of this role may be a list."""
        return role == WEIGHTS_ROLE or (self.plural and role in CAPTION_ROLES)

    @property
    def name(self) -> str:
        """The path in lower case, without a URL's query: its end decides the format."""
        return (self.path.partition("?")[0] if is_url(self.path) else self.path).lower()


class Chunk(NamedTuple):
    """Consecutive rows of a list, both tables in the file's order.

    rows: position int64 (0-based row number in the file, the header not counted), a large_string column for
        each role (of a caption large_list<large_string> where values are lists; weights as JSON), then, if asked for,
        the file's other columns.
    rejected: position int64, reason string, content large_string (the line; of parquet the role columns as
        JSON; cut at 10,000 characters with an ellipsis).
    """

    rows: pa.Table
    rejected: pa.Table


def select(spec: TableSpec, names: list[str], keep_others: bool, hint: str = "") -> list[tuple[str, int]]:
    """The output's columns as (name, index in the file), roles first."""
    selected: list[tuple[str, int]] = []
    for role, column in spec.columns.items():
        if column not in names:
            folded = {name.casefold(): name for name in names}
            close = difflib.get_close_matches(column.casefold(), folded, n=1, cutoff=0.5)
            fix = f"try {option(role)} {folded[close[0]]!r}" if close else f"name one with {option(role)}"
            if role.startswith(FIELD_ROLE):
                fix = f"write {{{folded[close[0]]}}} in --template" if close else "name others in --template"
            there = ", ".join(repr(name[:80]) for name in names[:50]) + (", ..." if len(names) > 50 else "")
            raise InputError(f"{spec.path} has no column {column!r}; its columns are {there}", hint or fix)
        if names.count(column) > 1:
            cause = f"{spec.path} has {names.count(column)} columns {column!r}"
            raise InputError(cause, f"rename them, or name another with {option(role)}")
        selected.append((role, names.index(column)))
    taken = {"position", *spec.columns}
    for index, name in enumerate(names if keep_others else []):
        if name not in spec.columns.values():
            while name in taken:
                name = f"other_{name}"
            taken.add(name)
            selected.append((name, index))
    return selected


def rejected(rejects: Sequence[tuple[int, str, bytes]]) -> pa.Table:
    """A Chunk's rejected rows, out of (position, reason, content)."""
    contents = []
    for _, _, raw in rejects:
        text = raw[: 4 * MAX_CONTENT_CHARACTERS + 4].decode(errors="replace")
        contents.append(text if len(text) <= MAX_CONTENT_CHARACTERS else text[:MAX_CONTENT_CHARACTERS] + "…")
    positions, reasons = [position for position, _, _ in rejects], [reason for _, reason, _ in rejects]
    return pa.table([positions, reasons, contents], schema=_REJECTED)


def wrong_type(path: str, role: str, column: str, kind: str) -> InputError:
    """The error for a role's column that holds `kind` instead of text."""
    wanted = "lists of numbers" if role == WEIGHTS_ROLE else "text"
    return InputError(f"{path}: column {column!r} is {kind}, not {wanted}", f"name another with {option(role)}")


def option(role: str) -> str:
    """The option that names a role's column."""
    if role.startswith(FIELD_ROLE):
        return "--template"
    return "--caption-weights" if role == WEIGHTS_ROLE else f"--{role.partition(' ')[0]}-column"


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))
