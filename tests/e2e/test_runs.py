"""How a job runs: with any workers, again, after changes, crashes and losses, on a cluster and on S3, it ends the same.

Stores are compared file by file as bytes; only the field `seconds` of the records in _state/ may differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
Process = subprocess.Popen[str] | forked.Started
Digests = dict[str, str]
DERIVED = {"manifest.json", "shards.parquet", "shards/sizes.json"}  # written again, the same, when their stage has work
K = 5
TARS, SAMPLES = 4, 12  # samples a tar


def digests(store: Path) -> Digests:
    """Path in the store -> sha256 of every file, records without their `seconds`."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): digest(path.name, path.read_bytes()) for path in files}


def digest(name: str, content: bytes) -> str:
    if name.endswith(".done.json"):
        record = json.loads(content)
        assert record.pop("seconds") >= 0
        content = json.dumps(record, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def mtimes(store: Path) -> dict[str, int]:
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def members(pictures: Iterable[tuple[int, Picture]]) -> list[tuple[str, bytes]]:
    return [m for i, (jpeg, text) in pictures for m in ((f"{i:04d}.jpg", jpeg), (f"{i:04d}.txt", text.encode()))]


@pytest.fixture(scope="session")
def tars(pictures: list[Picture], write_tar: WriteTar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four tars; the last image of each has the first one's caption."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(TARS):
        mine = list(enumerate(pictures))[number * SAMPLES : (number + 1) * SAMPLES]
        mine[-1] = (mine[-1][0], (mine[-1][1][0], pictures[0][1]))
        write_tar(folder / f"part-{number:04d}.tar", members(mine))
    return folder


@pytest.fixture(scope="session")
def recipe(tars: Path, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(f"embed:\n  shards: {tars}/part-*.tar\n  encoder: {words}\nindex:\n  k: {K}\n")
    return path


@pytest.fixture(scope="session")
def built(recipe: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store that all others are compared with, made by two workers. Copy it to change it."""
    store = tmp_path_factory.mktemp("built") / "store"
    cli("run", recipe, store, "--workers", 2)
    return store


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "store")  # with its modification times
    return tmp_path / "store"


# ---- the same bytes


@pytest.mark.parametrize("workers", [None, *(pytest.param(few, marks=pytest.mark.slow) for few in (0, 1))])
def test_any_number_of_workers_writes_the_same_bytes(
    workers: int | None, built: Path, recipe: Path, cli: Cli, tmp_path: Path
) -> None:
    """None: as many as so small a job wants, which is none."""
    said = cli("run", recipe, tmp_path / "store", *(() if workers is None else ("--workers", workers))).stderr
    assert ("so small a job runs in this process" in said) == (workers is None)
    assert digests(tmp_path / "store") == digests(built)


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextlib.contextmanager
def two_node_cluster(environment: dict[str, str]) -> Iterator[str]:
    """A Ray cluster of two nodes with one CPU each, in processes of its own; gives its address."""
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            pytest.fail(f"no cluster: {process.communicate()[1]}")
        try:
            yield address
        finally:
            process.communicate()  # closes its input, on which it waits


@pytest.mark.slow
def test_a_cluster_of_two_nodes_writes_the_same_bytes(
    built: Path, recipe: Path, cli: Cli, environment: dict[str, str], tmp_path: Path
) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": hashlib.sha256(os.urandom(32)).hexdigest()}
    with two_node_cluster({**environment, **token}) as address:
        said = cli("run", recipe, tmp_path / "store", "--address", address, env=token).stderr
    assert "in this process" not in said
    assert digests(tmp_path / "store") == digests(built)


# ---- crashes

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


def descendants(pid: int) -> dict[int, str]:
    """All processes below one: pid -> command line."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found, generation = set(), {pid}
    while generation:
        generation = {child for child, parent in parents.items() if parent in generation}
        found |= generation
    return {child: names.get(child, "") for child in found}


def workers_of(process: Process, name: str = "ray::Worker") -> list[int]:
    return [pid for pid, command in descendants(process.pid).items() if command.startswith(name)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], process: Process, seconds: float = 120) -> Any:
    """The first true value of a condition, while a process runs."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    process.kill()
    return pytest.fail(f"waited in vain; exit code {process.poll()}\n{process.communicate()[1]}")


def done(store: Path, stage: str) -> int:
    return len(list((store / "_state" / stage).glob("*.done.json")))


@pytest.fixture
def start(program: Path, environment: dict[str, str]) -> Iterator[Callable[..., forked.Started]]:
    """Start `graphbuild ARGUMENTS` and go on; what still runs at the end is killed."""
    started: list[forked.Started] = []

    def run(*arguments: object) -> forked.Started:
        process = forked.Started([str(program), *map(str, arguments)], environment)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@needs_proc
@pytest.mark.slow
def test_a_run_outlives_a_killed_worker_with_the_same_bytes(
    built: Path, recipe: Path, start: Callable[..., forked.Started], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start("run", recipe, store, "--workers", 2)
    wait_for(lambda: done(store, "texts") == TARS and (store / "manifest.json").read_bytes().count(b'"texts"'), process)
    busy = wait_for(lambda: workers_of(process, "ray::Worker.attempt"), process)
    assert done(store, "encode") == 0  # it is still loading the encoder
    os.kill(busy[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "its worker died" in errors
    assert digests(store) == digests(built)


@needs_proc
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    built: Path, recipe: Path, start: Callable[..., forked.Started], cli: Cli, tmp_path: Path, workers: int
) -> None:
    store = tmp_path / "store"
    process = start("run", recipe, store, "--workers", workers)
    wait_for(lambda: done(store, "encode") >= 1, process)
    workers = workers_of(process)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)  # they notice that the driver is gone, and may have ended their task by then
    finished = {name: when for name, when in mtimes(store).items() if re.match(r"_state/encode/\d+\.done\.json$", name)}
    again = cli("run", recipe, store, "--workers", 0)
    assert finished.items() <= mtimes(store).items()  # what was done is kept
    left = TARS - len(finished)
    work = f"{left} tasks? in .*, {len(finished)} done before" if left else "up to date"
    assert re.search(f"encoding +{work}", again.stderr)
    assert digests(store) == digests(built)


# ---- again


def cpu_seconds() -> float:
    """Of the commands that have ended: other tests run beside them, so time by the clock says little."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("verb", ["run", "embed", "index", "export"])
def test_a_second_run_of_a_verb_does_nothing_and_says_so_in_three_seconds(
    verb: str, built: Path, recipe: Path, cli: Cli
) -> None:
    before = mtimes(built)
    arguments = ["run", recipe, built] if verb == "run" else [verb, built]
    begin = cpu_seconds()
    again = cli(*arguments)
    seconds = cpu_seconds() - begin
    assert mtimes(built) == before
    stages = {"run": 10, "embed": 6, "index": 3, "export": 1}[verb]
    assert again.stderr.count("up to date") == len(again.stderr.splitlines()) == stages
    assert seconds < 3


# ---- changes


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["embed", "--template", "a photo of {}"], "template: {} -> a photo of {}"),
        (["embed", "--caption-member", "json:caption"], "caption_member: auto -> json:caption"),
        (["index", "--k", 7], "k: 5 -> 7"),
        (["index", "--engine", "partition"], "engine: exact -> partition"),
        (["export", "--embeddings", "float16"], "embeddings: int8 -> float16"),
    ],
)
def test_a_changed_setting_stops_with_its_name_and_changes_nothing(
    arguments: list[object], difference: str, built: Path, cli: Cli
) -> None:
    before = mtimes(built)
    verb, *options = arguments
    stopped = cli(verb, built, *options, code=2)
    assert difference in stopped.stderr
    assert "--force" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert mtimes(built) == before


