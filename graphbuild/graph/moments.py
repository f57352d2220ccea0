"""Stage moments: the first two moments of all embeddings, and what follows from them for the graph.

They are float64 [d + 1, d]: the sum of the unit vectors, then the sum of their outer products. From them come each
node's *background*, the mean and deviation of its similarity to the nodes that are not its neighbours, and the basis of
the sketches.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from graphbuild.graph import sketch
from graphbuild.graph.tasks import built_without, living_nodes, nodes_entry
from graphbuild.machine.threads import torch_threads
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, records
from graphbuild.store.layout import BASIS, MOMENTS, PARTS
from graphbuild.store.remote import READERS
from graphbuild.store.sharded import Array
from graphbuild.store.store import Json, Store, Writer

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 8_192


def moments_of(raw: Array) -> Array:
    """The moments of stored vectors float16 [n, d]."""
    import torch

    from graphbuild.knn.products import unit

    sums = torch.zeros(raw.shape[1] + 1, raw.shape[1], dtype=torch.float64)
    with torch_threads(1):
        for begin in range(0, len(raw), BLOCK_ROWS):
            x = unit(raw[begin : begin + BLOCK_ROWS])
            sums[0] += x.sum(dim=0)
            sums[1:] += x.T @ x
    result: Array = sums.numpy()
    return result


def plan(recipe: Recipe, store: Store) -> list[Task]:
    manifest = nodes_entry(store)
    built = {"embeddings": manifest["embeddings"]["fingerprint"], **built_without(manifest)}
    return [Task(stage="moments", name="all", built=built)]


def run(task: Task, store: Store, writer: Writer) -> Json:
    names = [PARTS.format(name) for name in records(store, "codes")]
    total = np.zeros_like(store.array(names[0]))
    with ThreadPoolExecutor(READERS) as pool:  # fetches them side by side; the order of adding stays
        for begin in range(0, len(names), READERS):
            for part in pool.map(store.array, names[begin : begin + READERS]):
                total += part
    writer.array(MOMENTS, total)
    writer.array(BASIS, sketch.basis_of(total, living_nodes(store.manifest())))
    return {}


def background_of(x: Tensor, similarities: Array, moments: Array, total: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Mean and standard deviation, float32 [n, 2], of the similarities of n nodes to those outside their lists.

    x: their unit vectors float32 [n, d]; similarities: to their neighbours [n, k]; moments: of all `total` nodes. Zeros
    where every other node is a neighbour.
    """
    import torch

    rest = total - 1 - similarities.shape[1]
    if rest == 0:
        return np.zeros((len(x), 2), np.float32)
    near = similarities.astype(np.float64)
    with torch_threads(1):
        all_moments = torch.from_numpy(moments / total).float()
        first = (x @ all_moments[0]).double().numpy() * total - 1 - near.sum(axis=1)
        second = ((x @ all_moments[1:]) * x).sum(dim=1).double().numpy() * total - 1 - (near**2).sum(axis=1)
    mean = first / rest
    deviation = np.sqrt(np.maximum(second / rest - mean**2, 0))
    return np.stack([mean, deviation], axis=1).astype(np.float32)


STAGE = Stage(name="moments", title="moments", plan=plan, run=run)
