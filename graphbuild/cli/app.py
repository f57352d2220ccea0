"""The Typer app that the verbs register with."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """As Typer's, without the words that pydantic puts before a refused choice."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    name="graphbuild",
    cls=Group,
    help="Sample similarity graphs for contrastive training: URL list or tars in, shards with their graph out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graphbuild {version('graphbuild')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it, and exit")
    ] = False,
) -> None:
    pass
