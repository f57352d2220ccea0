"""Jobs whose store and tars lie on S3, behind a proxy that refuses, delays and cuts requests, and through outages.

What a job leaves is compared byte by byte with the files that it makes on a disk, or on S3 without faults.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphbuild.errors import StorageError
from graphbuild.export.sidecar import SidecarHeader, read_columns, sidecar_schema
from graphbuild.store import remote
from graphbuild.store.store import Store
from tests.e2e.s3_proxy import KINDS, S3Proxy
from tests.e2e.test_runs import digest, members, s3_server

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
logger = logging.getLogger(__name__)
TARS, SAMPLES, K = 3, 12, 5
GIVE_UP_SOON = {"AWS_MAX_ATTEMPTS": "1"}  # s3fs then still sends five times what was reset


class S3(NamedTuple):
    """A server with a bucket `jobs` that holds the tars: a client for it, how commands find it, its address."""

    client: Any
    environment: dict[str, str]
    url: str

    def objects(self, prefix: str, bucket: str = "jobs") -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        read = {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix(f"{prefix}/"): content for key, content in read.items()}

    def digests(self, prefix: str) -> dict[str, str]:
        return {name: digest(name, content) for name, content in self.objects(prefix).items()}


@pytest.fixture(scope="module")
def tars(pictures: list[Picture], write_tar: WriteTar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for number in range(TARS):
        write_tar(
            folder / f"part-{number:04d}.tar",
            members(list(enumerate(pictures))[number * SAMPLES : (number + 1) * SAMPLES]),
        )
    return folder


@pytest.fixture(scope="module")
def built(tars: Path, cli: Cli, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the same tars make on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "recipe.yaml").write_text(f"embed:\n  shards: {tars}/part-*.tar\n  encoder: {words}\nindex:\n  k: {K}\n")
    cli("run", folder / "recipe.yaml", folder / "store", "--workers", 0)
    return folder / "store"


@pytest.fixture(scope="module")
def s3(tars: Path) -> Iterator[S3]:
    with s3_server() as (client, environment):
        client.create_bucket(Bucket="jobs")
        for tar in tars.iterdir():
            client.upload_file(str(tar), "jobs", f"tars/{tar.name}")
        yield S3(client, environment, environment["AWS_ENDPOINT_URL_S3"])


@pytest.fixture
def recipe(words: str, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"embed:\n  shards: s3://jobs/tars/part-*.tar\n  encoder: {words}\nindex:\n  k: {K}\n")
    return path


@pytest.fixture
def busy(s3: S3) -> Iterator[S3Proxy]:
    """Every tenth request fails or is late."""
    with S3Proxy(s3.url, seed=1, share=0.1) as proxy:
        yield proxy
    logger.info("%d requests %s, faults %s", sum(proxy.requests.values()), dict(proxy.requests), dict(proxy.faults))


def seen(proxy: S3Proxy, least: int) -> None:
    """Fail unless so many faults met requests, and all kinds of them."""
    assert sum(proxy.faults.values()) >= least, proxy.faults
    assert set(proxy.faults) == set(KINDS), proxy.faults


def same_as_on_disk(found: dict[str, bytes], built: Path) -> None:
    local = {str(path.relative_to(built)): path.read_bytes() for path in built.rglob("*") if path.is_file()}
    assert found.keys() == local.keys()
    records = {name for name in local if name.endswith(".done.json")}
    for name in local.keys() - records - {"manifest.json", "recipe.yaml", "shards.parquet"}:  # these name tars' places
        assert found[name] == local[name], name
    for name in records:
        assert json.loads(found[name])["outputs"] == json.loads(local[name])["outputs"], name


def stopped(done: subprocess.CompletedProcess[str], url: str) -> None:
    """Fail unless a command ended as it should when its storage is out of reach."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    said = done.stderr[done.stderr.index("graphbuild: ") :]
    assert re.search(rf"{url}[^ ]* cannot be reached \(", said), said
    assert "  -> " in said
    assert "run the same command again" in said


# ---- faults


