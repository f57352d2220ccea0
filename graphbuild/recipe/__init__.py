"""The recipe: every setting of a job, and how it is read from files, stores and commands."""

from graphbuild.recipe.reading import absolute, is_folder, read_recipe, resolve
from graphbuild.recipe.settings import (
    BESIDE,
    DEFAULT_ENCODER,
    SECTIONS,
    Download,
    Embed,
    EmbeddingKind,
    Index,
    Pack,
    Precision,
    Recipe,
    flag,
    marked,
)

__all__ = [
    "BESIDE",
    "DEFAULT_ENCODER",
    "SECTIONS",
    "Download",
    "Embed",
    "EmbeddingKind",
    "Index",
    "Pack",
    "Precision",
    "Recipe",
    "absolute",
    "flag",
    "is_folder",
    "marked",
    "read_recipe",
    "resolve",
]
