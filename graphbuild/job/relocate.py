"""Relocate: tars that were moved or renamed are found by their sha256, and nothing is scanned or encoded again.

The records of `scan` get the tars' new places, as if they had lain there; rows, nodes, vectors and graph stay. Sidecars
are named after tars, so `export` runs again. Stopped half-way it goes on with the same command. Reads each tar there
that has the size of a known one once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from graphbuild.errors import ConfigError, InputError, public
from graphbuild.export import clustered, columns, inline, sidecars
from graphbuild.job.verbs import run_verb
from graphbuild.nodes.number import finish_assign
from graphbuild.recipe import BESIDE, resolve
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task, records, sealed, state_path, write_manifest
from graphbuild.runner.state import invalidate, require
from graphbuild.sources.tars import expand_shards
from graphbuild.store.checksum import file_sha256
from graphbuild.store.files import file_identity, local_file
from graphbuild.store.remote import READERS, file_system, reaching
from graphbuild.store.store import Json, Store


def relocate(store: Store, shards: str, runner: Runner) -> Iterator[str]:
    """Make the tars that `shards` names (`expand_shards`) the store's; yields what was done. New ones are added.

    Raises:
        ConfigError: the store was not made from tars that lie elsewhere. InputError: one of its tars is not among them;
            nothing is changed then.
    """
    assigned = require(store, "assign", "embed")
    done = records(store, "scan")
    tars = {name: record["facts"]["shards"].get(name, {}).get("tar") for name, record in done.items()}
    before = resolve(store, "embed", {}).embed
    if before.source not in ("shards", BESIDE) or None in tars.values():
        raise ConfigError(f"{store.url} was not made from tars that lie elsewhere", "use it on one of `embed --shards`")
    urls = _places(tars, expand_shards(shards))
    if lost := [tar["url"] for name, tar in tars.items() if name not in urls]:
        raise InputError(
            f"{len(lost):,} of the {len(tars):,} tars of {store.url} are not in {shards}, by their content: {lost[0]}",
            "name a folder or pattern that has them all; of tars with other content make another store",
        )
    for name, record in done.items():
        store.write_json(state_path("scan", name), _moved(record, urls[name]))
    invalidate(store, [stage.name for stage in (sidecars.STAGE, inline.STAGE, columns.STAGE, clustered.CLUSTER)])
    beside = {} if before.vectors is None else {"vectors": before.vectors}
    recipe = resolve(store, "embed", {"shards": shards, **beside})
    write_manifest(store, store.manifest() | finish_assign(recipe, store, assigned))
    run_verb("embed", recipe, store, runner)
    yield f"relocate  {len(tars):,} tars found by their content: rows, nodes, vectors and graph are as they were"
    verb = "export" if "certify" in store.manifest()["stages"] else "index"
    yield f"next      graphbuild {verb} {store.url}"


def _places(tars: Mapping[str, Json], urls: Sequence[str]) -> dict[str, str]:
    """Shard -> the URL where a tar with the content of its tar lies, of those for which there is one."""
    sizes = {tar["bytes"] for tar in tars.values()}
    with ThreadPoolExecutor(READERS) as pool:
        likely = [url for url, size in zip(urls, pool.map(_size, urls), strict=True) if size in sizes]
        by_content: dict[str, list[str]] = {}
        for url, sha256 in zip(likely, pool.map(_sha256, likely), strict=True):
            by_content.setdefault(sha256, []).append(url)
    found = {}
    for name, tar in tars.items():
        same = by_content.get(tar["sha256"], [])
        if same:
            found[name] = same.pop(0)
    return found


def _size(url: str) -> int | None:
    fs, path = file_system(url)
    with reaching(url):
        return fs.size(path) if fs.exists(path) else None


def _sha256(url: str) -> str:
    with local_file(url) as path:
        return file_sha256(path)


def _moved(record: Json, url: str) -> Json:
    """The record of a tar's scan, had it lain there."""
    name = record["task"]
    inputs = {"tar": file_identity(url)}
    task = Task(stage="scan", name=name, settings=record["settings"], inputs=inputs, built=record["built"])
    shard = record["facts"]["shards"][name]
    tar = {**shard["tar"], "url": public(url), "name": public(url).rsplit("/", 1)[-1]}
    facts = {**record["facts"], "shards": {name: {**shard, "tar": tar}}}
    return sealed({**record, "inputs": inputs, "fingerprint": task.fingerprint, "facts": facts})
