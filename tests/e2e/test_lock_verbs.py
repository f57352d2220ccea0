"""Two commands on one store: which are refused, what is left, and the lock on an S3 server."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from graphbuild.errors import ConfigError, StageError
from graphbuild.store import lock
from graphbuild.store.lock import LOCK, writing
from graphbuild.store.store import Store
from tests.e2e.s3_proxy import S3Proxy
from tests.e2e.test_runs import digests, s3_server, wait_for
from tests.store.test_lock import ELSEWHERE, Other, needs_proc, race, write_lock

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    np.save(folder / "vectors.npy", np.random.default_rng(0).standard_normal((400, 16), np.float32))
    (folder / "recipe.yaml").write_text(f"embed: {{vectors: {folder}/vectors.npy, shard_size: 100}}\nindex: {{k: 5}}\n")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def built(recipe: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("built") / "store"
    cli("run", recipe, store, "--workers", 0)
    return store


@contextlib.contextmanager
def stopped_while_it_writes(program: Path, environment: dict[str, str], *arguments: object) -> Iterator[Any]:
    """A command that stands still with the lock of its store, its third argument."""
    process = forked.Started([str(program), *map(str, arguments)], environment)
    wait_for((Path(str(arguments[2])) / LOCK).exists, process)
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_of_two_commands_the_second_is_refused_and_the_first_leaves_what_it_leaves_alone(
    recipe: Path, built: Path, program: Path, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stopped_while_it_writes(program, environment, "run", recipe, store, "--workers", 0) as first:
        second = cli("run", recipe, store, "--workers", 0, code=2)
        assert f"{store} is being written by `graphbuild run` (process {first.pid} on " in second.stderr
        assert f"kill {first.pid}" in second.stderr
        assert "Traceback" not in second.stderr
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=120)
        assert first.returncode == 0, errors
    assert digests(store) == digests(built)


@needs_proc
def test_a_killed_command_is_followed_by_the_same_at_once(
    recipe: Path, built: Path, program: Path, environment: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stopped_while_it_writes(program, environment, "run", recipe, store, "--workers", 0) as first:
        first.kill()
        first.wait()
        assert (store / LOCK).exists()
        said = cli("run", recipe, store, "--workers", 0).stderr
    assert f"`graphbuild run` (process {first.pid} on " in said
    assert "has died; this command follows it" in said
    assert digests(store) == digests(built)


def test_verbs_that_write_are_refused_and_change_nothing_and_verbs_that_read_are_not(
    recipe: Path, built: Path, cli: Cli, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(built, store)
    (store / "report").mkdir()
    before = digests(store)
    write_lock(store, ELSEWHERE, 0)
    (tmp_path / "list.csv").write_text("url,caption\nhttp://127.0.0.1:9/1.jpg,a\n")
    writes: list[list[object]] = [
        ["download", store, tmp_path / "list.csv"],
        ["embed", store, "--force"],
        ["index", store, "--k", 7, "--force"],
        ["export", store, "--embeddings", "float16", "--force"],
        ["run", recipe, store],
        ["retry", store],
        ["demo", store],
        ["mine", store, "--what", "duplicates", "--threshold", 0.9],
        ["match", store, "--captions", tmp_path / "list.csv"],
    ]
    for arguments in writes:
        write_lock(store, ELSEWHERE, 0)
        refused = cli(*arguments, code=2)
        assert "is being written by `graphbuild embed` (process 1 on far, since 2026" in refused.stderr, arguments
        assert f"rm {store / LOCK}" in refused.stderr
        (store / LOCK).unlink()
        assert digests(store) == before, arguments
    write_lock(store, ELSEWHERE, 0)
    assert "no problems" in cli("verify", store).stdout
    cli("neighbors", store, "--node", 3)
    cli("mine", store, "--what", "duplicates", "--threshold", 0.9, "--dry-run")
    cli("mine", store, "--what", "duplicates", "--threshold", 0.9, "--out", tmp_path / "elsewhere.parquet")
    cli("report", store)
    assert json.loads((store / LOCK).read_bytes()) == ELSEWHERE


# ---- on S3


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Any, dict[str, str]]]:
    """A server that looks and writes in one step, as S3 does and moto by itself does not."""
    responses = pytest.importorskip("moto.s3.responses")
    guard = threading.Lock()
    with pytest.MonkeyPatch.context() as patch, s3_server() as (client, environment):
        for name in ("put_object", "delete_object"):
            step = getattr(responses.S3Response, name)

            def atomic(self: Any, *arguments: Any, step: Any = step) -> Any:
                with guard:
                    return step(self, *arguments)

            patch.setattr(responses.S3Response, name, atomic)
        client.create_bucket(Bucket="jobs")
        for name, value in environment.items():
            patch.setenv(name, value)
        yield client, environment


def put_lock(client: Any, folder: str, said: dict[str, Any], seconds_ago: float) -> None:
    """As its holder would have done so long ago, by the server's clock."""
    from moto.s3.models import s3_backends

    text = json.dumps(said)
    client.put_object(Bucket="jobs", Key=f"{folder}/{LOCK}", Body=text.encode(), Metadata={"lock": text})
    (account,) = s3_backends
    key = s3_backends[account]["aws"].get_object("jobs", f"{folder}/{LOCK}")
    key.last_modified = key.last_modified.fromtimestamp(key.last_modified.timestamp() - seconds_ago, tz=None)


