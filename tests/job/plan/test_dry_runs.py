"""--dry-run of retry, mine and demo: what would be done, by name and number, and that nothing is."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from graphbuild.cli import app
from graphbuild.demo.scenes import make_scenes
from graphbuild.demo.server import FAULTS, SceneServer, write_url_list
from graphbuild.errors import ConfigError, InputError
from graphbuild.job.retry import retry_store
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Download, Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import Task
from graphbuild.runner.workers import Failure, record_failure
from graphbuild.store.store import Store

PASSING = {"server_error", "hang", "cut_off"}
SCENES = 200


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in folder.rglob("*")
    }


def dry(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--dry-run"])
    if done.exception:
        raise done.exception
    return done.output


def test_a_dry_retry_names_the_urls_that_the_retry_then_fetches_and_changes_nothing(tmp_path: Path) -> None:
    urls, store = tmp_path / "list.parquet", tmp_path / "out"
    scenes = make_scenes(SCENES)
    with SceneServer(scenes) as server:
        write_url_list(urls, scenes, server.url)
        config = Download(urls=str(urls), shard_size=100, timeout_seconds=0.5, allow_private_hosts=True)
        with Runner(workers=0) as runner:
            run_verb("download", Recipe(download=config), Store(str(store)), runner)
        faults = Counter(fault.kind for fault in server.faults if fault)
        passing = sum(faults[kind] for kind in PASSING)
        failed = sum(count for kind, count in faults.items() if not FAULTS[kind].kept)
        before = digests(store)

        told = dry("retry", store)
        assert f"would fetch {passing} of {failed} failed URLs again" in told
        assert f"and leave {failed - passing} that failed for good (--reason TEXT, --all)" in told
        again, left = told.split("and leave")
        assert f"{faults['server_error']} download: HTTP Error 500" in again
        assert f"{faults['not_found']} download: HTTP Error 404" in left
        assert f"{passing} URLs -> {passing} images" in left, "the table of what that takes"
        assert re.search(r"^download +1 ", told, re.M)
        gone = dry("retry", store, "--reason", "HTTP Error 404")
        assert f"would fetch {faults['not_found']} of {failed} failed URLs again" in gone
        assert f"and leave {failed - faults['not_found']} that failed for other reasons" in gone
        everything = dry("retry", store, "--all")
        assert f"would fetch {failed} of {failed} failed URLs again" in everything
        assert "and leave" not in everything
        none = dry("retry", store, "--reason", "no such reason")
        assert f"would fetch 0 of {failed} failed URLs again" in none
        assert "stage" not in none
        assert digests(store) == before

        record_failure(Store(str(store)), Task(stage="number", name="all"), Failure("no caption", "", "", 2))
        both = dry("retry", store)
        assert both.index(f"would fetch {passing} of {failed}") < both.index("would run 1 failed task of embed again")
        assert "all: no caption" in both
        assert not re.search(r"^numbering ", both, re.M), "what embed takes is not known before the URLs are fetched"
        (store / "_state/number/all.failed.json").unlink()

        with Runner(workers=0) as runner:
            assert f"{passing} of {failed} failed URLs" in "\n".join(
                retry_store(Store(str(store)), runner, changes={"allow_private_hosts": True})
            )
    urls.write_bytes(urls.read_bytes() + b" ")
    with pytest.raises(ConfigError, match="was built differently"):
        dry("retry", store)


def test_a_dry_retry_names_the_failed_tasks_and_why_they_failed(tmp_path: Path) -> None:
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for sample in range(20):
                text = f"picture {sample} of {number}".encode()
                info = tarfile.TarInfo(f"{number}-{sample}.txt")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:3000])
    store = tmp_path / "out"
    with Runner(workers=0) as runner, pytest.raises(InputError):
        run_verb("embed", Recipe(embed=Embed(shards=f"{tmp_path}/*.tar")), Store(str(store)), runner)
    before = digests(store)
    told = dry("retry", store)
    assert "would run 1 failed task of embed again" in told
    assert re.search(r"00001: .*1\.tar", told)
    assert re.search(r"^captions +1 ", told, re.M), "one of three tasks is left"
    assert "failed URLs" not in told
    assert digests(store) == before
    with pytest.raises(ConfigError, match="nothing to retry"):
        dry("retry", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_dry_runs_of_mine_and_of_a_forced_index_tell_what_they_replace_and_change_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((300, 16)).astype(np.float16))
    store = tmp_path / "out"
    recipe = Recipe(embed=Embed(vectors=str(tmp_path / "v.npy")), index=Index(k=8, device="cpu"))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, recipe, Store(str(store)), runner)
    mine = ("mine", store, "--what", "false-negatives", "--threshold", 0.5)
    before = digests(store)
    told = dry(*mine)
    assert f"2,400 edges of 300 nodes into {store}/mined/false-negatives.parquet" in told
    assert "in place of" not in told
    assert str(tmp_path / "new/list.parquet") in dry(*mine, "--out", tmp_path / "new/list.parquet")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="--threshold"):
        dry("mine", store, "--what", "false-negatives")
    with pytest.raises(ConfigError, match="k: 8 -> 4"):
        dry("index", store, "--k", 4)
    forced = dry("index", store, "--k", 4, "--force")
    assert "k = 4" in forced
    assert "done" not in forced
    assert digests(store) == before
    CliRunner().invoke(app, [*map(str, mine)])
    assert "in place of the list that is there" in dry(*mine)


def test_a_dry_demo_is_planned_without_a_folder(tmp_path: Path) -> None:
    told = dry("demo", tmp_path / "demo", "--scenes", 1_200)
    assert "1,200 URLs" in told
    assert "3 shards" in told
    assert not (tmp_path / "demo").exists()
