"""Images of other layouts become tars: byte for byte, each beside its own caption and columns, none lost or swapped.

The sources are written here by pyarrow, json, csv and img2dataset's own writers; the tars are read by tarfile.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graphbuild.errors import ConfigError, InputError
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.sources.tars import add_member
from graphbuild.store.store import Store

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}
HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COUNT, SHARD = 23, 5
Sample = dict[str, Any]  # image, ending, caption, values, origin


def image(number: int, size: int = 4) -> tuple[bytes, str]:
    """An image that no other number has, and its ending."""
    kind, content = FORMATS[number % len(FORMATS)], io.BytesIO()
    Image.new("RGB", (size, size), (number, 255 - number, 7)).save(content, kind)
    return content.getvalue(), ENDINGS[kind]


def sample(number: int, file: str, row: int, **values: Any) -> Sample:
    content, ending = image(number)
    caption = f"number {number}, é"
    return {"image": content, "ending": ending, "caption": caption, "values": values, "origin": [file, row]}


def hugging_face(folder: Path) -> list[Sample]:
    """Three files of 10, 10 and 3 rows, in row groups of 4."""
    (folder / "data").mkdir()
    when, found = datetime.date(2024, 2, 29), []
    for part in range(3):
        mine = range(10 * part, min(10 * part + 10, COUNT))
        name = f"data/train-{part:05d}-of-00003.parquet"
        columns = {
            "image": pa.array([{"bytes": image(n)[0], "path": f"{n}.x"} for n in mine], HF),
            "caption": [f"number {n}, é" for n in mine],
            "label": [n % 3 for n in mine],
            "score": [float("nan") if n % 2 else 0.5 for n in mine],
            "tags": [["a", str(n)] for n in mine],
            "when": [when for _ in mine],
            "key": [f"mine {n}" for n in mine],
        }
        pq.write_table(pa.table(columns), folder / name, row_group_size=4)
        for row, n in enumerate(mine):
            values = {"file_name": f"{n}.x", "label": n % 3, "score": None if n % 2 else 0.5, "tags": ["a", str(n)]}
            found.append(sample(n, name, row, **values, when="2024-02-29", key_in_source=f"mine {n}"))
    return found


def binary(folder: Path) -> list[Sample]:
    """One file and row group; dictionary-encoded captions."""
    text = pa.array([f"number {n}, é" for n in range(COUNT)]).dictionary_encode()
    pq.write_table(pa.table({"pic": [image(n)[0] for n in range(COUNT)], "text": text}), folder / "a.parquet")
    return [sample(n, "a.parquet", n) for n in range(COUNT)]


def paths_alone(folder: Path) -> list[Sample]:
    """Hugging Face's struct without bytes, the files beside."""
    (folder / "pictures").mkdir()
    for n in range(COUNT):
        (folder / f"pictures/{n}.any").write_bytes(image(n)[0])
    rows = pa.array([{"bytes": None, "path": f"pictures/{n}.any"} for n in range(COUNT)], HF)
    pq.write_table(pa.table({"image": rows, "caption": [f"number {n}, é" for n in range(COUNT)]}), folder / "a.parquet")
    return [sample(n, "a.parquet", n, file_name=f"pictures/{n}.any") for n in range(COUNT)]