def test_force_rebuilds_what_a_changed_setting_touches_and_back_again(
    built: Path, recipe: Path, copy: Path, cli: Cli, tmp_path: Path
) -> None:
    wider = tmp_path / "wider.yaml"
    wider.write_text(recipe.read_text().replace(f"k: {K}", "k: 7"))
    before = mtimes(copy)
    cli("run", wider, copy, "--workers", 0, "--force")
    assert all(np.load(copy / f"graph/{number:05d}.neighbors.npy").shape[1] == 7 for number in range(TARS))
    assert json.loads((copy / "manifest.json").read_bytes())["recall"]["k"] == 7
    assert len(pq.read_table(copy / "shards/part-0001.graph.parquet")["neighbors"][0].as_py()) == 7
    kept = {name: when for name, when in before.items() if name.startswith(("samples/", "nodes/"))}
    assert kept.items() <= mtimes(copy).items()
    cli("run", recipe, copy, "--workers", 0, "--force")
    assert digests(copy) == digests(built)


def test_forcing_one_verb_leaves_later_ones_to_be_done_and_complains_of_nothing(copy: Path, cli: Cli) -> None:
    forced = cli("index", copy, "--k", 7, "--workers", 0, "--force")
    assert "export" not in json.loads((copy / "manifest.json").read_bytes())["stages"]
    assert "missing" not in forced.stderr


