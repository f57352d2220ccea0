"""The table of rates against the benchmarks that it is drawn from, the probe, and what a store's own tasks took."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphbuild.job.plan import machine
from graphbuild.job.plan.case import Cost
from graphbuild.job.plan.encoder_facts import MINILM, NO_ENCODER
from graphbuild.job.plan.job import Job, finished, job_of
from graphbuild.job.plan.rates import KINDS, PROBED, Rates, kind_here, probe_here, scaled
from graphbuild.job.plan.show import cases, plan_verb
from graphbuild.job.steps import steps_of
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.runner.stage import records, state_path
from graphbuild.store.store import Store

RESULTS = Path(__file__).parents[3] / "benchmarks/results"
NODES = {"minilm_50k.npy": 50_000, "captions.npy": 251_610, "mixed_250000.npy": 250_000, "mixed_3000000.npy": 3_000_000}
TIMED = ("codes", "join", "search")  # what takes long there


def rates_of(kind: str) -> Rates:
    """Of the machine whose row that is."""
    return scaled(kind, replace(PROBED, encoder=KINDS[kind].encoder))


def by_stage(job: Job, recipe: Recipe, rates: Rates, on: str = "cores=2") -> dict[str, Cost]:
    ((_, found),) = cases(job, recipe, rates, [machine.parse(on)])
    return {cost.name: cost for cost in found}


@pytest.mark.parametrize(("kind", "results"), [("AMX", "knn.jsonl"), ("AVX-512 with VNNI", "knn_epyc.jsonl")])
def test_an_index_takes_what_the_benchmarks_measured_on_that_kind_of_cpu(kind: str, results: str) -> None:
    rows = [json.loads(line) for line in (RESULTS / results).read_text().splitlines()]
    rows = [row for row in rows if "stages" in row and row["settings"].get("recall", 0.99) in (0.95, 0.99)]
    assert len({(row["vectors"], row["name"]) for row in rows}) >= 3
    for row in rows:
        nodes = NODES[row["vectors"]]
        index = Index(engine=row["name"], k=row["k"], recall=row["settings"].get("recall", 0.99), device="cpu")
        job = Job("vectors", nodes, nodes, nodes, max(nodes // 10_000, 1), NO_ENCODER, verb="index", k=row["k"])
        costs = by_stage(job, Recipe(index=index), rates_of(kind))
        forecast = sum(costs[name].core_seconds * costs[name].tasks / 2 for name in TIMED)
        measured = sum(row["stages"][name] for name in TIMED)
        assert measured / 2 < forecast < 2 * measured, (
            row["vectors"],
            row["name"],
            row["settings"],
            forecast,
            measured,
        )


@pytest.mark.parametrize("nodes", [12_400_000, 258_000_000, 1_000_000_000])
def test_recall_takes_few_percent_at_any_size_and_tasks_have_bounded_memory(nodes: int) -> None:
    job = Job("vectors", nodes, nodes, nodes, nodes // 10_000, NO_ENCODER, verb="index", k=32)
    for recall in (0.95, 0.99):
        recipe = Recipe(index=Index(k=32, recall=recall, engine="partition", device="cpu"))
        costs = by_stage(job, recipe, Rates(), "nodes=32,cores=32,memory=128")
        seconds = {name: cost.core_seconds * cost.tasks for name, cost in costs.items()}
        certify = seconds.pop("certify")
        assert certify < (0.05 if nodes > 12_400_000 else 0.07) * sum(seconds.values())
        assert all(cost.ram < 4e9 for cost in costs.values())
        for name in ("prepare", "certify", "moments", "codes", "order", "refine"):
            assert costs[name].core_seconds < 300
        assert costs["prepare"].seconds < 900, "its last task orders the leaders"


@pytest.mark.parametrize(("kind", "captions_a_cpu_second"), [("AMX", 847), ("AVX-512 with VNNI", 475)])
def test_encoding_takes_what_the_benchmarks_measured_on_that_kind_of_cpu(kind: str, captions_a_cpu_second: int) -> None:
    tables = [(RESULTS / name).read_text() for name in ("embed_xeon.md", "embed_epyc.md")]
    assert any(f" | {captions_a_cpu_second} | " in text for text in tables)
    job = Job("captions", 20_000, 20_000, 20_000, 2, MINILM, verb="embed", k=1, tokens=29_266 / 2_000)
    encode = by_stage(job, Recipe(embed=Embed(captions="x.tsv", device="cpu")), rates_of(kind))["encode"]
    assert 10_000 / encode.core_seconds == pytest.approx(captions_a_cpu_second, rel=0.15)


def test_a_machine_twice_as_slow_takes_twice_as_long_for_what_it_is_slow_at() -> None:
    fast, slow = PROBED, replace(PROBED, memory=2 * PROBED.memory, encoder=3 * PROBED.encoder)
    before, after = (scaled("AVX2", probe) for probe in (fast, slow))
    assert before == Rates()
    assert after.candidate == pytest.approx(2 * before.candidate)
    assert after.token == pytest.approx(3 * before.token)
    assert (after.tar_sample, after.flop) == (before.tar_sample, before.flop)


def test_the_probe_takes_under_5_cpu_seconds_and_measures_what_numpy_does(tmp_path: Path) -> None:
    begin = time.process_time()
    probe = probe_here(tmp_path)
    assert time.process_time() - begin < 5
    assert list(tmp_path.iterdir()) == []
    a, b = np.ones((1_024, 384), np.float32), np.ones((384, 1_536), np.float32)
    times = []
    for _ in range(20):
        begin = time.process_time()
        a @ b
        times.append(time.process_time() - begin)
    assert probe.float32 == pytest.approx(min(times) / (2 * 1_024 * 384 * 1_536), rel=2)
    assert kind_here() in KINDS


def test_the_seconds_that_a_stores_own_tasks_took_outrank_the_table(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((4_000, 32)).astype(np.float16))
    recipe = Recipe(
        embed=Embed(vectors=str(tmp_path / "v.npy"), shard_size=1_000), index=Index(k=8, engine="exact", device="cpu")
    )
    store = Store(str(tmp_path / "out"))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, recipe, store, runner)
    for stage, seconds in (("vectors", 40.0), ("search", 60.0), ("certify", 8.0)):
        for name, record in records(store, stage).items():
            store.write_json(state_path(stage, name), {**record, "seconds": seconds})
    store.remove("nodes/00003.npy")
    told = "\n".join(plan_verb("embed", recipe, store, 1))
    assert "vectors: by what this store's finished tasks took" in told
    assert "finished tasks" not in "\n".join(plan_verb("embed", recipe, store, 1, force=True)), "of other settings"
    assert next(line for line in told.splitlines() if line.startswith("vectors ")).split()[1] == "1"
    job = replace(job_of("run", recipe), finished=finished(store, steps_of("run", recipe)))
    costs = by_stage(job, recipe, Rates())
    assert costs["vectors"].core_seconds == pytest.approx(40)
    assert costs["search"].core_seconds == pytest.approx(60)
    twice = replace(job, rows=8_000, samples=8_000, nodes=8_000, shards=4)
    costs = by_stage(twice, recipe, Rates())
    assert costs["vectors"].core_seconds == pytest.approx(80), "shards of twice as many rows"
    assert costs["search"].core_seconds == pytest.approx(120)
    assert 60 < by_stage(replace(job, k=16), recipe, Rates())["search"].core_seconds < 120, "longer lists"
