"""Stage fidelity: how near the stored vectors are to the encoder's own in float32, on texts drawn at random.

The reference is sentence-transformers' `encode`, which shares with stage encode the weights and nothing else: a fault
of the faster path fails the job here. Cost: SAMPLE texts encoded in float32, some seconds on a CPU core.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphbuild.errors import QualityError
from graphbuild.nodes.encoder import find_encoder, open_model, prompt_of
from graphbuild.nodes.matrix import is_matrix
from graphbuild.recipe import BESIDE, Recipe
from graphbuild.runner.stage import Stage, Task
from graphbuild.store.layout import TEXTS, VECTORS
from graphbuild.store.sharded import Array
from graphbuild.store.shards import node_count, shards_of
from graphbuild.store.store import Json, Store, Writer

SAMPLE = 512
MEAN_FLOOR, INT8_MEAN_FLOOR = 0.999, 0.995


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    if embed.source == BESIDE or is_matrix(embed.encoder):  # whose own record tells how near it is
        return []
    return [
        Task(
            stage="fidelity",
            name="all",
            built={"embeddings": store.manifest()["embeddings"]["fingerprint"], "sample": SAMPLE},
            hints={
                **embed.model_dump(include={"encoder", "trust_remote_code", "dim", "device", "precision"}),
                "prompt": prompt_of(embed),
            },
        )
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    texts, vectors = sampled(store)
    hints = task.hints
    encoder = find_encoder(hints["encoder"], trusted=hints["trust_remote_code"])
    model = open_model(encoder, hints["device"], "float32", hints["prompt"], hints["dim"])
    cosines = cosine(model.reference(texts), vectors)
    floor = INT8_MEAN_FLOOR if hints["precision"] == "int8" else MEAN_FLOOR
    if not cosines.mean() >= floor:  # also where it is no number
        worst = int(cosines.argmin())
        raise QualityError(
            f"stored vectors have a mean cosine of {cosines.mean():.6f} to the encoder's own in float32, under "
            f"{floor}; worst: {cosines[worst]:.4f} for {texts[worst][:80]!r}",
            "its vectors depend on the batch that a text is padded in, as of positions counted from the padding on the "
            "left: choose another --encoder, or make them elsewhere and give --vectors"
            if store.manifest()["embeddings"]["precision"] == ["float32"]
            else "use --precision float32 and --force",
        )
    mean, least = (round(float(value), 7) for value in (cosines.mean(), cosines.min()))
    return {"texts": len(texts), "mean_cosine": mean, "min_cosine": least}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    return {"fidelity": done[0]["facts"] if done else {}}


STAGE = Stage(
    name="fidelity", title="fidelity", plan=plan, run=run, finish=finish, entries=("fidelity",), on_device=True
)


def sampled(store: Store) -> tuple[list[str], Array]:
    """Texts and stored vectors [n, d] of SAMPLE nodes drawn evenly; of fewer than 4 SAMPLE nodes, of every fourth."""
    manifest = store.manifest()
    total = node_count(manifest)
    chosen = np.sort(np.random.default_rng(0).choice(total, size=min(SAMPLE, math.ceil(total / 4)), replace=False))
    texts: list[str] = []
    vectors = []
    for shard in shards_of(store, manifest).with_nodes:
        inside = chosen[(chosen >= shard.first_node) & (chosen < shard.first_node + shard.nodes)]
        if len(inside):
            rows = inside - shard.first_node
            texts += store.table(TEXTS.format(shard.name), ["text"])["text"].take(rows).to_pylist()
            vectors.append(np.asarray(store.array(VECTORS.format(shard.name)))[rows])
    return texts, np.concatenate(vectors)


def cosine(a: Array, b: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Cosine of each pair of rows, in float64: [n]; NaN where one has no direction."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore"):
        found: np.ndarray[Any, np.dtype[np.float64]] = (a * b).sum(1) / lengths
    return found
