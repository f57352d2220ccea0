"""Readers under fire: damaged and made-up bytes give what an independent reader finds, or a GraphbuildError; no reader
hangs, and none raises anything else. Bounded and the same at every run.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from graphbuild.errors import GraphbuildError, ShardError
from graphbuild.export.quantized import quantize_int8
from graphbuild.export.sidecar import Sidecar, SidecarHeader, TarIdentity, sidecar_schema
from graphbuild.nodes.captions import MAX_CAPTION_BYTES, usable_text
from graphbuild.sources.tables import TableSpec, read_chunks
from graphbuild.sources.tars import open_tar

quick = settings(
    max_examples=300,
    deadline=10_000,  # a hang would be longer
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
Samples = list[tuple[str, dict[str, bytes]]]


@st.composite
def damage(draw: st.DrawFn, whole: bytes, unit: int = 1) -> bytes:
    """Some of: bits flipped, bytes set, a stretch removed, doubled, moved or zeroed, the end cut; places in units."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 5))):
        places = st.integers(0, max(len(content) - 1, 0))
        at, length = draw(places) // unit * unit, draw(st.integers(1, 4)) * unit
        match draw(st.sampled_from(["flip", "flip", "set", "set", "remove", "double", "move", "zero", "cut"])):
            case _ if not content:
                break
            case "flip":
                content[draw(places)] ^= 1 << draw(st.integers(0, 7))
            case "set":
                content[draw(places)] = draw(st.integers(0, 255))
            case "remove":
                del content[at : at + length]
            case "double":
                content[at:at] = content[at : at + length]
            case "move":
                part = content[at : at + length]
                del content[at : at + length]
                there = draw(places) // unit * unit
                content[there:there] = part
            case "zero":
                content[at : at + length] = bytes(len(content[at : at + length]))
            case "cut":
                del content[draw(places) :]
    return bytes(content)


def names(error: GraphbuildError, path: Path) -> None:
    """Fail unless an error says which file is to blame."""
    assert str(path) in error.cause


# -- lists

ROWS = [(f"caption {i}, \"so\" 'called'", f"http://x/{i}") for i in range(6)]
LISTS = {
    "csv": b"caption,url\n" + b"".join(f'"{c.replace(chr(34), chr(34) * 2)}",{u}\n'.encode() for c, u in ROWS),
    "tsv": b"caption\turl\n" + b"".join(f"{c}\t{u}\n".encode() for c, u in ROWS),
    "jsonl": b"".join(json.dumps({"caption": c, "url": u, "n": [1, {}]}).encode() + b"\n" for c, u in ROWS),
}


def chunks(path: Path, chunk_rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    spec = TableSpec(path=str(path), columns={"caption": "caption", "url": "url"})
    found = list(read_chunks(spec, chunk_rows=chunk_rows))
    return [r for c in found for r in c.rows.to_pylist()], [r for c in found for r in c.rejected.to_pylist()]


@pytest.mark.parametrize("suffix", LISTS)
@quick
@given(data=st.data(), chunk_rows=st.integers(1, 4))
def test_a_damaged_list_is_read_alike_in_any_chunks_and_no_row_is_lost(
    tmp_path: Path, suffix: str, data: st.DataObject, chunk_rows: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data.draw(damage(LISTS[suffix])))
    try:
        rows, rejected = chunks(path, 100_000)
    except GraphbuildError as error:
        names(error, path)
        return
    positions = sorted(row["position"] for row in rows + rejected)
    assert positions == list(range(len(positions)))
    assert all(row["reason"] for row in rejected)
    assert all(isinstance(row["url"], str) and row["url"].strip() for row in rows)
    assert chunks(path, chunk_rows) == (rows, rejected)
    if suffix == "jsonl":
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
        assert len(positions) == len(lines)
        for row in rows:
            line = json.loads(lines[row["position"]].removeprefix(b"\xef\xbb\xbf"))
            assert (row["caption"], row["url"]) == (line["caption"], line["url"])


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(values=st.lists(json_value, min_size=1, max_size=6))
def test_json_values_of_any_kind_are_text_null_or_rejected_by_name(tmp_path: Path, values: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    first = {"caption": "first", "url": "u"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *({"caption": v, "url": "u"} for v in values)]))
    rows, rejected = chunks(path, 100_000)
    expected = {n: v for n, v in enumerate(values, 1) if v is None or (isinstance(v, str) and encodable(v))}
    assert {row["position"]: row["caption"] for row in rows[1:]} == expected
    assert all("'caption'" in row["reason"] for row in rejected)
    assert len(rows) + len(rejected) == len(values) + 1


