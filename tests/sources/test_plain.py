"""Columns that JSON cannot hold: each value as text by the stated rule, and every type fit for json.dumps."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from graphbuild.errors import InputError
from graphbuild.sources.tables.plain import plain_table

UTC = datetime.UTC
WHEN = datetime.datetime(2024, 2, 29, 23, 59, 58, 250_000)
CASES: list[tuple[pa.DataType, Any, Any]] = [
    (pa.timestamp("us"), WHEN, "2024-02-29T23:59:58.250000"),
    (pa.timestamp("s", tz="UTC"), WHEN.replace(microsecond=0, tzinfo=UTC), "2024-02-29T23:59:58+00:00"),
    (pa.timestamp("ns"), 1_000_000_001, "1970-01-01T00:00:01.000000001"),
    (pa.date32(), WHEN.date(), "2024-02-29"),
    (pa.date64(), WHEN.date(), "2024-02-29"),
    (pa.time32("s"), datetime.time(7, 8, 9), "07:08:09"),
    (pa.time64("us"), datetime.time(7, 8, 9, 10), "07:08:09.000010"),
    (pa.duration("ms"), datetime.timedelta(days=1, milliseconds=500), "86400.5"),
    (pa.decimal128(20, 3), Decimal("-12345678901234567.890"), "-12345678901234567.890"),
    (pa.decimal256(40, 20), Decimal("1E-20"), "0.00000000000000000001"),
    (pa.binary(), b"\x00\xff~", "AP9+"),
    (pa.large_binary(), b"", ""),
    (pa.binary(2), b"ab", "YWI="),
    (pa.list_(pa.timestamp("s")), [WHEN.replace(microsecond=0), None], ["2024-02-29T23:59:58", None]),
    (pa.large_list(pa.date32()), [], []),
    (pa.list_(pa.time32("s"), 1), [datetime.time(1)], ["01:00:00"]),
    (pa.struct([("n", pa.int8()), ("b", pa.binary())]), {"n": 1, "b": b"a"}, {"n": 1, "b": "YQ=="}),
    (pa.map_(pa.date32(), pa.list_(pa.binary())), [(WHEN.date(), [b"a"])], [["2024-02-29", ["YQ=="]]]),
    (pa.dictionary(pa.int8(), pa.date32()), WHEN.date(), "2024-02-29"),
]


@pytest.mark.parametrize(
    ("kind", "value", "text"), CASES, ids=lambda case: str(case) if isinstance(case, pa.DataType) else ""
)
def test_what_json_cannot_hold_becomes_text_and_nothing_stays_nothing(kind: pa.DataType, value: Any, text: Any) -> None:
    column = pa.array([value, None], kind.value_type if pa.types.is_dictionary(kind) else kind)
    if pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    found = plain_table(pa.table({"before": [1, 2], "x": column, "after": ["a", "b"]}))
    assert found.column_names == ["before", "x", "after"]
    assert json.loads(json.dumps(found["x"].to_pylist())) == [text, None]


def test_columns_that_json_holds_are_passed_on_as_they_are() -> None:
    nested = pa.array([[("k", [0.5, None])]], pa.map_(pa.string(), pa.list_(pa.float16())))
    table = pa.table(
        {"n": pa.array([2**64 - 1], pa.uint64()), "nan": [float("nan")], "nothing": [None], "nested": nested}
    )
    assert plain_table(table) is table


def test_a_value_without_a_text_names_its_column_and_type() -> None:
    with pytest.raises(
        InputError, match=r"column 'seen' \(timestamp\[s\]\) has a value that cannot be written as text"
    ):
        plain_table(pa.table({"seen": pa.array([10**18], pa.timestamp("s"))}))
