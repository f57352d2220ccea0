"""What a path, folder or pattern names, in verbs and loaders: what exists is taken as it is written."""

from __future__ import annotations

import logging
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphbuild.errors import ConfigError, InputError, public
from graphbuild.recipe import Embed, absolute
from graphbuild.sources.paths import expand, several
from graphbuild.sources.tars import expand_shards, named_tars
from graphbuild.torch.shards import find_shards

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# A name with every character that patterns and URLs read as their own, but for "::" of chained URLs.
names = st.text(st.sampled_from("ab *?[]{},0.1é犬!-^~#%&"), min_size=1, max_size=10).filter(
    lambda name: name.strip(".") != "" and not name.startswith((".", "~"))
)


@quick
@given(names, names, st.lists(names, max_size=3))
def test_a_name_of_any_characters_is_that_file_or_folder_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, folder: str, name: str, others: list[str]
) -> None:
    root = tmp_path_factory.mktemp("names")
    tar = root / folder / f"{name}.tar"
    make(tar, *(root / other / "other.tar" for other in others if other != folder))
    assert expand(str(tar)) == named_tars(str(tar)) == [str(tar)]
    assert named_tars(str(root / folder)) == [str(tar)]
    assert named_tars(f"{root}/{folder}/*.tar") == [str(tar)], "a pattern in a folder that exists"
    assert [shard.tar for shard in _pairs(tar, str(root / folder))] == [str(tar)]


@quick
@given(st.lists(names, min_size=2, max_size=4, unique=True))
def test_several_names_of_any_characters_are_those_files(
    tmp_path_factory: pytest.TempPathFactory, given: list[str]
) -> None:
    paths = [str(tmp_path_factory.mktemp("names") / name) for name in given]
    make(*map(Path, paths))
    assert expand(several(paths)) == expand(absolute(several(paths))) == paths


def test_several_may_be_patterns_and_urls(tmp_path: Path) -> None:
    make(tmp_path / "a1.csv", tmp_path / "a2.csv", tmp_path / "b,c.csv")
    urls = ["https://host.test/x,y.csv?sign=a,b&c=d", "s3://bucket/a.csv"]
    given = [urls[0], f"{tmp_path}/a{{1,2}}.csv", urls[1], f"{tmp_path}/b,*"]
    assert expand(several(given)) == [f"{tmp_path}/{name}.csv" for name in ("a1", "a2", "b,c")] + urls
    assert public(several(urls)) == r"{https://host.test/x\,y.csv,s3://bucket/a.csv}", "no record keeps a signature"


def _pairs(tar: Path, urls: str) -> list[object]:
    make(tar.with_suffix(".graph.parquet"))
    return list(find_shards(urls, None))


def test_a_folder_beside_those_that_its_name_would_match_is_taken_alone(tmp_path: Path) -> None:
    make(tmp_path / "cc[12]/x.tar", tmp_path / "cc1/y.tar", tmp_path / "cc2/z.tar", tmp_path / "{a,b}/q.tar")
    assert named_tars(f"{tmp_path}/cc[12]") == [f"{tmp_path}/cc[12]/x.tar"]
    assert named_tars(f"{tmp_path}/cc[12]/*") == [f"{tmp_path}/cc[12]/x.tar"]
    assert named_tars(f"{tmp_path}/c[c]?") == [f"{tmp_path}/cc1/y.tar", f"{tmp_path}/cc2/z.tar"]
    assert named_tars(f"{tmp_path}/cc{{1,2}}") == [f"{tmp_path}/cc1/y.tar", f"{tmp_path}/cc2/z.tar"]
    assert named_tars(f"{tmp_path}/{{a,b}}/{{q,}}.tar") == [f"{tmp_path}/{{a,b}}/{name}.tar" for name in ("q", "")]


def test_patterns_below_a_working_folder_with_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "only [v1]/x.tar", tmp_path / "only [v1]/sub/y.tar")
    monkeypatch.chdir(tmp_path / "only [v1]")
    assert named_tars("*.tar") == [f"{tmp_path}/only [v1]/x.tar"]
    assert named_tars("su?/*") == [f"{tmp_path}/only [v1]/sub/y.tar"]
    assert named_tars("x.tar") == ["x.tar"]


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "d/0.tar")
    for named in ("~/d", "~/d/*.tar", "~/d/{0..0}.tar"):
        assert named_tars(named) == [f"{tmp_path}/d/0.tar"]


def test_a_folder_gives_tars_of_all_endings_in_order_and_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tars = ["a.tar", "b.tgz", "c.tar.gz", "d.TAR", "e.Tar.GZ"]
    make(*(tmp_path / name for name in [*tars, "._a.tar", ".hidden.tar", "a.json", "notes.txt", "more/f.tar"]))
    with caplog.at_level(logging.INFO, "graphbuild"):
        assert [Path(url).name for url in expand_shards(str(tmp_path))] == tars
        expand_shards(str(tmp_path))
    assert caplog.text.count("5 tars; 3 others are left out") == 1  # of two looks at the folder
    assert ".json" in caplog.text
    assert ".txt" in caplog.text
    (tmp_path / "more/empty").mkdir()
    with pytest.raises(InputError, match=r"no tar matches .*more/empty/\*\.tar"):
        expand_shards(f"{tmp_path}/more/empty")


def test_what_other_options_name_is_not_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(*(tmp_path / name for name in ("a.tar", "names.txt", "notes.md")))
    with caplog.at_level(logging.INFO, "graphbuild"):
        expand_shards(str(tmp_path), Embed(shards=str(tmp_path), class_names=f"{tmp_path}/names.txt").beside_tars)
        assert [record.message.split("; ")[1] for record in caplog.records] == ["1 other is left out (notes.md)"]
        caplog.clear()
        (tmp_path / "notes.md").unlink()
        expand_shards(str(tmp_path), [f"{tmp_path}/names.txt"])
    assert not caplog.records


def test_a_part_of_a_pattern_that_names_nothing_is_told(tmp_path: Path) -> None:
    make(tmp_path / "a/0.tar", tmp_path / "b/notes.txt")
    with pytest.raises(InputError, match=r"no tar matches .*/b/\*\.tar"):
        expand_shards(f"{tmp_path}/{{a,b}}/*.tar")
    with pytest.raises(ConfigError, match=r"/b/\*\.tar matches no file"):
        find_shards(f"{tmp_path}/{{a,b}}/*.tar", None)


def test_names_on_object_stores_are_taken_as_they_are_written_too() -> None:
    fs = fsspec.filesystem("memory")
    for path in ("/names/v[1]/x.tar", "/names/v1/y.tar", "/names/v[1]/z.TGZ"):
        fs.pipe(path, b"")
    assert named_tars("memory://names/v[1]") == ["memory:///names/v[1]/x.tar", "memory:///names/v[1]/z.TGZ"]
    assert named_tars("memory://names/v[1]/*.tar") == ["memory:///names/v[1]/x.tar"]
    assert named_tars("memory://names/v[1]/x.tar") == ["memory://names/v[1]/x.tar"]
    assert named_tars("memory://names/{v1,v[1]}") == [
        f"memory:///names/{name}" for name in ("v1/y.tar", "v[1]/x.tar", "v[1]/z.TGZ")
    ]


def test_a_long_pattern_asks_for_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    local = type(fsspec.filesystem("file"))
    real = local.exists
    monkeypatch.setattr(local, "exists", lambda self, path, **more: asked.append(path) or real(self, path, **more))
    assert len(named_tars(f"{tmp_path}/{{00000..01242}}.tar")) == 1_243
    assert len(asked) == 1
