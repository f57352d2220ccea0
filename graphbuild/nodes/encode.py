"""Stage encode: the sentence encoder over each shard's distinct texts, to nodes/<shard>.npy.

Embeddings are float16, unit norm, and the same bytes whatever the worker count; of packed and int8 models also whatever
the shards and batches (graphbuild.nodes.encoder). Memory: the model, and one shard. On a GPU two workers take turns:
one encodes while the other reads, tokenises or writes.
`matrix:FILE` in place of an encoder takes the similarities of classes (graphbuild.nodes.matrix).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from graphbuild.errors import InputError, StageError
from graphbuild.nodes import matrix
from graphbuild.nodes.encoder import find_encoder, open_model
from graphbuild.recipe import Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, total_counts
from graphbuild.runner.state import require
from graphbuild.store.files import file_identity
from graphbuild.store.layout import TEXTS, VECTORS
from graphbuild.store.store import Json, Store, Writer

logger = logging.getLogger(__name__)


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    hints: dict[str, Any] = {"device": embed.device, "encoder": embed.encoder}
    if matrix.is_matrix(embed.encoder):
        classes = matrix.read_classes(embed)
        settings = {"encoder": matrix.PREFIX, "classes": digest(classes)}
        inputs = {"matrix": file_identity(embed.encoder.removeprefix(matrix.PREFIX))}
        hints["classes"] = classes
    else:
        identity = find_encoder(embed.encoder).identity
        settings = {"encoder": identity, **embed.model_dump(include={"prompt", "dim", "precision"})}
        inputs = {}
    return [
        Task(
            stage="encode",
            name=record["task"],
            settings=settings,
            inputs=inputs,
            built={"texts": record["facts"]["texts_sha256"]},
            hints=hints,
        )
        for record in require(store, "assign", "embed")
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    texts = store.table(TEXTS.format(task.name), ["text"])["text"].to_pylist()
    if "classes" in task.hints:
        vectors, facts = matrix.vectors(task.hints["encoder"], task.hints["classes"], texts)
        writer.array(VECTORS.format(task.name), vectors)
        return {"counts": {"embeddings": len(texts)}, **facts}
    settings = task.settings
    encoder = find_encoder(task.hints["encoder"])
    if encoder.identity != settings["encoder"]:
        raise StageError(
            f"this worker's {encoder.identity} is not {settings['encoder']}",
            "install the same model on every node",
        )
    model = open_model(encoder, task.hints["device"], settings["precision"], settings["prompt"], settings["dim"])
    found = model.encode(texts or ["-"])  # a shard all of whose texts appeared before has a file of no rows
    writer.array(VECTORS.format(task.name), found.vectors[: len(texts)])
    counts = {
        "embeddings": len(texts),
        "truncated": found.truncated,
        "tokens": found.tokens,
        "computed_tokens": found.computed,
    }
    facts = {"precision": model.precision, "max_tokens": model.max_tokens, "static": model.is_static}
    return {"counts": counts, "d": found.vectors.shape[1], **facts}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    facts = [record["facts"] for record in done]
    if matrix.is_matrix(recipe.embed.encoder):
        deviation = {name: facts[0][name] for name in ("mean_deviation", "max_deviation")}
        return embeddings_entry(done, {"encoder": recipe.embed.encoder, **deviation})
    encoder = find_encoder(recipe.embed.encoder)
    entry = {
        "encoder": encoder.name,
        "weights_sha256": encoder.sha256,
        "revision": encoder.revision,
        "static": facts[0]["static"],
        "prompt": recipe.embed.prompt,
        "max_tokens": facts[0]["max_tokens"],
        "truncated": total_counts(done)["truncated"],
        "precision": sorted({fact["precision"] for fact in facts}),
    }
    if entry["truncated"]:
        logger.warning(
            "%-9s %s texts are longer than the %s tokens that the encoder reads: their ends do not count",
            "encoding",
            f"{entry['truncated']:,}",
            entry["max_tokens"],
        )
    return embeddings_entry(done, entry)


def embeddings_entry(done: list[Json], encoder: Mapping[str, Any]) -> Json:
    dimensions = sorted({record["facts"]["d"] for record in done})
    if len(dimensions) > 1:
        raise InputError(f"vectors of mixed length: {dimensions}", "give every row a vector of one length")
    facts = {"d": dimensions[0], "dtype": "float16", "fingerprint": digest(outputs(done, "nodes/", ".npy"))}
    return {"embeddings": {**encoder, **facts}}


def check(recipe: Recipe) -> None:
    """Raise ConfigError where there is no such encoder."""
    if not matrix.is_matrix(recipe.embed.encoder):
        find_encoder(recipe.embed.encoder)


STAGE = Stage(
    name="encode",
    title="encoding",
    plan=plan,
    run=run,
    finish=finish,
    entries=("embeddings",),
    check=check,
    on_device=True,
    sharing=2,
)
