"""What is so small that the command does it itself: Ray and its workers would take longer to start than to do it.

A rule of sizes and no forecast, so that anybody can tell beforehand. It reads the manifest alone, and imports nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from graphbuild.runner.stage import Stage, Task
from graphbuild.store.store import Store

SAMPLES = 10_000  # of the whole store, or URLs, or nodes: those of one shard of a list
BYTES = 200e6  # of files outside the store
IMAGE_BYTES = 100e3  # taken for an image in a folder
FEW = 0.1  # of both: no stage gains by workers there
SIZE = re.compile(r", (\d+) (bytes|images), ")
COUNTED = ("urls", "rows", "samples", "nodes")


def is_small(stage: Stage, tasks: Sequence[Task], store: Store) -> bool:
    """Whether these tasks of a stage run in the command's own process, where nobody asks for workers.

    They do where the store, by its finished stages, has at most SAMPLES samples, the tasks read at most BYTES from
    outside it, and the stage has no reason of its own against it; of a tenth of that it is not asked.
    """
    counts = [entry["counts"] for entry in store.manifest()["stages"].values()]
    most = max((each.get(name, 0) for each in counts for name in COUNTED), default=0)
    outside = sum(map(_bytes, {identity for task in tasks for identity in task.inputs.values()}))
    share = max(most / SAMPLES, outside / BYTES)
    return share <= FEW or (share <= 1 and stage.in_process(tasks))


def _bytes(identity: str) -> float:
    """Of an input file ("a.tar, 1024 bytes, DATE"), or of so many images; of unknown size it is large."""
    value, unit = [("inf", "bytes"), *SIZE.findall(identity)][-1]
    return float(value) * (1 if unit == "bytes" else IMAGE_BYTES)