@pytest.mark.slow
def test_a_job_through_a_faulty_network_leaves_what_it_leaves_on_disk(
    s3: S3, busy: S3Proxy, built: Path, recipe: Path, cli: Cli
) -> None:
    env = busy.environment(s3.environment)
    cli("run", recipe, "s3://jobs/busy", "--workers", 0, env=env)
    same_as_on_disk(s3.objects("busy"), built)
    assert "no problems" in cli("verify", "s3://jobs/busy", env=env).stdout
    assert cli("neighbors", "s3://jobs/busy", "0003", env=env).stdout == cli("neighbors", built, "0003").stdout
    seen(busy, 24)


@pytest.mark.slow
def test_all_verbs_with_workers_through_a_worse_network_leave_the_bytes_of_a_good_one(
    s3: S3, recipe: Path, cli: Cli
) -> None:
    with S3Proxy(s3.url, seed=2, share=0.25) as proxy:
        for folder, env in (("good", s3.environment), ("worse", proxy.environment(s3.environment))):
            store = f"s3://jobs/{folder}"
            cli("embed", store, "--shards", "s3://jobs/tars/part-*.tar", "--workers", 2, env=env)
            cli("index", store, "--k", K, "--engine", "partition", "--workers", 0, env=env)
            cli("export", store, "--workers", 0, env=env)
            cli("export", store, "--layout", "clustered", "--shard-size", 16, "--chunk", 4, "--workers", 2, env=env)
            assert cli("embed", store, env=env).stderr.count("up to date") == 6
            assert "no problems" in cli("verify", store, env=env).stdout
    logger.info("%d requests %s, faults %s", sum(proxy.requests.values()), dict(proxy.requests), dict(proxy.faults))
    assert s3.digests("worse") == s3.digests("good")
    seen(proxy, 200)


class Counting(S3Proxy):
    """Counts the requests for each object's content."""

    def fault(self, method: str, path: str) -> str | None:
        kind = super().fault(method, path)
        if method == "GET":
            self.requests[path] += 1
        return kind


@pytest.mark.slow
def test_clustered_tars_cost_few_requests_and_have_the_bytes_that_they_have_on_disk(
    s3: S3, built: Path, recipe: Path, cli: Cli, tmp_path: Path
) -> None:
    layout = ("--layout", "clustered", "--shard-size", 6, "--chunk", 2, "--workers", 0)
    shutil.copytree(built, tmp_path / "store")
    cli("export", tmp_path / "store", *layout)
    cli("run", recipe, "s3://jobs/moved", "--workers", 0, env=s3.environment)
    with Counting(s3.url) as proxy:
        cli("export", "s3://jobs/moved", *layout, env=proxy.environment(s3.environment))
    found, local = s3.objects("moved"), tmp_path / "store/clustered"
    assert not [name for name in found if name.startswith("_work")]
    assert len(list(local.glob("*.tar"))) == TARS * SAMPLES // 6
    for path in local.iterdir():
        assert found[f"clustered/{path.name}"] == path.read_bytes()
    for number in range(TARS):
        assert proxy.requests[f"/jobs/tars/part-{number:04d}.tar"] == 1, "its samples lie behind each other"
        moved = [proxy.requests[f"/jobs/moved/_work_clustered/{number:05d}.{kind}"] for kind in ("rows", "moved")]
        assert sum(moved) <= 3 * TARS * SAMPLES // 6, "three for each new tar"
        assert moved[1] > 0


LOADER = """
import json, sys
import torch
from torch.utils.data import DataLoader
from graphbuild.torch import GraphDataset, graph_webdataset

if __name__ == "__main__":
    torch.set_num_threads(1)
    tars, sidecars = "s3://jobs/tars/*.tar", "s3://jobs/sidecars"
    stream = graph_webdataset(tars, batch_size=5, image_pixels=16, sidecars=sidecars)
    dataset = GraphDataset(tars, image_pixels=16, sidecars=sidecars)
    streamed = [key for batch in DataLoader(stream, batch_size=None, num_workers=2) for key in batch["key"]]
    loader = DataLoader(dataset, batch_size=5, shuffle=True, num_workers=2, collate_fn=dataset.collate)
    json.dump([streamed, [key for batch in loader for key in batch["key"]]], sys.stdout)
"""


