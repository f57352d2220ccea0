"""`graphbuild verify` finds every damage and names the file: one store with every kind of file, damaged in every way.

One file at a time is changed and put back. The only bytes of a store under no checksum are the digits of `seconds` in
the records, in which no two runs agree.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.errors import GraphbuildError
from graphbuild.graph.lists.mine import mine_store
from graphbuild.graph.match.match import match_store
from graphbuild.job.verbs import run_verb
from graphbuild.look.verify import verify_store
from graphbuild.recipe import resolve
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.e2e.web import Refusal, serving

logger = logging.getLogger(__name__)
Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
URLS, SHARD, K = 60, 32, 4  # two shards: enough to be mistaken for each other
LEAST = 200


@pytest.fixture(scope="module")
def site(pictures: list[Picture]) -> Iterator[str]:
    """A server of drawn scenes on loopback; every 13th is gone."""

    def answer(path: str) -> bytes | Refusal:
        number = int(path.strip("/"))
        return pictures[number][0] if number % 13 else (404, None)

    with serving(answer) as address:
        yield address


def build(folder: Path, site: str, pictures: list[Picture], order: list[int]) -> Path:
    """A store with all that commands write, of the scenes in that order; two URLs are missing, three captions empty."""
    numbers: list[int | None] = [*order[:7], None, *order[7:40], None, *order[40:]]
    captions = ["no picture" if n is None else " " if n in (5, 25, 45) else pictures[n - n % 7 % 2][1] for n in numbers]
    urls = [None if n is None else f"{site}/{n}" for n in numbers]
    folder.mkdir()
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "list.parquet")
    store = Store(str(folder / "store"))
    clustered = {"layout": "clustered", "chunk": 4, "shard_size": SHARD}
    download = {"urls": str(folder / "list.parquet"), "shard_size": SHARD, "resize_mode": "no"}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("download", {**download, "allow_private_hosts": True, "threads": 4}),
        ("embed", {}),
        ("index", {"k": K}),
        ("export", {}),
        ("export", clustered),
        ("export", {"layout": "inline"}),
    ]
    with Runner(workers=0) as runner:
        for verb, changes in steps:
            run_verb(verb, resolve(store, verb, changes), store, runner)
    for what, options in {"duplicates": {"threshold": 0.7}, "hard-negatives": {"count": 2}}.items():
        mine_store(store, what, options)
    (folder / "asked.csv").write_text('caption\n" "\na dog runs\n')
    match_store(store, "neighbors", {"captions": str(folder / "asked.csv"), "k": 2})
    return folder / "store"


@pytest.fixture(scope="module")
def stores(site: str, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The store, and one as it was before: of the same list in another order."""
    folder = tmp_path_factory.mktemp("mutations")
    now, before = list(range(URLS)), list(range(URLS))
    random.Random(1).shuffle(before)
    store, older = build(folder / "now", site, pictures, now), build(folder / "older", site, pictures, before)
    assert problems(store) == problems(older) == []
    return store, older


def problems(store: Path) -> list[str]:
    try:
        return verify_store(Store(str(store))).problems
    except GraphbuildError as error:
        return [error.cause]


def files(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())


def kind_of(name: str) -> str:
    """A file's name without what tells it from others of its kind."""
    name = re.sub(r"\d{5}", "N", name)
    name = re.sub(r"^\w+/sizes\.json$", "*/sizes.json", name)
    return re.sub(r"(mined|match|_state/mine|_state/match)/[a-z-]+\.", r"\1/WHAT.", name)


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip a bit": flip_bit,
    "flip another": flip_bit,
    "cut a byte": lambda content, draw: content[:-1],
    "cut half": lambda content, draw: content[: len(content) // 2],
    "empty": lambda content, draw: b"",
    "add a byte": lambda content, draw: content + bytes([draw.randrange(256)]),
    "delete": lambda content, draw: None,
}


def without_seconds(content: bytes) -> Any:
    try:
        record = json.loads(content)
    except ValueError:
        return content
    return {name: value for name, value in record.items() if name != "seconds"}


def damaged(name: str, how: str, content: bytes, draw: random.Random) -> bytes | None:
    """A file's content after that damage; drawn again where only the digits of a record's `seconds` would differ."""
    while True:
        changed = DAMAGE[how](content, draw)
        assert changed != content
        if not (how.startswith("flip") and name.startswith("_state/") and changed is not None):
            return changed
        if not name.endswith(".json") or without_seconds(changed) != without_seconds(content):
            return changed


