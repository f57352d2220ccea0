"""What the verbs share: their common options, and how a STORE argument is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graphbuild.errors import ConfigError

if TYPE_CHECKING:
    from graphbuild.store import Store

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
Embeddings = Literal["int8", "float16", "sketch:64", "none"]
Layout = Literal["sidecars", "inline", "clustered"]
DerivedList = Literal["duplicates", "hard-negatives", "false-negatives", "positives"]


def option(help_: str, **limits: Any) -> Any:
    """An option whose help says by itself what its absence means."""
    return typer.Option(help=help_, show_default=False, **limits)


StoreArg = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="the job's output folder, or any fsspec URL such as s3://...", show_default=False
    ),
]
RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, see pipelines/", show_default=False)]
Workers = Annotated[
    int | None, option("worker processes; 0: none, in this process  [default: one a CPU or GPU]", min=0)
]
Address = Annotated[
    str | None, option("a Ray cluster: auto (on one of its nodes), or HOST:PORT  [default: this machine]")
]
Force = Annotated[bool, typer.Option("--force", help="rebuild what was built with other settings or inputs")]
ProgressOption = Annotated[
    Literal["auto", "live", "plain", "json"],
    typer.Option(help="how progress is shown; json: an object a line, on stderr"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only tell what it would take")]
PresetOption = Annotated[Literal["cc3m", "cc12m"] | None, option("a published headerless TSV")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"] | None, option("[default: auto]")]


def given(values: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: values[name] for name in names.split()}


def open_store(url: str) -> Store:
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
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"STORE {url} cannot be opened ({error})", "name a folder, or a URL that fsspec knows"
        ) from None
