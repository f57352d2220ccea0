"""Recipes: written-out defaults, options over a store's recipe, exclusive sources, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from graphbuild.errors import ConfigError
from graphbuild.recipe import Recipe, read_recipe, resolve
from graphbuild.runner.stage import Task
from graphbuild.store.store import Store


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_recipe_writes_every_default_out_and_reads_back_the_same(tmp_path: Path) -> None:
    dumped = Recipe().dump()
    assert read_recipe(write(tmp_path, dumped)) == Recipe()
    written = yaml.safe_load(dumped)
    switches = {"allow_private_hosts", "ignore_opt_out", "proxy", "trust_remote_code"}
    assert {name: set(section) for name, section in written.items()} == {
        name: set(field.annotation.model_fields) - switches  # type: ignore[union-attr]
        for name, field in Recipe.model_fields.items()
    }
    assert (written["index"]["recall"], written["export"]["embeddings"]) == (0.99, "int8")


@pytest.mark.parametrize("content", ["", "# nothing\n", "embed:\n  template: '{}'\n"])
def test_what_a_recipe_leaves_out_has_its_default(tmp_path: Path, content: str) -> None:
    assert read_recipe(write(tmp_path, content)) == Recipe()


def test_text_in_any_script_survives_the_file(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"embed": {"captions": "/x.csv", "template": "写真: {} \u202e 🐕\n", "caption_column": "Bildunterschrift ß"}}
    )
    assert read_recipe(write(tmp_path, recipe.dump())) == recipe


def test_options_change_the_recipe_of_the_store_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "index: {k: 7, seed: 3}\nexport: {embeddings: none}\n")
    recipe = resolve(Store(str(tmp_path)), "index", {"k": 9, "min_recall": None})
    assert (recipe.index.k, recipe.index.seed, recipe.index.min_recall) == (9, 3, None)
    assert recipe.export.embeddings == "none"
    assert resolve(Store(str(tmp_path / "new")), "index", {}) == Recipe()


def test_a_setting_changed_to_none_goes_back_to_its_default(tmp_path: Path) -> None:
    write(tmp_path, "embed: {dim: 64, precision: int8, prompt: 'query: '}\nindex: {memory: 9}\n")
    store = Store(str(tmp_path))
    embed = resolve(store, "embed", {"dim": None, "precision": None}).embed
    assert (embed.dim, embed.precision, embed.prompt) == (None, "auto", "query: ")
    assert resolve(store, "index", {"memory": None}).index == Recipe().index


def test_what_is_unset_is_told_in_words_where_finished_work_differs() -> None:
    task = Task(stage="encode", name="00000", settings={"dim": None, "prompt": "a"})
    assert task.changes({"settings": {"dim": 64, "prompt": None}, "inputs": {}}) == [
        "dim: 64 -> not set",
        "prompt: not set -> a",
    ]


# -- the kind of source

SOURCES = ("shards", "captions", "vectors")
DESCRIBED = {  # for each kind of source, settings that only describe such a one
    "": {"caption_member": "json:caption", "class_names": "/data/names.txt", "template": "a photo of a {}"},
    "shards": {"caption_member": "cls", "class_names": "/data/names.txt", "template": "a photo of a {}"},
    "captions": {"caption_column": "text", "key_column": "id", "template": "a {}"},
    "vectors": {"vector_column": "v"},
}
KINDS = list(DESCRIBED)


def naming(kind: str) -> dict[str, Any]:
    """The options of a command that names a source of that kind."""
    return {kind: "/data/x"} if kind else {"captions": None}


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("now", KINDS)
def test_with_another_kind_of_source_the_recipe_is_that_of_a_store_made_from_nothing(
    tmp_path: Path, before: str, now: str
) -> None:
    store = Store(str(tmp_path))
    write(tmp_path, resolve(store, "embed", naming(before) | DESCRIBED[before]).dump())
    command = naming(now) | {"template": "{}"}
    changed = resolve(store, "embed", command)
    assert {name: getattr(changed.embed, name) for name in SOURCES} == dict.fromkeys(SOURCES) | (
        {now: "/data/x"} if now else {}
    )
    fresh = resolve(Store(str(tmp_path / "new")), "embed", command)
    assert (changed.dump() == fresh.dump()) == (before != now)
    if before == now:
        kept = DESCRIBED[before] | {"template": "{}"}
        assert changed.embed.model_dump(include=set(kept)) == kept


def test_what_a_command_says_of_another_kind_of_source_is_kept_and_so_is_what_describes_none(tmp_path: Path) -> None:
    write(tmp_path, "embed: {captions: /data/list.csv, preset: cc3m, template: 'a {}', encoder: e5, dim: 32}\n")
    embed = resolve(Store(str(tmp_path)), "embed", {"shards": "/data/x", "template": "one {}"}).embed
    assert (embed.template, embed.preset, embed.encoder, embed.dim) == ("one {}", None, "e5", 32)


@pytest.mark.parametrize("named", SOURCES)
@pytest.mark.parametrize("before", SOURCES)
def test_no_source_of_any_kind_is_the_tars_of_the_store(tmp_path: Path, before: str, named: str) -> None:
    write(tmp_path, f"embed: {{{before}: /data/x}}\n")
    assert resolve(Store(str(tmp_path)), "embed", {named: None}) == Recipe()


def test_a_least_size_over_the_largest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_bytes 2,000 is over max_bytes 1,000"):
        read_recipe(write(tmp_path, "download: {min_bytes: 2000, max_bytes: 1000}\n"))
    assert resolve(Store(str(tmp_path / "new")), "download", {"min_bytes": 5, "max_bytes": 5}).download.min_bytes == 5


# -- switches of security


def test_a_store_neither_keeps_nor_obeys_a_switch_and_says_so_where_it_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "download: {allow_private_hosts: true, threads: 7}\n")
    named = read_recipe(path)
    assert named.download.allow_private_hosts, "a recipe that the user names is his word"
    assert "allow_private_hosts" not in named.dump()
    store = Store(str(tmp_path))
    for section, changes, allowed, warnings in [
        ("index", {}, False, 0),
        ("download", {}, False, 1),
        ("download", {"allow_private_hosts": False}, False, 0),
        ("download", {"allow_private_hosts": True}, True, 0),
    ]:
        caplog.clear()
        download = resolve(store, section, changes).download
        assert (download.allow_private_hosts, download.threads) == (allowed, 7)
        assert sum("--allow-private-hosts" in text for text in caplog.messages) == warnings


@pytest.mark.parametrize("switch", ["ignore_opt_out: true", "proxy: 'http://us:5ec2e7@h:1'"])
def test_neither_are_what_ignores_opt_outs_and_a_proxy_with_its_password(tmp_path: Path, switch: str) -> None:
    named = read_recipe(write(tmp_path, f"download: {{{switch}}}\n"))
    assert named != Recipe()
    assert Recipe.model_validate(yaml.safe_load(named.dump())) == Recipe()
    assert resolve(Store(str(tmp_path)), "download", {}) == Recipe()


def test_a_store_that_allows_nothing_private_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "download: {allow_private_hosts: false}\n")
    assert resolve(Store(str(tmp_path)), "download", {}) == Recipe()
    assert not caplog.messages


def test_relative_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    section = (
        "embed: {shards: 'tars/{00..11}.tar', class_names: names.txt, encoder: model}\ndownload: {urls: ~/l.csv}\n"
    )
    recipe = read_recipe(write(tmp_path, section))
    assert recipe.embed.shards == f"{tmp_path}/tars/{{00..11}}.tar"
    assert recipe.embed.class_names == f"{tmp_path}/names.txt"
    assert recipe.embed.encoder == f"{tmp_path}/model"
    assert recipe.download.urls == str(Path("~/l.csv").expanduser())
    assert read_recipe(write(tmp_path, "embed: {shards: 's3://b/{0..9}.tar'}")).embed.shards == "s3://b/{0..9}.tar"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("embed: [", "YAML"),
        ("a: b: c", "YAML"),
        (b"\xff\xfe\x00", "YAML"),
        ("embed: \x07", "YAML"),
        ("embed: !!python/object/apply:os.system ['true']", "YAML"),
        ("- embed", "sections"),
        ("just text", "sections"),
        ("embeds: {}", "embeds: no such setting"),
        ("embed: {caption_colum: x}", "embed.caption_colum: no such setting"),
        ("embed: text", "embed: "),
        ("index: {k: many}", "index.k"),
        ("index: {k: -1}", "index.k"),
        ("index: {k: 1.5}", "index.k"),
        ("index: {k: 5000}", "index.k"),
        ("index: {min_recall: 1.01}", "index.min_recall"),
        ("index: {device: tpu}", "index.device"),
        ("export: {embeddings: int4}", "export.embeddings"),
        ("embed: {encoder: ''}", "embed.encoder"),
        ("embed: {shards: ''}", "embed.shards"),
        ("embed: {captions: 3}", "embed.captions"),
        ("embed: {preset: laion}", "embed.preset"),
        ("embed: {template: a photo}", "must contain {} once"),
        ("embed: {template: '{} and {}'}", "must contain {} once"),
        ("embed: {shards: a.tar, captions: b.csv}", "shards and captions exclude each other"),
        ("embed: {shards: a.tar, captions: b.csv, vectors: c.npy}", "shards and captions and vectors exclude"),
        ("download: {timeout_seconds: 0}", "download.timeout_seconds"),
        ("download: {retries: -1}", "download.retries"),
    ],
)
def test_a_bad_recipe_is_refused_by_naming_the_file_and_the_setting(
    tmp_path: Path, content: str | bytes, named: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert path in caught.value.cause
    assert named in caught.value.cause


def test_all_faults_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path, "index: {k: -1, seeds: 1}\nexport: {embeddings: x}\n"))
    assert all(named in caught.value.cause for named in ("index.k", "index.seeds", "export.embeddings"))


@pytest.mark.parametrize("name", ["missing.yaml", "", "recipe.yaml/below", "foo://bar/recipe.yaml"])
def test_a_recipe_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, "embed: {}")
    path = name if "://" in name else str(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert path in caught.value.cause


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("index", {"k": -1}, "--k"),
        ("embed", {"caption_column": None, "template": "no place"}, "--template"),
        ("embed", {"captions": "a", "vectors": "b"}, "--captions, --vectors: captions and vectors exclude each other"),
        ("embed", {"captions": "a.csv", "template": ""}, "--template: '' must contain {} once"),
        ("download", {"shard_size": 0}, "--shard-size"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(tmp_path: Path, section: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Store(str(tmp_path)), section, changes)
    assert named in caught.value.cause


def test_the_recipe_of_another_format_version_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "from_the_future: {}")
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ConfigError, match="format version 99"):
        resolve(Store(str(tmp_path)), "index", {})
