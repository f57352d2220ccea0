"""The pipeline: which stages a verb consists of, in order, and the call that runs them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence

from graphbuild import certify, clustered, download, embed, export, fidelity, index, inline, number, scan, vectors
from graphbuild.encoder import find_encoder
from graphbuild.errors import ConfigError
from graphbuild.leftovers import remove_leftovers
from graphbuild.matrix import is_matrix
from graphbuild.recipe import Recipe
from graphbuild.runner import Runner
from graphbuild.stage import Stage, write_manifest
from graphbuild.state import remove_scratch, write_recipe
from graphbuild.store import Json, Store
from graphbuild.versions import version_of

PACKAGES = (
    "graphbuild",
    "numpy",
    "torch",
    "pyarrow",
    "polars",
    "ray",
    "sentence-transformers",
    "transformers",
    "openvino",
    "img2dataset",
    "webdataset",
)


def stages_of(verb: str, recipe: Recipe) -> Sequence[Stage]:
    """The stages of download, embed, index, export, or of `run`, which is all that the recipe's source needs."""
    if verb == "run":
        chosen = [name for name in ("shards", "captions", "vectors") if getattr(recipe.embed, name) is not None]
        if recipe.download.urls is not None and chosen:
            raise ConfigError(
                f"the recipe has download.urls and embed.{chosen[0]}: two sources", "drop one of them from the recipe"
            )
        from_list = recipe.download.urls is not None
        return [
            stage
            for part in ("download", "embed", "index", "export")
            if part != "download" or from_list
            for stage in stages_of(part, recipe)
        ]
    if verb == "embed" and recipe.embed.vectors is not None:
        return [vectors.STAGE]
    return {
        "download": [download.URLS, download.DOWNLOAD],
        "embed": [scan.STAGE, number.NUMBER, number.ASSIGN, embed.STAGE, fidelity.STAGE],
        "index": [*index.STAGES, certify.STAGE],
        "export": {"sidecars": [export.STAGE], "inline": [inline.STAGE], "clustered": clustered.STAGES}[
            recipe.export.layout
        ],
    }[verb]


def run_verb(verb: str, recipe: Recipe, store: Store, runner: Runner, *, force: bool = False) -> Json:
    """Bring every stage of a verb up to date; returns the manifest. Nothing is written before the first plan holds."""
    stages = stages_of(verb, recipe)
    store.manifest()  # refuse another format version before anything else
    if embed.STAGE in stages and not is_matrix(recipe.embed.encoder):
        find_encoder(recipe.embed.encoder)
    stages[0].plan(recipe, store)
    store.check_writable()
    if store.is_local:
        remove_leftovers(store.root)
    for stage in stages:
        runner.run(stage, recipe, store, force=force)
        if stage is index.SEARCH:
            remove_scratch(index.SCRATCH_STAGES, index.SCRATCH, store)
        if stage is clustered.CLUSTER:
            remove_scratch(clustered.SCRATCH_STAGES, clustered.SCRATCH, store)
    write_recipe(recipe, store)
    manifest = store.manifest()
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    made_with = {"versions": versions, "recipe": hashlib.sha256(store.read_bytes("recipe.yaml")).hexdigest()}
    if manifest != {**manifest, **made_with}:
        manifest |= made_with
        write_manifest(store, manifest)
    if store.is_local:  # of workers that died meanwhile
        remove_leftovers(store.root)
    return manifest