@pytest.mark.slow
def test_loaders_on_a_faulty_network_give_every_sample_once(s3: S3, built: Path, environment: dict[str, str]) -> None:
    for path in (built / "shards").glob("*.graph.parquet"):
        s3.client.upload_file(str(path), "jobs", f"sidecars/{path.name}")
    with S3Proxy(s3.url, seed=3, share=0.25) as proxy:
        env = {**environment, **proxy.environment(s3.environment)}
        run = subprocess.run(
            [sys.executable, "-c", LOADER], env=env, capture_output=True, text=True, timeout=300, check=False
        )
    logger.info("%d requests %s, faults %s", sum(proxy.requests.values()), dict(proxy.requests), dict(proxy.faults))
    assert run.returncode == 0, run.stderr
    streamed, drawn = json.loads(run.stdout)
    assert sorted(streamed) == sorted(drawn) == [f"{number:04d}" for number in range(TARS * SAMPLES)]
    assert sum(proxy.faults.values()) >= 10, proxy.faults


def test_a_count_of_samples_fetches_little_of_a_large_sidecar(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, rows, d, k = np.random.default_rng(0), 4_000, 384, 64
    header = SidecarHeader(encoder="e", d=d, k=k, embeddings="int8", graph="g", shard="0", tar=None, rows=rows)
    values = {
        "row": np.arange(rows),
        "key": [f"{row:09d}" for row in range(rows)],
        "node": rng.permutation(rows),
        "caption": [rng.bytes(20).hex() for _ in range(rows)],
        "embedding": list(rng.integers(-127, 127, (rows, d), np.int8)),
        "embedding_scale": rng.random(rows, np.float32),
        "neighbors": list(rng.integers(0, rows, (rows, k), np.uint32)),
        "similarities": list(rng.random((rows, k)).astype(np.float16)),
    }
    schema = sidecar_schema(d, k, "int8").with_metadata(header.metadata())
    table = pa.table([pa.array(values.get(n, np.arange(rows)), schema.field(n).type) for n in schema.names], schema)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    s3.client.put_object(Bucket="jobs", Key="large.graph.parquet", Body=stream.getvalue())
    with S3Proxy(s3.url) as proxy:
        for name, value in proxy.environment(s3.environment).items():
            monkeypatch.setenv(name, value)
        found, columns = read_columns("s3://jobs/large.graph.parquet", ["node", "image_offset"])
    assert found == header
    assert columns["node"].to_pylist() == values["node"].tolist()
    assert proxy.bytes < len(stream.getvalue()) / 4
    assert sum(proxy.requests.values()) <= 4


@pytest.mark.slow
def test_a_file_of_several_parts_is_whole_or_absent_whatever_is_lost(
    s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = os.urandom(1 << 20) * 120
    with S3Proxy(s3.url, seed=4, share=0.3) as proxy:
        for name, value in proxy.environment(s3.environment).items():
            monkeypatch.setenv(name, value)
        store = Store("s3://jobs/parts")
        for number in range(4):
            store.write_bytes(f"{number}.bin", content)
            assert store.local_copy(f"{number}.bin").read_bytes() == content
    logger.info("%d requests %s, faults %s", sum(proxy.requests.values()), dict(proxy.requests), dict(proxy.faults))
    # Where the answer to an upload's begin is lost, it is begun again: the first one stays, and holds nothing.
    for upload in s3.client.list_multipart_uploads(Bucket="jobs").get("Uploads", []):
        place = {"Bucket": "jobs", "Key": upload["Key"], "UploadId": upload["UploadId"]}
        assert s3.client.list_parts(**place).get("Parts", []) == []
    assert sum(proxy.faults.values()) >= 10, proxy.faults


# ---- outages


@pytest.mark.parametrize(
    ("outage", "workers"),
    [
        pytest.param("reset", 0, marks=pytest.mark.slow),
        pytest.param("slow down", 2, marks=pytest.mark.slow),
        pytest.param("reset", 2, marks=pytest.mark.slow),
    ],
)
def test_an_outage_ends_the_job_with_its_url_and_the_same_command_finishes_it(
    outage: str, workers: int, s3: S3, built: Path, recipe: Path, cli: Cli
) -> None:
    folder = f"outage-{workers}-{outage.replace(' ', '-')}"
    arguments = ["run", recipe, f"s3://jobs/{folder}", "--workers", workers]
    with S3Proxy(s3.url) as proxy:
        env = {**proxy.environment(s3.environment), **GIVE_UP_SOON}
        proxy.outage_at = (f"/{folder}/_state/encode/", outage)
        begin = time.monotonic()
        done = cli(*arguments, code=None, env=env, timeout=120)
        seconds = time.monotonic() - begin
        assert proxy.outage == outage
        refused = sum(proxy.faults.values())
        proxy.outage = None
        logger.info("%s, %d workers: %d requests failed, ended after %.1f s", outage, workers, refused, seconds)
        stopped(done, f"s3://jobs/{folder}/")
        left = s3.objects(folder)
        assert json.loads(left["manifest.json"])["stages"].keys() == {"scan", "number", "texts"}
        assert [name for name in left if name.startswith("_state/encode/")] == []
        cli(*arguments, env=env)
    same_as_on_disk(s3.objects(folder), built)


@pytest.mark.parametrize("verb", ["embed", pytest.param("verify", marks=pytest.mark.slow), "neighbors"])
def test_no_server_is_said_so_by_every_verb(verb: str, s3: S3, cli: Cli) -> None:
    with S3Proxy(s3.url) as proxy:
        env = {**proxy.environment(s3.environment), **GIVE_UP_SOON}
    options = {"embed": ["--shards", "s3://jobs/tars/part-*.tar"], "verify": [], "neighbors": ["0003"]}[verb]
    stopped(cli(verb, "s3://jobs/nowhere", *options, code=None, env=env, timeout=60), "s3://jobs/")


# ---- the cache of remote files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"graphbuild-cache-{os.getuid()}"


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for one in (path, path.with_suffix(remote.SUM)):
        if one.exists():
            os.utime(one, (then, then))


def with_sums(*copies: Path) -> set[Path]:
    return {*copies, *(copy.with_suffix(remote.SUM) for copy in copies)}


def test_copies_of_remote_files_go_when_they_were_not_used_for_a_day(cache: Path) -> None:
    store = Store("memory://cached")
    for name in "abc":
        store.write_bytes(f"{name}.bin", name.encode() * 1000)
    first, second = store.local_copy("a.bin"), store.local_copy("b.bin")
    partial = cache / "half.fetched"
    partial.write_bytes(b"half")
    for path in (first, second, partial):
        age(path, remote.CACHE_SECONDS + 60)
    assert store.local_copy("b.bin") == second  # used again
    third = store.local_copy("c.bin")
    assert set(cache.iterdir()) == with_sums(second, third)
    assert store.local_copy("a.bin").read_bytes() == b"a" * 1000


def test_copies_of_remote_files_stay_within_a_bound_but_for_those_just_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CACHE_BYTES", 2_500)
    store = Store("memory://bounded")
    copies = []
    for number in range(4):
        store.write_bytes(f"{number}.bin", b"x" * 1000)
        copies.append(store.local_copy(f"{number}.bin"))
    assert set(cache.iterdir()) == with_sums(*copies)  # all used within the hour
    for number, path in enumerate(copies):
        age(path, 2 * remote.SAFE_SECONDS - number)
    store.write_bytes("4.bin", b"x" * 1000)
    newest = store.local_copy("4.bin")
    assert set(cache.iterdir()) == with_sums(copies[3], newest)


def test_a_copy_that_cannot_be_fetched_leaves_nothing_behind(
    cache: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Proxy(s3.url) as proxy:
        for name, value in {**proxy.environment(s3.environment), **GIVE_UP_SOON}.items():
            monkeypatch.setenv(name, value)
        proxy.outage = "cut answer"
        with pytest.raises(StorageError, match=r"s3://jobs/tars/part-0000.tar cannot be reached"):
            Store("s3://jobs/tars").local_copy("part-0000.tar")
    assert not cache.exists() or list(cache.iterdir()) == []
