"""Icons with their names: which are taken and what they are called, how they look, draws, retrieval, the whole path."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments import icons
from benchmarks.experiments.retrieval import retrieval
from graphbuild.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [f"{shape}-{place}" for shape in ("box", "dot", "bar") for place in ("left", "right", "top", "bottom")]


def test_a_caption_is_the_name_in_words_less_the_style() -> None:
    assert icons.caption_of("arrow-left") == "arrow left"
    assert icons.caption_of("battery-80-outline") == "battery 80"
    assert icons.caption_of("home-bold-duotone") == "home"
    assert icons.caption_of("add-circle-16-filled", ["16-filled", "filled"]) == "add circle"
    assert icons.caption_of("add-circle-16-filled") == "add circle 16"  # only the set knows that 16 is a size
    assert icons.caption_of("baseline-home", prefixes=["baseline", ""]) == "home"
    assert icons.caption_of("outline") == "outline"
    assert icons.caption_of("line-chart") == "line chart"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"license": {"spdx": "CC0-1.0"}}, ""),
        ({"license": {"spdx": "CC-BY-NC-4.0"}}, "licence CC-BY-NC-4.0"),
        ({"license": {"spdx": "GPL-3.0"}}, "licence GPL-3.0"),
        ({"license": {"title": "Mine"}}, "licence none named"),
        ({"palette": True}, "coloured"),
        ({"hidden": True}, "superseded, says the package"),
        ({"category": "Logos"}, "logos, the same drawing in every set"),
    ],
)
def test_a_set_is_left_out_for_its_licence_or_kind(changes: dict[str, Any], reason: str) -> None:
    assert icons.refusal({"license": {"spdx": "MIT"}, "palette": False, **changes}) == reason


# --- a package made here --------------------


def body_of(name: str, inset: float) -> str:
    """A shape in a half of a field of 8 by 8."""
    shape, place = name.split("-")
    left, top, width, height = {
        "left": (0, 0, 4, 8), "right": (4, 0, 4, 8), "top": (0, 0, 8, 4), "bottom": (0, 4, 8, 4),
    }[place]  # fmt: skip
    x, y, wide, high = left + inset, top + inset, width - 2 * inset, height - 2 * inset
    return {
        "box": f'<path fill="currentColor" d="M{x} {y}h{wide}v{high}h{-wide}z"/>',
        "dot": f'<circle fill="currentColor" cx="{x + wide / 2}" cy="{y + high / 2}" r="{2 - inset}"/>',
        "bar": f'<path stroke="currentColor" d="M{x} {y}L{x + wide} {y + high}"/>',
    }[shape]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A tar in the layout of @iconify/json: nine authors who draw the same twelve things, one each somewhat smaller; a
    copyist, a set that may not be taken, a blank and a broken icon."""
    pytest.importorskip("resvg_py")
    sets = {f"set-{n}": (f"author {n}", "MIT", {name: body_of(name, n / 8) for name in NAMES}) for n in range(9)}
    sets["set-0"][2].update({"box-left-outline": body_of("dot-top", 0.0), "nothing": "<g/>", "broken": "<path"})
    sets["zopy"] = ("a copyist", "ISC", {"tile-left": body_of("box-left", 0.0), "box-top": body_of("box-top", 1.4)})
    sets["zz-own"] = ("somebody", "GPL-3.0", {"box-left": body_of("box-left", 0.5)})
    path = tmp_path / "icons.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for prefix, (author, licence, bodies) in sets.items():
            info = {"author": {"name": author}, "license": {"spdx": licence}, "palette": False}
            found = {name: {"body": body} for name, body in bodies.items()}
            content = json.dumps({"prefix": prefix, "info": info, "width": 8, "height": 8, "icons": found}).encode()
            member = tarfile.TarInfo(f"package/json/{prefix}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_icons_are_black_on_white_in_the_middle_of_a_square() -> None:
    pytest.importorskip("resvg_py")
    left = icons.picture(body_of("box-left", 0.0), (0, 0, 8, 8), 16)
    expected = np.full((16, 16), 255)
    expected[:, :8] = 0
    assert np.array_equal(left, expected)
    tall = icons.picture(body_of("box-left", 0.0), (0, 0, 4, 8), 16)  # half as wide: white at both sides
    assert np.array_equal(tall, np.roll(expected, 4, axis=1))


def test_blank_broken_and_copied_icons_and_second_styles_are_left_out_and_told(package: Path, tmp_path: Path) -> None:
    found = icons.rendered(package, 32, tmp_path / "data")
    told = json.loads((tmp_path / "data" / "icons-icons-32.json").read_text())
    assert told["left out"] == {"zz-own": "licence GPL-3.0"}
    assert told["taken"]["set-0"] == {
        "author": "author 0",
        "licence": "MIT",
        "taken": 12,
        "blank": 1,
        "not rendered": 1,
    }
    assert told["taken"]["zopy"] == {"author": "a copyist", "licence": "ISC", "as author 0's": 1, "taken": 1}
    assert len(found) == 9 * 12 + 1
    assert sorted(found.captions[found.sets == "set-0"]) == sorted(name.replace("-", " ") for name in NAMES)
    with pytest.raises(InputError, match="npm pack"):
        icons.rendered(tmp_path / "other.tgz", 16, tmp_path / "data")


def made(authors: int, names: int) -> icons.Icons:
    """Author a draws the first names - a names."""
    rows = [(f"name {n}", f"set {a}", f"author {a}") for a in range(authors) for n in range(names - a)]
    columns = (np.array(column) for column in zip(*rows, strict=True))
    return icons.Icons(np.zeros((len(rows), 2, 2), np.uint8), *columns)


def test_a_draw_trains_and_tests_on_other_authors_and_on_shared_names_alone_where_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(icons, "FREQUENT", 3)
    found = made(12, 20)
    draws = [icons.draw_of(found, 40, 10, 30, seed, shared) for seed in (1, 1, 2) for shared in (None, 12)]
    assert draws[0] == draws[2] != draws[4]
    for draw, shared in zip(draws, [None, 12] * 3, strict=True):
        trained, tested = ({str(found.authors[n]) for n in part} for part in (draw.train + draw.probe, draw.gallery))
        assert not trained & tested
        assert not trained & {str(found.authors[n]) for n in draw.test}
        assert (len(draw.train), len(draw.probe), len(draw.gallery)) == (40, 10, 30)
        assert {str(found.captions[n]) for n in draw.test} == {"name 0", "name 1", "name 2"}
        names = {int(str(found.captions[n]).split()[1]) for n in draw.train}
        assert (max(names) <= 8) == (shared is not None)  # the ninth name is the last that all twelve have
    with pytest.raises(InputError, match="icons to train on"):
        icons.draw_of(found, 4000, 10, 30, 1)


def test_retrieval_counts_the_nearest_of_the_same_name_among_other_authors() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)) * 3 + 1
    names, authors = ([str(value) for value in rng.integers(0, most, 60)] for most in (20, 4))
    x = (features - features.mean(0)) / features.std(0, ddof=1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ranks = []
    for query in range(60):
        others = [n for n in range(60) if authors[n] != authors[query]]
        order = sorted(others, key=lambda n: -float(x[query] @ x[n]))
        hits = [place for place, n in enumerate(order, 1) if names[n] == names[query]]
        ranks += hits[:1]
    found = retrieval(torch.from_numpy(features).float(), names, authors)
    assert 20 < len(ranks) < 60
    assert found["queries"] == len(ranks)
    assert found["recall at 1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert found["mean reciprocal rank"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    alike = retrieval(torch.ones(4, 3), ["a", "a", "b", "b"], ["1", "2", "1", "2"])
    assert alike["recall at 1"] == 0  # who cannot tell them apart has not found it


@pytest.mark.slow
def test_a_recipe_with_icons_trains_on_names_and_looks_for_them_at_other_authors(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icons, "FREQUENT", 6)
    data = {"images": "icons", "train": 60, "test": 100, "probe": 40, "pixels": 32, "k": 4, "draw": "seed"}
    variants = {"masked": {"method": "siglip_mask"}}
    recipe: dict[str, Any] = {
        "data": {"icons": data},
        "base": {"width": 8, "pixels": 32, "batch_size": 20, "epochs": 1, "held_out": 0, "flip": False},
        "forms": {"reduced": {"seeds": 1}},
        "groups": [{"name": "icons", "data": "icons", "variants": variants}],
        "measures": ["recall at 1", "linear class"],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    experiments.run([path], icons=package, work=tmp_path / "work", results=tmp_path / "results")
    (line,) = [json.loads(text) for text in (tmp_path / "results" / "small.jsonl").read_text().splitlines()]
    wanted = {"recall at 1", "mean reciprocal rank", "linear class", "zero-shot class", "learned tau"}
    assert wanted <= line["metrics"].keys()
    assert line["metrics"]["queries"] > 20
    (tar,) = (tmp_path / "work" / "data").glob("*/store/shards/*.tar")
    with tarfile.open(tar) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    texts = [content.decode() for name, content in members.items() if name.endswith("txt")]
    assert len(texts) == 60
    assert set(texts) <= {name.replace("-", " ") for name in NAMES}
    shown = Image.open(io.BytesIO(next(content for name, content in members.items() if name.endswith("png"))))
    assert (shown.size, shown.mode) == ((32, 32), "RGB")
