"""Class similarities in place of an encoder: a matrix [C, C] becomes vectors whose cosines are its entries.

`matrix:FILE.npy`, with --class-names: row i belongs to the i-th name. The vectors are the eigenvectors times the roots
of their eigenvalues. A matrix with negative ones is no Gram matrix: these are dropped, and how far the cosines then
are from the matrix is recorded, and refused above MEAN_LIMIT. Memory and time: C^2 and C^3, for thousands of classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from graphbuild.errors import ConfigError, InputError, StageError
from graphbuild.machine.threads import torch_threads
from graphbuild.nodes.captions import fill_template, read_class_names, usable_text
from graphbuild.recipe import Embed
from graphbuild.store.files import read_array
from graphbuild.store.store import Json

logger = logging.getLogger(__name__)
PREFIX = "matrix:"
MEAN_LIMIT, NOTABLE = 0.05, 0.01  # of |cosine - entry|
Half = np.ndarray[Any, np.dtype[np.float16]]


def is_matrix(encoder: str) -> bool:
    return encoder.startswith(PREFIX)


def read_classes(embed: Embed) -> list[str]:
    """The node text of each row of the matrix."""
    if embed.class_names is None:
        raise ConfigError(f"{embed.encoder} without class names", "name its rows, one a line, with --class-names")
    names = [usable_text(fill_template(embed.template, name))[0] for name in read_class_names(embed.class_names)]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"{embed.class_names} names {len(twice)} classes twice, as {twice[0]!r}: they would be one node",
            "give each class a name of its own",
        )
    return [str(name) for name in names]


def vectors(encoder: str, classes: Sequence[str], texts: Sequence[str]) -> tuple[Half, Json]:
    """float16 vectors [n, d] of class texts, and how far their cosines are from the matrix."""
    rows = {text: row for row, text in enumerate(classes)}
    unknown = [text for text in texts if text not in rows]
    if unknown:
        raise StageError(f"{unknown[0][:80]!r} is no class name, so {encoder} has no row for it", "see --class-names")
    table, deviation = factored(encoder.removeprefix(PREFIX), len(rows))
    return table[[rows[text] for text in texts]], {"d": table.shape[1], **deviation}


@lru_cache(maxsize=1)
def factored(path: str, classes: int) -> tuple[Half, Json]:
    """float16 vectors [C, d] of a similarity matrix; InputError when it is none."""
    given = read_array(path)
    fault = _fault(given, classes)
    if fault:
        raise InputError(f"{path}: {fault}", "give a symmetric matrix of cosine-like similarities, 1 on its diagonal")
    wanted = given.astype(np.float64)
    with torch_threads(1):
        values, directions = np.linalg.eigh(wanted)
    kept = values > 1e-7 * values[-1]
    found = directions[:, kept] * np.sqrt(values[kept])
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not lengths.min() > 0:
        raise InputError(f"{path}: row {int(lengths.argmin())} has no positive part", "see docs/reference/recipe.md")
    found = (found / lengths).astype(np.float16)
    distance = np.abs(found.astype(np.float64) @ found.T.astype(np.float64) - wanted)
    mean, most = float(distance.mean()), float(distance.max())
    if mean > MEAN_LIMIT:
        raise InputError(
            f"{path} is no Gram matrix: the nearest cosines are off by {mean:.3f} in the mean, {most:.3f} at most",
            "shrink it towards the identity, as in 0.5 * S + 0.5 * I, or give --vectors",
        )
    if most > NOTABLE:
        logger.warning("%s: cosines differ from it by %.4f in the mean, %.3f at most", path, mean, most)
    return found, {"mean_deviation": round(mean, 6), "max_deviation": round(most, 6)}


def _fault(given: Any, classes: int) -> str:
    if given.ndim != 2 or given.shape != (classes, classes):
        return f"shape {given.shape} is not [{classes}, {classes}], a row a class name"
    if given.dtype.kind not in "fiu" or not np.isfinite(given).all():
        return "it holds what is no finite number"
    if not np.allclose(given, given.T, atol=1e-6):
        row, column = np.unravel_index(np.abs(given - given.T).argmax(), given.shape)
        return f"it is not symmetric at row {row}, column {column}"
    if not np.allclose(np.diag(given), 1, atol=1e-6):
        return f"row {int(np.abs(np.diag(given) - 1).argmax())} has not 1 on the diagonal"
    return "" if np.abs(given).max() <= 1 + 1e-6 else "it has entries beyond 1"
