"""The Typer app that the verbs register with."""

import typer

app = typer.Typer(
    name="graphbuild",
    help="Sample similarity graphs for contrastive training: URL list or tars in, shards with their graph out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
