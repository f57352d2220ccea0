"""The table reader against independent readers (csv, polars, splitting), real lists and hostile input."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphbuild.errors import ConfigError, InputError
from graphbuild.sources.tables import MAX_ROW_BYTES, Chunk, TableSpec, read_chunks

BOTH = {"caption": "caption", "url": "url"}
URL = "http://x.org/1.jpg"
WHITESPACE = " \t\n\r\v\f"
PER_EXAMPLE = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def read(path: Path | str, columns: dict[str, str] = BOTH, preset: str | None = None, **options: Any) -> Chunk:
    """All chunks in one, after a check that every position came once and in order."""
    chunks = list(read_chunks(TableSpec(path=str(path), columns=columns, preset=preset), **options))
    rows, rejected = (pa.concat_tables(tables) for tables in zip(*chunks, strict=True))
    for table in (rows, rejected):
        assert table["position"].to_pylist() == sorted(table["position"].to_pylist())
    positions = rows["position"].to_pylist() + rejected["position"].to_pylist()
    assert sorted(positions) == list(range(len(positions)))
    return Chunk(rows, rejected)


def values(chunk: Chunk, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(chunk.rows[name].to_pylist() for name in names or ("caption", "url")), strict=True))


def rejects(chunk: Chunk) -> list[tuple[int, str, str]]:
    return [(row["position"], row["reason"], row["content"]) for row in chunk.rejected.to_pylist()]


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Real lists


def test_cc3m_list_is_what_polars_reads_without_quoting(shared_data: Path) -> None:
    path = shared_data / "captions/cc3m_val.tsv.gz"
    chunk = read(path, preset="cc3m", chunk_rows=1_000)
    expected = pl.read_csv(path, separator="\t", has_header=False, quote_char=None, infer_schema=False)
    assert len(chunk.rows) == 15_833
    assert len(chunk.rejected) == 0
    assert values(chunk) == expected.rows()


def test_tate_list_is_what_splitting_reads_and_rows_without_url_are_rejected(shared_data: Path) -> None:
    path = shared_data / "captions/tate_artworks.tsv.gz"
    chunk = read(path, {"caption": "title", "url": "thumbnailUrl", "key": "id"}, keep_others=True)
    header, *lines = gzip.decompress(path.read_bytes()).decode().removesuffix("\n").split("\n")
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert len(rows) == 69_202
    delivered = [(i, row) for i, row in enumerate(rows) if row["thumbnailUrl"]]
    assert values(chunk, "position", "caption", "url", "key", "medium", "subjects") == [
        (i, r["title"], r["thumbnailUrl"], r["id"], r["medium"], r["subjects"]) for i, r in delivered
    ]
    without = [(i, "no url", line) for i, line in enumerate(lines) if not rows[i]["thumbnailUrl"]]
    assert len(without) == 10_786
    assert [(i, reason, content[:9_000]) for i, reason, content in rejects(chunk)] == [
        (i, reason, content[:9_000]) for i, reason, content in without
    ]


def test_flickr8k_list_is_what_the_csv_module_reads(shared_data: Path) -> None:
    path = shared_data / "images/flickr8k_captions.csv"
    chunk = read(path, {"key": "image", "caption": "caption"})
    with path.open(newline="") as file:
        expected = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    assert values(chunk, "key", "caption") == expected
    assert len(chunk.rejected) == 0


def test_image_lists_in_parquet_are_what_polars_reads(shared_data: Path) -> None:
    path = shared_data / "urls/test_1000.parquet"
    chunk = read(path, {"caption": "TEXT", "url": "URL"}, chunk_rows=300)
    assert values(chunk) == pl.read_parquet(path).select("TEXT", "URL").rows()
    assert chunk.rows.column_names == ["position", "caption", "url"]


def test_caption_corpus_comes_whole_through_every_format(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "captions/corpus.parquet"
    captions = pl.read_parquet(path)["caption"]
    assert read(path, {"caption": "caption"}).rows["caption"].to_pylist() == captions.to_list()
    assert len(captions) == 251_610
    some = captions.gather_every(25).to_frame()
    some.write_csv(tmp_path / "some.csv")
    some.write_csv(tmp_path / "some.tsv", separator="\t")
    some.write_ndjson(tmp_path / "some.jsonl")
    for name in ("some.csv", "some.tsv", "some.jsonl"):
        chunk = read(tmp_path / name, {"caption": "caption"})
        assert chunk.rows["caption"].to_pylist() == some["caption"].to_list(), name
        assert len(chunk.rejected) == 0


def test_naughty_strings_survive_csv_jsonl_and_parquet(shared_data: Path, tmp_path: Path) -> None:
    strings = json.loads(gzip.decompress((shared_data / "hostile/naughty_strings.json.gz").read_bytes()))
    frame = pl.DataFrame({"caption": strings, "url": [URL] * len(strings)})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_csv(tmp_path / "a.tsv", separator="\t")
    frame.write_ndjson(tmp_path / "a.jsonl")
    frame.write_parquet(tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert values(read(path)) == frame.rows(), path.name


# Round trips


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    if path.suffix == ".parquet":
        columns = {"caption": [caption for caption, _ in rows], "url": [url for _, url in rows]}
        pq.write_table(pa.table(columns, schema=pa.schema([("caption", pa.string()), ("url", pa.string())])), path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"caption": c, "url": u}, ensure_ascii=len(c) % 2 == 0) + "\n" for c, u in rows)
        put(path, "".join(lines))
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if path.suffix == ".csv" else "\t")
        writer.writerows([("caption", "url"), *rows])
        put(path, text.getvalue())
    return path


awkward = st.text(st.sampled_from('"",,\t\n\r\0 aé\u2028\ufeff'), max_size=8)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
any_list = st.lists(st.tuples(awkward | any_text, awkward | any_text), min_size=1, max_size=12)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@PER_EXAMPLE
@given(rows=any_list, chunk_rows=st.integers(1, 5))
def test_any_list_comes_back_identical_or_is_rejected_with_its_position(
    tmp_path: Path, suffix: str, rows: list[tuple[str, str]], chunk_rows: int
) -> None:
    if suffix == "tsv":  # a line end inside a field is ambiguous where quoting has to be guessed: see below
        rows = [(caption.replace("\n", " "), url.replace("\n", " ")) for caption, url in rows]
    chunk = read(write_list(tmp_path / f"list.{suffix}", rows), chunk_rows=chunk_rows)
    expected = [(i, *row) for i, row in enumerate(rows) if row[1].strip(WHITESPACE)]
    assert values(chunk, "position", "caption", "url") == expected
    assert {reason for _, reason, _ in rejects(chunk)} <= {"no url"}
    assert len(chunk.rows) + len(chunk.rejected) == len(rows)


@PER_EXAMPLE
@given(rows=any_list)
def test_literal_tsv_keeps_every_character_but_tab_and_line_ends(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    cleaned = [[field.translate(dict.fromkeys(map(ord, "\t\n\r\ufeff"), " ")) for field in row] for row in rows]
    path = put(tmp_path / "list.tsv", "".join(f"{url}\t{caption}\n" for caption, url in cleaned))
    chunk = read(path, preset="cc12m")
    assert values(chunk) == [(caption, url) for caption, url in cleaned if url.strip(WHITESPACE)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"])
@PER_EXAMPLE
@given(content=st.binary(max_size=200) | st.lists(st.sampled_from([b'"', b",", b"\t", b"\n", b"a", b"\xff", b"{"])))
def test_arbitrary_bytes_raise_nothing_but_input_errors_and_lose_no_line(
    tmp_path: Path, suffix: str, content: bytes | list[bytes]
) -> None:
    body = content if isinstance(content, bytes) else b"".join(content)
    header = b'{"caption": "c", "url": "u"}\n' if suffix.startswith("jsonl") else b"caption,url\n"
    header = header.replace(b",", b"\t") if suffix.startswith("tsv") else header
    for data in (body, header + body):
        path = put(tmp_path / f"fuzz.{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
        try:
            chunk = read(path)
        except InputError:
            continue
        if suffix.startswith(("jsonl", "tsv")) and b'"' not in body:
            lines = data.count(b"\n") + (not data.endswith(b"\n")) - suffix.startswith("tsv")
            assert len(chunk.rows) + len(chunk.rejected) == lines


@PER_EXAMPLE
@given(
    cut=st.integers(0, 1),
    at=st.floats(0, 1),
    byte=st.integers(0, 255),
    suffix=st.sampled_from(["csv.gz", "parquet"]),
)
def test_damaged_files_raise_nothing_but_input_errors(
    tmp_path: Path, cut: int, at: float, byte: int, suffix: str
) -> None:
    rows = [(f"caption {i}", f"{URL}?{i}") for i in range(200)]
    whole = write_list(tmp_path / f"whole.{suffix.removesuffix('.gz')}", rows).read_bytes()
    data = bytearray(gzip.compress(whole) if suffix.endswith("gz") else whole)
    place = int(at * (len(data) - 1))
    data[place] = byte
    path = put(tmp_path / f"damaged.{suffix}", bytes(data[:place] if cut else data))
    with contextlib.suppress(InputError):
        read(path)


# What is delivered


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_text_that_looks_like_another_type_stays_text(tmp_path: Path, suffix: str) -> None:
    rows = [(text, URL) for text in ("007", "NA", "null", "None", "true", "1e5", "nan", "2024-01-01", "", " x ")]
    assert values(read(write_list(tmp_path / f"list.{suffix}", rows))) == rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
def test_bom_line_ends_and_a_missing_last_line_end_change_nothing(
    tmp_path: Path, end: str, last: bool, bom: bytes, suffix: str
) -> None:
    text = end.join(["caption,url", f"a,{URL}", f"b,{URL}"]) + (end if last else "")
    data = bom + (text.replace(",", "\t") if "tsv" in suffix else text).encode()
    path = put(tmp_path / f"list.{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    assert values(read(path)) == [("a", URL), ("b", URL)]


def test_csv_fields_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", f'"caption",url\n"a, ""b""\r\n\nc",{URL}\n5" pipe,{URL}\n"","{URL}"\n')
    assert values(read(path)) == [('a, "b"\r\n\nc', URL), ('5" pipe', URL), ("", URL)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['"Untitled"\tU', 'say "hi"\tU'], ['"Untitled"', 'say "hi"']),
        (['"starts with a quote\tU', "next\tU"], ['"starts with a quote', "next"]),
        (['"say ""hi"""\tU', '"Untitled"\tU'], ['say "hi"', "Untitled"]),
        (['"has a\ttab"\tU', "plain\tU"], ["has a\ttab", "plain"]),
        (['"two\nlines"\tU', "plain\tU"], ["two\nlines", "plain"]),
    ],
)
def test_a_headed_tsv_is_unquoted_only_if_a_writer_quoted_it(
    tmp_path: Path, lines: list[str], expected: list[str]
) -> None:
    path = put(tmp_path / "a.tsv", "caption\turl\n" + "".join(f"{line}\n" for line in lines))
    assert [caption for caption, _ in values(read(path))] == expected


