"""Verbs that build a store: each resolves a recipe and runs its stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphbuild.cli.app import app
from graphbuild.cli.options import (
    Address,
    DeviceOption,
    DryRun,
    Embeddings,
    Force,
    Layout,
    Precision,
    PresetOption,
    ProgressOption,
    RecipeArg,
    ResizeMode,
    StoreArg,
    Workers,
    given,
    open_store,
    option,
)
from graphbuild.terminal import echo

if TYPE_CHECKING:
    from graphbuild.progress import Mode, Progress
    from graphbuild.recipe import Recipe
    from graphbuild.runner import Runner
    from graphbuild.store import Store

HOW = "workers address force progress dry_run"


@app.command()
def demo(
    store: Annotated[str, typer.Argument(metavar="STORE", help="output folder")] = "demo",
    scenes: Annotated[int, typer.Option(min=200, help="captioned scenes to make")] = 3000,
    workers: Workers = None,
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """The whole data job on generated, captioned scenes."""
    from graphbuild.demo.run import plan_demo, run_demo

    if dry_run:
        _say(plan_demo(store, scenes=scenes, workers=workers))
    else:
        run_demo(store, scenes=scenes, workers=workers, address=address)


@app.command()
def run(
    recipe: RecipeArg,
    store: StoreArg,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
    progress: ProgressOption = "auto",
    dry_run: DryRun = False,
) -> None:
    """Every stage of a recipe, from its source to sidecars."""
    from graphbuild.recipe import read_recipe

    _run_verb("run", read_recipe(recipe), open_store(store), given(locals(), HOW))


@app.command()
def download(
    store: StoreArg,
    urls: Annotated[
        str | None,
        typer.Argument(metavar="URLS", help="URL list: parquet, CSV, TSV or JSONL", show_default=False),
    ] = None,
    preset: PresetOption = None,
    url_column: Annotated[str | None, option("[default: url]")] = None,
    caption_column: Annotated[str | None, option("[default: caption]")] = None,
    shard_size: Annotated[int | None, option("URLs a shard  [default: 10000]")] = None,
    image_size: Annotated[int | None, option("pixels  [default: 256]")] = None,
    resize_mode: Annotated[ResizeMode | None, option("what the size bounds  [default: keep_ratio]")] = None,
    timeout_seconds: Annotated[float | None, option("[default: 10]")] = None,
    retries: Annotated[int | None, option("[default: 1]")] = None,
    threads: Annotated[int | None, option("requests at a time, a worker  [default: 32]")] = None,
    allow_private_hosts: Annotated[
        bool | None, typer.Option("--allow-private-hosts", help="also fetch from addresses that are not public")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
    progress: ProgressOption = "auto",
    dry_run: DryRun = False,
) -> None:
    """URL list to WebDataset tars; failures are counted and kept."""
    changes = given(
        locals(),
        "urls preset url_column caption_column shard_size image_size resize_mode timeout_seconds retries threads"
        " allow_private_hosts",
    )
    _run_section("download", store, changes, given(locals(), HOW))


@app.command(context_settings={"allow_extra_args": True})
def embed(
    context: typer.Context,
    store: StoreArg,
    shards: Annotated[
        str | None, option("tars made elsewhere: a folder, or 'cc3m/{0000..0331}.tar', 'cc3m/*.tar'")
    ] = None,
    captions: Annotated[str | None, option("a caption list: parquet, CSV, TSV or JSONL")] = None,
    vectors: Annotated[str | None, option("ready vectors, one node a row: .npy [n, d] or parquet")] = None,
    preset: PresetOption = None,
    caption_column: Annotated[str | None, option("of --captions  [default: caption]")] = None,
    key_column: Annotated[str | None, option("of --captions  [default: the row number]")] = None,
    vector_column: Annotated[str | None, option("of parquet --vectors  [default: embedding]")] = None,
    caption_member: Annotated[
        str | None, option("in tars: txt, cls, json:FIELD  [default: txt, then json:caption]")
    ] = None,
    class_names: Annotated[str | None, option("text file, one name a line, if the member is a class number")] = None,
    template: Annotated[
        str | None, option("text around it, 'a photo of a {}', or several fields, '{title}. {text}'")
    ] = None,
    encoder: Annotated[
        str | None, option("sentence-transformers name or folder, or matrix:FILE.npy  [default: all-MiniLM-L6-v2]")
    ] = None,
    prompt: Annotated[str | None, option("put before each text, for the encoder  [default: its own]")] = None,
    dim: Annotated[int | None, option("first coordinates kept, of Matryoshka encoders  [default: all]")] = None,
    precision: Annotated[Precision | None, option("of the encoder's arithmetic  [default: auto]")] = None,
    device: DeviceOption = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
    progress: ProgressOption = "auto",
    dry_run: DryRun = False,
) -> None:
    """Captions to nodes (distinct texts) and embeddings.

    Reads the store's own tars, or --shards, --captions or --vectors.
    """
    if context.args:
        raise typer.BadParameter(
            f"unexpected {context.args[0]}. Quote patterns, or the shell puts all files there: --shards '/data/*.tar'"
        )
    names = "shards captions vectors preset caption_column key_column vector_column caption_member class_names template"
    names += " encoder prompt dim precision device"
    _run_section("embed", store, given(locals(), names), given(locals(), HOW))


@app.command()
def index(
    store: StoreArg,
    k: Annotated[int | None, option("neighbours a node  [default: 64]")] = None,
    engine: Annotated[str | None, option("auto, exact, partition or faiss:FACTORY  [default: auto]")] = None,
    recall: Annotated[float | None, option("recall@k to aim for, unless exact  [default: 0.99]")] = None,
    min_recall: Annotated[
        float | None, option("fail below this recall@k  [default: 0.999 if exact, else --recall less 0.01]")
    ] = None,
    memory: Annotated[float | None, option("GB a worker may take  [default: 4]")] = None,
    device: DeviceOption = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
    progress: ProgressOption = "auto",
    dry_run: DryRun = False,
) -> None:
    """Nodes to the k-nearest-neighbour graph, recall certified."""
    _run_section("index", store, given(locals(), "k engine recall min_recall memory device"), given(locals(), HOW))


@app.command()
def export(
    store: StoreArg,
    embeddings: Annotated[Embeddings | None, option("carried by the sidecars  [default: int8]")] = None,
    layout: Annotated[
        Layout | None,
        option("sidecars beside the tars; new tars with the fields inside; new tars in neighbour order  [sidecars]"),
    ] = None,
    chunk: Annotated[int | None, option("of clustered: neighbours shuffled as one  [default: 32]")] = None,
    shard_size: Annotated[int | None, option("of clustered: samples a tar  [default: 10000]")] = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
    progress: ProgressOption = "auto",
    dry_run: DryRun = False,
) -> None:
    """Graph to sidecars or new tars, for trainers."""
    _run_section("export", store, given(locals(), "embeddings layout chunk shard_size"), given(locals(), HOW))


@app.command()
def retry(
    store: StoreArg,
    reason: Annotated[list[str] | None, option("instead: URLs whose reason contains this; may be given again")] = None,
    all_urls: Annotated[bool, typer.Option("--all", help="instead: all URLs without an image")] = False,
    workers: Workers = None,
    address: Address = None,
    progress: ProgressOption = "auto",
    dry_run: DryRun = False,
) -> None:
    """Failed tasks once more, and URLs that may be there again."""
    from graphbuild.retry import retry_store, wanted_urls

    opened, wanted = open_store(store), wanted_urls(reason or (), everything=all_urls)
    if dry_run:
        from graphbuild.plan.retry import plan_retry

        _say(plan_retry(opened, wanted, workers))
        return
    with _runner(given(locals(), "workers address progress")) as runner:
        _say(retry_store(opened, runner, wanted))


def _run_section(section: str, url: str, changes: dict[str, Any], how: dict[str, Any]) -> None:
    from graphbuild.recipe import resolve

    store = open_store(url)
    _run_verb(section, resolve(store, section, changes), store, how)


def _run_verb(verb: str, recipe: Recipe, store: Store, how: dict[str, Any]) -> None:
    if how["dry_run"]:
        from graphbuild.plan.show import plan_verb

        _say(plan_verb(verb, recipe, store, how["workers"], force=how["force"]))
        return
    from graphbuild.fetched import require_images
    from graphbuild.pipeline import run_verb
    from graphbuild.summary import summary

    with _runner(how) as runner:
        manifest = run_verb(verb, recipe, store, runner, force=how["force"])
    echo(summary(verb, manifest, store))
    if verb == "download":
        require_images(store)


def _say(texts: Iterable[str]) -> None:
    for text in texts:
        echo(text)


def _runner(how: dict[str, Any]) -> Runner:
    from graphbuild.runner import Runner

    return Runner(workers=how["workers"], address=how["address"], progress=_progress(how["progress"]))


def _progress(mode: Mode) -> Progress:
    from graphbuild.progress import Progress
    from graphbuild.terminal import log_as_json

    if mode == "json":
        log_as_json()
    return Progress(mode)
