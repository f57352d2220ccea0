"""The command line: parses, builds a recipe, calls one function. Heavy imports wait until a verb runs."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graphbuild.errors import ConfigError, GraphbuildError
from graphbuild.terminal import HarmlessFormatter, echo

if TYPE_CHECKING:
    from graphbuild.recipe import Recipe
    from graphbuild.store import Store

app = typer.Typer(
    name="graphbuild",
    help="Sample similarity graphs for contrastive training: URL list or tars in, shards with their graph out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Preset = Literal["cc3m", "cc12m"]
Device = Literal["auto", "cpu", "cuda"]
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
Embeddings = Literal["int8", "float16", "sketch:64", "none"]
Layout = Literal["sidecars", "inline", "clustered"]
DerivedList = Literal["duplicates", "hard-negatives", "false-negatives", "positives"]
StoreArg = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="the job's output folder, or any fsspec URL such as s3://...",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="worker processes; 0: none, in this process  [default: one a CPU or GPU]",
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="a Ray cluster: auto (on one of its nodes), or HOST:PORT  [default: this machine]", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="rebuild what was built with other settings or inputs")]
PresetOption = Annotated[Preset | None, typer.Option(help="a published headerless TSV", show_default=False)]
DeviceOption = Annotated[Device | None, typer.Option(help="[default: auto]", show_default=False)]


def _option(help_: str, **kwargs: Any) -> Any:
    return typer.Option(help=help_, show_default=False, **kwargs)


@app.command()
def demo(
    store: Annotated[str, typer.Argument(metavar="[STORE]", help="output folder")] = "demo",
    scenes: Annotated[int, typer.Option(min=200, help="captioned scenes to make")] = 3000,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """The whole data job on generated, captioned scenes."""
    from graphbuild.demo.run import run_demo

    run_demo(store, scenes=scenes, workers=workers, address=address)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, see pipelines/", show_default=False)],
    store: StoreArg,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Every stage of a recipe, from its source to sidecars."""
    from graphbuild.recipe import read_recipe

    _run_verb("run", read_recipe(recipe), _store(store), workers, address, force)


