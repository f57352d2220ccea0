"""JSON Lines: lines to records, each an object whose keys are the columns.

A role's value has to be text or null; other values stay JSON. The columns are the keys in the first MiB; a row
that does not fit them is rejected alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from graphbuild.errors import InputError
from graphbuild.sources.tables.spec import (
    BLANK,
    CAPTION_ROLES,
    NOT_UTF8,
    WEIGHTS_ROLE,
    TableSpec,
    select,
    wrong_type,
)
from graphbuild.sources.tables.text import Field, TextTable, chomp

_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}


def json_table(spec: TableSpec, head: list[bytes], lines: Iterator[bytes], keep_others: bool) -> TextTable:
    """The columns and records of JSON Lines whose first lines are `head`.

    Raises:
        InputError: a column is missing or not text, or none of these lines is an object.
    """
    objects = [row for row in map(json_object, head) if isinstance(row, dict)]
    if not objects:
        raise InputError(f"{spec.path}: none of the first {len(head):,} lines is a JSON object", "give JSON Lines")
    names = [name for name in dict.fromkeys(chain.from_iterable(objects)) if not _SURROGATE.search(name)]
    selected = [(name, names[index]) for name, index in select(spec, names, keep_others)]
    for role, column in spec.columns.items():
        types = {type(row[column]) for row in objects if row.get(column) is not None}
        allowed = {str} | ({int} if role == "key" else set()) | ({list} if spec.takes_lists(role) else set())
        if types and not types & allowed:
            kind = " or ".join(sorted({_JSON_TYPES[each] for each in types}))
            raise wrong_type(spec.path, role, column, kind)

    known = set(names)

    def fields_of(line: bytes) -> list[Field] | str:
        row = json_object(line)
        if isinstance(row, str):
            return row
        if keep_others and not row.keys() <= known:
            return f"key {min(row.keys() - known)[:80]!r}, which the first rows do not have"
        fields: list[Field] = []
        for name, column in selected:
            value = row.get(column)
            if name in spec.columns and column not in row:
                return f"no column {column!r}"
            if name in CAPTION_ROLES and spec.takes_lists(name) and isinstance(value, list):
                texts = [text for text in value if isinstance(text, str)]
                if len(texts) < len(value) or any(map(_SURROGATE.search, texts)):
                    return f"{column!r} holds what is no text"
                fields.append(texts)
                continue
            if not isinstance(value, str | None):
                is_fit = (name == "key" and type(value) is int) or name == WEIGHTS_ROLE
                if name in spec.columns and not is_fit:
                    return f"{column!r} is {_JSON_TYPES[type(value)]}, not text"
                value = json.dumps(value, ensure_ascii=False)
            if value is not None and _SURROGATE.search(value):
                return f"{column!r} has a lone surrogate, which is no Unicode text"
            fields.append(None if value is None else value.encode())
        return fields

    records = ((chomp(line), fields_of(line)) for line in chain(head, lines))
    return [(name, index) for index, (name, _) in enumerate(selected)], len(selected), records


def json_object(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or why there is none."""
    if not line.strip():
        return BLANK
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError) as error:
        return f"malformed JSON: {error}"
    return row if isinstance(row, dict) else f"the line is {_JSON_TYPES.get(type(row), 'no object')}"
