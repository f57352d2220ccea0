"""How a recipe is read: from a file, or from a store with the changes of a command; what is wrong is named as the user
said it. fsspec and yaml wait until a recipe is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from graphbuild.errors import ConfigError, public
from graphbuild.recipe.settings import ENCODING, SECTIONS, SOURCES, Embed, Recipe, flag, marked, source_of

if TYPE_CHECKING:
    from graphbuild.store.store import Store

logger = logging.getLogger(__name__)


def read_recipe(path: str) -> Recipe:
    """A recipe file; relative paths in it are taken from the working folder."""
    from graphbuild.store.remote import file_system, reaching

    try:
        fs, root = file_system(path)
        with reaching(path):
            content = fs.cat_file(root)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"there is no recipe {path}", "`graphbuild run --help` shows a recipe") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error})", "check the path") from None
    recipe = _parse(content, path)
    for section, name, why in unread(recipe):
        raise ConfigError(f"{path}: {section}.{name} is not read {why}", "leave it out")
    return recipe


def resolve(store: Store, section: str, changes: Mapping[str, Any]) -> Recipe:
    """The store's recipe with the changes that a command makes to one section: setting -> value, None: its default.

    Those of SOURCES that are given take the place of the source before, None: the store's own tars. With a source of
    another kind, what described the one before goes back to its default. Switches are as in `changes`: what a store of
    an older version says of them is not obeyed, and told.
    """
    store.manifest()  # another format version may have other recipes
    recipe = Recipe()
    if store.exists("recipe.yaml"):
        recipe = _parse(store.read_bytes("recipe.yaml"), store.display("recipe.yaml"))
    values, defaults = recipe.model_dump(), Recipe().model_dump()

    def reset(part: str, name: str) -> bool:
        """Put a setting that the command does not name back to its default; whether that changes it."""
        if (part == section and name in changes) or values[part][name] == defaults[part][name]:
            return False
        values[part][name] = defaults[part][name]
        return True

    for name in [name for part, name in marked("switch") if reset(part, name) and part == section]:
        where, again = store.display("recipe.yaml"), f"give {flag(name)} with each command that is to have it"
        logger.warning("%s says %s, which is no longer remembered: %s", where, name, again)
    if section == "embed" and not changes.keys().isdisjoint(SOURCES):
        values["embed"].update(dict.fromkeys(SOURCES))
        if source_of({**values["embed"], **changes}) != recipe.embed.source:
            unset = [name for part, name in marked("of source") if reset(part, name)]
            if unset:
                logger.info("another kind of source: %s back to the default", ", ".join(unset))
    values[section].update({n: defaults[section][n] if value is None else value for n, value in changes.items()})
    resolved = _validate(values, options=list(changes))
    for part, name, why in unread(resolved):
        if part == section and name in changes:
            raise ConfigError(f"{flag(name)} is not read {why}", "leave it out")
    return resolved


def unread(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Settings that are not their defaults and yet not read: section, name, and with what else that is so."""
    embed, exported = recipe.embed, recipe.export
    is_matrix, has_fields = embed.encoder.startswith("matrix:"), "{}" not in embed.template
    found = {}
    for name, field in Embed.model_fields.items():
        sources = cast(dict[str, Any], field.json_schema_extra)["sources"]
        if sources and embed.source not in sources and not (name == "class_names" and is_matrix):
            kinds = " and ".join(map(flag, filter(None, embed.source.split(" and ")))) or "the tars of the store"
            found["embed", name] = f"with {kinds}"
    if embed.vector_member is not None:
        found |= {("embed", name): "with --vector-member" for name in ("vector_keys", "key_column", "vector_column")}
    if public(embed.vectors or "").endswith(".npy"):
        found["embed", "vector_column"] = "with a .npy file"
    if embed.source != "vectors" and has_fields:
        found |= {
            ("embed", name): "with named fields in --template"
            for name in ("caption_column", "caption_member", "caption_weights")
        }
    if embed.vectors is None and is_matrix:
        found |= {("embed", name): "with a matrix as --encoder" for name in ENCODING}
    if exported.layout != "clustered":
        found |= {("export", name): f"with --layout {exported.layout}" for name in ("chunk", "shard_size")}
    if recipe.index.engine == "exact":
        found["index", "recall"] = "with --engine exact"
    given, default = recipe.model_dump(), Recipe().model_dump()
    return [(part, name, why) for (part, name), why in found.items() if given[part][name] != default[part][name]]


def _parse(content: bytes, where: str) -> Recipe:
    import yaml

    try:
        values = yaml.safe_load(content.decode()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}", "fix the line named above") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} must hold sections ({', '.join(SECTIONS)})", "`graphbuild run --help` shows a recipe"
        )
    return _validate(values, where)


def _validate(values: Mapping[str, Any], where: str = "", options: Sequence[str] = ()) -> Recipe:
    """The recipe of these values; what is wrong is named as a field of the file `where`, or as one of the options."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            field = fault["loc"][-1]
            names = [name for name in options if name == field or len(fault["loc"]) == 1]
            name = ", ".join(map(flag, names)) or ".".join(map(str, fault["loc"]))
            known = fault["type"] != "extra_forbidden"
            lines.append(f"{name}: {fault['msg'].removeprefix('Value error, ') if known else _no_such(fault['loc'])}")
        raise ConfigError(
            (f"{where}: " if where else "") + "; ".join(lines),
            "correct it; what is allowed say the verb's --help, and docs/reference/recipe.md of the sources",
        ) from None
    values = recipe.model_dump()
    for section, key in marked("path"):
        if values[section][key] is not None:
            values[section][key] = absolute(values[section][key])
    encoder = values["embed"]["encoder"]
    if encoder.startswith("matrix:"):
        values["embed"]["encoder"] = "matrix:" + absolute(encoder.removeprefix("matrix:"))
    elif is_folder(encoder):
        values["embed"]["encoder"] = absolute(encoder)
    return Recipe.model_validate(values)


def _no_such(place: Sequence[int | str]) -> str:
    """That there is no such section, or setting of a section, and which there are."""
    if len(place) == 1:
        return f"no such setting: a recipe has the sections {', '.join(Recipe.model_fields)}"
    return f"no such setting: {place[0]} has {', '.join(SECTIONS[str(place[0])].model_fields)}"


def is_folder(name: str) -> bool:
    """Whether there is a local folder of that name; no name at all, or one too long for a path, is none."""
    try:
        return bool(name) and Path(name).is_dir()
    except OSError:
        return False


def absolute(path: str) -> str:
    """A local path made absolute, so that it means the same to a worker in another folder; URLs unchanged, and what
    `paths.several` made of absolute ones."""
    return path if "://" in path or path.startswith("{/") else str(Path(path).expanduser().absolute())
