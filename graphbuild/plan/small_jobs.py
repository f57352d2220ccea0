"""The calibration: three small jobs on this machine with all its cores, timed by stage and task, and their memory.

Run as a process of its own (`python -m graphbuild.plan.small_jobs OUT.json`), so that Ray, torch and a cluster's
address of the caller stay out of it. About a minute on two cores, 600 MB of memory a core beside the workers'.
What is measured is what the formulas of costs.py ask for (`calibration.Rates`), no more.
"""

from __future__ import annotations

import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from graphbuild.plan.calibration import CALIBRATED, MOST_WORKERS, STEP, Rates, cores_here, identity_here
from graphbuild.plan.one_process import alone, cache_bytes, mixture
from graphbuild.plan.watch import Share, WorkerMemory
from graphbuild.recipe import Embed, Export, Index, Recipe
from graphbuild.stage import records
from graphbuild.store import Json, Store

TARS, TAR_SAMPLES = CALIBRATED.tars, CALIBRATED.tar_samples
VECTORS, FEW_VECTORS, WIDTH, K = CALIBRATED.nodes, CALIBRATED.few_nodes, CALIBRATED.d, CALIBRATED.k
LONG_ENOUGH = 0.5  # seconds, for a share of the processor to be told by a clock of 10 ms
WORDS = """a the of in on with and two small large red blue old young man woman dog cat street house tree river mountain
standing sitting running holding near under over table chair window light night morning city beach boat train car sky
bicycle field flowers snow rain bird horse water road bridge market kitchen garden wall door sign photo"""


