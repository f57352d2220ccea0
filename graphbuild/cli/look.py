"""Verbs that look at a store: they change nothing that a stage wrote."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from graphbuild.cli.app import app
from graphbuild.cli.options import DryRun, RecipeArg, StoreArg, Workers, open_store, option
from graphbuild.machine.terminal import echo


@app.command()
def plan(
    recipe: RecipeArg,
    store: Annotated[
        str | None, typer.Argument(metavar="STORE", help="where it would go, for the disk", show_default=False)
    ] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="of the source, instead of a look at it")] = None,
    workers: Workers = None,
    on: Annotated[
        list[str] | None,
        option("machines: nodes=32,cores=64,memory=256,gpus=8,gpu=h100,network=25; may be given again"),
    ] = None,
) -> None:
    """Rows, bytes, memory and time of a recipe, before anything runs."""
    from graphbuild.job.plan.show import plan_recipe
    from graphbuild.recipe import read_recipe

    opened = open_store(store) if store is not None else None
    for part in plan_recipe(read_recipe(recipe), opened, rows=rows, workers=workers, on=on or ()):
        echo(part)


@app.command()
def neighbors(
    store: StoreArg,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="a sample's key", show_default=False)] = None,
    text: Annotated[str | None, option("any text instead of a sample")] = None,
    node: Annotated[int | None, option("a node's number instead")] = None,
    count: Annotated[int, typer.Option(min=1, help="how many")] = 10,
    images: Annotated[bool, typer.Option(help="thumbnails, on a terminal")] = True,
) -> None:
    """The nearest neighbours of a sample, or of any text."""
    from graphbuild.look.catalog import Catalog
    from graphbuild.look.thumbnails import show_neighbors

    catalog = Catalog(open_store(store))
    sample, found = catalog.ask(count, key=key, text=text, node=node)
    show_neighbors(catalog, sample, found, images=images)


@app.command()
def mine(
    context: typer.Context,
    store: StoreArg,
    what: Annotated[Literal["duplicates", "hard-negatives", "false-negatives", "positives"], option("which list")],
    threshold: Annotated[float | None, option("least similarity; of all but hard-negatives")] = None,
    count: Annotated[int | None, option("most an anchor; of hard-negatives and positives  [default: 10]")] = None,
    skip: Annotated[int | None, option("nearest ranks left out; this and all below of hard-negatives")] = None,
    within: Annotated[int | None, option("only of the nearest so many ranks  [default: all]")] = None,
    random: Annotated[int | None, option("draw them, with this seed  [default: the nearest]")] = None,
    positive: Annotated[
        str | None, option("the positive's similarity: number, captions, or .npy by row  [default: 1]")
    ] = None,
    absolute_margin: Annotated[float | None, option("stay below it by  [default: 0]")] = None,
    relative_margin: Annotated[float | None, option("stay below it by this share of it  [default: 0.05]")] = None,
    min_similarity: Annotated[float | None, option("[default: -1]")] = None,
    max_similarity: Annotated[float | None, option("[default: 1]")] = None,
    matches: Annotated[str | None, option("a list of match: its queries' nodes as candidates")] = None,
    rescore: Annotated[str | None, option("cross-encoder that scores candidates anew, name or folder")] = None,
    format: Annotated[Literal["pairs", "triplets"] | None, option("triplets: texts to train on")] = None,
    mutual: Annotated[bool | None, typer.Option("--mutual", help="of positives: that list each other")] = None,
    out: Annotated[str | None, option("parquet file  [default: STORE/mined/WHAT.parquet]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Graph to lists for training and cleaning, without a search."""
    from graphbuild.graph.lists.mine import mine_store

    rules = {name: value for name, value in context.params.items() if name not in ("store", "what", "out", "dry_run")}
    echo(mine_store(open_store(store), what, rules, out, dry_run=dry_run))