def keys(client: Any, folder: str) -> list[str]:
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="jobs", Prefix=folder).get("Contents", [])]


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        other.process.kill()
        other.process.communicate()


@pytest.mark.slow
def test_a_command_on_s3_is_refused_while_the_lock_is_fresh_and_follows_it_later(
    s3: tuple[Any, dict[str, str]], recipe: Path, built: Path, cli: Cli
) -> None:
    client, env = s3
    put_lock(client, "store", ELSEWHERE, 0)
    refused = cli("run", recipe, "s3://jobs/store", "--workers", 0, env=env, code=2)
    assert "s3://jobs/store is being written by `graphbuild embed` (process 1 on far, since 2026" in refused.stderr
    assert f"aws s3 rm s3://jobs/store/{LOCK}" in refused.stderr
    assert keys(client, "store/") == [f"store/{LOCK}"]
    put_lock(client, "store", ELSEWHERE, lock.STALE_SECONDS + 5)
    done = cli("run", recipe, "s3://jobs/store", "--workers", 0, env=env)
    assert "`graphbuild embed` (process 1 on far" in done.stderr
    assert sorted(key.removeprefix("store/") for key in keys(client, "store/")) == sorted(digests(built))
    assert "no problems" in cli("verify", "s3://jobs/store", env=env).stdout


@needs_proc
def test_a_killed_holder_on_s3_is_followed_at_once(s3: tuple[Any, dict[str, str]], others: list[Other]) -> None:
    client, env = s3
    others.append(Other("s3://jobs/killed", env=env))
    assert others[0].holds()
    with pytest.raises(ConfigError, match=f"process {others[0].process.pid}"), writing(Store("s3://jobs/killed"), "x"):
        pass
    others[0].kill()
    assert keys(client, "killed/") == [f"killed/{LOCK}"]
    with writing(Store("s3://jobs/killed"), "index"):
        pass
    assert keys(client, "killed/") == []


def test_of_many_that_find_the_same_dead_lock_on_s3_or_none_exactly_one_holds_it(
    s3: tuple[Any, dict[str, str]], others: list[Other]
) -> None:
    client, env = s3
    others += [Other("s3://jobs/race", f"racer-{number}", env=env) for number in range(4)]
    for turn in range(12):
        if turn % 3:
            put_lock(client, "race", ELSEWHERE, 1e6)
        assert race(others) == 1
        assert keys(client, "race/") == []


def test_who_loses_its_lock_on_s3_is_told(s3: tuple[Any, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = s3
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)

    def renewed() -> bool:
        said = json.loads(client.get_object(Bucket="jobs", Key=f"lost/{LOCK}")["Body"].read())
        return bool(said["renewed"] > 0)

    def write() -> None:
        with writing(Store("s3://jobs/lost"), "index"):
            end = time.monotonic() + 30
            while not renewed() and time.monotonic() < end:
                time.sleep(0.05)
            assert renewed()
            put_lock(client, "lost", ELSEWHERE, 0)
            for _ in range(600):  # in steps: a signal that is ignored ends none of them
                time.sleep(0.1)

    with pytest.raises(StageError, match="process 1 on far"):
        write()
    assert keys(client, "lost/") == [f"lost/{LOCK}"]


@pytest.mark.slow
def test_a_faulty_network_neither_loses_a_lock_nor_leaves_one(
    s3: tuple[Any, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers get lost too: a condition that was met is then refused when the client asks again."""
    from s3fs import S3FileSystem

    client, env = s3
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    S3FileSystem.clear_instance_cache()  # which know the server's address
    with S3Proxy(env["AWS_ENDPOINT_URL_S3"], seed=5, share=0.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "8")
        for number in range(6):
            with writing(Store(f"s3://jobs/faulty-{number}"), "index"):
                time.sleep(0.5)
    S3FileSystem.clear_instance_cache()
    assert proxy.faults["lost answer"] > 3
    assert keys(client, "faulty") == []