@pytest.mark.parametrize(
    "lost",
    [
        "_state/scan/00001.parquet",
        "_state/scan/00001.done.json",
        "nodes/00002.parquet",
        "graph/00001.neighbors.npy",
        "_state/moments/moments.npy",
        "graph/basis.npy",
        "shards/part-0003.graph.parquet",
        "_state/export/00000.done.json",
    ],
)
def test_a_lost_file_is_made_again_and_nothing_else(lost: str, built: Path, recipe: Path, copy: Path, cli: Cli) -> None:
    before = mtimes(copy)
    (copy / lost).unlink()
    cli("run", recipe, copy, "--workers", 0)
    assert digests(copy) == digests(built)
    changed = {name for name, when in mtimes(copy).items() if when != before[name]} - DERIVED
    assert lost in changed
    moments = {"_state/moments/moments.npy", "graph/basis.npy"}  # of one task
    shard = "all" if lost in moments else re.sub(r"\D", "", lost)[-3:]
    assert [name for name in changed - (moments if lost in moments else {lost}) if shard not in name] == []


@pytest.mark.parametrize("stopped", [[1], pytest.param([0, 2], marks=pytest.mark.slow)])
def test_tars_whose_scan_failed_get_the_numbers_that_they_would_have_had(
    stopped: list[int], built: Path, recipe: Path, tmp_path: Path, cli: Cli
) -> None:
    """The state that a full disk or a kill leaves: shards behind them are scanned, nothing is numbered."""
    store = tmp_path / "store"
    shutil.copytree(built / "_state" / "scan", store / "_state" / "scan")
    for number in stopped:
        (store / f"_state/scan/{number:05d}.done.json").unlink()
    cli("run", recipe, store, "--workers", 0)
    assert digests(store) == digests(built)


def test_a_shortened_file_is_made_again(built: Path, recipe: Path, copy: Path, cli: Cli) -> None:
    path = copy / "graph/00002.similarities.npy"
    path.write_bytes(path.read_bytes()[:100])
    again = cli("run", recipe, copy, "--workers", 0)
    assert "graph/00002.similarities.npy is missing or of another size" in again.stderr
    assert digests(copy) == digests(built)


@pytest.fixture(scope="session")
def extra(tars: Path, pictures: list[Picture], write_tar: WriteTar) -> str:
    """The same tars and a new one whose name comes first; its first caption is already a node. A pattern."""
    mine = list(enumerate(pictures))[100:106]
    mine[0] = (100, (mine[0][1][0], pictures[0][1]))
    write_tar(tars / "extra.tar", members(mine))
    return f"{tars}/{{extra,part-*}}.tar"


def test_a_new_tar_is_taken_or_refused_before_anything_changes(copy: Path, extra: str, cli: Cli) -> None:
    before = digests(copy)
    added = cli("embed", copy, "--shards", extra, "--workers", 0, code=None)
    if added.returncode:
        assert added.returncode == 2
        assert "extra.tar" in added.stderr
        assert digests(copy) == before


def test_a_new_tar_gets_the_next_numbers_and_the_others_are_not_touched(
    built: Path, copy: Path, recipe: Path, tars: Path, extra: str, pictures: list[Picture], cli: Cli, tmp_path: Path
) -> None:
    before = mtimes(copy)
    wider = tmp_path / "recipe.yaml"
    wider.write_text(recipe.read_text().replace(f"{tars}/part-*.tar", f"'{extra}'"))
    cli("run", wider, copy, "--workers", 0)
    after = mtimes(copy)
    kept = [
        name for name in before if name.startswith(("_state/scan/", "_state/encode/")) or re.match(r"nodes/.*npy", name)
    ]
    assert len(kept) == 4 * TARS
    assert [name for name in kept if after[name] != before[name]] == []
    rows = [row for n in range(TARS + 1) for row in pq.read_table(copy / f"samples/{n:05d}.parquet").to_pylist()]
    nodes = [row for n in range(TARS + 1) for row in pq.read_table(copy / f"nodes/{n:05d}.parquet").to_pylist()]
    assert [row["row"] for row in rows] == list(range(TARS * SAMPLES + 6))
    assert rows[: TARS * SAMPLES] == [
        row for n in range(TARS) for row in pq.read_table(built / f"samples/{n:05d}.parquet").to_pylist()
    ]
    old = TARS * (SAMPLES - 1)
    assert [row["node"] for row in rows[TARS * SAMPLES :]] == [0, *range(old, old + 5)]
    assert [row["node"] for row in nodes] == list(range(old + 5))
    assert nodes[0]["samples"] == TARS + 2
    assert [row["caption"] for row in rows[-5:]] == [caption for _, caption in pictures[101:106]]
    sizes = json.loads((copy / "shards/sizes.json").read_bytes())
    assert sizes == {"extra.tar": 6, **{f"part-{n:04d}.tar": SAMPLES for n in range(TARS)}}
    assert "no problems" in cli("verify", copy).stdout


# ---- damage