def encodable(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


# -- tars


def tar_of(format_: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for key in ("a/0", "1", "k" * 120 if format_ != tarfile.USTAR_FORMAT else "k", "2"):
            for extension in ("jpg", "txt", "json"):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(key) * 9
                archive.addfile(info, io.BytesIO(key.encode() * 9))
    return buffer.getvalue()


TARS = [tar_of(format_) for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "kind": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "more": (345, 155),
}
NUMBERS = [b"00000000000\0", b"77777777777\0", b"\xff" * 12, b"\x80" + bytes(10) + b"\x10", b"-0000000001\0", b" " * 12]


@st.composite
def forged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Headers whose fields were set to anything and whose checksums are right again."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content) // 512 - 1)) * 512
        begin, length = FIELDS[draw(st.sampled_from(sorted(FIELDS)))]
        value = draw(st.binary(max_size=length) | st.sampled_from(NUMBERS + [bytes([k]) for k in b"0123456xgLKSVND7"]))
        content[at + begin : at + begin + len(value[:length])] = value[:length]
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


def by_tarfile(path: Path) -> Samples:
    """The samples by Python's own reader: regular files in order, grouped by their name up to its first dot."""
    found: Samples = []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            meta = any(re.fullmatch(r"__.*__", part, re.DOTALL) for part in member.name.split("/")[:1])
            if not (member.isreg() and stem and dot) or meta:
                continue
            key = f"{folder}{slash}{stem}"
            if not found or found[-1][0] != key:
                found.append((key, {}))
            found[-1][1][extension.lower()] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return found


def check_tar(path: Path) -> None:
    try:
        with open_tar(str(path)) as tar:
            found = [(s.key, {m.extension: tar.read(m) for m in s.members}) for s in tar.samples()]
    except GraphbuildError as error:
        names(error, path)
        return
    assert found == by_tarfile(path)


@quick
@given(data=st.data(), whole=st.sampled_from(TARS), unit=st.sampled_from([1, 512]))
def test_a_damaged_tar_is_refused_or_read_as_tarfile_reads_it(
    tmp_path: Path, data: st.DataObject, whole: bytes, unit: int
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data.draw(damage(whole, unit)))
    check_tar(path)


@settings(quick, max_examples=300)
@given(data=st.data(), whole=st.sampled_from(TARS))
def test_a_tar_of_forged_headers_is_refused_or_read_as_tarfile_reads_it(
    tmp_path: Path, data: st.DataObject, whole: bytes
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data.draw(forged(whole)))
    check_tar(path)


# -- sidecars

D, K, N = 6, 3, 12


def sidecar_bytes() -> bytes:
    rng = np.random.default_rng(0)
    vectors, scale = quantize_int8(rng.normal(size=(N, D)))
    data = {
        "row": range(N),
        "key": [f"key {n}" for n in range(N)],
        "node": [None if n == 5 else n for n in range(N)],
        "caption": [f"caption {n}" for n in range(N)],
        "embedding": list(vectors),
        "embedding_scale": scale,
        "neighbors": [[n, n + 1, n + 2] for n in range(N)],
        "similarities": [np.float16([0.9, 0.5, -0.25])] * N,
        "background_mean": rng.normal(size=N),
        "background_std": rng.random(N),
        "image_offset": [512 * n for n in range(N)],
        "image_size": [100 + n for n in range(N)],
    }
    head = SidecarHeader(
        encoder="e", d=D, k=K, embeddings="int8", graph="abc", shard="0", rows=N,
        tar=TarIdentity(name="0.tar", bytes=10_240, sha256="00"),
    )  # fmt: skip
    table = pa.table(data, schema=sidecar_schema(D, K, "int8").with_metadata(head.metadata()))
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


SIDECAR = sidecar_bytes()


def fields_of(sidecar: Sidecar) -> dict[str, Any]:
    values = {name: value for name, value in vars(sidecar).items() if name != "url"}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


@pytest.fixture(scope="module")
def whole_sidecar(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is read of one that is whole."""
    path = tmp_path_factory.mktemp("whole") / "a.graph.parquet"
    path.write_bytes(SIDECAR)
    return fields_of(Sidecar.read(str(path)))


@settings(quick, max_examples=300)
@given(data=st.data(), once=st.booleans())
def test_a_damaged_sidecar_is_refused_or_reads_the_same(
    tmp_path: Path, whole_sidecar: dict[str, Any], data: st.DataObject, once: bool
) -> None:
    path = tmp_path / "a.graph.parquet"
    if once:
        changed = bytearray(SIDECAR)
        changed[data.draw(st.integers(0, len(SIDECAR) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(changed)
    else:
        path.write_bytes(data.draw(damage(SIDECAR)))
    try:
        found = Sidecar.read(str(path))
    except ShardError as error:
        names(error, path)
        return
    assert fields_of(found) == whole_sidecar


# -- text


@settings(quick, max_examples=500)
@given(
    st.text(max_size=40)
    | st.text(st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0\u2028\u3000e\u0301\u200d\0\ud800"), max_size=12)
)
@example("x" * (MAX_CAPTION_BYTES + 1))
@example("\ud83d\ude00")
def test_text_is_normal_or_there_is_a_reason(caption: str) -> None:
    text, reason = usable_text(caption)
    assert (text is None) != (reason is None)
    if text is None:
        assert not encodable(caption) or not caption.split() or len(caption.encode()) > MAX_CAPTION_BYTES
        return
    assert usable_text(text) == (text, None)
    assert text.split(" ") == text.split()
    assert "".join(text.split()) == "".join(unicodedata.normalize("NFC", caption).split())