def img2dataset(folder: Path, writer: str) -> list[Sample]:
    """What img2dataset's own writer makes of two shards, whose every fourth URL failed."""
    import os

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset import writer as writers

    schema = pa.schema([(name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")])
    found: list[Sample] = []
    for shard in range(2):
        made = getattr(writers, writer)(shard, str(folder), True, 5, schema, "jpg")
        row = 0
        for place in range(12):
            n, key = 12 * shard + place, f"{shard:05d}{place:04d}"
            failed = place % 4 == 3
            told = {"caption": f"number {n}, é", "url": f"http://a/{n}", "key": key}
            told |= {
                "status": "failed_to_download" if failed else "success",
                "error_message": "404" if failed else None,
            }
            made.write(None if failed else image(n)[0], key, told["caption"], dict(told))
            if not failed:
                values = {"key_in_source": told.pop("key"), **told}
                if writer == "ParquetSampleWriter":
                    del values["caption"]  # which is the text
                    found.append(sample(n, f"{shard:05d}.parquet", place, **values))
                else:
                    found.append(sample(n, f"{shard:05d}/", row, file_name=f"{key}.jpg", **values))
            row += not failed
        made.close()
    return found


def metadata_jsonl(folder: Path) -> list[Sample]:
    """An imagefolder with nested values; a byte order mark, no end of the last line."""
    (folder / "train/deep").mkdir(parents=True)
    lines = []
    for n in range(COUNT):
        (folder / f"train/deep/{n}.jpg").write_bytes(image(n)[0])
        lines.append(json.dumps({"file_name": f"deep/{n}.jpg", "text": f"number {n}, é", "n": n, "box": {"at": [n]}}))
    (folder / "train/metadata.jsonl").write_text("\ufeff" + "\n".join(lines))
    return [sample(n, "train/metadata.jsonl", n, file_name=f"deep/{n}.jpg", n=n, box={"at": [n]}) for n in range(COUNT)]


def metadata_csv(folder: Path) -> list[Sample]:
    with (folder / "metadata.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "caption", "note", "position"])
        for n in range(COUNT):
            (folder / f"{n}.jpg").write_bytes(image(n)[0])
            lines.writerow([f"{n}.jpg", f"number {n}, é", f'a "quote",\nof {n}', "x"])
    values = {"other_position": "x"}
    return [
        sample(n, "metadata.csv", n, file_name=f"{n}.jpg", note=f'a "quote",\nof {n}', **values) for n in range(COUNT)
    ]


def twins(folder: Path) -> list[Sample]:
    """Two folders of images with .txt, one of them with .json too; hidden files are no samples."""
    found = []
    for n in range(COUNT):
        at = folder / ("b" if n % 2 else "a/deeper")
        at.mkdir(parents=True, exist_ok=True)
        (at / f"{n:02d}.jpg").write_bytes(image(n)[0])
        (at / f"{n:02d}.{'TXT' if n % 3 else 'txt'}").write_text(f"number {n}, é")
        if n % 2:
            (at / f"{n:02d}.json").write_text(json.dumps({"n": n}))
        told = {"n": n} if n % 2 else {}
        file = "b/" if n % 2 else "a/deeper/"
        found.append(sample(n, file, n // 2, file_name=f"{n:02d}.jpg", **told))
    (folder / "a/.hidden.jpg").write_bytes(image(0)[0])
    (folder / ".cache").mkdir()
    (folder / ".cache/0.jpg").write_bytes(image(0)[0])
    return sorted(found, key=lambda one: one["origin"])


LAYOUTS: dict[str, Callable[[Path], list[Sample]]] = {
    "Hugging Face's parquet": hugging_face,
    "a binary column": binary,
    "paths alone": paths_alone,
    "img2dataset's parquet": lambda folder: img2dataset(folder, "ParquetSampleWriter"),
    "img2dataset's files": lambda folder: img2dataset(folder, "FilesSampleWriter"),
    "metadata.jsonl": metadata_jsonl,
    "metadata.csv": metadata_csv,
    "twins": twins,
}


def pack(store: Path, source: object, *, force: bool = False, **settings: Any) -> dict[str, Any]:
    opened = Store(str(store))
    with Runner(workers=0) as runner:
        return run_verb(
            "pack", resolve(opened, "pack", {"source": str(source), **settings}), opened, runner, force=force
        )


def members(store: Path) -> dict[str, dict[str, bytes]]:
    """Key -> ending -> content, over all tars by their number."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((store / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                key, ending = info.name.split(".")
                assert ending not in found.setdefault(key, {})
                found[key][ending] = archive.extractfile(info).read()  # type: ignore[union-attr]
    return found


def rejections(store: Path) -> list[tuple[int, str]]:
    tables = [pq.read_table(path).to_pylist() for path in sorted((store / "rejected/pack").glob("*.parquet"))]
    return [(row["position"], row["reason"]) for rows in tables for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_of_every_layout_is_there_once_with_its_own_caption_and_columns(
    layout: str, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    expected = LAYOUTS[layout](tmp_path / "source")
    counts = pack(tmp_path / "store", tmp_path / "source", shard_size=SHARD)["stages"]["pack"]["counts"]
    found = members(tmp_path / "store")
    assert counts["samples"] == len(expected) == len(found)
    assert counts["rows"] - counts["rejected"] == len(expected)
    for (key, parts), one in zip(found.items(), expected, strict=True):
        assert parts.keys() == {one["ending"], "txt", "json"}
        assert parts[one["ending"]] == one["image"]
        assert parts["txt"].decode() == one["caption"]
        told = json.loads(parts["json"], parse_constant=pytest.fail)
        assert told.pop("key") == key
        assert [told["origin"].pop("file"), told["origin"].pop("row")] == one["origin"]
        assert told.pop("origin") == {}
        assert told == one["values"]
    for path in (tmp_path / "store/shards").glob("*.tar"):
        with tarfile.open(path) as archive:
            assert len(archive.getnames()) <= 3 * SHARD


@pytest.mark.parametrize("pattern", ["data", "data/train-{00000..00002}-of-00003.parquet", "data/*.parquet"])
def test_a_source_is_a_file_a_folder_or_a_pattern(pattern: str, tmp_path: Path) -> None:
    expected = hugging_face(tmp_path)
    pack(tmp_path / "store", tmp_path / pattern)
    assert [one for parts in members(tmp_path / "store").values() for one in parts.values()][::3] == [
        one["image"] for one in expected
    ]
    pack(tmp_path / "one", tmp_path / "data/train-00001-of-00003.parquet")
    assert len(members(tmp_path / "one")) == 10


def test_rows_without_an_image_are_kept_with_their_reason_and_the_others_keep_their_rows(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(image(0)[0])
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "folder.jpg").mkdir()
    good, broken = image(1)[0], "no image"
    rows = [
        {"bytes": good, "path": None},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": "../secret.jpg"},
        {"bytes": None, "path": str(tmp_path / "secret.jpg")},
        {"bytes": None, "path": "folder.jpg"},
        {"bytes": b"<html>not found</html>", "path": "a.jpg"},
        {"bytes": b"", "path": None},
        {"bytes": b"BM is how this text begins", "path": None},
        {"bytes": good, "path": "b.jpg"},
        {"bytes": good, "path": "c.jpg"},
    ]
    captions = pa.array([f"row {row}".encode() for row in range(11)] + [b"\xff"])
    text = pa.Array.from_buffers(pa.string(), 12, captions.buffers())  # not UTF-8 in its last row
    pq.write_table(pa.table({"image": pa.array(rows, HF), "caption": text}), folder / "a.parquet")
    manifest = pack(tmp_path / "store", folder)
    no_file = "no such file beside it: "
    assert rejections(tmp_path / "store") == [
        (1, broken),
        (2, broken),
        (3, f"{no_file}gone.jpg"),
        (4, f"{no_file}../secret.jpg"),
        (5, f"{no_file}{tmp_path}/secret.jpg"),
        (6, f"{no_file}folder.jpg"),
        (7, "not an image"),
        (8, "not an image"),
        (9, "not an image"),
        (11, "invalid UTF-8"),
    ]
    reasons = {"no such file beside it": 4, "not an image": 3, broken: 2, "invalid UTF-8": 1}
    assert manifest["pack"] == {"rejected": reasons}
    told = [json.loads(parts["json"])["origin"]["row"] for parts in members(tmp_path / "store").values()]
    assert told == [0, 10]


def test_broken_lines_of_metadata_are_rejected_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(image(0)[0])
    lines = ['{"file_name": "0.jpg"}', "{", '{"file_name": 5}', "", '{"other": 1}', '{"file_name": "0.jpg", "n": 1}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    pack(tmp_path / "store", tmp_path / "metadata.jsonl", shard_size=2)
    assert [row for row, _ in rejections(tmp_path / "store")] == [1, 2, 3, 4]
    assert [json.loads(parts["json"])["origin"]["row"] for parts in members(tmp_path / "store").values()] == [0, 5]


def test_broken_json_beside_images_is_one_reason_and_each_name_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for n, told in enumerate(["{}", "{", "[1]", '{"n": NaN']):
        (folder / f"{n}.png").write_bytes(image(1)[0])
        (folder / f"{n}.json").write_text(told)
    manifest = pack(tmp_path / "store", folder)
    assert manifest["pack"] == {"rejected": {"its .json cannot be read": 3}}
    reasons = [reason for _, reason in rejections(tmp_path / "store")]
    assert [reason.split(": ")[:2] for reason in reasons] == [["its .json cannot be read", f"{n}.json"] for n in "123"]


def test_a_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    content = pa.array([image(0)[0]], pa.binary())
    table = pa.Table.from_arrays([content, pa.array(["a"]), pa.array(["b"])], ["image", "caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="2 columns 'caption'") as refusal:
        pack(tmp_path / "store", tmp_path / "a.parquet")
    assert "a.parquet" in refusal.value.cause
    assert "rename them" in refusal.value.fix
    assert not list((tmp_path / "store").rglob("*.tar"))
    assert not (tmp_path / "store" / "_state" / "pack").exists(), "before any task is run"


def test_keys_of_a_column_are_kept_and_those_that_are_unfit_or_there_twice_are_counted(tmp_path: Path) -> None:
    keys = ["a", "b c", "é", "a", "x/y", "x.y", None, "", "1" * 101]
    table = {"image": [image(n)[0] for n in range(9)], "id": keys}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    pack(tmp_path / "store", tmp_path / "a.parquet", key_column="id")
    found = members(tmp_path / "store")
    assert list(found) == ["a", "b c", "é"]
    assert [found[key][image(n)[1]] for n, key in enumerate(found)] == [image(n)[0] for n in range(3)]
    assert [row for row, _ in rejections(tmp_path / "store")] == [3, 4, 5, 6, 7, 8]


def test_a_row_s_caption_is_of_the_first_column_that_has_one(tmp_path: Path) -> None:
    columns = {"txt": ["a", None, "", None], "caption": ["b", "c", "d", None], "text": ["e", "f", "g", None]}
    pq.write_table(pa.table({"image": [image(number)[0] for number in range(4)], **columns}), tmp_path / "a.parquet")
    pack(tmp_path / "store", tmp_path / "a.parquet")
    found = list(members(tmp_path / "store").values())
    assert [parts["txt"].decode() for parts in found[:3]] == ["a", "c", "d"]
    assert "txt" not in found[3]
    assert [json.loads(parts["json"]).get("text") for parts in found[:3]] == ["e", "f", "g"]


def test_larger_images_are_scaled_where_a_size_is_asked_for_and_others_keep_their_bytes(tmp_path: Path) -> None:
    small, large = image(0, 20)[0], image(0, 64)[0]
    pq.write_table(pa.table({"image": [small, large, large[:-40]]}), tmp_path / "a.parquet")
    pack(tmp_path / "store", tmp_path / "a.parquet", image_size=32)
    found = [parts["jpg"] for parts in members(tmp_path / "store").values()]
    assert found[0] == small
    with Image.open(io.BytesIO(found[1])) as scaled:
        assert (scaled.format, scaled.size) == ("JPEG", (32, 32))
    assert [row for row, _ in rejections(tmp_path / "store")] == [2]


@pytest.mark.parametrize(
    ("columns", "settings", "said", "fix"),
    [
        ({"a": [b"x"], "b": [b"y"]}, {}, "columns 'a', 'b' may hold images", "name the one by --image-column"),
        ({"a": [1]}, {}, "none of its columns ['a'] can hold images", "name the one by --image-column"),
        ({"a": [1]}, {"image_column": "a"}, "column 'a' is int64", "name another with --image-column"),
        ({"image": [b"x"]}, {"image_column": "imag"}, "no column 'imag'", "try --image-column 'image'"),
        ({"image": [b"x"]}, {"caption_column": "text"}, "no column 'text'", "name one with --caption-column"),
        ({"image": [b"x"], "c": [["a"]]}, {"caption_column": "c"}, "not text", "name another with --caption-column"),
        ({"image": [b"x"]}, {"key_column": "id"}, "no column 'id'", "name one with --key-column"),
        (
            {"image": [None, b"x"]},
            {},
            "no row has an image (1 rejected: no image; 1 rejected: not an",
            "--image-column",
        ),
    ],
)
def test_a_table_whose_columns_do_not_fit_is_refused_by_name(
    columns: dict[str, Any], settings: dict[str, Any], said: str, fix: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError) as refusal:
        pack(tmp_path / "store", tmp_path / "a.parquet", **settings)
    assert "a.parquet" in refusal.value.cause
    assert said in refusal.value.cause
    assert fix in refusal.value.fix


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    for source, said in {
        "nowhere.parquet": "does not exist",
        "*.parq": "no file matches",
        "empty": "holds no parquet",
        "cut.parquet": "not parquet, truncated or damaged",
        "none.parquet": "has no rows",
    }.items():
        with pytest.raises(InputError, match=said):
            pack(tmp_path / "store", tmp_path / source)
    assert not (tmp_path / "store/shards").exists()


def test_a_new_file_gets_the_next_tars_and_the_others_are_not_touched(tmp_path: Path) -> None:
    def write(name: str, numbers: range) -> None:
        pq.write_table(pa.table({"image": [image(n)[0] for n in numbers]}), tmp_path / name)

    (tmp_path / "s").mkdir()
    write("s/b.parquet", range(7))
    write("s/d.parquet", range(7, 10))
    pack(tmp_path / "store", tmp_path / "s", shard_size=4)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "store").glob("*/*.tar")}
    write("s/a.parquet", range(10, 12))
    pack(tmp_path / "store", tmp_path / "s", shard_size=4)
    tars = sorted((tmp_path / "store/shards").glob("*.tar"))
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tars[:3]} == before
    assert [next(iter(parts.values())) for parts in members(tmp_path / "store").values()] == [
        image(n)[0] for n in range(12)
    ]
    write("s/b.parquet", range(20, 27))
    with pytest.raises(ConfigError, match=r"images: b\.parquet"):
        pack(tmp_path / "store", tmp_path / "s", shard_size=4)
    pack(tmp_path / "store", tmp_path / "s", shard_size=4, force=True)
    assert next(iter(members(tmp_path / "store").values())).keys() == {image(20)[1], "json"}


@pytest.mark.parametrize("name", ["a.jpg", "a" * 96 + ".jpg", "a" * 97 + ".jpg", "é.jpg", "a/" * 60 + "b.jpg"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 100_000])
def test_a_member_is_written_as_tarfile_writes_it(name: str, size: int) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=ours, mode="w") as one, tarfile.open(fileobj=theirs, mode="w") as other:
        for part in (name, "last.txt"):
            info = tarfile.TarInfo(part)
            info.size = size
            other.addfile(info, io.BytesIO(b"z" * size))
            begin = add_member(one, part, b"z" * size)
            assert ours.getvalue()[begin : begin + size] == b"z" * size
    assert ours.getvalue() == theirs.getvalue()
