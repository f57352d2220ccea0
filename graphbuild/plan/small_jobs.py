"""The calibration: three small jobs on this machine with all its cores, timed by stage and task, and their memory.

Run as a process of its own (`python -m graphbuild.plan.small_jobs OUT.json`), so that Ray, torch and a cluster's
address of the caller stay out of it. About half a minute on two cores, 600 MB of memory a core beside the workers'.
What is measured is what the formulas of costs.py ask for (`calibration.Rates`), no more.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from graphbuild.plan.calibration import CALIBRATED, Rates, cores_here, identity_here
from graphbuild.plan.watch import Share, WorkerMemory
from graphbuild.recipe import Download, Embed, Export, Index, Recipe
from graphbuild.stage import records
from graphbuild.store import Json, Store

MOST_WORKERS = 8
TARS, TAR_SAMPLES, LIST_ROWS = CALIBRATED.tars, CALIBRATED.tar_samples, CALIBRATED.list_rows
VECTORS, FEW_VECTORS, WIDTH, K = CALIBRATED.nodes, CALIBRATED.few_nodes, CALIBRATED.d, CALIBRATED.k
FAR_VECTORS, FAR_NODES = 250_000, 400
LATENT = 10
LONG_ENOUGH = 0.5  # seconds, for a share of the processor to be told by a clock of 10 ms
IMAGE_PIXELS = (1_600, 1_200)
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
        list_fill = _sum(less["join"]) / FEW_VECTORS
        pair = max((_sum(many["join"]) - 2 * VECTORS * list_fill) / pairs, 1e-11)
        list_fill -= pair * FEW_VECTORS / 2
        fan = leaves["manifest"]["graph"]["fan"]
        leaf_pairs = VECTORS * 32 * fan**2
        per_text = own["text"]
        rates: dict[str, Any] = {
            **identity_here(),
            "import_torch": import_seconds,
            "start": from_tars["start"],
            "load_encoder": max(tars["encode"]) - _steady(tars["encode"]),
            "load_index": max(exact["tasks"]["codes"]) - _steady(exact["tasks"]["codes"]),
            "task": own["task"],
            "stage": max(exact["walls"]["moments"] - _sum(exact["tasks"]["moments"]), 0.005),
            "list_row": own["list_row"],
            "tar_sample": _steady(tars["scan"]) / TAR_SAMPLES,
            "number_row": own["number_row"],
            "assign_row": _steady(tars["assign"]) / TAR_SAMPLES,
            "text": per_text,
            "token": max(_steady(tars["encode"]) - texts * per_text, 0) / tokens,
            "fidelity_text": _sum(tars["fidelity"]) / from_tars["manifest"]["fidelity"]["texts"],
            "vector_row": _steady(many["vectors"]) * len(many["vectors"]) / VECTORS,
            "code_node": _steady(many["codes"]) * len(many["codes"]) / VECTORS,
            "pair": pair,
            "list_fill": max(list_fill, 1e-7),
            "leaf_row": max((_sum(parts["join"]) - leaf_pairs * pair) / (VECTORS * fan), 1e-8),
            "prepare_flop": own["float32_flop"],
            "merge_entry": _sum(many["merge"]) / (VECTORS * 2 * length),
            "candidate": _sum(many["search"]) / (VECTORS * length),
            "refine_node": _sum(parts["search"]) / VECTORS,
            "far": own["far"],
            "cache_bytes": cache_bytes(),
            "leader": own["leader"],
            "hash_byte": own["hash_byte"],
            "certify_mac": _sum(many["certify"]) / (min(CALIBRATED.recall_sample, VECTORS) * VECTORS * WIDTH),
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
    own = {**_alone(root, texts), "task": _per_task(job)}
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

        def run(self, stage: Any, recipe: Recipe, store: Store, *, force: bool = False) -> Json:
            own = Share()
            with WorkerMemory() as memory:
                entry = super().run(stage, recipe, store, force=force)
            done = list(records(store, stage.name).values())
            seconds = self.seconds.get(stage.name, 0.0)
            left = (own if seconds > LONG_ENOUGH else share).left(max(min(workers, len(done)), 1))
            job["tasks"][stage.name] = [record["seconds"] * left for record in done]
            job["counts"][stage.name] = [record["facts"].get("counts", {}) for record in done]
            job["walls"][stage.name] = seconds * (left if len(job["walls"]) else own.left(1))  # Ray starts on one core
            if memory.peak_bytes:
                job["memory"][stage.name] = memory.peak_bytes
            return entry

    share = Share()
    with Kept(workers=workers) as runner:
        job["manifest"] = run_verb("run", recipe, store, runner)
    first = "scan" if "scan" in job["tasks"] else "vectors"
    rounds = -(-len(job["tasks"][first]) // workers)
    job["start"] = max(job["walls"][first] - rounds * _steady(job["tasks"][first]), 0)
    return job


def _alone(root: Path, texts: list[str]) -> Json:
    """Rates of one process: tokenising, lists, numbering, float32 products, random reads, images, the disk."""
    import polars as pl

    from graphbuild.encoder import DEFAULT_ENCODER, find_encoder, open_model
    from graphbuild.encoder.tokens import tokenize
    from graphbuild.number import number_nodes
    from graphbuild.threads import torch_threads

    found: Json = {}
    model = open_model(find_encoder(DEFAULT_ENCODER), "cpu")
    with torch_threads(1):
        found["text"] = _best(lambda: tokenize(model.whole.tokenizer, texts, 256)) / len(texts)
    found["list_row"] = _list_seconds(root, texts) / LIST_ROWS
    hashes = np.random.default_rng(0).integers(1, 1 << 62, (200_000, 2), dtype=np.uint64)
    frame = pl.DataFrame({"hash_high": hashes[:, 0], "hash_low": hashes[:, 1]})
    found["number_row"] = _best(lambda: number_nodes(frame)) / len(hashes)
    found["float32_flop"] = _float32()
    found["far"] = _far_over_near()
    block = bytes(1 << 24)
    found["hash_byte"] = _best(lambda: hashlib.sha256(block)) / len(block)
    found["leader"] = _leader()
    found["image"], found["image_memory"] = _image()
    found["disk"] = _disk(root)
    return found


def captions(count: int) -> list[str]:
    """Distinct made-up captions, as long as CC3M's: 10.3 words in the mean."""
    rng, words = random.Random(0), WORDS.split()
    return [f"{' '.join(rng.choices(words, k=rng.randint(4, 14)))} {number}" for number in range(count)]


