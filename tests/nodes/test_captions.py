"""Captions joined of several fields: a list's columns, or the fields of the JSON in tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from graphbuild.errors import ConfigError, InputError
from graphbuild.job.steps import run_verb
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


def test_a_template_has_one_place_or_named_ones(tmp_path):
    for template in ("{} of {title}", "no place"):
        with pytest.raises(ConfigError, match=r"must contain \{\} once"):
            resolve(Store(str(tmp_path)), "embed", {"template": template})
