"""Verbs that build a store: each resolves a recipe and runs its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from graphbuild.cli.options import Changes, How, RecipeArg, StoreArg, builds, open_store, option
from graphbuild.errors import ConfigError
from graphbuild.machine.terminal import echo, log_as_json

if TYPE_CHECKING:
    from graphbuild.recipe import Recipe
    from graphbuild.runner.runner import Runner
    from graphbuild.store.store import Store


@builds(without="force progress")
def demo(
    store: Annotated[str, typer.Argument(metavar="STORE", help="output folder")] = "demo",
    scenes: Annotated[int, typer.Option(min=200, help="captioned scenes to make")] = 3000,
    *,
    how: How,
) -> None:
    """The whole data job on generated, captioned scenes."""
    from graphbuild.demo.run import plan_demo, run_demo

    if how.dry_run:
        _say(plan_demo(store, scenes=scenes, workers=how.workers))
    else:
        run_demo(store, scenes=scenes, workers=how.workers, address=how.address)


@builds()
def run(recipe: RecipeArg, store: StoreArg, how: How) -> None:
    """Every stage of a recipe, from its source to sidecars.

    A recipe for tars with captions, two lines (other settings have their defaults, which STORE/recipe.yaml then shows):

    \b
    embed:
      shards: /data/tars
    """
    from graphbuild.recipe import read_recipe

    _run_verb("run", lambda: read_recipe(recipe), open_store(store), how)


@builds(
    "download",
    "preset url_column caption_column shard_size image_size resize_mode min_image_size max_aspect_ratio min_bytes"
    " max_bytes timeout_seconds retries threads user_agent_token robots_txt ignore_opt_out proxy allow_private_hosts",
    positional="urls",
)
def download(store: StoreArg, changes: Changes, how: How) -> None:
    """URL list to WebDataset tars; failures are counted and kept."""
    _run_section("download", store, changes, how)


@builds("pack", "image_column caption_column key_column image_size shard_size", positional="source")
def pack(store: StoreArg, changes: Changes, how: How) -> None:
    """Parquet or folders of images to WebDataset tars."""
    _run_section("pack", store, changes, how)


@builds(
    "embed",
    "shards captions vectors preset caption_column key_column vector_column vector_keys vector_member"
    " caption_member caption_weights image_member class_names template encoder prompt prompt_name trust_remote_code"
    " dim precision device",
    context_settings={"allow_extra_args": True},
)
def embed(context: typer.Context, store: StoreArg, changes: Changes, how: How) -> None:
    """Captions to nodes (distinct texts) and embeddings.

    Reads the store's own tars, or --shards, --captions or --vectors; none for the one given: the store's own again.
    """
    if context.args:
        raise typer.BadParameter(
            f"unexpected {context.args[0]}. Quote patterns, or the shell puts all files there: --shards '/data/*.tar'"
        )
    _run_section("embed", store, changes, how)


@builds("index", "k engine recall min_recall memory device")
def index(store: StoreArg, changes: Changes, how: How) -> None:
    """Nodes to the k-nearest-neighbour graph, recall certified."""
    _run_section("index", store, changes, how)


@builds("export", "embeddings layout selection chunk shard_size")
def export(store: StoreArg, changes: Changes, how: How) -> None:
    """Graph to sidecars or new tars, for trainers."""
    _run_section("export", store, changes, how)


@builds("download", "ignore_opt_out proxy allow_private_hosts", without="force")
def retry(
    store: StoreArg,
    reason: Annotated[list[str] | None, option("instead: URLs whose reason contains this; may be given again")] = None,
    all_urls: Annotated[bool, typer.Option("--all", help="instead: all URLs without an image")] = False,
    *,
    changes: Changes,
    how: How,
) -> None:
    """Failed tasks once more, and URLs that may be there again."""
    from graphbuild.job.retry import retry_store, wanted_urls

    if reason and all_urls:
        raise ConfigError("--all and --reason exclude each other", "give one of them")
    opted_out = bool(changes.get("ignore_opt_out"))
    opened, wanted = open_store(store), wanted_urls(reason or (), everything=all_urls, opted_out=opted_out)
    if how.dry_run:
        from graphbuild.job.plan.retry import plan_retry

        _say(plan_retry(opened, wanted, how.workers))
        return
    with _runner("retry", opened, how) as runner:
        _say(retry_store(opened, runner, wanted, changes))


@builds(without="force dry_run")
def relocate(
    store: StoreArg,
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="where the tars lie now, as in `embed --shards`")],
    how: How,
) -> None:
    """Tars that were moved or renamed, found by their content: nothing is encoded again."""
    from graphbuild.job.relocate import relocate as found_again

    opened = open_store(store)
    with _runner("relocate", opened, how) as runner:
        _say(found_again(opened, shards, runner))


def _run_section(section: str, url: str, changes: Changes, how: How) -> None:
    from graphbuild.recipe import resolve

    store = open_store(url)
    _run_verb(section, lambda: resolve(store, section, changes), store, how)


def _run_verb(verb: str, recipe: Callable[[], Recipe], store: Store, how: How) -> None:
    """recipe: read under the lock, as it may lie in the store."""
    if how.dry_run:
        from graphbuild.job.plan.show import plan_verb

        _say(plan_verb(verb, recipe(), store, how.workers, force=how.force))
        return
    from graphbuild.job.summary import summary
    from graphbuild.job.verbs import run_verb
    from graphbuild.sources.fetched import require_images

    with _runner(verb, store, how) as runner:
        manifest = run_verb(verb, recipe(), store, runner, force=how.force)
    echo(summary(verb, manifest, store))
    if verb == "download":
        require_images(store)


def _say(texts: Iterable[str]) -> None:
    for text in texts:
        echo(text)


@contextlib.contextmanager
def _runner(verb: str, store: Store, how: How) -> Iterator[Runner]:
    """A runner while no other command writes the store: its workers end before the lock is given back."""
    from graphbuild.runner.progress import Progress
    from graphbuild.runner.runner import Runner
    from graphbuild.store.lock import writing

    if how.progress == "json":
        log_as_json()
    progress = Progress(how.progress)
    with writing(store, verb), Runner(workers=how.workers, address=how.address, progress=progress) as runner:
        yield runner
