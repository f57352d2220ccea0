"""Stage encode: the sentence encoder over each shard's distinct texts, to nodes/<shard>.npy.

Embeddings are float16, unit norm, and the same bytes whatever the worker count. Memory: the model, and one shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphbuild.encoder import encode, find_encoder
from graphbuild.errors import InputError, StageError
from graphbuild.recipe import Recipe
from graphbuild.stage import Stage, Task, digest, outputs
from graphbuild.state import require
from graphbuild.store import Json, Store, Writer


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    encoder = find_encoder(embed.encoder)
    return [
        Task(
            stage="encode",
            name=record["task"],
            settings={"encoder": encoder.identity, "batch_size": embed.batch_size},
            built={"texts": record["facts"]["texts_sha256"]},
            hints={"encoder": embed.encoder, "device": embed.device},
        )
        for record in require(store, "assign", "embed")
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    encoder = find_encoder(task.hints["encoder"])
    if encoder.identity != task.settings["encoder"]:
        raise StageError(
            f"this worker's {encoder.identity} is not {task.settings['encoder']}",
            "install the same model on every node",
        )
    texts = store.table(f"nodes/{task.name}.parquet", ["text"])["text"].to_pylist()
    if not texts:  # a shard all of whose texts appeared before
        texts, keep = ["-"], 0
    else:
        keep = len(texts)
    vectors = encode(encoder, texts, batch_size=task.settings["batch_size"], device=task.hints["device"])[:keep]
    writer.array(f"nodes/{task.name}.npy", vectors)
    return {"counts": {"embeddings": keep}, "d": vectors.shape[1]}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    encoder = find_encoder(recipe.embed.encoder)
    return embeddings_entry(done, {"encoder": encoder.name, "weights_sha256": encoder.sha256})


def embeddings_entry(done: list[Json], encoder: Mapping[str, Any]) -> Json:
    dimensions = sorted({record["facts"]["d"] for record in done})
    if len(dimensions) > 1:
        raise InputError(f"vectors of mixed length: {dimensions}", "give every row a vector of one length")
    files = outputs(done, "nodes/", ".npy")
    facts = {"d": dimensions[0], "dtype": "float16", "fingerprint": digest(files), "files": files}
    return {"embeddings": {**encoder, **facts}}


STAGE = Stage(name="encode", title="encoding", plan=plan, run=run, finish=finish, on_device=True)
