"""Stage encode: the sentence encoder over each shard's new texts, to nodes/<shard>.npy.

A text of which the encoder makes zeros, NaN or infinities has no row there; the record names its place, and stage
assign leaves it out.
Embeddings are float16, unit norm, and the same bytes whatever the worker count; of packed and int8 models also whatever
the shards and batches (graphbuild.nodes.encoder). Memory: the model, and one shard. On a GPU two workers take turns:
one encodes while the other reads, tokenises or writes.
`matrix:FILE` in place of an encoder takes the similarities of classes (graphbuild.nodes.matrix), and
vectors beside tars are each sample's own (graphbuild.nodes.beside).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphbuild.errors import InputError, StageError
from graphbuild.nodes import beside, matrix
from graphbuild.nodes.encoder import find_encoder, open_model, prompt_of
from graphbuild.nodes.encoder.model import is_bert_like
from graphbuild.nodes.number import new_texts, numbered
from graphbuild.nodes.samples import READY
from graphbuild.recipe import BESIDE, Recipe
from graphbuild.runner.stage import Stage, Task, digest, outputs, records, total_counts
from graphbuild.runner.state import require
from graphbuild.store.files import file_identity
from graphbuild.store.layout import REJECTED, VECTORS, by_number
from graphbuild.store.store import Json, Store, Writer

logger = logging.getLogger(__name__)


def plan(recipe: Recipe, store: Store) -> list[Task]:
    embed = recipe.embed
    if embed.source == BESIDE:
        return beside.reading(embed, store, *require(store, "number", "embed"))
    hints: dict[str, Any] = {"device": embed.device, "encoder": embed.encoder}
    if matrix.is_matrix(embed.encoder):
        classes = matrix.read_classes(embed)
        settings: dict[str, Any] = {"encoder": matrix.PREFIX, "classes": digest(classes)}
        inputs = {"matrix": file_identity(embed.encoder.removeprefix(matrix.PREFIX))}
        hints["classes"] = classes
    else:
        identity = find_encoder(embed.encoder, trusted=embed.trust_remote_code).identity
        settings = {"encoder": identity, **embed.model_dump(include={"prompt", "dim", "precision"})}
        settings["prompt"] = prompt_of(embed)
        hints["trusted"] = embed.trust_remote_code
        inputs = {}
    told = records(store, "texts") or records(store, "assign")
    return [
        Task(
            stage="encode",
            name=name,
            settings=settings,
            inputs=inputs,
            built={"texts": told[name]["facts"]["texts_sha256"]},
            hints={**hints, "shard": shard},
        )
        for name, shard in sorted(numbered(store).items(), key=lambda item: by_number(item[0]))
    ]


def run(task: Task, store: Store, writer: Writer) -> Json:
    if "encoder" not in task.settings:
        return beside.read(task, store, writer)
    texts = new_texts(store, task.name, *task.hints["shard"])
    if "classes" in task.hints:
        vectors, told = matrix.vectors(task.hints["encoder"], task.hints["classes"], texts)
        writer.array(VECTORS.format(task.name), vectors)
        return {"counts": {"embeddings": len(texts)}, **told}
    settings = task.settings
    encoder = find_encoder(task.hints["encoder"], trusted=task.hints["trusted"])
    if encoder.identity != settings["encoder"]:
        raise StageError(
            f"this worker's {encoder.identity} is not {settings['encoder']}",
            "install the same model on every node",
        )
    model = open_model(encoder, task.hints["device"], settings["precision"], settings["prompt"], settings["dim"])
    some = texts or ["-"]  # a shard all of whose texts appeared before has a file of no rows
    found = model.encode(some, task.hints["threads"])
    vectors = found.vectors[: len(texts)]
    without = np.isnan(vectors).any(axis=1)
    writer.array(VECTORS.format(task.name), vectors[~without])
    counts = {
        "embeddings": len(texts) - int(without.sum()),
        "truncated": found.truncated,
        "tokens": found.tokens,
        "computed_tokens": found.computed,
    }
    facts: Json = {"precision": model.precision, "max_tokens": model.max_tokens, "static": model.is_static}
    if without.any():
        facts["without"] = np.flatnonzero(without).tolist()
    return {"counts": counts, "d": found.vectors.shape[1], **facts}


def finish(recipe: Recipe, store: Store, done: list[Json]) -> Json:
    facts = [record["facts"] for record in done]
    without = sum(len(fact.get("without", [])) for fact in facts)
    if recipe.embed.source == BESIDE:
        if not total_counts(done)["embeddings"]:
            why = next((fact["why"][0] for fact in facts if fact["why"]), "there is no sample")
            raise InputError(f"no sample of {store.url} has a vector that can be used: {why}", "mend the vectors")
        (record,) = require(store, "number", "embed")
        entry = {"encoder": READY, "weights_sha256": None, "joined": record["settings"]["joined"]}
        return embeddings_entry([record for record in done if record["facts"]["d"]], entry)
    if not total_counts(done)["embeddings"]:
        raise StageError(
            f"encoder {recipe.embed.encoder} gives no vector for any of {without:,} texts",
            "try --precision float32, --device cpu or another --encoder",
        )
    if without:
        logger.warning(
            "%-9s the encoder gives no vector for %s texts: their samples have no node, and are named in %s",
            "encoding",
            f"{without:,}",
            store.display(f"{REJECTED.format('assign')}/"),
        )
    if matrix.is_matrix(recipe.embed.encoder):
        deviation = {name: facts[0][name] for name in ("mean_deviation", "max_deviation")}
        return embeddings_entry(done, {"encoder": recipe.embed.encoder, **deviation})
    encoder = find_encoder(recipe.embed.encoder, trusted=recipe.embed.trust_remote_code)
    entry = {
        "encoder": encoder.name,
        "weights_sha256": encoder.sha256,
        "revision": encoder.revision,
        "static": facts[0]["static"],
        "prompt": prompt_of(recipe.embed),
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
    """Raise ConfigError where there is no such encoder, or a matrix without names for its rows; InputError where
    vectors beside tars cannot be read."""
    if recipe.embed.source == BESIDE:
        beside.check(recipe.embed)
    elif matrix.is_matrix(recipe.embed.encoder):
        matrix.read_classes(recipe.embed)
    else:
        find_encoder(recipe.embed.encoder, trusted=recipe.embed.trust_remote_code)
        prompt_of(recipe.embed)


def in_process(tasks: Sequence[Task]) -> bool:
    """Whether threads compute them as fast as processes: one task, or those of a packed model or of none."""
    first = tasks[0]
    if len(tasks) == 1 or "trusted" not in first.hints:
        return True
    encoder = find_encoder(first.hints["encoder"], trusted=first.hints["trusted"])
    return first.settings["precision"] != "int8" and is_bert_like(encoder)


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
    in_process=in_process,
)