def test_verify_finds_a_flipped_bit_in_every_kind_of_file(copy: Path, cli: Cli) -> None:
    kinds = ["samples/00001.parquet", "nodes/00001.parquet", "nodes/00001.npy", "shards/part-0001.graph.parquet"]
    kinds += [f"graph/00001.{what}.npy" for what in ("neighbors", "similarities", "background", "sketch")]
    kinds += ["_state/scan/00001.parquet", "_state/number/nodes.npy", "_state/number/counts.npy"]
    kinds += ["_state/moments/moments.npy", "graph/basis.npy"]
    assert "no problems" in cli("verify", copy).stdout
    for name in kinds:
        flip_bit(copy / name)
    found = cli("verify", copy, code=1)
    for name in kinds:
        assert f"BAD  {name}: its content has changed" in found.stdout
    assert found.stdout.count("BAD") == len(kinds)


@pytest.mark.parametrize("place", [0.0, 0.5])
def test_verify_finds_a_flipped_bit_in_a_tar_made_elsewhere(place: float, built: Path, tars: Path, cli: Cli) -> None:
    tar = tars / "part-0002.tar"
    status = tar.stat()
    whole = tar.read_bytes()
    try:
        flip_bit(tar, place)
        found = cli("verify", built, code=1)
    finally:
        tar.write_bytes(whole)
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "BAD" in found.stdout
    assert "part-0002.tar" in found.stdout
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "name", ["manifest.json", "recipe.yaml", "_state/search/00001.done.json", "_state/assign/00001.done.json"]
)
def test_verify_survives_damage_to_its_own_records_and_names_the_file(name: str, copy: Path, cli: Cli) -> None:
    content = bytearray((copy / name).read_bytes())
    content[content.index(b":")] ^= 1  # no longer JSON or YAML
    (copy / name).write_bytes(content)
    found = cli("verify", copy, code=1)
    assert name in found.stdout + found.stderr
    assert "Traceback" not in found.stderr


def flip_bit(path: Path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


# ---- an object store


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[Any, dict[str, str]]]:
    """An S3 server on loopback: a client for it, and the environment in which commands find it."""
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    try:
        yield client, environment
    finally:
        server.stop()


def objects(client: Any, prefix: str) -> dict[str, bytes]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="jobs", Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key.removeprefix(prefix): client.get_object(Bucket="jobs", Key=key)["Body"].read() for key in keys}


@pytest.mark.slow
def test_a_job_on_s3_writes_the_same_files_as_on_disk(built: Path, tars: Path, words: str, cli: Cli) -> None:
    with s3_server() as (client, env):
        client.create_bucket(Bucket="jobs")
        for tar in tars.glob("part-*.tar"):
            client.upload_file(str(tar), "jobs", f"tars/{tar.name}")
        store = "s3://jobs/made/store"
        source = ("--shards", "s3://jobs/tars/part-*.tar", "--encoder", words)
        cli("embed", store, *source, "--workers", 1, env=env)
        cli("index", store, "--k", K, "--workers", 0, env=env)
        cli("export", store, "--workers", 0, env=env)
        first = objects(client, "made/store/")
        assert cli("embed", store, env=env).stderr.count("up to date") == 6
        assert objects(client, "made/store/") == first
        assert "no problems" in cli("verify", store, env=env).stdout
        client.put_object(Bucket="jobs", Key="made/store/nodes/00001.npy", Body=b"\x00" + first["nodes/00001.npy"][1:])
        assert "BAD  nodes/00001.npy" in cli("verify", store, env=env, code=1).stdout
    local = {str(path.relative_to(built)): path.read_bytes() for path in built.rglob("*") if path.is_file()}
    assert first.keys() == local.keys()
    placed = {"manifest.json", "recipe.yaml", "shards.parquet"}  # these name the tars' places
    records = {name for name in local if name.endswith(".done.json")}
    for name in local.keys() - records - placed:
        assert first[name] == local[name], name
    for name in records:
        assert json.loads(first[name])["outputs"] == json.loads(local[name])["outputs"], name
    manifests = [json.loads(content["manifest.json"]) for content in (first, local)]
    for manifest in manifests:
        del manifest["stages"], manifest["recipe"], manifest["checksum"]
        del manifest["shards"]["bytes"], manifest["shards"]["sha256"]
    assert manifests[0] == manifests[1]
    tables = [pl.read_parquet(io.BytesIO(content["shards.parquet"])).drop("tar_url") for content in (first, local)]
    assert tables[0].equals(tables[1])


# ---- the command line itself


def test_help_is_there_in_half_a_second(cli: Cli) -> None:
    seconds = []
    for _ in range(3):
        begin = cpu_seconds()
        cli("--help")
        seconds.append(cpu_seconds() - begin)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("verb", ["demo", "run", "download", "embed", "index", "export", "neighbors", "verify", None])
def test_help_fits_80_columns(verb: str | None, cli: Cli) -> None:
    text = cli(*([verb] if verb else []), "--help", env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "Usage: graphbuild" in text
