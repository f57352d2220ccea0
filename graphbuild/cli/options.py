"""What the verbs share: options made from the recipe's fields and of how to run, and how a STORE argument is opened."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from graphbuild.cli.app import app
from graphbuild.errors import ConfigError
from graphbuild.machine.terminal import ProgressMode
from graphbuild.recipe import SECTIONS, flag

if TYPE_CHECKING:
    from graphbuild.store.store import Store

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
EPILOG = (
    "STORE/recipe.yaml keeps these settings for later commands. --NAME none puts one back to its default, but where"
    " none is one of the choices; \\none is that word itself."
)


def option(help_: str, **limits: Any) -> Any:
    """An option whose help says by itself what its absence means."""
    return typer.Option(help=help_, show_default=False, **limits)


StoreArg = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="the job's output folder, or any fsspec URL such as s3://...", show_default=False
    ),
]
RecipeArg = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, as `graphbuild run --help` shows one", show_default=False)
]
Workers = Annotated[
    int | None,
    option("worker processes, at most; 0: this one alone  [default: one a CPU or GPU; small jobs: 0]", min=0),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only tell what it would take")]


@dataclass(frozen=True)
class How:
    """How a verb is run; each field is an option."""

    workers: Workers = None
    address: Annotated[
        str | None, option("a Ray cluster: auto (on one of its nodes), or HOST:PORT  [default: this machine]")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="rebuild what was built with other settings or inputs")] = False
    progress: Annotated[ProgressMode, typer.Option(help="how progress is shown; json: an object a line, on stderr")] = (
        "auto"
    )
    dry_run: DryRun = False


Changes = dict[str, Any]
Verb = Callable[..., None]


def builds(
    section: str = "", shown: str = "", *, positional: str = "", without: str = "", **registered: Any
) -> Callable[[Verb], Verb]:
    """Register a verb that builds: with an option for each `shown` setting of that section of the recipe, and for each
    field of How that is not in `without`.

    It is called with its own arguments, `how`, and `changes`: setting -> value of those given, None for its default.
    positional: the setting that is an argument.
    """
    settings = {name: SECTIONS[section].model_fields[name] for name in f"{positional} {shown}".split()}
    every = inspect.signature(How, eval_str=True).parameters
    ways = {name: way for name, way in every.items() if name not in without.split()}

    def register(verb: Verb) -> Verb:
        def command(**values: Any) -> None:
            how = How(**{name: values.pop(name) for name in ways})
            if how.address is not None and how.workers == 0:
                raise ConfigError(
                    "--workers 0 runs in this process, not on the cluster at --address", "give one of them"
                )
            given = {name: text for name in settings if (text := values.pop(name)) not in (None, [])}
            changes = {name: _read(name, settings[name], text) for name, text in given.items()}
            verb(**values, **({"changes": changes} if section else {}), how=how)

        own = inspect.signature(verb, eval_str=True).parameters.values()
        made = [_parameter(name, field, is_argument=name == positional) for name, field in settings.items()]
        parameters = [*(p for p in own if p.name not in ("changes", "how")), *made, *ways.values()]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        epilog = EPILOG if section == verb.__name__ else None
        app.command(verb.__name__, help=inspect.getdoc(verb), epilog=epilog, **registered)(command)
        return verb

    return register


def _parameter(name: str, field: FieldInfo, *, is_argument: bool) -> inspect.Parameter:
    """A setting as a parameter of a verb: text, but for a switch, that `_read` takes as the field's own type."""
    extra, text = cast(dict[str, str], field.json_schema_extra), str(field.description)
    default = extra["unset"] if field.default is None else field.default
    limits = [
        f"x{sign}{getattr(rule, key)}" for rule in field.metadata for key, sign in SIGNS.items() if hasattr(rule, key)
    ]
    notes = "; ".join([f"default: {default}"] * (default != "") + [", ".join(limits)] * bool(limits))
    made: Any
    if is_argument:
        made = Annotated[list[str] | None, typer.Argument(metavar=name.upper(), help=text, show_default=False)]
    elif "files" in extra["marks"]:
        again = f"{text}; may be given again"
        made = Annotated[list[str] | None, option(again, metavar="<str>")]
    elif field.annotation is bool:
        made = Annotated[bool | None, option(text)]
    else:
        kind = "|".join(get_args(_type(field))) or _type(field).__name__
        made = Annotated[str | None, option(text + (f"  [{notes}]" if notes else ""), metavar=f"<{kind}>")]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=made)


def _type(field: FieldInfo) -> Any:
    """The type of a setting that is set."""
    return get_args(field.annotation)[0] if NoneType in get_args(field.annotation) else field.annotation


def _read(name: str, field: FieldInfo, text: str | list[str] | bool) -> Any:
    """A setting's value, as its type; None for its default. Its bounds are the recipe's to check."""
    if isinstance(text, list):
        from graphbuild.sources.paths import several

        text = text[0] if len(text) == 1 else several(text)
    if text == "none" and text not in get_args(_type(field)):
        return None
    if isinstance(text, str) and re.fullmatch(r"\\+none", text):
        text = text[1:]
    try:
        return TypeAdapter(_type(field)).validate_python(text)
    except ValidationError as error:
        message = f"{text!r}: {error.errors()[0]['msg']}".replace(": Input", ": input")
        raise typer.BadParameter(message, param_hint=f"'{flag(name)}'") from None


def open_store(url: str) -> Store:
    from graphbuild.store.store import Store

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
