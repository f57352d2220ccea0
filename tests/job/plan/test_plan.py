"""The plan as users see it: its numbers by hand, its warnings, what it refuses, and that it changes nothing."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from aiohttp import web

from graphbuild.errors import ConfigError, InputError
from graphbuild.job.plan import lists, machine
from graphbuild.job.plan.case import Case, Cost
from graphbuild.job.plan.costs import room
from graphbuild.job.plan.job import Job, job_of
from graphbuild.job.plan.rates import Rates
from graphbuild.job.plan.show import cases, tell
from graphbuild.job.verbs import run_verb
from graphbuild.knn import engine
from graphbuild.recipe import Download, Embed, Index, Recipe, read_recipe
from graphbuild.runner.runner import Runner
from graphbuild.store import mapped
from graphbuild.store.store import Store

PIPELINES = Path(__file__).parents[3] / "pipelines"
BIN = Path(sys.executable).parent


def on(text: str, recipe: Recipe, rates: Rates, rows: int | None = None) -> dict[str, Cost]:
    ((_, found),) = cases(job_of("run", recipe, None, rows), recipe, rates, [machine.parse(text)])
    return {cost.name: cost for cost in found}


def words(rates: Rates, recipe: Recipe, *machines: str, rows: int | None = None) -> str:
    return tell(job_of("run", recipe, None, rows), recipe, rates, [machine.parse(text) for text in machines])


@pytest.mark.slow
def test_the_first_plan_on_a_new_machine_prints_everything_within_15_seconds(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    for recipe, options, says in (
        ("cc3m", [], "3,318,333 URLs"),
        ("cc12m", ["--rows", "400000000"], "400,000,000 URLs"),
    ):
        command = [str(BIN / "graphbuild"), "plan", str(PIPELINES / f"{recipe}.yaml"), *options]
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert says in done.stdout
        for column in ("2 cores", "1 H200*", "32 x 32 cores", "computed, not measured", "WARNING"):
            assert column in done.stdout, done.stdout
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert cpu < 15, f"{cpu:.1f} CPU seconds"
        assert seconds < 15 or os.getloadavg()[0] > (os.cpu_count() or 1), f"{seconds:.1f} s"


@pytest.mark.parametrize(
    ("card", "gpus", "engine"),
    [("NVIDIA A100-SXM4-80GB", 2, "exact"), ("NVIDIA L40S", 0, "partition"), ("", 0, "partition")],
)
def test_a_plan_for_this_machine_has_its_gpus(
    monkeypatch: pytest.MonkeyPatch, card: str, gpus: int, engine: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(card))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one = machine.here()
    assert (one.gpus, one.name.endswith(" + 2 A100 here")) == (gpus, gpus == 2)
    recipe = Recipe(embed=Embed(captions="cc3m.tsv", preset="cc3m"))
    assert Case(job_of("run", recipe, None, 2_900_000), recipe, one, Rates()).engine.name == engine


def test_figures_of_a_gpu_are_its_published_peaks_and_say_so(made_up: Rates) -> None:
    recipe = Recipe(embed=Embed(captions="cc3m.tsv", preset="cc3m"))
    found = on("cores=16,gpus=1,gpu=h200", recipe, made_up, rows=2_900_000)
    nodes, d, tokens = 2.9e6, 384, 12.7
    join = found["join"]
    by_hand = 2 * nodes**2 * d / 1979e12 + 19 * nodes**2 / 4.8e12  # int8 operations; bytes a pair
    assert join.on_gpu
    assert join.gpu_seconds * join.tasks == pytest.approx(by_hand, rel=0.01)
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384  # MiniLM's layers, and a pooler
    flop = 2 * weights + 4 * tokens * 384 * 6
    by_hand = 1.05 * tokens * nodes * (flop / 989e12 + 60 * 384 * 6 / 4.8e12)
    assert found["encode"].gpu_seconds * found["encode"].tasks == pytest.approx(by_hand, rel=0.01)
    text = words(made_up, recipe, "cores=16,gpus=1,gpu=h200", rows=2_900_000)
    assert "computed, not measured" in text
    assert next(line for line in text.splitlines() if line.startswith("join")).endswith("*")
    assert "computed" not in words(made_up, recipe, "cores=16", rows=2_900_000)


@pytest.mark.parametrize("name", ["exact", "partition"])
@pytest.mark.parametrize("nodes", [3_000, 400_000, 3_000_000])
def test_join_tasks_and_memory_are_those_that_the_build_prints(name: str, nodes: int, made_up: Rates) -> None:
    index = Index(engine=name, k=32, device="cpu")
    found = on("cores=8", Recipe(embed=Embed(captions="x.tsv", preset="cc3m"), index=index), made_up, rows=nodes)
    printed = engine.forecast(index, nodes, 384)
    assert f"; {found['join'].tasks} join task" in printed
    assert f"up to {(1e9 + found['join'].held) / 1e9:.1f} GB" in printed


def test_more_nodes_of_a_cluster_shorten_what_has_many_tasks_and_nothing_else(made_up: Rates) -> None:
    recipe = read_recipe(str(PIPELINES / "cc12m.yaml"))
    one, many = (on(f"nodes={nodes},cores=16,network=100", recipe, made_up) for nodes in (1, 8))
    for name in ("download", "encode", "search", "export"):
        assert many[name].seconds < one[name].seconds / 4, name
    for name in ("urls", "number", "moments"):
        assert many[name].core_seconds == one[name].core_seconds, name


def test_without_worker_processes_every_machine_runs_a_task_at_a_time(made_up: Rates) -> None:
    recipe = read_recipe(str(PIPELINES / "cc3m.yaml"))
    job = job_of("run", recipe)
    for machines in (machine.standard(None), [machine.parse("cores=16"), machine.parse("nodes=4,cores=8")]):
        none, one, every = (
            tell(job, recipe, made_up, [replace(each, workers=workers) for each in machines])
            for workers in (0, 1, None)
        )
        assert none == one
        assert none != every


def test_what_will_hurt_is_said_with_what_to_do(
    made_up: Rates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc3m = read_recipe(str(PIPELINES / "cc3m.yaml"))
    assert "tasks for 2,048 workers" in words(made_up, cc3m, "nodes=32,cores=64,network=100")
    assert "shard_size of 500 would busy all" in words(made_up, cc3m, "nodes=32,cores=64,network=100")
    assert "expect images from 5" in words(made_up, cc3m, "cores=2")
    assert "on a node: use --workers" in words(made_up, cc3m, "cores=64,memory=16")
    assert "GB are free: another STORE" in words(made_up, cc3m, "cores=2,disk=10")
    exact = cc3m.model_copy(update={"index": cc3m.index.model_copy(update={"engine": "exact"})})
    huge = words(made_up, exact, "cores=16,gpus=1,gpu=h200,memory=2000", rows=400_000_000)
    assert "join takes" in huge
    assert "--engine partition" in huge
    monkeypatch.setattr(mapped, "MOST", tmp_path / "max_map_count")
    for most, too_many in ((200_000, False), (40_000, True)):
        mapped.MOST.write_text(f"{most}\n")
        assert ("on every node" in words(made_up, cc3m, "cores=2", rows=100_000_000)) == too_many


def test_a_long_list_is_read_in_pieces_unless_its_format_cannot_be_cut(made_up: Rates) -> None:
    cc3m = read_recipe(str(PIPELINES / "cc3m.yaml"))
    bytes_a_row = job_of("run", cc3m, None, 1_000_000).list_bytes / 1e6
    costs = on("cores=16", cc3m, made_up, rows=400_000_000)
    assert costs["urls"].tasks == costs["count"].tasks == -(-4e8 * bytes_a_row // 2**30)
    assert costs["urls"].core_seconds * costs["urls"].tasks == pytest.approx(4e8 * made_up.list_row)
    assert "count" not in on("cores=16", cc3m, made_up, rows=1_000_000)
    as_csv = cc3m.model_copy(update={"download": cc3m.download.model_copy(update={"urls": "no.csv", "preset": None})})
    assert on("cores=16", as_csv, made_up, rows=400_000_000)["urls"].tasks == 1


@pytest.mark.parametrize("samples", [10_000_000, 258_000_000, 1_000_000_000])
def test_no_task_of_numbering_takes_more_than_2_gb(made_up: Rates, samples: int) -> None:
    cc3m = read_recipe(str(PIPELINES / "cc3m.yaml"))
    job = replace(job_of("run", cc3m, None, samples), samples=samples, nodes=samples)
    ((_, found),) = cases(job, cc3m, made_up, [machine.parse("cores=16")])
    costs = {cost.name: cost for cost in found if cost.name in ("split", "unique", "mark", "number")}
    assert max(cost.ram for cost in costs.values()) < 2e9
    tasks = -(-samples // 16_000_000)
    names = ["number"] if samples < 16_000_000 else ["split", "unique", "mark", "number"]
    assert {name: cost.tasks for name, cost in costs.items()} == dict.fromkeys(names, tasks)


@pytest.mark.parametrize("joined", ["by key", "by order", "as members"])
@pytest.mark.parametrize("samples", [5_000_000, 258_000_000, 1_000_000_000])
def test_no_task_takes_more_than_2_gb_where_vectors_lie_beside_tars(made_up: Rates, samples: int, joined: str) -> None:
    options = {
        "by key": {"vectors": "img_emb", "vector_keys": "metadata"},
        "by order": {"vectors": "img_emb"},
        "as members": {"vector_member": "npy"},
    }
    recipe = Recipe(embed=Embed.model_validate({"shards": "tars", **options[joined]}))
    cc3m = read_recipe(str(PIPELINES / "cc3m.yaml"))
    job = replace(job_of("run", cc3m, None, samples), source="tars", samples=samples, nodes=samples)
    (found,) = (costs for _, costs in cases(job, recipe, made_up, [machine.parse("cores=16")]))
    costs = {cost.name: cost for cost in found if cost.name in ("split", "unique", "mark", "number")}
    assert max(cost.ram for cost in costs.values()) < 2e9
    assert costs.pop("number").tasks == 1
    groups = 2 * -(-samples // 16_000_000) if joined == "by key" and samples > 8_000_000 else 0
    assert {name: cost.tasks for name, cost in costs.items()} == ({} if not groups else dict.fromkeys(costs, groups))
    assert len(costs) == (3 if groups else 0)


def test_a_list_is_looked_at_not_read(tmp_path: Path) -> None:
    rows = [f"a dog and cat {number % 700}" for number in range(1_000)]
    urls = [f"http://no-such-host.invalid/{number}.jpg" for number in range(1_000)]
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": urls, "caption": rows}), path)
    job = job_of("run", Recipe(download=Download(urls=str(path))))
    assert job.rows == 1_000
    assert job.nodes == round(job.samples * 0.7)
    assert job.tokens == pytest.approx(7, abs=0.5)  # five words and two marks
    text = tmp_path / "list.tsv"
    text.write_text("caption\turl\n" + "".join(f"{a}\t{b}\n" for a, b in zip(rows, urls, strict=True)) * 200)
    assert job_of("run", Recipe(download=Download(urls=str(text)))).rows == pytest.approx(200_000, rel=0.01)
    np.save(tmp_path / "v.npy", np.ones((123, 48), np.float16))
    job = job_of("run", Recipe(embed=Embed(vectors=str(tmp_path / "v.npy"))))
    assert (job.nodes, job.d, job.k) == (123, 48, 64)


@pytest.fixture
def web_folder(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that gives the files of tmp_path, by ranges too."""
    application = web.Application()
    application.router.add_static("/", tmp_path)
    runner = web.AppRunner(application)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(step: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(step, loop).result()

    wait(runner.setup())
    wait(web.TCPSite(runner, "127.0.0.1", 0).start())
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    wait(runner.cleanup())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("name", ["list.parquet", "list.csv", "list.tsv.gz"])
def test_a_list_at_a_url_with_a_query_has_its_own_format(tmp_path: Path, web_folder: str, name: str) -> None:
    captions = [f"a dog\nand {number} cats" for number in range(1_000)]
    if name == "list.parquet":
        pq.write_table(pa.table({"caption": captions}), tmp_path / name)
    else:
        content = "\n".join(["caption", *(caption.replace("\n", " ") for caption in captions)]).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    job = job_of("run", Recipe(embed=Embed(captions=f"{web_folder}/{name}?download=true")))
    assert job.rows == 1_000


def test_class_names_anywhere_tell_the_nodes_of_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(50):
            info = tarfile.TarInfo(f"{number}.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"%d" % (number % 3)))
    with fsspec.open("memory://classes/names.txt", "w") as file:
        file.write("cat\ndog\nbird\n")
    embed = Embed(shards=f"{tmp_path}/*.tar", caption_member="cls", class_names="memory://classes/names.txt")
    job = job_of("run", Recipe(embed=embed))
    assert (job.samples, job.nodes, job.assumed) == (50, 3, ())
    with pytest.raises(InputError, match=r"no\.txt does not exist"):
        job_of("run", Recipe(embed=embed.model_copy(update={"class_names": f"{tmp_path}/no.txt"})))


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_last_line_without_an_end_is_a_row(tmp_path: Path, end: str) -> None:
    for name, header in (("list.jsonl", ""), ("list.csv", "caption\n")):
        (tmp_path / name).write_text(header + '{"caption": "a dog"}' + end)
        assert job_of("run", Recipe(embed=Embed(captions=str(tmp_path / name)))).rows == 1


def test_links_die_with_the_years_as_users_reported() -> None:
    for year, when, reported in ((2021, 1.45, 0.792), (2021, 4.3, 0.623), (2018, 5.55, 0.70)):
        assert lists.FRESH * lists.KEPT_A_YEAR**when == pytest.approx(reported, abs=0.08), year
    assert lists.expected_success(2018) < lists.expected_success(2021) < lists.expected_success(None) == 0.9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cores=x", "cores: Input should be a valid integer"),
        ("memory=3", "cores: Field required"),
        ("cores=4,disk=0", "disk: Input should be greater than 0"),
        ("cores=4,gpu=abacus", "gpu: Input should be 'h200', 'h100', 'a100' or 'l4'"),
        ("cores=4,core=4", "core: Extra inputs are not permitted"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        machine.parse(text)


def test_a_recipe_without_a_source_or_with_a_missing_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no source"):
        job_of("run", Recipe())
    with pytest.raises(InputError, match="does not exist"):
        job_of("run", Recipe(download=Download(urls="nowhere.tsv")))
    assert isinstance(job_of("run", Recipe(download=Download(urls="nowhere.tsv")), None, 1_000), Job)


def snapshot(store: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in store.rglob("*")}


@pytest.mark.slow
def test_a_dry_run_says_what_is_left_and_touches_nothing(tmp_path: Path) -> None:
    captions = tmp_path / "captions.tsv"
    captions.write_text("caption\n" + "".join(f"a picture of {number} things\n" for number in range(400)))
    store = tmp_path / "out"

    def run(*arguments: object, code: int = 0) -> str:
        command = [str(BIN / "graphbuild"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    told = run("embed", store, "--captions", captions, "--dry-run")
    assert "400 samples -> 400 nodes" in told
    assert not store.exists()
    assert "run `graphbuild embed" in run("index", store, "--dry-run", code=2)
    run("embed", store, "--captions", captions, "--workers", 0)
    before = snapshot(store)
    again = run("embed", store, "--captions", captions, "--dry-run")
    assert [line.split()[-1] for line in again.splitlines() if line.startswith(("captions", "encoding"))] == [
        "done"
    ] * 2
    assert "400 nodes" in run("index", store, "--k", 8, "--dry-run")
    changed = run("embed", store, "--captions", captions, "--template", "x {}", "--dry-run", code=2)
    assert "template: {} -> x {}" in changed
    assert snapshot(store) == before


def test_a_graph_that_grows_is_planned_with_the_lists_that_are_kept(made_up: Rates, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, store = tmp_path / "v.npy", Store(str(tmp_path / "out"))
    whole = rng.standard_normal((3_000, 16)).astype(np.float16)
    index = Index(k=4, engine="exact", device="cpu")
    recipe = Recipe(embed=Embed(vectors=str(vectors), shard_size=1_000), index=index)
    with Runner(workers=0) as runner:
        np.save(vectors, whole[:2_000])
        for verb in ("embed", "index"):
            run_verb(verb, recipe, store, runner)
        np.save(vectors, whole)
        run_verb("embed", recipe, store, runner, force=True)
    job = job_of("index", recipe, store)
    assert (job.nodes, job.first_new) == (3_000, 2_000)
    ((_, found),) = cases(job, recipe, made_up, [machine.parse("cores=2")])
    ((_, anew),) = cases(replace(job, first_new=0), recipe, made_up, [machine.parse("cores=2")])
    assert found[0].name == "base"
    joins = [next(cost for cost in one if cost.name == "join") for one in (found, anew)]
    assert joins[0].core_seconds * joins[0].tasks < joins[1].core_seconds * joins[1].tasks


def test_scratch_needs_room_until_the_last_stage_that_reads_it(made_up: Rates) -> None:
    recipe = Recipe(embed=Embed(vectors="a.npy"), index=Index(engine="partition", k=32))
    job = Job("vectors", 10**7, 10**7, 10**7, 1_000, verb="index", k=32)
    ((_, found),) = cases(job, recipe, made_up, [machine.parse("cores=8")])
    wrote = {cost.name: cost.written for cost in found}
    ordered = sum(wrote[name] for name in ("prepare", "moments", "order"))
    merging = ordered + wrote["join"] + wrote["merge"]
    searching = ordered + sum(wrote[name] for name in ("merge", "refine", "search"))
    assert room(found) == pytest.approx(max(ordered + wrote["codes"], merging, searching), rel=1e-9)
    assert room(found) < 0.7 * sum(wrote.values())