@app.command()
def select(
    context: typer.Context,
    store: StoreArg,
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the selection")] = "selection",
    keep: Annotated[
        list[str] | None, option("list to keep: .parquet, .npy, .txt, or a selection's name; may be given again")
    ] = None,
    drop: Annotated[list[str] | None, option("list to drop, as of mine; may be given again")] = None,
    prefer: Annotated[
        Literal["first", "sharpest", "neighbors", "longest"] | None,
        option("which of each group of duplicates stays"),
    ] = None,
    where: Annotated[str | None, option("SQL over columns of samples and their JSON fields")] = None,
    min_degree: Annotated[int, option("least number of lists that name the node", min=0)] = 0,
    budget: Annotated[float | None, option("rows to keep, or a share of those left, by --method")] = None,
    method: Annotated[str, typer.Option(help="random, sas, d2, density, semdedup, k-center or sensitivity")] = "random",
    scores: Annotated[str | None, option("for the method: a column, or a .npy by row")] = None,
    labels: Annotated[str | None, option("for the method: a column, or a .npy by row")] = None,
    seed: Annotated[int, typer.Option(help="of the method")] = 0,
    out: Annotated[str | None, option("parquet file  [default: STORE/selections/NAME.parquet]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Rows that loaders, exports and trainers take; no tar is rewritten."""
    from graphbuild.graph.select.rules import select_store

    rules = {key: value for key, value in context.params.items() if key not in ("store", "name", "out", "dry_run")}
    rules |= {"keep": keep or (), "drop": drop or ()}
    echo(select_store(open_store(store), name, rules, out, dry_run=dry_run))


@app.command()
def match(
    context: typer.Context,
    store: StoreArg,
    captions: Annotated[str | None, option("queries: a caption list; files, a folder or a pattern")] = None,
    vectors: Annotated[str | None, option("queries: .npy, .npz or parquet, of the store's encoder")] = None,
    other: Annotated[str | None, typer.Option("--store", help="queries: the samples of another store")] = None,
    images: Annotated[str | None, option("queries, of leaks: tars, compared by their pictures")] = None,
    what: Annotated[Literal["neighbors", "leaks", "novel"], typer.Option(help="which list")] = "neighbors",
    k: Annotated[
        int | None, option("nearest nodes a query, not of leaks  [default: 10, or all at --threshold]")
    ] = None,
    threshold: Annotated[
        float | None, option("least similarity, not of novel  [default of leaks: equal texts]")
    ] = None,
    bits: Annotated[int | None, option("of leaks: pictures that differ in so many of 64  [default: 4]")] = None,
    caption_column: Annotated[str | None, option("of --captions  [default: caption]")] = None,
    key_column: Annotated[str | None, option("of --captions, or of parquet --vectors  [default: none]")] = None,
    vector_column: Annotated[str | None, option("of parquet or .npz --vectors  [default: embedding]")] = None,
    out: Annotated[str | None, option("parquet file  [default: STORE/match/WHAT.parquet]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Queries to the graph: the nearest, leaks of a test set, novelty.

    Every query is compared with every node, so the answer is exact.
    """
    from graphbuild.graph.match.match import match_store

    rest = ("store", "other", "what", "out", "dry_run")
    asked = {name: value for name, value in context.params.items() if name not in rest}
    echo(match_store(open_store(store), what, {**asked, "store": other}, out, dry_run=dry_run))


@app.command()
def report(
    store: StoreArg,
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="another store, to compare its graph", show_default=False)
    ] = None,
    out: Annotated[str | None, option("folder to write it to  [default: STORE/report]")] = None,
) -> None:
    """A page of what came out, or of how two graphs differ.

    Compared are two stores of the same captions, by different encoders for instance.
    """
    from graphbuild.look.report import write_report

    if out is not None:
        open_store(out)  # refuses what can be no folder
    echo(f"report    {write_report(open_store(store), out, open_store(other) if other is not None else None)}")


@app.command()
def explore(
    store: StoreArg,
    compare: Annotated[str | None, option("another store, beside it: another encoder or k")] = None,
    static: Annotated[str | None, option("write a folder for any web server instead, of at most 50 MB")] = None,
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8765,
) -> None:
    """A page to search, map and walk the graph, until Ctrl-C.

    Only who has the address that it prints, with its token, gets in.
    """
    from graphbuild.errors import ConfigError
    from graphbuild.look.explore import serve, write_static

    if static is not None:
        if compare is not None:
            raise ConfigError("--static with --compare", "write a folder for each store")
        echo(write_static(open_store(store), open_store(static).url))
        return
    stores = [open_store(url) for url in (store, compare) if url is not None]
    serve(stores, host, port, lambda url: echo(f"explore   {url}   (Ctrl-C ends it)"))


@app.command()
def certify(
    vectors: Annotated[str, typer.Argument(metavar="VECTORS", help="[N, d]: .npy, .npz, parquet", show_default=False)],
    neighbors: Annotated[
        str,
        typer.Argument(metavar="NEIGHBORS", help="[N, k]: the same, or a sparse matrix in .npz", show_default=False),
    ],
    similarities: Annotated[
        str | None,
        typer.Argument(metavar="SIMILARITIES", help="or distances, [N, k]: the same", show_default=False),
    ] = None,
    queries: Annotated[str | None, option("vectors [Q, d] whose lists these are, [Q, k]  [default: VECTORS]")] = None,
    metric: Annotated[
        Literal["cosine", "inner-product", "l2"] | None, option("what is near  [default: what explains the graph]")
    ] = None,
    with_self: Annotated[
        bool, typer.Option("--with-self", help="each list names its own node too: leave that out")
    ] = False,
    min_recall: Annotated[float | None, option("exit 1 below it", min=0, max=1)] = None,
    sample: Annotated[int, typer.Option(min=1, help="nodes searched again by brute force")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="draws them")] = 0,
    json: Annotated[str | None, option("write the certificate there; -: to stdout", metavar="<file>")] = None,
    vector_column: Annotated[str, typer.Option(help="of parquet or .npz")] = "embedding",
    neighbor_column: Annotated[str, typer.Option(help="of parquet or .npz")] = "neighbors",
    similarity_column: Annotated[str, typer.Option(help="of parquet or .npz")] = "similarities",
) -> None:
    """Recall and structure of any tool's graph, without a store.

    Exit code 1 if the structure is broken or --min-recall is missed.
    """
    from graphbuild.look.certify import certify_files

    columns = (vector_column, neighbor_column, similarity_column)
    certify_files(
        vectors, neighbors, similarities, queries=queries, columns=columns, json_to=json, min_recall=min_recall,
        metric=metric, with_self=with_self, sample=sample, seed=seed,
    )  # fmt: skip


@app.command()
def verify(store: StoreArg) -> None:
    """Check every file, their alignment, and recall afresh."""
    from graphbuild.errors import QualityError
    from graphbuild.look.verify import verify_store

    opened = open_store(store)
    report = verify_store(opened)
    for problem in report.problems:
        echo(f"BAD  {problem}")
    echo(report.summary())
    if report.problems:
        raise QualityError(f"{len(report.problems)} problem(s) in {opened.url}", report.fix(opened))


@app.command()
def doctor(
    store: Annotated[str | None, typer.Argument(metavar="STORE", help="a store to try writing to")] = None,
) -> None:
    """What this machine can do, tried out.

    Exit code 1 if the demo could not run.
    """
    from graphbuild.look.doctor import examine

    failed = False
    for finding in examine(store):
        echo(f"{finding.check:<9} {finding.state:<8} {finding.says}")
        if finding.fix:
            echo(f"{'':19}-> {finding.fix}")
        failed |= finding.state == "FAIL"
    if failed:
        raise typer.Exit(1)