def measure() -> Rates:
    """All rates of this machine. Raises what the jobs raise."""
    share, begin = Share(), time.perf_counter()
    import torch  # noqa: F401 its import is what is timed

    import_seconds = (time.perf_counter() - begin) * share.left(1)
    workers = min(cores_here(), MOST_WORKERS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        own, from_tars = _job_of_tars(root, workers)
        exact = _job_of_vectors(root, workers, VECTORS, "exact")
        few = _job_of_vectors(root, workers, FEW_VECTORS, "exact")
        leaves = _job_of_vectors(root, workers, VECTORS, "partition")
        tars, many, less, parts = (job["tasks"] for job in (from_tars, exact, few, leaves))
        tokens, texts = (_mean(from_tars["counts"]["encode"], name) for name in ("computed_tokens", "embeddings"))
        length, pairs = CALIBRATED.exact_length, VECTORS**2 / 2
        list_fill = sum(less["join"]) / FEW_VECTORS
        pair = max((sum(many["join"]) - 2 * VECTORS * list_fill) / pairs, 1e-11)
        list_fill -= pair * FEW_VECTORS / 2
        fan = leaves["manifest"]["graph"]["fan"]
        leaf_pairs = VECTORS * 32 * fan**2
        rates: dict[str, Any] = {
            **identity_here(),
            "import_torch": import_seconds,
            "start": from_tars["start"],
            "load_encoder": max(tars["encode"]) - _steady(tars["encode"]),
            "load_index": max(exact["tasks"]["codes"]) - _steady(exact["tasks"]["codes"]),
            "task": own["task"],
            "stage": max(exact["walls"]["moments"] - sum(exact["tasks"]["moments"]), 0.005),
            "list_row": own["list_row"],
            "tar_sample": _steady(tars["scan"]) / TAR_SAMPLES,
            "number_row": own["number_row"],
            "assign_row": _steady(tars["assign"]) / TAR_SAMPLES,
            "text": own["text"],
            "token": max(_steady(tars["encode"]) - texts * own["text"], 0) / tokens,
            "fidelity_text": sum(tars["fidelity"]) / from_tars["manifest"]["fidelity"]["texts"],
            "vector_row": _steady(many["vectors"]) * len(many["vectors"]) / VECTORS,
            "code_node": _steady(many["codes"]) * len(many["codes"]) / VECTORS,
            "pair": pair,
            "list_fill": max(list_fill, 1e-7),
            "leaf_row": max((sum(parts["join"]) - leaf_pairs * pair) / (VECTORS * fan), 1e-8),
            "prepare_flop": own["float32_flop"],
            "merge_entry": sum(many["merge"]) / (VECTORS * 2 * length),
            "candidate": sum(many["search"]) / (VECTORS * length),
            "refine_node": sum(parts["search"]) / VECTORS,
            "far": own["far"],
            "cache_bytes": cache_bytes(),
            "leader": own["leader"],
            "hash_byte": own["hash_byte"],
            "certify_mac": sum(many["certify"]) / (min(CALIBRATED.recall_sample, VECTORS) * VECTORS * WIDTH),
            "export_row": _steady(many["export"]) * len(many["export"]) / VECTORS,
            "image": own["image"],
            "disk_bytes_second": own["disk"],
            "memory": {
                **{f"with_encoder.{name}": value for name, value in from_tars["memory"].items()},
                **exact["memory"],
            },
            "image_memory": own["image_memory"],
        }
    return Rates.model_validate(rates)


def _job_of_tars(root: Path, workers: int) -> tuple[Json, Json]:
    """Captions of tars through the default encoder to sidecars; and what one process measures beside it."""
    texts = captions(TARS * TAR_SAMPLES)
    for number in range(TARS):
        _write_tar(root / f"tars/{number:05}.tar", texts[number * TAR_SAMPLES : (number + 1) * TAR_SAMPLES])
    recipe = Recipe(embed=Embed(shards=f"{root}/tars/*.tar", device="cpu"), index=Index(k=K, device="cpu"))
    job = _run(Store(str(root / "from_tars")), recipe, workers)
    own = {**alone(root, texts), "task": _per_task(job)}
    _step()
    return own, job


def _job_of_vectors(root: Path, workers: int, count: int, engine: str) -> Json:
    path = root / f"{count}.npy"
    if not path.exists():
        np.save(path, mixture(count))
    index = Index(k=K, engine=engine, recall_sample=CALIBRATED.recall_sample, min_recall=0, device="cpu")
    embed = Embed(vectors=str(path), shard_size=-(-count // (4 * workers)))
    return _run(Store(str(root / f"{engine}_{count}")), Recipe(embed=embed, index=index, export=Export()), workers)


def _run(store: Store, recipe: Recipe, workers: int) -> Json:
    """Run a job; seconds of each stage's tasks, of the stages as a whole, and the largest worker by stage."""
    from graphbuild.pipeline import run_verb
    from graphbuild.runner import Runner

    job: Json = {"workers": workers, "tasks": {}, "walls": {}, "counts": {}, "memory": {}}

    class Kept(Runner):
        """Takes a stage's records before the scratch is removed; seconds are those of a machine to oneself."""

        def run(self, stage: Any, recipe: Recipe, store: Store, **options: Any) -> Json:
            own = Share()
            with WorkerMemory() as memory:
                entry = super().run(stage, recipe, store, **options)
            done = list(records(store, stage.name).values())
            seconds = self.seconds.get(stage.name, 0.0)
            left = (own if seconds > LONG_ENOUGH else share).left(max(min(workers, len(done)), 1))
            job["tasks"][stage.name] = [record["seconds"] * left for record in done]
            job["counts"][stage.name] = [record["facts"].get("counts", {}) for record in done]
            job["walls"][stage.name] = seconds * (left if len(job["walls"]) else own.left(1))  # Ray starts on one core
            if memory.peak_bytes:
                job["memory"][stage.name] = memory.peak_bytes
            _step()
            return entry

    share = Share()
    with Kept(workers=workers) as runner:
        job["manifest"] = run_verb("run", recipe, store, runner)
    first = "scan" if "scan" in job["tasks"] else "vectors"
    rounds = -(-len(job["tasks"][first]) // workers)
    job["start"] = max(job["walls"][first] - rounds * _steady(job["tasks"][first]), 0)
    return job


def _step() -> None:
    """Tell the process that waits (`calibration.rates_here`) that one more stage has been."""
    sys.stdout.write(f"{STEP}\n")
    sys.stdout.flush()


def captions(count: int) -> list[str]:
    """Distinct made-up captions, as long as CC3M's: 10.3 words in the mean."""
    rng, words = random.Random(0), WORDS.split()
    return [f"{' '.join(rng.choices(words, k=rng.randint(4, 14)))} {number}" for number in range(count)]


def _write_tar(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    noise = random.Random(0).randbytes(CALIBRATED.tar_sample_bytes)
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(texts):
            for name, content in (("jpg", noise), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number:09}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _per_task(job: Json) -> float:
    """What the runner adds to a task: of stages with many quick ones, the rest of the wall time."""
    names = ("assign", "codes", "merge", "export")
    rest = [(job["walls"][name] - sum(job["tasks"][name]) / job["workers"]) / len(job["tasks"][name]) for name in names]
    return float(max(statistics.median(rest), 0.001))


def _steady(seconds: list[float]) -> float:
    """Of a stage's tasks of one size, the lower median: a worker's first one loads what the others find loaded."""
    return float(statistics.median_low(sorted(seconds)[: max(len(seconds) - 2, 1)]))


def _mean(counts: list[Json], name: str) -> float:
    return float(statistics.mean(count[name] for count in counts))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(measure().model_dump_json(indent=1))
