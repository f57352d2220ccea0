"""Icons with their names: pictures of the same things by many authors, whose captions are often equal, as on the web.

From the npm package @iconify/json, a tar of a JSON file a set with the bodies of its icons as SVG, rendered once for
all draws: black on white, some milliseconds each: 110,000 of 32 pixels are 110 MB in memory. A caption
is the icon's name in words, less the style's. A domain is an author with all sets: a draw trains on two thirds of the
authors and tests on the others. Nothing of the package is in this repository: each set has its own licence.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.experiments.labelled import LabelledImages
from benchmarks.experiments.photos import write_tars
from graphbuild.errors import ConfigError, InputError

if TYPE_CHECKING:
    from benchmarks.experiments.sources import Data

LICENCES = ("MIT", "Apache-2.0", "ISC", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1", "BSD-3-Clause", "Unlicense")
STYLE = (
    *(
        "outline",
        "outlined",
        "outlines",
        "line",
        "lines",
        "linear",
        "fill",
        "filled",
        "solid",
        "regular",
        "bold",
        "thin",
    ),
    *("light", "duotone", "twotone", "rounded", "sharp", "broken", "baseline", "stroke", "stroked", "mono", "flat"),
)
Box = tuple[float, float, float, float]  # left, top, width, height
MOST_OF_A_SET = 2000
TRAIN_SHARE = 2 / 3  # of the authors
FREQUENT = 64  # names that probes tell apart: those that most authors have
SAME_HANDS = {  # authors of whose icons 100 or more are another's pixel by pixel, and that other: one domain
    "Family": "Ben Sperry",
    "Bryan Housel": "Quincy Morgan",
    "Material Design Authors": "Google",
    "Pictogrammers": "Google",
}


@dataclass(frozen=True)
class Icons:
    """images: uint8 [n, P, P], 0 black. Of each icon its caption, its set, and the set's author: str [n]."""

    images: NDArray[np.uint8]
    captions: NDArray[np.str_]
    sets: NDArray[np.str_]
    authors: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Any) -> Icons:
        return Icons(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def labelled(self) -> LabelledImages:
        """class: the captions."""
        return LabelledImages(
            torch.from_numpy(self.images)[:, None].repeat(1, 3, 1, 1), {"class": self.captions.tolist()}
        )


def refusal(info: Mapping[str, Any]) -> str:
    """Why a set is left out, by its description; empty: it is taken."""
    licence = info["license"].get("spdx", "none named")
    for wrong, reason in (
        (licence not in LICENCES, f"licence {licence}"),
        (info.get("hidden"), "superseded, says the package"),
        (info.get("palette"), "coloured"),
        (info.get("category") == "Logos", "logos, the same drawing in every set"),
    ):
        if wrong:
            return reason
    return ""


def caption_of(name: str, suffixes: Sequence[str] = (), prefixes: Sequence[str] = ()) -> str:
    """An icon's name in words, less the style that its set declares before or behind names, and less STYLE's words
    behind it; one word is left at least."""
    for suffix in sorted(filter(None, suffixes), key=len, reverse=True):
        if name.endswith(f"-{suffix}"):
            name = name.removesuffix(f"-{suffix}")
            break
    for prefix in sorted(filter(None, prefixes), key=len, reverse=True):
        if name.startswith(f"{prefix}-"):
            name = name.removeprefix(f"{prefix}-")
            break
    words = name.split("-")
    while len(words) > 1 and words[-1] in STYLE:
        words.pop()
    return " ".join(words)


def picture(body: str, box: Box, pixels: int) -> NDArray[np.uint8]:
    """uint8 [P, P] of an SVG body whose viewBox is left, top, width, height: in the middle of a square, on white."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ConfigError("icons are rendered by resvg", "pip install resvg-py") from None
    left, top, width, height = box
    side = max(width, height)
    view = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="{view}" color="black">{body}</svg>'
    png = svg_to_bytes(svg_string=svg, width=pixels, height=pixels, background="white", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def icons_of(content: Mapping[str, Any]) -> dict[str, tuple[str, Box]]:
    """Of a set's JSON, by caption, the body and viewBox of the first icon that has it: of one thing in several styles
    and sizes one. Of a large set MOST_OF_A_SET of them, the same ones always."""
    found: dict[str, tuple[str, Box]] = {}
    suffixes, prefixes = list(content.get("suffixes") or ()), list(content.get("prefixes") or ())
    for name, icon in sorted(content["icons"].items()):
        if not icon.get("hidden"):
            left, top, width, height = (
                icon.get(key, content.get(key, usual))
                for key, usual in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            found.setdefault(caption_of(name, suffixes, prefixes), (icon["body"], (left, top, width, height)))
    chosen = random.Random("icons").sample(sorted(found), min(MOST_OF_A_SET, len(found)))
    return {caption: found[caption] for caption in sorted(chosen)}


@lru_cache(maxsize=1)
def rendered(package: Path, pixels: int, parent: Path) -> Icons:
    """The icons of the package, rendered once, under `parent`; beside them icons-*.json: which sets were taken, with
    their licences, and which left out, and why. Blank pictures are left out, and those that an earlier set of another
    author has pixel by pixel."""
    if not package.exists():
        raise InputError(f"there is no {package}", "get it with: npm pack @iconify/json")
    kept = parent / f"icons-{package.stem}-{pixels}.npz"
    if not kept.exists():
        parent.mkdir(parents=True, exist_ok=True)
        icons, told = _render(package, pixels)
        kept.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        temporary = kept.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, **{field.name: getattr(icons, field.name) for field in fields(icons)})
        temporary.replace(kept)
    with np.load(kept) as file:
        found = {field.name: file[field.name] for field in fields(Icons)}
    found["authors"] = np.array([SAME_HANDS.get(author, author) for author in found["authors"].tolist()])
    return Icons(**found)


def _render(package: Path, pixels: int) -> tuple[Icons, dict[str, Any]]:
    images, rows, seen = [], [], {}
    told: dict[str, Any] = {"taken": {}, "left out": {}}
    for content in _sets(package):
        info, prefix, counts = content["info"], content["prefix"], Counter[str]()
        if reason := refusal(info):
            told["left out"][prefix] = reason
            continue
        author = info["author"]["name"]
        for caption, (body, box) in icons_of(content).items():
            try:
                image = picture(body, box, pixels)
            except ValueError:
                counts["not rendered"] += 1
                continue
            owner = seen.setdefault(image.tobytes(), author)
            kind = "blank" if image.min() > 127 else "taken" if owner == author else f"as {owner}'s"
            counts[kind] += 1
            if kind == "taken":
                images.append(image)
                rows.append((caption, prefix, author))
        told["taken"][prefix] = {"author": author, "licence": info["license"]["spdx"], **counts}
    if not rows:
        raise InputError(f"{package} has no set that can be taken", "is it the tar of @iconify/json?")
    return Icons(np.stack(images), *(np.array(column) for column in zip(*rows, strict=True))), told


def _sets(package: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(package) as archive:
        for member in archive:  # in the order of their names, as npm packs them
            if member.name.startswith("package/json/") and member.name.endswith(".json"):
                content = archive.extractfile(member)
                assert content is not None
                yield json.load(content)


@dataclass(frozen=True)
class Draw:
    """Numbers of icons: trained on, of training authors; labelled for probes, of these; test of the probes, and gallery
    of the retrieval, of the other authors."""

    train: list[int]
    probe: list[int]
    test: list[int]
    gallery: list[int]


def draw_of(icons: Icons, train: int, probe: int, test: int, draw: int | None, shared: int | None = None) -> Draw:
    """Two thirds of the authors to train on; icons of them, and of the others, at random.

    train: exactly so many, with names that at least `shared` authors have. probe, test: at most so many.
    """
    generator = random.Random(f"icons {draw}")
    authors = sorted(set(icons.authors.tolist()))
    own = set(generator.sample(authors, round(TRAIN_SHARE * len(authors))))
    pairs = set(zip(icons.captions.tolist(), icons.authors.tolist(), strict=True))
    counts = Counter(caption for caption, _ in pairs)
    frequent = {caption for caption, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]}
    trained, tested = (
        [n for n, a in enumerate(icons.authors.tolist()) if (a in own) == side] for side in (True, False)
    )
    common = [n for n in trained if counts[str(icons.captions[n])] >= (shared or 0)]
    if len(common) < train:
        raise InputError(f"draw {draw} has {len(common):,} icons to train on, not {train:,}", "lower the number")
    named = [[n for n in part if icons.captions[n] in frequent] for part in (trained, tested)]
    return Draw(
        train=sorted(generator.sample(common, train)),
        probe=sorted(generator.sample(named[0], min(probe, len(named[0])))),
        test=named[1],
        gallery=sorted(generator.sample(tested, min(test, len(tested)))),
    )


def write_icons(data: Data, root: Path, shards: Path, package: Path | None) -> None:
    """The tars of a draw; probe.npz, test.npz and gallery.npz; the frequent names, a line each, in classes.txt."""
    if package is None:
        raise ConfigError("this recipe trains on icons", "--icons FILE, which `npm pack @iconify/json` makes")
    icons = rendered(package, data.pixels, root.parent)
    draw = draw_of(icons, data.train, data.probe, data.test, data.draw, data.shared)

    def samples() -> Iterator[dict[str, bytes]]:
        for number in draw.train:
            content = io.BytesIO()
            Image.fromarray(icons.images[number]).convert("RGB").save(content, "PNG")
            yield {"png": content.getvalue(), "txt": str(icons.captions[number]).encode()}

    write_tars(shards, samples(), data.shard_size)
    for name in ("probe", "test", "gallery"):
        chosen = icons[getattr(draw, name)]
        found = chosen.labelled()
        if name == "gallery":
            found.labels["author"] = chosen.authors.tolist()
        found.save(root / f"{name}.npz")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in sorted(set(icons.captions[draw.test].tolist()))))