def mutations(store: Path, older: Path) -> Iterator[tuple[str, str, dict[str, bytes | None]]]:
    """Kind of file, kind of damage, and the new content of each file that it touches (None: deleted)."""
    kinds = defaultdict(list)
    for name in files(store):
        kinds[kind_of(name)].append(name)
    draw = random.Random(7)
    for kind, names in kinds.items():
        for how in DAMAGE:
            name = draw.choice(names)
            yield kind, how, {name: damaged(name, how, (store / name).read_bytes(), draw)}
        contents = {name: (store / name).read_bytes() for name in names}
        pairs = [(a, b) for a in names for b in names if a < b and contents[a] != contents[b]]
        if pairs:
            one, other = draw.choice(pairs)
            yield kind, "swap", {one: contents[other], other: contents[one]}
        before = {n: (older / n).read_bytes() for n in names if (older / n).exists()}
        if changed := [name for name, content in before.items() if content != contents[name]]:
            name = draw.choice(changed)
            yield kind, "older version", {name: before[name]}


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_every_damage_to_every_kind_of_file_is_found_and_named(stores: tuple[Path, Path], share: int) -> None:
    """share: every so many mutations are tried, so with 8 some damage to each kind of file, and each damage to some."""
    store, older = stores
    tried: Counter[tuple[str, str]] = Counter()
    missed = []
    for kind, how, contents in list(mutations(store, older))[::share]:
        originals = {name: (store / name).read_bytes() for name in contents}
        for name, content in contents.items():
            if content is None:
                (store / name).unlink()
            else:
                (store / name).write_bytes(content)
        found = problems(store)
        for name, content in originals.items():
            (store / name).write_bytes(content)
        tried[kind, how] += 1
        if not any(name in problem for name in contents for problem in found):
            missed.append((how, sorted(contents), found))
    by_kind, by_damage = Counter[str](), Counter[str]()
    for (kind, how), count in tried.items():
        by_kind[kind] += count
        by_damage[how] += count
    logger.info("%d mutations tried, %d found", tried.total(), tried.total() - len(missed))
    for what, count in [*by_kind.items(), *by_damage.items()]:
        logger.info("%6d %s", count, what)
    assert not missed, missed
    assert tried.total() >= LEAST // share
    assert min(by_damage.values()) >= 20 // share
    assert len(by_kind) == len(set(map(kind_of, files(store))))
    assert problems(store) == []


def test_the_store_that_is_damaged_holds_every_kind_of_file(stores: tuple[Path, Path]) -> None:
    kinds = {kind_of(name) for name in files(stores[0])}
    assert kinds >= {
        "manifest.json",
        "shards.parquet",
        "recipe.yaml",
        "*/sizes.json",
        "mined/WHAT.parquet",
        "match/WHAT.parquet",
        "rejected/match/WHAT.parquet",
        "graph/basis.npy",
    }
    assert kinds >= {"shards/N.tar", "shards/N.parquet", "shards/N_stats.json", "shards/N.graph.parquet"}
    assert kinds >= {f"graph/N.{what}.npy" for what in ("neighbors", "similarities", "background", "sketch")}
    assert kinds >= {"samples/N.parquet", "nodes/N.parquet", "nodes/N.npy", "_state/number/nodes.npy"}
    assert kinds >= {"clustered/N.tar", "clustered/N.graph.parquet", "inline/N.tar", "_state/scan/N.parquet"}
    assert kinds >= {"rejected/urls/N.parquet", "rejected/scan/N.parquet"}
    assert kinds >= {"_state/mine/WHAT.done.json", "_state/match/WHAT.done.json"}
    stages = ("download", "scan", "assign", "encode", "search", "certify", "export", "cluster", "inline")
    assert kinds >= {f"_state/{stage}/N.done.json" for stage in stages}


@pytest.mark.parametrize("name", ["manifest.json", "_state/encode/00001.done.json", "inline/00001.tar"])
def test_the_command_names_the_damaged_file_and_exits_1(
    stores: tuple[Path, Path], name: str, cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stores[0], store)
    content = (store / name).read_bytes()
    (store / name).write_bytes(content[:-1])
    found = cli("verify", store, code=1)
    assert f"BAD  {name}: " in found.stdout
    assert found.stdout.count("BAD") == 1
    assert "Traceback" not in found.stderr


def test_a_file_that_the_store_does_not_list_is_no_damage(stores: tuple[Path, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(stores[0], store)
    for name in ("notes.txt", "shards/README", "graph/extra.npy", "mined/own.parquet", "_state/search/notes.txt"):
        (store / name).write_bytes(b"mine")
    pq.write_table(pa.table({"x": [1]}), store / "mined/other.parquet")
    assert problems(store) == []


def test_an_edited_recipe_is_named_and_the_next_command_writes_it_again(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(stores[0], tmp_path / "store")
    recipe = tmp_path / "store/recipe.yaml"
    whole = recipe.read_text()
    recipe.write_text(whole.replace("threads: 4", "threads: 5"))
    assert [problem.partition(":")[0] for problem in problems(tmp_path / "store")] == ["recipe.yaml"]
    store = Store(str(tmp_path / "store"))
    with Runner(workers=0) as runner:
        run_verb("embed", resolve(store, "embed", {}), store, runner)
    assert "threads: 5" in recipe.read_text()
    assert problems(tmp_path / "store") == []
