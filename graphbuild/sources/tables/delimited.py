"""CSV and TSV: lines to records, with CSV's quoting (RFC 4180) or literally (IANA's TSV).

A bad quote costs the line it stands in and no other: no quoted field is followed for more than 1,000 lines,
which also keeps work linear. `read_chunks` says when a TSV is read as quoted.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice

from graphbuild.errors import InputError
from graphbuild.sources.tables.spec import BLANK, NOT_UTF8, PRESETS, TableSpec, is_url, is_utf8, select
from graphbuild.sources.tables.text import MAX_ROW_BYTES, Record, TextTable, chomp

MAX_ROW_LINES = 1_000
_SEPARATORS = {";": "';'", "\t": "tabs", ",": "commas", "|": "'|'"}
_UNCLOSED, _AFTER_QUOTE = "a quote that is never closed", "text after a closing quote"
_CLOSING_QUOTE = re.compile(rb'(?:[^"]++|"")*+"')
_QUOTED_TSV_FIELD = re.compile(rb'(?:^|[\t\n])"((?:[^"\t\n]++|"")*+)"(?=[\t\r\n]|\Z)')


def delimited_table(
    spec: TableSpec, head: list[bytes], lines: Iterator[bytes], keep_others: bool, *, is_csv: bool
) -> TextTable:
    """The columns and records of a CSV or TSV whose first lines are `head`.

    Raises:
        InputError: the header is bad, lacks a column or contradicts the preset.
    """
    if spec.preset:
        names = list(PRESETS[spec.preset])
        _check_preset(spec.path, spec.preset, chomp(head[0]).decode(errors="replace").split("\t"))
        return select(spec, names, keep_others), len(names), _literal_records(chain(head, lines))
    delimiter = b"," if is_csv else b"\t"
    quoted = is_csv or is_quoted_tsv(head)
    all_lines = chain(head, lines)
    records = _quoted_records(all_lines, delimiter) if quoted else _literal_records(all_lines)
    raw, header = next(records)
    if b"\r" in raw and len(head) == 1:
        raise InputError(f"{spec.path}: its lines end in CR alone", "convert them: tr '\\r' '\\n'")
    if isinstance(header, str) or not raw or not is_utf8(raw):
        reason = BLANK if not raw else header if isinstance(header, str) else NOT_UTF8
        cause = f"{spec.path}: the first line, which should name the columns, is bad: {reason}"
        raise InputError(cause, "mend the first line")
    names = [bytes(name or b"").decode() for name in header]  # type: ignore[arg-type]
    hint = ""
    if any(map(is_url, names)):
        presets = [preset for preset in PRESETS if not is_csv and _fits(preset, names)]
        way = f"--preset {presets[0]}" if presets else "a first line that names the columns"
        hint = f"the first line looks like data, not like names: use {way}"
    elif len(names) == 1 and (mark := next((mark for mark in _SEPARATORS if mark in names[0]), "")):
        fix = "write it again with commas, or with tabs and the name .tsv"
        hint = f"the first line seems to have {_SEPARATORS[mark]} between its columns: {fix}"
    return select(spec, names, keep_others, hint), len(names), records


def _fits(preset: str, fields: list[str]) -> bool:
    """Whether the URL lies where the preset has it, and nowhere else."""
    return [is_url(field) for field in fields] == [column == "url" for column in PRESETS[preset]]


def _check_preset(path: str, preset: str, first: list[str]) -> None:
    if {field.strip().casefold() for field in first} == set(PRESETS[preset]):
        raise InputError(f"{path} has a header, but --preset {preset} means a list without one", "drop --preset")
    for other in PRESETS:
        if other != preset and _fits(other, first):
            raise InputError(f"{path}: row 0 has its URL where {preset} has captions", f"use --preset {other}")


def is_quoted_tsv(head: list[bytes]) -> bool:
    """Whether a writer's quoting, not its text, put the quotes into a headed TSV's first lines."""
    text = b"".join(head)
    if b'"' not in text:
        return False
    literal, quoted = (
        [fields for _, fields in records]
        for records in (_literal_records(iter(head)), _quoted_records(iter(head), b"\t"))
    )
    bad_literal, bad_quoted = (
        sum(isinstance(row, str) or len(row) != len(rows[0]) for row in rows) for rows in (literal, quoted)
    )
    if bad_literal != bad_quoted:
        return bad_quoted < bad_literal
    return literal[0] != quoted[0] or any(b'""' in field or b"\r" in field for field in _QUOTED_TSV_FIELD.findall(text))


def _literal_records(lines: Iterator[bytes]) -> Iterator[Record]:
    for line in lines:
        raw = chomp(line)
        yield raw, raw.split(b"\t")


def _quoted_records(lines: Iterator[bytes], delimiter: bytes) -> Iterator[Record]:
    """RFC 4180 records; work is linear, as no quoted field is followed for more than MAX_ROW_LINES lines."""
    field = re.compile(rb'(?:"((?:[^"]++|"")*+)"|([^"D][^D]*+|))(D|\Z)'.replace(b"D", delimiter))

    def split(raw: bytes, fields: list[bytes | None]) -> tuple[str, int]:
        """Appends the fields; what is wrong, if anything, and where the field begins in which it is."""
        end = 0
        while match := field.match(raw, end):
            quoted, plain, more = match.groups()
            fields.append(plain if quoted is None else quoted.replace(b'""', b'"'))
            end = match.end()
            if not more:
                return "", end
        return _AFTER_QUOTE if _CLOSING_QUOTE.match(raw, end + 1) else _UNCLOSED, end

    ahead: deque[bytes] = deque()
    while line := ahead.popleft() if ahead else next(lines, b""):
        raw = chomp(line)
        if b'"' not in raw:
            yield raw, raw.split(delimiter)
            continue
        fields: list[bytes | None] = []
        fault, begin = split(raw, fields)
        tail, size, taken = [line[begin:]], len(line), 0
        while fault == _UNCLOSED and taken + 1 < MAX_ROW_LINES and size <= MAX_ROW_BYTES:
            if taken == len(ahead):
                ahead.extend(islice(lines, 1))
            if taken == len(ahead):
                break
            tail.append(ahead[taken])
            size += len(ahead[taken])
            taken += 1
            if _CLOSING_QUOTE.match(tail[-1]):
                rest = b"".join(tail)
                fault, begin = split(chomp(rest), fields)
                tail = [rest[begin:]]
        if fault:
            yield raw, fault
        else:
            yield chomp(b"".join([line, *(ahead.popleft() for _ in range(taken))])), fields
