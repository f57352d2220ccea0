"""Captions of members and lists: joined of several fields, without byte order marks, the same text from either."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphbuild.errors import ConfigError, InputError
from graphbuild.job.steps import step_of
from graphbuild.job.verbs import run_step, run_verb
from graphbuild.nodes import scan
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

TEMPLATE = "{title}: {the text} ({title})"


def embed(folder: Path, **changes: str) -> Path:
    store = Store(str(folder / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", resolve(store, "embed", {"template": TEMPLATE, **changes}), store, runner)
    return folder / "store"


def test_columns_of_a_list_are_joined_and_rows_that_lack_one_are_kept_with_the_reason(tmp_path):
    rows = ["title,other,the text", "Ox,1,grazing {title}", "Elk,2,", ",3,alone", "Owl,4,at night"]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    store = embed(tmp_path, captions=str(tmp_path / "list.csv"))
    captions = pq.read_table(store / "samples/00000.parquet")["caption"].to_pylist()
    assert captions == ["Ox: grazing {title} (Ox)", "Owl: at night (Owl)"]
    rejected = pq.read_table(store / "rejected/scan/00000.parquet").select(["position", "reason"]).to_pylist()
    assert rejected == [{"position": 1, "reason": "no the text"}, {"position": 2, "reason": "no title"}]


def test_json_fields_of_tars_are_joined(tmp_path):
    members = [{"title": "Ox", "the text": "grazing"}, {"title": "Elk"}, {"title": "Owl", "the text": 7}]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, fields in enumerate(members):
            for extension, content in (("jpg", b"image"), ("json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    store = embed(tmp_path, shards=str(tmp_path / "a.tar"))
    assert pq.read_table(store / "samples/00000.parquet")["caption"].to_pylist() == [
        "Ox: grazing (Ox)",
        None,
        "Owl: 7 (Owl)",
    ]
    (reason,) = pq.read_table(store / "rejected/scan/00000.parquet")["reason"].to_pylist()
    assert reason == "member .json has no field 'the text'"


def test_a_field_that_no_column_has_is_named_with_the_nearest(tmp_path):
    (tmp_path / "list.csv").write_text("Title,the text\na,b\n")
    with pytest.raises(InputError, match=r"no column 'title'.*") as error:
        embed(tmp_path, captions=str(tmp_path / "list.csv"))
    assert "{Title} in --template" in error.value.fix


def test_a_field_that_is_a_list_is_refused_by_the_option_that_names_it(tmp_path):
    pq.write_table(pa.table({"title": ["Ox"], "the text": [["a", "b"]]}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match=r"column 'the text' is list<.* not text") as error:
        embed(tmp_path, captions=str(tmp_path / "list.parquet"))
    assert error.value.fix == "name another with --template"


def test_columns_that_semicolons_part_are_told_of_whichever_are_named(tmp_path):
    (tmp_path / "list.csv").write_text("caption;key\na;1\n")
    for column in ("caption", "caption;key"):
        with pytest.raises(InputError, match="no column 'caption'") as error:
            embed(tmp_path, captions=str(tmp_path / "list.csv"), template="{}", caption_column=column)
        assert "seems to have ';' between its columns: write it again with commas" in error.value.fix


def test_a_template_has_one_place_or_named_ones(tmp_path):
    for template in ("{} of {title}", "no place"):
        with pytest.raises(ConfigError, match=r"must contain \{\} once"):
            resolve(Store(str(tmp_path)), "embed", {"template": template})


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("extension", "contents", "options", "captions"),
    [
        ("txt", [b"a dog", MARK + b"a dog", 2 * MARK + b"a dog"], {}, ["a dog"] * 3),
        ("txt", [b"a " + MARK + b"dog"], {}, ["a \ufeffdog"]),
        ("json", [b'{"caption": "a dog"}', MARK + b'{"caption": "\\ufeffa dog"}'], {}, ["a dog"] * 2),
        ("json", [MARK + b'{"x": "a", "y": "\\ufeffdog"}'], {"template": "{x} {y}"}, ["a dog"]),
        ("txt", [b"dog", MARK + b"dog"], {"template": "a photo of {}"}, ["a photo of dog"] * 2),
        ("cls", [b"1", MARK + b"1", MARK + b" 0\n"], {"caption_member": "cls"}, ["cat", "cat", "dog"]),
    ],
)  # fmt: skip
def test_a_byte_order_mark_at_the_beginning_of_a_member_is_no_part_of_its_caption(
    tmp_path: Path, extension: str, contents: list[bytes], options: dict[str, str], captions: list[str]
) -> None:
    write_members(tmp_path / "a.tar", [(f"{number}.{extension}", one) for number, one in enumerate(contents)])
    if extension == "cls":
        (tmp_path / "names.txt").write_bytes(MARK + b"dog\ncat\n")
        options = {**options, "class_names": str(tmp_path / "names.txt")}
    store = scanned(tmp_path / "store", shards=str(tmp_path / "a.tar"), **options)
    assert store.table("_state/scan/00000.parquet")["caption"].to_pylist() == captions


def scanned(folder: Path, **options: object) -> Store:
    """A store whose captions are read, and no more."""
    store = Store(str(folder))
    with Runner(workers=0) as runner:
        run_step(step_of(scan.STAGE), resolve(store, "embed", options), store, runner)
    return store


any_caption = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: f"{text}.")


@settings(deadline=None, max_examples=40)
@given(
    captions=st.lists(any_caption | any_caption.map(lambda text: f"\ufeff{text}"), min_size=1, max_size=6),
    template=st.sampled_from(["{}", "a photo of {}", "\ufeff{}"]),
)
def test_a_caption_is_the_same_node_from_a_list_a_text_and_a_json_member(captions: list[str], template: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"caption": caption}) for caption in captions]
        (folder / "list.jsonl").write_text("\n".join(rows) + "\n")
        write_members(folder / "txt.tar", [(f"{at}.txt", caption.encode()) for at, caption in enumerate(captions)])
        write_members(folder / "json.tar", [(f"{at}.json", row.encode()) for at, row in enumerate(rows)])
        texts = [
            scanned(folder / file.partition(".")[0], template=template, **{source: str(folder / file)})
            .table("_state/scan/00000.parquet")["text"]
            .to_pylist()
            for source, file in (("captions", "list.jsonl"), ("shards", "txt.tar"), ("shards", "json.tar"))
        ]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == len(captions)


def test_a_text_of_several_lines_is_one_caption_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b"a dog\na cat\n", b"a dog\n", b"\n a cat \n", b"\xef\xbb\xbfa dog\r\na cat"]
    members = [(f"{number}.txt", content) for number, content in enumerate(lines)]
    write_members(tmp_path / "a.tar", [*members, ("4.json", b'{"caption": "a dog\\na cat"}')])
    with caplog.at_level(logging.WARNING):
        store = scanned(tmp_path / "store", shards=str(tmp_path / "a.tar"))
    texts = store.table("_state/scan/00000.parquet")["text"].to_pylist()
    assert texts == ["a dog a cat", "a dog", "a cat", "a dog a cat", "a dog a cat"]
    assert store.manifest()["stages"]["scan"]["counts"]["of_several_lines"] == 2
    assert "2 are texts of several lines, each one caption" in caplog.text