def test_a_tsv_quoted_throughout_is_known_by_its_header(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", f'"caption"\t"url"\n"a"\t"{URL}"\n')
    assert values(read(path)) == [("a", URL)]


def test_presets_order_the_columns_and_never_unquote(tmp_path: Path) -> None:
    cc3m = put(tmp_path / "cc3m.tsv", f'"a ""b"""\t{URL}\n')
    cc12m = put(tmp_path / "cc12m.tsv", f"{URL}\tc\n")
    assert values(read(cc3m, preset="cc3m")) == [('"a ""b"""', URL)]
    assert values(read(cc12m, preset="cc12m")) == [("c", URL)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_caption_of_five_megabytes_and_nul_bytes_are_delivered(tmp_path: Path, suffix: str) -> None:
    rows = [("é, word " * 600_000, URL), ("a\0b", URL)]
    assert values(read(write_list(tmp_path / f"list.{suffix}", rows))) == rows


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_chunks_end_at_their_rows_or_at_64_mebibytes(tmp_path: Path, suffix: str) -> None:
    path = write_list(tmp_path / f"a.{suffix}", [("x" * 100_000, URL)] * 1_500)
    for chunk_rows, most in [(100_000, 1_499), (299, 299)]:
        spec = TableSpec(path=str(path), columns=BOTH)
        sizes = [len(chunk.rows) for chunk in read_chunks(spec, chunk_rows=chunk_rows)]
        assert sum(sizes) == 1_500
        assert max(sizes) <= most
    short = write_list(tmp_path / f"b.{suffix}", [("a", URL)] * 5_500)
    sizes = [len(chunk.rows) for chunk in read_chunks(TableSpec(path=str(short), columns=BOTH), chunk_rows=2_500)]
    assert sizes[0] > 1_500
    assert sum(sizes) == 5_500


def test_any_fsspec_url_will_do() -> None:
    with fsspec.open("memory://lists/a.tsv.gz", "wb") as file:
        file.write(gzip.compress(f"a\t{URL}\n".encode()))
    assert values(read("memory://lists/a.tsv.gz", preset="cc3m")) == [("a", URL)]


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
)
def test_parquet_text_of_every_kind_comes_as_large_string(tmp_path: Path, type_: pa.DataType) -> None:
    captions = pa.array(["a", None, "é", "a"], pa.string()).cast(type_)
    pq.write_table(pa.table({"caption": captions, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet", row_group_size=3)
    rows = read(tmp_path / "a.parquet", {"caption": "caption", "key": "n"}).rows
    assert rows.schema.types == [pa.int64(), pa.large_string(), pa.large_string()]
    assert rows["caption"].to_pylist() == ["a", None, "é", "a"]
    assert rows["key"].to_pylist() == ["1", "2", "3", "4"]


def test_other_columns_are_kept_unchanged_beside_the_roles(tmp_path: Path) -> None:
    table = pa.table({"title": ["a", "b"], "caption": [1, 2], "url": [URL, ""], "tags": [["x"], []]})
    pq.write_table(table, tmp_path / "a.parquet")
    chunk = read(tmp_path / "a.parquet", {"caption": "title", "url": "url"}, keep_others=True)
    assert chunk.rows.to_pylist() == [{"position": 0, "caption": "a", "url": URL, "other_caption": 1, "tags": ["x"]}]
    tags = pa.array([["x"], None, []] * 1_000)
    kinds = pa.array(["a", "b", "a"] * 1_000).dictionary_encode()
    table = pa.table({"url": [URL] * 3_000, "tags": tags, "kind": kinds, "n": range(3_000)})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=700)
    chunk = read(tmp_path / "b.parquet", {"url": "url"}, keep_others=True)
    assert chunk.rows.drop_columns("position").to_pylist() == table.to_pylist()
    put(tmp_path / "a.jsonl", '{"caption": "a", "n": 1}\n{"caption": "b", "tags": ["é"], "n": "1"}\n')
    chunk = read(tmp_path / "a.jsonl", {"caption": "caption"}, keep_others=True)
    assert values(chunk, "caption", "n", "tags") == [("a", "1", None), ("b", "1", '["é"]')]


# What is rejected


def test_bad_lines_of_a_delimited_list_are_rejected_alone(tmp_path: Path) -> None:
    good = f"good,{URL}".encode()
    bad = [b"one", b"a,b,c", b"", b"\xff\xfe,u", b"x,", b"x, ", b'"never closed,u', b'"a"b,u', b'"a,""']
    path = put(tmp_path / "a.csv", b"\n".join([b"caption,url", *(line for b in bad for line in (b, good))]))
    chunk = read(path)
    assert chunk.rows["position"].to_pylist() == list(range(1, 2 * len(bad), 2))
    assert set(values(chunk)) == {("good", URL)}
    assert rejects(chunk) == [
        (0, "1 fields instead of 2", "one"),
        (2, "3 fields instead of 2", "a,b,c"),
        (4, "blank line", ""),
        (6, "invalid UTF-8", "��,u"),
        (8, "no url", "x,"),
        (10, "no url", "x, "),
        (12, "text after a closing quote", '"never closed,u'),
        (14, "text after a closing quote", '"a"b,u'),
        (16, "a quote that is never closed", '"a,""'),
    ]


def test_an_unclosed_quote_costs_its_own_line_and_little_time(tmp_path: Path) -> None:
    lines = [f'"open,{URL}' if i % 1_500 == 0 else f"row {i},{URL}" for i in range(30_000)]
    begin = time.perf_counter()
    chunk = read(put(tmp_path / "a.csv", "\n".join(["caption,url", *lines])))
    assert time.perf_counter() - begin < 10
    assert chunk.rejected["position"].to_pylist() == list(range(0, 30_000, 1_500))


def test_bad_lines_of_jsonl_are_rejected_alone(tmp_path: Path) -> None:
    good = json.dumps({"caption": "good", "url": URL})
    bad = ["{", "", "[1]", '{"url": "u"}', '{"caption": 1, "url": "u"}', '{"caption": "a", "url": null}']
    bad += ['{"caption": "\\ud800", "url": "u"}', "[" * 100_000, '{"caption": ' + "9" * 5_000 + "}"]
    chunk = read(put(tmp_path / "a.jsonl", "\n".join(line for b in bad for line in (b, good))))
    assert values(chunk) == [("good", URL)] * len(bad)
    assert [(i, content) for i, _, content in rejects(chunk)] == [
        (2 * i, line if len(line) < 10_000 else line[:10_000] + "…") for i, line in enumerate(bad)
    ]
    starts = [
        "malformed JSON",
        "blank line",
        "the line is an array",
        "no column 'caption'",
        "'caption' is a number",
    ]
    starts += ["no url", "'caption' has a lone surrogate", "malformed JSON", "malformed JSON"]
    for (_, reason, _), start in zip(rejects(chunk), starts, strict=True):
        assert reason.startswith(start)


def test_null_captions_are_delivered_and_null_urls_rejected(tmp_path: Path) -> None:
    frame = pl.DataFrame({"caption": [None, "b", "c"], "url": [URL, None, "  "]})
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ndjson(tmp_path / "a.jsonl")
    for name in ("a.parquet", "a.jsonl"):
        chunk = read(tmp_path / name)
        assert values(chunk) == [(None, URL)]
        assert [(i, reason, json.loads(content)) for i, reason, content in rejects(chunk)] == [
            (1, "no url", {"caption": "b", "url": None}),
            (2, "no url", {"caption": "c", "url": "  "}),
        ]


def test_invalid_utf8_in_parquet_is_rejected_with_its_position(tmp_path: Path) -> None:
    for type_ in (pa.binary(), pa.string()):
        captions = pa.array([b"a", b"\xff", None, b"\xed\xa0\x80"], pa.binary())
        captions = captions if type_ == pa.binary() else pa.Array.from_buffers(type_, 4, captions.buffers(), 1)
        pq.write_table(pa.table({"caption": captions, "url": [URL] * 4}), tmp_path / "a.parquet")
        chunk = read(tmp_path / "a.parquet")
        assert values(chunk, "position", "caption") == [(0, "a"), (2, None)]
        assert [(i, reason) for i, reason, _ in rejects(chunk)] == [
            (1, "invalid UTF-8"),
            (3, "invalid UTF-8"),
        ]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_row_over_the_limit_is_rejected_and_the_next_one_delivered(tmp_path: Path, suffix: str) -> None:
    path = write_list(tmp_path / f"list.{suffix}", [("a", URL), ("x" * (MAX_ROW_BYTES + 1), URL), ("b", URL)])
    chunk = read(path)
    assert values(chunk, "position", "caption") == [(0, "a"), (2, "b")]
    [(position, reason, content)] = rejects(chunk)
    assert (position, reason, len(content)) == (1, "longer than 33,554,432 bytes", 10_001)


def test_a_json_key_without_a_column_is_not_lost_in_silence(tmp_path: Path) -> None:
    lines = [json.dumps({"caption": "x" * 1_000}) for _ in range(2_000)] + ['{"caption": "a", "late": 1}']
    path = put(tmp_path / "a.jsonl", "\n".join(lines))
    assert len(read(path, {"caption": "caption"}).rejected) == 0
    [(position, reason, _)] = rejects(read(path, {"caption": "caption"}, keep_others=True))
    assert (position, reason) == (2_000, "key 'late', which the first rows do not have")


# What stops at once


@pytest.mark.parametrize(
    ("name", "content", "preset", "said"),
    [
        ("a.csv", "", None, ["no rows"]),
        ("a.csv", "\ufeff", None, ["no rows"]),
        ("a.csv", "caption,url\n", None, ["no rows"]),
        ("a.jsonl", "", None, ["no rows"]),
        ("a.tsv", "", "cc3m", ["no rows"]),
        ("a.csv.gz", gzip.compress(b"", mtime=0), None, ["no rows"]),
        ("a.txt", "caption,url\na,u\n", None, ["unknown extension", ".jsonl"]),
        (
            "a.csv",
            "Captions,url\na,u\n",
            None,
            ["no column 'caption'", "'Captions', 'url'", "--caption-column 'Captions'"],
        ),
        ("a.csv", "x,url\na,u\n", None, ["no column 'caption'", "name one with --caption-column"]),
        ("a.jsonl", '{"text": "a", "url": "u"}\n', None, ["no column 'caption'", "'text', 'url'"]),
        ("a.jsonl", '{"caption": 1, "url": "u"}\n', None, ["'caption' is a number", "--caption-column"]),
        ("a.jsonl", '[{"caption": "a"}]\n', None, ["none of the first 1 lines is a JSON object"]),
        (
            "a.csv",
            "caption;url\na;u\n",
            None,
            ["no column 'caption'", "seems to have ';' between", "with commas", ".tsv"],
        ),
        ("a.tsv", "caption,url\na,u\n", None, ["no column 'caption'", "seems to have commas between", "tabs"]),
        ("a.csv", "caption\turl\na\tu\n", None, ["no column 'caption'", "seems to have tabs between", "the name .tsv"]),
        ("a.csv", "caption,url,url\na,u,u\n", None, ["2 columns 'url'", "--url-column"]),
        ("a.csv", "\na,u\n", None, ["first line", "blank"]),
        ("a.csv", "caption,url\ra,u\r", None, ["CR alone"]),
        ("a.csv", 'caption,"url\n', None, ["first line", "never closed"]),
        ("a.csv", "caption,url\na,u\n".encode("utf-16"), None, ["UTF-16", "iconv"]),
        ("a.csv", gzip.compress(b"caption,url\na,u\n", mtime=0), None, ["gzip", ".gz"]),
        ("a.csv.gz", b"caption,url\na,u\n", None, ["broken gzip"]),
        ("a.csv.gz", gzip.compress(b"caption,url\na,u\n", mtime=0)[:-9], None, ["broken gzip after line"]),
        ("a.tsv", f"a\t{URL}\nb\t{URL}\n", None, ["looks like data", "--preset cc3m"]),
        ("a.tsv", f"{URL}\ta\n{URL}\tb\n", None, ["looks like data", "--preset cc12m"]),
        ("a.csv", f"{URL},a\n{URL},b\n", None, ["looks like data", "names the columns"]),
        ("a.csv", "caption,url\na,u\n", "cc3m", ["--preset cc3m", "no TSV"]),
        ("a.tsv", f"url\tcaption\n{URL}\ta\n", "cc12m", ["has a header", "drop --preset"]),
        ("a.tsv", f"{URL}\ta\n", "cc3m", ["row 0", "--preset cc12m"]),
        ("a.parquet", "caption,url\na,u\n", None, ["not parquet"]),
        ("a.parquet", "", None, ["not parquet"]),
    ],
)
def test_a_list_that_cannot_be_read_stops_before_the_first_chunk(
    tmp_path: Path, name: str, content: bytes | str, preset: str | None, said: list[str]
) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        read_chunks(TableSpec(path=str(path), columns=BOTH, preset=preset))
    for words in [*said, str(path)]:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"caption": [1], "url": ["u"]}), "'caption' is int64, not text"),
        (pa.table({"caption": [["a"]], "url": ["u"]}), "'caption' is list<"),
        (pa.table({"TEXT": ["a"], "url": ["u"]}), "its columns are 'TEXT', 'url'"),
        (pa.table({"caption": pa.array([], pa.string()), "url": pa.array([], pa.string())}), "no rows"),
    ],
)
def test_a_parquet_that_does_not_fit_stops_before_the_first_chunk(tmp_path: Path, table: pa.Table, said: str) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet") as error:
        read_chunks(TableSpec(path=str(tmp_path / "a.parquet"), columns=BOTH))
    assert said in str(error.value)


def test_missing_files_folders_and_unknown_presets_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    held = os.open(tmp_path / "pipe", os.O_RDWR)  # else opening waits for a writer
    for path, said in [
        (tmp_path, "is a folder"),
        (tmp_path / "no.csv", "does not exist"),
        ("no://x.csv", "no://x"),
        (tmp_path / "pipe", "is a pipe"),
    ]:
        with pytest.raises(InputError, match=said):
            read_chunks(TableSpec(path=str(path), columns=BOTH))
    with pytest.raises(ConfigError, match="cc3m or cc12m"):
        TableSpec(path="a.tsv", columns=BOTH, preset="laion")
    os.close(held)