def mixture(count: int) -> np.ndarray[Any, Any]:
    """Vectors float16 [count, WIDTH] of LATENT dimensions and a little noise: like captions', whose neighbours differ
    in similarity. (Vectors of clusters smaller than k are alike to all others: no list of those can be proved.)"""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((count, LATENT), np.float32)
    vectors = latent @ rng.standard_normal((LATENT, WIDTH), np.float32) / LATENT**0.5
    noise = 0.2 * rng.standard_normal((count, WIDTH), np.float32)
    mixed: np.ndarray[Any, Any] = (vectors + noise).astype(np.float16)
    return mixed


def _write_tar(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    noise = random.Random(0).randbytes(CALIBRATED.tar_sample_bytes)
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(texts):
            for name, content in (("jpg", noise), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number:09}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _list_seconds(root: Path, texts: list[str]) -> float:
    from graphbuild import scan
    from graphbuild.stage import perform

    path = root / "list.tsv"
    path.write_text("caption\n" + "\n".join(texts[at % len(texts)] for at in range(LIST_ROWS)) + "\n")
    recipe, store = Recipe(embed=Embed(captions=str(path))), Store(str(root / "list"))
    seconds: float = perform(scan.STAGE, scan.plan(recipe, store)[0], store)["seconds"]
    return seconds


def _float32() -> float:
    """Seconds of a core for one FLOP of the float32 products by which leaders and samples are searched."""
    import torch

    from graphbuild.threads import torch_threads

    a, b = torch.randn(400, WIDTH), torch.randn(8_192, WIDTH)
    with torch_threads(1):
        return _best(lambda: a @ b.T) / (2 * 400 * 8_192 * WIDTH)


def _leader() -> float:
    from graphbuild.knn.leaders import Leaders

    some = mixture(8_192)
    return _best(lambda: Leaders(some)) / len(some)


def cache_bytes() -> float:
    """The last level of cache, as Linux tells it; 32 MB elsewhere."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(found[1]) * units[found[2]] for text in sizes if (found := re.match(r"(\d+)([KM])", text))]
    return float(max(known, default=32 << 20))


def _far_over_near() -> float:
    """How many times slower a candidate is scored among vectors that no cache holds, than among the calibration's."""
    from graphbuild.knn import kernels, lists

    rng = np.random.default_rng(0)
    vectors = np.tile(rng.standard_normal((1_000, WIDTH)).astype(np.float16), (FAR_VECTORS // 1_000, 1))
    nothing = np.full(FAR_NODES, np.inf)
    seconds = {}
    for among in (VECTORS, FAR_VECTORS):
        tried = []
        for _ in range(6):
            near = np.sort(rng.integers(FAR_NODES, among, (FAR_NODES, CALIBRATED.exact_length)), axis=1)
            keys = lists.pack(np.zeros(near.shape, np.float32), near)
            starts = np.array([0, len(vectors)])
            guess = np.zeros(-(-len(vectors) // 256), np.int32)
            table = (np.array([vectors.ctypes.data]), starts, guess, WIDTH * 2)
            begin = time.perf_counter()
            kernels.exact_similarities(0, keys, K, nothing, nothing, table, WIDTH)
            tried.append(time.perf_counter() - begin)
        seconds[among] = min(tried[1:])
    return max(seconds[FAR_VECTORS] / seconds[VECTORS], 1.0)


def _image() -> tuple[float, float]:
    """Seconds of a core for a web photograph of IMAGE_PIXELS to be checked, decoded, scaled and written again; and the
    bytes that img2dataset takes in a worker. Zeros where it is not installed."""
    import importlib.util

    import psutil
    from PIL import Image

    if importlib.util.find_spec("img2dataset") is None:
        return 0.0, 0.0
    before = psutil.Process().memory_info().rss
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.resizer import Resizer

    from graphbuild.download import CheckedResizer

    defaults = Download()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (75, 100, 3), dtype=np.uint8)).resize(IMAGE_PIXELS)
    stream = io.BytesIO()
    coarse.save(stream, "JPEG", quality=85)
    resizer = Resizer(
        image_size=defaults.image_size,
        resize_mode=defaults.resize_mode,
        resize_only_if_bigger=True,
        encode_quality=defaults.encode_quality,
    )
    checked = CheckedResizer(resizer, defaults.max_pixels)
    seconds = _best(lambda: checked(io.BytesIO(stream.getvalue())))
    return seconds, float(psutil.Process().memory_info().rss - before)


def _disk(root: Path) -> float:
    """Bytes a second, written and flushed."""
    block = os.urandom(1 << 20)
    begin = time.perf_counter()
    with (root / "block").open("wb") as file:
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return 64 * len(block) / (time.perf_counter() - begin)


def _per_task(job: Json) -> float:
    """What the runner adds to a task: of stages with many quick ones, the rest of the wall time."""
    names = ("assign", "codes", "merge", "export")
    rest = [(job["walls"][name] - sum(job["tasks"][name]) / job["workers"]) / len(job["tasks"][name]) for name in names]
    return float(max(statistics.median(rest), 0.001))


def _best(call: Any) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _steady(seconds: list[float]) -> float:
    """Of a stage's tasks of one size, the lower median: a worker's first one loads what the others find loaded."""
    return float(statistics.median_low(sorted(seconds)[: max(len(seconds) - 2, 1)]))


def _sum(seconds: list[float]) -> float:
    return sum(seconds)


def _mean(counts: list[Json], name: str) -> float:
    return float(statistics.mean(count[name] for count in counts))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(measure().model_dump_json(indent=1))