@app.command()
def download(
    store: StoreArg,
    urls: Annotated[
        str | None,
        typer.Argument(metavar="URLS", help="URL list: parquet, CSV, TSV or JSONL", show_default=False),
    ] = None,
    preset: PresetOption = None,
    url_column: Annotated[str | None, _option("[default: url]")] = None,
    caption_column: Annotated[str | None, _option("[default: caption]")] = None,
    shard_size: Annotated[int | None, _option("URLs a shard  [default: 10000]")] = None,
    image_size: Annotated[int | None, _option("pixels  [default: 256]")] = None,
    resize_mode: Annotated[ResizeMode | None, _option("what the size bounds  [default: keep_ratio]")] = None,
    timeout_seconds: Annotated[float | None, _option("[default: 10]")] = None,
    retries: Annotated[int | None, _option("[default: 1]")] = None,
    threads: Annotated[int | None, _option("requests at a time, a worker  [default: 32]")] = None,
    allow_private_hosts: Annotated[
        bool | None, typer.Option("--allow-private-hosts", help="also fetch from addresses that are not public")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """URL list to WebDataset tars; failures are counted and kept."""
    changes = _given(
        locals(),
        "urls preset url_column caption_column shard_size image_size resize_mode timeout_seconds retries threads"
        " allow_private_hosts",
    )
    _run_section("download", store, changes, workers, address, force)


@app.command()
def embed(
    store: StoreArg,
    shards: Annotated[
        str | None, _option("tars made elsewhere: a folder, or 'cc3m/{0000..0331}.tar', 'cc3m/*.tar'")
    ] = None,
    captions: Annotated[str | None, _option("a caption list: parquet, CSV, TSV or JSONL")] = None,
    vectors: Annotated[str | None, _option("ready vectors, one node a row: .npy [n, d] or parquet")] = None,
    preset: PresetOption = None,
    caption_column: Annotated[str | None, _option("of --captions  [default: caption]")] = None,
    key_column: Annotated[str | None, _option("of --captions  [default: the row number]")] = None,
    vector_column: Annotated[str | None, _option("of parquet --vectors  [default: embedding]")] = None,
    caption_member: Annotated[
        str | None, _option("in tars: txt, cls, json:FIELD  [default: txt, then json:caption]")
    ] = None,
    class_names: Annotated[str | None, _option("text file, one name a line, if the member is a class number")] = None,
    template: Annotated[str | None, _option("text around it, as in 'a photo of a {}'")] = None,
    encoder: Annotated[str | None, _option("sentence-transformers name or folder  [default: all-MiniLM-L6-v2]")] = None,
    device: DeviceOption = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Captions to nodes (distinct texts) and embeddings.

    Reads the store's own tars, or --shards, --captions or --vectors.
    """
    names = "shards captions vectors preset caption_column key_column vector_column caption_member class_names template"
    names += " encoder device"
    _run_section("embed", store, _given(locals(), names), workers, address, force)


@app.command()
def index(
    store: StoreArg,
    k: Annotated[int | None, typer.Option("--k", help="neighbours a node  [default: 64]", show_default=False)] = None,
    engine: Annotated[str | None, _option("auto, exact, partition or faiss:FACTORY  [default: auto]")] = None,
    recall: Annotated[float | None, _option("recall@k to aim for, unless exact  [default: 0.99]")] = None,
    min_recall: Annotated[
        float | None, _option("fail below this recall@k  [default: 0.999 if exact, else --recall less 0.01]")
    ] = None,
    memory: Annotated[float | None, _option("GB a worker may take  [default: 4]")] = None,
    device: DeviceOption = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Nodes to the k-nearest-neighbour graph, recall certified."""
    _run_section("index", store, _given(locals(), "k engine recall min_recall memory device"), workers, address, force)


@app.command()
def export(
    store: StoreArg,
    embeddings: Annotated[Embeddings | None, _option("carried by the sidecars  [default: int8]")] = None,
    layout: Annotated[
        Layout | None,
        _option("sidecars beside the tars; new tars with the fields inside; new tars in neighbour order  [sidecars]"),
    ] = None,
    chunk: Annotated[int | None, _option("of clustered: neighbours shuffled as one  [default: 32]")] = None,
    shard_size: Annotated[int | None, _option("of clustered: samples a tar  [default: 10000]")] = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
) -> None:
    """Graph to sidecars beside the tars, or to new tars, for trainers."""
    _run_section("export", store, _given(locals(), "embeddings layout chunk shard_size"), workers, address, force)


@app.command()
def neighbors(
    store: StoreArg,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="a sample's key", show_default=False)] = None,
    text: Annotated[str | None, _option("any text instead of a sample")] = None,
    count: Annotated[int, typer.Option(min=1, help="how many")] = 10,
) -> None:
    """The nearest neighbours of a sample, or of any text."""
    from graphbuild.errors import ConfigError
    from graphbuild.lookup import find_sample, neighbors_of_node, neighbors_of_text, printable

    opened = _store(store)
    if (key is None) == (text is None):
        raise ConfigError(
            "give a KEY or --text, one of them", f"keys are listed in {opened.display('samples/')}*.parquet"
        )
    if key is not None:
        sample = find_sample(opened, key)
        echo(f"{printable(sample['key'])}  node {sample['node']}  {printable(sample['caption'])}")
        found = neighbors_of_node(opened, sample["node"], count)
    else:
        found = neighbors_of_text(opened, text or "", count)
    for neighbor in found:
        echo(f"  {neighbor.similarity:.3f}  node {neighbor.node:>9}  x{neighbor.samples:<4} {printable(neighbor.text)}")


@app.command()
def mine(
    store: StoreArg,
    what: Annotated[DerivedList, _option("which list")],
    threshold: Annotated[float | None, _option("least similarity; of all but hard-negatives")] = None,
    count: Annotated[int | None, _option("most an anchor; of hard-negatives and positives  [default: 10]")] = None,
    skip: Annotated[int | None, _option("nearest ranks left out; this and all below of hard-negatives")] = None,
    positive: Annotated[str | None, _option("the positive's similarity: number, or .npy by row  [default: 1]")] = None,
    absolute_margin: Annotated[float | None, _option("stay below it by  [default: 0]")] = None,
    relative_margin: Annotated[float | None, _option("stay below it by this share of it  [default: 0.05]")] = None,
    min_similarity: Annotated[float | None, _option("[default: -1]")] = None,
    max_similarity: Annotated[float | None, _option("[default: 1]")] = None,
    mutual: Annotated[bool | None, typer.Option("--mutual", help="of positives: that list each other")] = None,
    out: Annotated[str | None, _option("parquet file  [default: STORE/mined/WHAT.parquet]")] = None,
) -> None:
    """Graph to derived lists for training and cleaning, without a search."""
    from graphbuild.mine import mine_store

    names = "threshold count skip positive absolute_margin relative_margin min_similarity max_similarity mutual"
    echo(mine_store(_store(store), what, _given(locals(), names), out))


@app.command()
def retry(
    store: StoreArg,
    reason: Annotated[list[str] | None, _option("instead: URLs whose reason contains this; may be given again")] = None,
    all_urls: Annotated[bool, typer.Option("--all", help="instead: all URLs without an image")] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Failed tasks, and URLs whose failure may have passed, once more."""
    from graphbuild.retry import retry_store
    from graphbuild.runner import Runner

    with Runner(workers=workers, address=address) as runner:
        echo(retry_store(_store(store), runner, reasons=reason or (), everything=all_urls))


@app.command()
def verify(store: StoreArg) -> None:
    """Check every file, their alignment, and recall afresh."""
    from graphbuild.errors import QualityError
    from graphbuild.verify import verify_store

    opened = _store(store)
    report = verify_store(opened)
    for problem in report.problems:
        echo(f"BAD  {problem}")
    echo(report.summary())
    if report.problems:
        raise QualityError(
            f"{len(report.problems)} problem(s) in {opened.url}",
            "rebuild the stages named above with --force, or restore the files",
        )


def main() -> None:
    """Entry point: users' mistakes become two lines on stderr and exit code 2, failed work exit code 1."""
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("graphbuild").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every caption's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except GraphbuildError as error:
        echo(f"graphbuild: {error}", err=True)
        sys.exit(error.exit_code)


def _given(values: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: values[name] for name in names.split()}


def _store(url: str) -> Store:
    from graphbuild.store import Store

    if not url:
        raise ConfigError("STORE is empty", "name a folder, or a URL such as s3://bucket/folder")
    try:
        if "://" not in url:
            folder = Path(url).absolute()
            for path in (folder, *folder.parents):
                if path.is_file():
                    raise ConfigError(f"STORE {url} cannot be a folder: {path} is a file", "name a folder")
        return Store(url)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"STORE {url} cannot be opened ({error})", "name a folder, or a URL that fsspec knows"
        ) from None


def _run_section(
    section: str, url: str, changes: dict[str, Any], workers: int | None, address: str | None, force: bool
) -> None:
    from graphbuild.recipe import resolve

    store = _store(url)
    _run_verb(section, resolve(store, section, changes), store, workers, address, force)


def _run_verb(verb: str, recipe: Recipe, store: Store, workers: int | None, address: str | None, force: bool) -> None:
    from graphbuild.pipeline import run_verb
    from graphbuild.runner import Runner
    from graphbuild.summary import summary

    with Runner(workers=workers, address=address) as runner:
        manifest = run_verb(verb, recipe, store, runner, force=force)
    echo(summary(verb, manifest, store))
