"""`graphbuild demo`: generated scenes, a faulty web server of its own, and the whole data job on them.

Everything is the real thing (HTTP, img2dataset, sentence encoder, Ray, exact search); only the pictures are made up.
About a minute on two cores for 3,000 scenes, most of it Ray's start and the imports of its workers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from graphbuild.demo.scenes import make_scenes
from graphbuild.demo.server import SceneServer, assign_faults, expected_images, write_url_list
from graphbuild.errors import ConfigError
from graphbuild.job.summary import summary
from graphbuild.job.verbs import run_verb
from graphbuild.look.catalog import Catalog, Sample
from graphbuild.look.report import write_report
from graphbuild.look.thumbnails import show_neighbors
from graphbuild.machine.terminal import echo
from graphbuild.recipe import Download, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.layout import MANIFEST, SAMPLES
from graphbuild.store.lock import writing
from graphbuild.store.shards import shards_of
from graphbuild.store.store import Json, Store

PIXELS = 96
SHARD_SIZE = 500
TIMEOUT_SECONDS = 2.0
K = 32
LIST = "scenes.parquet"
TRAINER = Path("training/train.py")  # of a clone, where the command is typed


def run_demo(url: str, *, scenes: int, workers: int | None, address: str | None) -> None:
    """Make `scenes` scenes, serve them, and bring the store at the local folder `url` up to date with them."""
    folder, store, recipe = _job(url)
    made = make_scenes(scenes)
    with writing(store, "demo"):
        port = _known_port(folder / LIST, scenes)
        try:
            server = SceneServer(made, pixels=PIXELS, port=port)
        except OSError as error:
            raise ConfigError(
                f"the demo's web server cannot have port {port}, which {folder / LIST} names ({error.strerror})",
                "end what listens there, or name another STORE",
            ) from error
        with server, Runner(workers=workers, address=address) as runner:
            if not port:
                write_url_list(folder / LIST, made, server.url)
            manifest = run_verb("run", recipe, store, runner)
    echo(summary("demo", manifest, store))
    echo(f"          ({expected_images(assign_faults(scenes)):,} images expected: the server's faults are known)")
    echo("seconds   " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in runner.seconds.items()))
    page = folder / "report/index.html"
    if not page.exists() or page.stat().st_mtime < (folder / MANIFEST).stat().st_mtime:
        write_report(store)
    echo("\nthree samples and their nearest neighbours")
    catalog = Catalog(store)
    samples = _some_samples(store, manifest, catalog)
    for sample in samples:
        show_neighbors(catalog, sample, catalog.neighbors(sample.node or 0, 2), images=sample is samples[-1])
    shards = len(shards_of(store, manifest))
    echo(
        f"""
outputs   {folder}/shards/{{00000..{shards - 1:05d}}}.tar with .graph.parquet beside each
          samples/, nodes/, graph/, manifest.json, recipe.yaml: docs/reference/format.md says what is what
look      {page}
{_activate()}try       graphbuild explore {url}
          graphbuild neighbors {url} --text "two red stars on grass"
          graphbuild verify {url}"""
    )
    if TRAINER.exists():
        echo(f"          python {TRAINER} {url} --config training/demo.yaml --labels kind,colour,count,background")


def _activate() -> str:
    """The line to begin with where a shell does not find what this interpreter's environment holds."""
    script = Path(sys.prefix) / "bin/activate"
    on_path = [Path(folder).absolute() for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    if script.parent in on_path or not script.exists():
        return ""
    near = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f"first     source {near}\n"


def plan_demo(url: str, *, scenes: int, workers: int | None) -> Iterator[str]:
    """What `run_demo` would do and take, in words."""
    from graphbuild.job.plan.job import job_of
    from graphbuild.job.plan.show import plan_job, plan_verb

    folder, store, recipe = _job(url)
    if _known_port(folder / LIST, scenes):
        return plan_verb("run", recipe, store, workers)
    return plan_job(job_of("run", recipe, rows=scenes), recipe, store, workers)


def _job(url: str) -> tuple[Path, Store, Recipe]:
    if "://" in url:
        raise ConfigError(
            f"the demo's STORE {url} is not a local folder",
            "name a local folder; every other verb takes URLs",
        )
    folder = Path(url).absolute()
    download = Download(
        urls=str(folder / LIST),
        shard_size=SHARD_SIZE,
        image_size=PIXELS,
        timeout_seconds=TIMEOUT_SECONDS,
        threads=16,
        allow_private_hosts=True,  # its server is on loopback
    )
    return folder, Store(str(folder)), Recipe(download=download, index=Index(k=K))


def _known_port(urls: Path, scenes: int) -> int:
    """The port in an earlier demo's list, so that a rerun resumes; 0 when there is no list for as many scenes."""
    if not urls.exists():
        return 0
    listed = pq.read_table(urls, columns=["url"])["url"]
    return urlsplit(listed[0].as_py()).port or 0 if len(listed) == scenes else 0


def _some_samples(store: Store, manifest: Json, catalog: Catalog) -> list[Sample]:
    """Three samples with a node, from the first, a middle and the last shard; from fewer shards other ones of these."""
    names = shards_of(store, manifest).names
    keys: list[str] = []
    for name in (names[0], names[len(names) // 2], names[-1]):
        table = store.table(SAMPLES.format(name), ["key", "node"]).drop_null()
        keys += [key for key in table["key"].to_pylist() if key not in keys][:1]
    return [catalog.sample(key) for key in keys]
