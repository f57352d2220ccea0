"""What JSON cannot hold of a list's columns, as text: the json member of a downloaded sample has each row's values.

Dates, times and timestamps become ISO 8601, decimals their digits, durations seconds, bytes base64, also where lists,
structs or maps hold them. Memory: the converted columns as Python objects.
"""

from __future__ import annotations

import base64
import datetime
import decimal
from typing import Any

import pyarrow as pa

from graphbuild.errors import InputError

_HELD = ("string", "large_string", "string_view", "integer", "floating", "boolean", "null")


def plain_table(table: pa.Table) -> pa.Table:
    """The same rows and columns, of types that JSON holds; columns that have one already are passed on.

    Raises:
        InputError: a value has no text, as a date beyond the year 9999; or two columns have one name.
    """
    refuse_twice("the list", table.column_names)
    for index, field in enumerate(table.schema):
        if _is_plain(field.type):
            continue
        try:
            values = [_plain(value) for value in table.column(index).to_pylist()]
            table = table.set_column(index, field.name, pa.array(values, _plain_type(field.type)))
        except (pa.ArrowException, ArithmeticError, ValueError) as error:
            cause = f"column {field.name!r} ({field.type}) has a value that cannot be written as text: {error}"
            raise InputError(cause, "leave the column out of the list, or write it as text") from error
    return table


def refuse_twice(table: str, names: list[str]) -> None:
    """InputError where two columns of a table have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        cause = f"{table} has {names.count(twice)} columns {twice!r}"
        raise InputError(cause, "rename them: of columns with one name JSON keeps the last alone")


def _is_plain(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_plain(type_.value_type)
    if type_.num_fields:
        return all(_is_plain(type_.field(index).type) for index in range(type_.num_fields))
    return any(getattr(pa.types, f"is_{kind}")(type_) for kind in _HELD)


def _plain_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type_):
        return _plain_type(type_.value_type)
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _plain_type(field.type)) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(_plain_type(type_.key_type), _plain_type(type_.item_type))
    if type_.num_fields:
        return pa.list_(_plain_type(type_.value_type))
    return type_ if _is_plain(type_) else pa.string()


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case (key, inner) if type(value) is tuple:  # of a map
            return _plain(key), _plain(inner)
        case bytes():
            return base64.b64encode(value).decode()
        case decimal.Decimal():
            return f"{value:f}"
        case datetime.timedelta():
            return str(value.total_seconds())
        case datetime.date() | datetime.time():
            return value.isoformat()
    return str(value)
